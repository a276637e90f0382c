"""Rows of values computed by one hook, without an anchor: pointwise ops, reductions over a row, scattered stores."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["N"])
def rows(
    e0, e1, e2, e3, e4, e5, e6, e7, o0, o1, o2, o3, N,
    ROWS_PER_TOKEN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, BODY: tl.constexpr, EARLY: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """BODY for ROWS of the N * ROWS_PER_TOKEN rows (program_id 0) and BLOCK columns (program_id 1).

    BODY(r [ROWS, 1] int64, c [1, BLOCK], rows_ok [ROWS, 1], N, e0..e7, o0..o3) loads, computes and stores.
    EARLY: the kernel behind this one may start, up to where it waits, once this one has: worth it for small ones.
    """
    r = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    c = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK))[None, :]
    if PDL:
        tl.extra.cuda.gdc_wait()
    if EARLY and PDL:
        tl.extra.cuda.gdc_launch_dependents()
    BODY(r, c, r < N * ROWS_PER_TOKEN, N, e0, e1, e2, e3, e4, e5, e6, e7, o0, o1, o2, o3)
    if PDL and not EARLY:
        tl.extra.cuda.gdc_launch_dependents()
