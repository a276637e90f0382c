"""Weights asked into the L2 cache while the kernel ahead still runs; for GPUs with dependent launch (from sm_90 on)."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def ask_rows(w, first, column, ROWS: tl.constexpr, COLUMNS: tl.constexpr, K: tl.constexpr, LAST):
    """Start fetching columns `column` .. `column` + COLUMNS - 1 of rows `first` .. of w [., K], ROWS of them, none
    beyond row LAST, into L2; nothing waits for it. ROWS a power of two.

    Each thread asks for one piece by a bulk prefetch (PTX ISA, cp.async.bulk.prefetch.L2), which comes in multiples of
    16 bytes; rows that cannot be cut so among the threads are left to their loads.
    """
    THREADS: tl.constexpr = tl.extra.cuda.num_threads()
    PIECES: tl.constexpr = max(1, THREADS // ROWS)
    BYTES: tl.constexpr = COLUMNS * w.dtype.element_ty.primitive_bitwidth // 8
    if ROWS <= THREADS and BYTES % (16 * PIECES) == 0 and (K * w.dtype.element_ty.primitive_bitwidth) % 128 == 0:
        piece = tl.arange(0, THREADS)
        row = tl.minimum(first + piece // PIECES, LAST)
        at = w + row.to(tl.int64) * K + column + (piece % PIECES) * (COLUMNS // PIECES)
        tl.inline_asm_elementwise(
            "cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0;",
            "=r,l,r",
            [at.to(tl.int64), tl.full([THREADS], BYTES // PIECES, tl.int32)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
