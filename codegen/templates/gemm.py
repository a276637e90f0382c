"""Matrix product for a few tokens (up to 64): y = EPILOGUE(W x), with the RMSNorm of x taken on the way.

The weights are the left operand of `tl.dot` and the tokens its columns, padded to BLOCK_M of 8 to 64: so W, all of the
traffic, is read once and in its own order, and eight tokens cost one narrow instruction and not a padded tile of 64.
Rows too few to fill the machine are shared: SLICES groups of warps of one program take turns along K (a batch
dimension of the dot, summed at the end), SPLIT_K programs each take a stretch of K and the last one to arrive adds up
all of them in order, which keeps the result the same from run to run.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import triton
import triton.language as tl

from llmopt.codegen.templates.ahead import ask_rows
from llmopt.compiler.target import Target

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def _load(w, first, row, k, K: tl.constexpr, MASKED: tl.constexpr):
    # the block's first row in 64 bits, as 256k rows of 16k exceed 2^31; rows last, as their distances are constants
    spot = (w + first.to(tl.int64) * K + k) + row * K
    if MASKED:
        return tl.load(spot, mask=k < K, other=0.0)
    else:
        return tl.load(spot)


@triton.jit
def _product(a, x, acc, SLICES: tl.constexpr):
    if INTERPRETED:  # which would multiply the integers that it keeps bf16 in
        a = a.to(tl.float32)
        x = x.to(tl.float32)
    if SLICES == 1:
        return tl.dot(a, tl.trans(x), acc, input_precision="ieee")
    else:
        return tl.dot(a, tl.permute(x, 0, 2, 1), acc, input_precision="ieee")


@triton.jit
def _squares(x, V: tl.constexpr):
    # V neighbouring columns lie in one thread, so that no thread needs another
    if len(x.shape) == 2:
        return tl.sum(tl.reshape(x * x, [x.shape[0], x.shape[1] // V, V]), axis=2)
    else:  # what follows a return is traced all the same
        return tl.sum(tl.reshape(x * x, [x.shape[0], x.shape[1], x.shape[2] // V, V]), axis=3)


@triton.jit
def _scales(
    m, column, squares, N, e0, e1, e2, e3, e4, e5,
    K: tl.constexpr, EPS: tl.constexpr, LOAD_X: tl.constexpr, SPAN: tl.constexpr, V: tl.constexpr,
):  # fmt: skip
    # the norm's scale of each row m, shaped as m, over all of K: SPAN columns a step from `column` on; squares all 0
    for step in range((K + SPAN - 1) // SPAN):
        k = column + step * SPAN
        squares += _squares(LOAD_X(m, k, (m < N) & (k < K), e0, e1, e2, e3, e4, e5), V)
    square = tl.sum(squares, axis=len(squares.shape) - 1)
    if len(square.shape) == 2:
        square = tl.sum(square, axis=0)
    return tl.reshape(tl.rsqrt(square / K + EPS), m.shape)


@triton.jit
def _finish(
    acc0, acc1, squares, first, y, e0, e1, e2, e3, e4, e5, N,
    K: tl.constexpr, J: tl.constexpr, PARTS: tl.constexpr, AFTER: tl.constexpr, EPS: tl.constexpr,
    EPILOGUE: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    m = tl.arange(0, BLOCK_M)[None, :]
    n = first + tl.arange(0, BLOCK_J)[:, None]
    if AFTER:
        scale = tl.rsqrt(squares / K + EPS)[None, :]
        acc0 = acc0 * scale
        if PARTS == 2:
            acc1 = acc1 * scale
    if PARTS == 1:
        acc1 = acc0
    ok = (m < N) & (n < J)
    value = EPILOGUE(acc0, acc1, m, n, ok, e0, e1, e2, e3, e4, e5)
    tl.store(y + m * J + n, value.to(y.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=["N"])
def gemm(  # noqa: C901
    w, y, e0, e1, e2, e3, e4, e5, N, tickets, partial,
    K: tl.constexpr, J: tl.constexpr, OFFSET0: tl.constexpr, OFFSET1: tl.constexpr, PARTS: tl.constexpr,
    NORM: tl.constexpr, EPS: tl.constexpr, LOAD_X: tl.constexpr, LOAD_G: tl.constexpr, EPILOGUE: tl.constexpr,
    BLOCK_J: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr, SLICES: tl.constexpr, SPLIT_K: tl.constexpr,
    EARLY: tl.constexpr, ASK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """y[m, j] = EPILOGUE of row OFFSET0 + j (and OFFSET1 + j) of w [F, K] with X[m], m < N <= BLOCK_M.

    X is LOAD_X, with NORM times LOAD_G, rounded to w's dtype, and the sums divided by the root of the mean of LOAD_X's
    squares plus EPS; in fp16, whose range LOAD_X * LOAD_G may leave, X is divided before it is rounded, for which each
    program reads x twice. Grid (cdiv(J, BLOCK_J), SPLIT_K). With SPLIT_K > 1: tickets i32 [cdiv(J, BLOCK_J)], zero
    before and after, partial fp32 [cdiv(J, BLOCK_J) * SPLIT_K * (PARTS * BLOCK_J + NORM) * BLOCK_M]; else both None.
    EARLY: the next kernel may start as soon as this one has, else after its last load. ASK: the weights come into L2
    while the kernel ahead still runs.
    """
    V: tl.constexpr = 128 // w.dtype.element_ty.primitive_bitwidth
    STEPS: tl.constexpr = (K + BLOCK_K * SLICES * SPLIT_K - 1) // (BLOCK_K * SLICES * SPLIT_K)
    MASKED: tl.constexpr = K % (BLOCK_K * SLICES * SPLIT_K) != 0
    SCALED: tl.constexpr = NORM == 1 and w.dtype.element_ty == tl.float16  # the operand, else the sums
    AFTER: tl.constexpr = NORM == 1 and not SCALED
    first = tl.program_id(0) * BLOCK_J
    split = tl.program_id(1)
    if SLICES == 1:
        row = tl.arange(0, BLOCK_J)[:, None]
        m = tl.arange(0, BLOCK_M)[:, None]
        column = tl.arange(0, BLOCK_K)[None, :]
        acc0 = tl.zeros([BLOCK_J, BLOCK_M], tl.float32)
        squares = tl.zeros([BLOCK_M, BLOCK_K // V], tl.float32)
    else:
        row = tl.arange(0, BLOCK_J)[None, :, None]
        m = tl.arange(0, BLOCK_M)[None, :, None]
        column = tl.arange(0, SLICES)[:, None, None] * BLOCK_K + tl.arange(0, BLOCK_K)[None, None, :]
        acc0 = tl.zeros([SLICES, BLOCK_J, BLOCK_M], tl.float32)
        squares = tl.zeros([SLICES, BLOCK_M, BLOCK_K // V], tl.float32)
    acc1 = acc0
    if J % BLOCK_J != 0:
        row = tl.minimum(row, J - 1 - first)  # rows past the end repeat the last one; they are not stored
    start = column
    column += split * (STEPS * BLOCK_K * SLICES)
    if PDL:
        if ASK and not MASKED:
            COLUMNS: tl.constexpr = STEPS * BLOCK_K * SLICES
            ask_rows(w, first + OFFSET0, split * COLUMNS, BLOCK_J, COLUMNS, K, OFFSET0 + J - 1)
            if PARTS == 2:
                ask_rows(w, first + OFFSET1, split * COLUMNS, BLOCK_J, COLUMNS, K, OFFSET1 + J - 1)
        if EARLY:
            tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    if SCALED:
        scales = _scales(m, start, squares, N, e0, e1, e2, e3, e4, e5, K, EPS, LOAD_X, BLOCK_K * SLICES, V)
    for step in range(STEPS):
        k = column + step * (BLOCK_K * SLICES)
        whole = k < K if MASKED else tl.full([1] * len(k.shape), True, tl.int1)
        a0 = _load(w, first + OFFSET0, row, k, K, MASKED)
        if PARTS == 2:
            a1 = _load(w, first + OFFSET1, row, k, K, MASKED)
        x = LOAD_X(m, k, (m < N) & whole, e0, e1, e2, e3, e4, e5)
        if AFTER:
            squares += _squares(x, V)
        if SCALED:
            x = x * scales
        if NORM:
            x = x * LOAD_G(k, whole, e0, e1, e2, e3, e4, e5)
        x = x.to(w.dtype.element_ty)
        acc0 = _product(a0, x, acc0, SLICES)
        if PARTS == 2:
            acc1 = _product(a1, x, acc1, SLICES)
    if PDL and not EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    square = tl.sum(squares, axis=len(squares.shape) - 1)
    if SLICES > 1:
        acc0 = tl.sum(acc0, axis=0)
        square = tl.sum(square, axis=0)
        if PARTS == 2:
            acc1 = tl.sum(acc1, axis=0)
    if SPLIT_K == 1:
        _finish(acc0, acc1, square, first, y, e0, e1, e2, e3, e4, e5, N,
                K, J, PARTS, AFTER, EPS, EPILOGUE, BLOCK_J, BLOCK_M)  # fmt: skip
    else:
        SIZE: tl.constexpr = (PARTS * BLOCK_J + NORM) * BLOCK_M
        column_m = tl.arange(0, BLOCK_M)
        spot = tl.arange(0, BLOCK_J)[:, None] * BLOCK_M + column_m[None, :]
        base = partial + tl.program_id(0).to(tl.int64) * (SPLIT_K * SIZE)
        mine = base + split * SIZE
        tl.store(mine + spot, acc0)
        if PARTS == 2:
            tl.store(mine + BLOCK_J * BLOCK_M + spot, acc1)
        if AFTER:
            tl.store(mine + PARTS * BLOCK_J * BLOCK_M + column_m, square)
        # every thread's stores before the ticket, every thread's loads after it
        tl.debug_barrier()
        arrived = tl.atomic_add(tickets + tl.program_id(0), 1, sem="acq_rel", scope="gpu")
        tl.debug_barrier()
        if arrived == SPLIT_K - 1:
            acc0 = tl.zeros([BLOCK_J, BLOCK_M], tl.float32)
            acc1 = acc0
            square = tl.zeros([BLOCK_M], tl.float32)
            for other in range(SPLIT_K):
                theirs = base + other * SIZE
                acc0 += tl.load(theirs + spot, cache_modifier=".cg")
                if PARTS == 2:
                    acc1 += tl.load(theirs + BLOCK_J * BLOCK_M + spot, cache_modifier=".cg")
                if AFTER:
                    square += tl.load(theirs + PARTS * BLOCK_J * BLOCK_M + column_m, cache_modifier=".cg")
            _finish(acc0, acc1, square, first, y, e0, e1, e2, e3, e4, e5, N,
                    K, J, PARTS, AFTER, EPS, EPILOGUE, BLOCK_J, BLOCK_M)  # fmt: skip
            tl.store(tickets + tl.program_id(0), 0)


def grid(shape: Mapping[str, int], config: Mapping[str, Any]) -> tuple[int | str, ...]:
    """Programs of a launch."""
    return (-(-shape["J"] // config["BLOCK_J"]), config["SPLIT_K"])


def scratch(shape: Mapping[str, int], config: Mapping[str, Any]) -> tuple[int, int]:
    """Lengths of `tickets` (i32, zeroed once and kept) and `partial` (fp32, temporary); 0, 0 if neither is used."""
    if config["SPLIT_K"] == 1:
        return 0, 0
    tiles = -(-shape["J"] // config["BLOCK_J"])
    rows = shape["PARTS"] * config["BLOCK_J"] + shape["NORM"]
    return tiles, tiles * config["SPLIT_K"] * rows * config["BLOCK_M"]


def supports(shape: Mapping[str, int], dtype: str, target: Target) -> str | None:
    """None if this template takes the product, else the reason why not. `shape`: K, J, PARTS, NORM, N (tokens)."""
    if dtype not in ("bfloat16", "float16", "float32"):
        return f"dtype {dtype}: sums are fp32"
    if "triton" not in target.features:
        return "the target has no Triton"
    if shape["N"] > 64:
        return f"{shape['N']} tokens, wanted 64 at most"
    return None


def configs(shape: Mapping[str, int], dtype: str, target: Target) -> list[dict[str, Any]]:
    """Constants worth trying, the default first; all fit the target's shared memory."""
    size = 4 if dtype == "float32" else 2
    parts, cores = shape["PARTS"], target.cores
    # rows of a program (of both halves), columns a step, slices, stages, warps
    tiles = [(64, 128, 1, 4, 4), (64, 64, 1, 6, 4), (128, 64, 1, 4, 4), (128, 128, 1, 3, 8), (32, 128, 1, 5, 2)]
    if shape["N"] <= 16:
        tiles += [(32, 64, 4, 3, 4), (16, 64, 4, 4, 4), (32, 64, 2, 4, 2)]
    else:
        tiles[:2] = tiles[1::-1]  # a wide x needs the registers
    if dtype == "float32":  # multiplied without tensor cores, so from registers
        tiles = [(32, 16, 1, 4, 4), (32, 32, 1, 4, 4), (64, 16, 1, 4, 4)]
    found = []
    for rows, columns, slices, stages, warps in tiles:
        tile = {"BLOCK_J": max(16, rows // parts), "BLOCK_K": columns, "SLICES": slices, "num_warps": warps}
        tile["BLOCK_M"] = max(8, triton.next_power_of_2(shape["N"]))
        programs = -(-shape["J"] // tile["BLOCK_J"])
        for split in _splits(programs, shape["K"] // (columns * slices), cores):
            found.append({**tile, "SPLIT_K": split, "EARLY": 0, "ASK": 0, "num_stages": stages})
    fitting = [c for c in (_fit(c, parts, size, target.shared_bytes) for c in found) if c["num_stages"]]
    return list({repr(c): c for c in fitting}.values())


def _splits(programs: int, steps: int, cores: int) -> list[int]:
    """Ways along K: the fewest that give every multiprocessor a program first; only such as leave 4 steps each."""
    ways = [s for s in (1, 2, 4, 7, 8) if steps >= 4 * s and (s == 1 or (steps % s == 0 and programs * s <= 4 * cores))]
    enough = [s for s in ways if programs * s >= cores]
    first = enough[0] if enough else ways[-1] if ways else 1
    return [first, *(s for s in ways if s != first)]


def _fit(config: dict[str, Any], parts: int, size: int, room: int) -> dict[str, Any]:
    stage = (parts * config["BLOCK_J"] + config["BLOCK_M"]) * config["BLOCK_K"] * config["SLICES"] * size
    return {**config, "num_stages": min(config["num_stages"], (room - 4096) // stage)}
