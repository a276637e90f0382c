"""Matrix product with low-bit weights for a few tokens (up to 64): y = EPILOGUE(W x), with the RMSNorm of x on the way.

As in `gemm` the weights are the left operand and the tokens its columns, padded to 8 or more; here they come as words
of several weights each (`lowbit_layout`) and become bf16 in the registers that the product reads. With few tokens,
programs are small and their products are mma's: of one warp, or of SLICES warps along K (a batch dimension), so that
no warp waits for another while it streams. From 16 tokens on four warps share wgmma's (BLOCK_J >= 64, num_warps 4).

Scales of 16 or 32 weights go on the weights, which stays exact in bf16 (E2M1 times E4M3 has 6 bits); those of more go
on the sums of their group.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import triton
import triton.language as tl

from llmopt.codegen.lowbit_layout import COLUMNS, own, side
from llmopt.codegen.templates.lowbit_tile import (
    INTERPRETED,
    columns,
    constant_operand,
    in_order,
    load_byte_scales,
    load_group_scales,
    load_words,
    operand,
    placed,
)
from llmopt.codegen.templates.order import place
from llmopt.codegen.templates.paged import drain
from llmopt.compiler.emittable import LONGEST_ROW
from llmopt.compiler.quant.schemes import SCHEMES
from llmopt.compiler.target import Target


@triton.jit
def _part(
    w, scales, stripe, first, ELEMENT: tl.constexpr, SIDE: tl.constexpr, SCALE: tl.constexpr, GROUP: tl.constexpr,
    OWN: tl.constexpr, KP: tl.constexpr, BATCH: tl.constexpr, BLOCK_K: tl.constexpr, WIDE: tl.constexpr,
    END: tl.constexpr,
):  # fmt: skip
    """(operand of these stripes' columns from `first` on, scale of its sums as fp32 [BATCH, rows, 1] or [rows, 1])."""
    S: tl.constexpr = stripe.shape[0]
    a, b, c = load_words(w, stripe, first, ELEMENT, KP, BATCH * BLOCK_K, END)
    factor = 0.0  # none
    if SIDE == "weights":
        GROUPS: tl.constexpr = BATCH * BLOCK_K // (4 * OWN)
        put = load_byte_scales(scales, stripe, first, SCALE, KP, BATCH, BLOCK_K, OWN, END)
    elif SIDE == "sums":
        GROUPS: tl.constexpr = BATCH  # type: ignore[no-redef]
        word, factor = load_group_scales(scales, stripe, first, SCALE, GROUP, KP, BATCH, WIDE, END)
        ZEROS: tl.constexpr = SCALE == "bfloat16 zeros" or SCALE == "float16 zeros"
        put = (word & 65535) * 65537 if ZEROS else constant_operand(word, ELEMENT)
        factor = tl.reshape(factor, [BATCH, S * 16, 1] if BATCH > 1 else [S * 16, 1])
    else:
        GROUPS: tl.constexpr = 1  # type: ignore[no-redef]
        put = constant_operand(placed(a, 1), ELEMENT)
    return operand(a, b, c, put, ELEMENT, GROUPS, BATCH, BLOCK_K, WIDE), factor


@triton.jit
def _product(a, x, acc, factor, SIDE: tl.constexpr, SLICES: tl.constexpr, WIDE: tl.constexpr):
    # a [BATCH, R, K], x [BATCH, K, M] or both without BATCH; acc [R, M], or with more than one slice [SLICES, R, M]
    if INTERPRETED:  # which would multiply the integers that it keeps bf16 in
        a = a.to(tl.float32)
        x = x.to(tl.float32)
    if SIDE == "sums":
        part = tl.dot(a, x, input_precision="ieee") * factor
        if len(part.shape) == 3:  # a warp has every SLICES-th group of a step
            part = tl.reshape(part, [part.shape[0] // SLICES, SLICES, part.shape[1], part.shape[2]])
            part = tl.reshape(tl.sum(part, axis=0), acc.shape)
        acc += part
    else:
        acc = tl.dot(a, x, acc, input_precision="ieee")
    if WIDE and not INTERPRETED:  # the product reads the weights from registers while it runs
        drain()
    return acc


@triton.jit
def _squares(x):
    # eight neighbouring columns lie in one thread, so that no thread needs another
    return tl.sum(tl.reshape(x * x, [x.shape[0], x.shape[1] // 8, 8]), axis=2)


@triton.jit
def _finish(
    acc0, acc1, squares, first, factor0, factor1, y, e0, e1, e2, e3, e4, e5, N,
    K: tl.constexpr, J: tl.constexpr, PARTS: tl.constexpr, FACTORS: tl.constexpr, NORM: tl.constexpr,
    EPS: tl.constexpr, EPILOGUE: tl.constexpr, ORDER: tl.constexpr,
):  # fmt: skip
    m = tl.arange(0, acc0.shape[1])[None, :]
    n = first + tl.arange(0, acc0.shape[0])[:, None]
    if NORM:
        scale = tl.rsqrt(squares / K + EPS)[None, :]
        acc0 = acc0 * scale
        if PARTS == 2:
            acc1 = acc1 * scale
    if FACTORS:
        acc0 = acc0 * factor0
        if PARTS == 2:
            acc1 = acc1 * factor1
    if PARTS == 1:
        acc1 = acc0
    ok = (m < N) & (n < J)
    value = EPILOGUE(acc0, acc1, m, n, ok, e0, e1, e2, e3, e4, e5)
    tl.store(y + m * J + place(n, ORDER), value.to(y.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=["N"])
def lowbit(  # noqa: C901
    w, scales, factor, y, e0, e1, e2, e3, e4, e5, N, tickets, partial,
    ELEMENT: tl.constexpr, SIDE: tl.constexpr, SCALE: tl.constexpr, GROUP: tl.constexpr, FACTORS: tl.constexpr,
    K: tl.constexpr, J: tl.constexpr, OFFSET0: tl.constexpr, OFFSET1: tl.constexpr, PARTS: tl.constexpr,
    NORM: tl.constexpr, ORDERED: tl.constexpr, EPS: tl.constexpr, LOAD_X: tl.constexpr, LOAD_G: tl.constexpr,
    EPILOGUE: tl.constexpr, ORDER: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr,
    SLICES: tl.constexpr, UNROLL: tl.constexpr, SPLIT_K: tl.constexpr, WIDE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """y[m, j] = EPILOGUE of row OFFSET0 + j (and OFFSET1 + j) of W [F, K] with X[m], m < N <= max(BLOCK_M, 8).

    w, scales, factor: `lowbit_layout`'s (None where it makes none); ELEMENT, SIDE, GROUP: the scheme's; SCALE e4m3,
    e8m0, bfloat16, float16 or float32, with " zeros" where zero points stand beside; FACTORS 0 none, 1 one, 2 one a
    row. X is LOAD_X, with NORM times LOAD_G, rounded to bf16, and the sums divided by the root of the mean of LOAD_X's
    squares plus EPS.
    BLOCK_M 1: the one token is loaded once for all eight columns. A step is of SLICES * UNROLL times BLOCK_K columns,
    which SLICES warps share; UNROLL is 1 unless SIDE is "sums". Grid (cdiv(J, BLOCK_J), SPLIT_K). With SPLIT_K > 1:
    tickets i32 [cdiv(J, BLOCK_J)], zero before and after, partial fp32 [cdiv(J, BLOCK_J) * SPLIT_K * (PARTS * BLOCK_J +
    NORM) * max(BLOCK_M, 8)]. WIDE: wgmma, whose products of a step end before the next step's weights are made; then
    ORDERED says that LOAD_X's columns stand as `lowbit_layout.in_order` puts them. ORDER: y's columns are to stand so,
    for weights of which a lane has so many neighbours; 0: as they are.
    """
    OWN: tl.constexpr = GROUP if SIDE == "weights" else 8
    KP: tl.constexpr = (K + 255) // 256 * 256
    SPREAD: tl.constexpr = OWN == 32 and SLICES > 1 and BLOCK_M == 1
    BATCH: tl.constexpr = SLICES * UNROLL
    SPAN: tl.constexpr = BATCH * BLOCK_K
    STEPS: tl.constexpr = (KP + SPAN * SPLIT_K - 1) // (SPAN * SPLIT_K)
    END: tl.constexpr = None if KP % (SPAN * SPLIT_K) == 0 else KP
    MASKED: tl.constexpr = K != STEPS * SPAN * SPLIT_K
    COLUMNS: tl.constexpr = max(BLOCK_M, 8)
    S: tl.constexpr = BLOCK_J // 16
    first = tl.program_id(0) * BLOCK_J
    split = tl.program_id(1)
    stripe = tl.program_id(0) * S + tl.arange(0, S)
    if J % BLOCK_J != 0:
        stripe = tl.minimum(stripe, (J - 1) // 16)  # stripes past the end repeat the last one; they are not stored
    stripe = stripe.to(tl.int64)
    acc0 = tl.zeros([BLOCK_J, COLUMNS] if SLICES == 1 else [SLICES, BLOCK_J, COLUMNS], tl.float32)
    acc1 = acc0
    # tokens past the end repeat the last one; they are not stored
    m = tl.minimum(tl.arange(0, BLOCK_M)[:, None], N - 1) if BLOCK_M > 1 else tl.zeros([1, 1], tl.int32)
    factor0 = 1.0
    factor1 = 1.0
    if FACTORS == 1:
        factor0 = tl.load(factor)
        factor1 = factor0
    if FACTORS == 2:
        row = tl.minimum(first + tl.arange(0, BLOCK_J)[:, None], J - 1)
        factor0 = tl.load(factor + OFFSET0 + row)
        if PARTS == 2:
            factor1 = tl.load(factor + OFFSET1 + row)
    squares = tl.zeros([BLOCK_M, SPAN // 8], tl.float32)
    if PDL:
        tl.extra.cuda.gdc_wait()
    for step in range(STEPS):
        start = (split * STEPS + step) * SPAN
        k = start + columns(SPAN, SPREAD)
        whole = k < K if MASKED else tl.full([1, 1], True, tl.int1)
        a0, f0 = _part(w, scales, stripe + OFFSET0 // 16, start, ELEMENT, SIDE, SCALE, GROUP, OWN, KP, BATCH, BLOCK_K,
                       WIDE, END)  # fmt: skip
        if PARTS == 2:
            a1, f1 = _part(w, scales, stripe + OFFSET1 // 16, start, ELEMENT, SIDE, SCALE, GROUP, OWN, KP, BATCH,
                           BLOCK_K, WIDE, END)  # fmt: skip
        x = LOAD_X(m, k, whole, e0, e1, e2, e3, e4, e5)
        if NORM:
            squares += _squares(x)
            x = x * LOAD_G(k, whole, e0, e1, e2, e3, e4, e5)
        x = x.to(tl.bfloat16)
        # in order no thread touches it: it is copied to where wgmma reads it
        x = tl.trans(x) if ORDERED else in_order(x, OWN, BATCH, BLOCK_K, WIDE, SPREAD)
        if BLOCK_M < 8:
            x = tl.broadcast_to(x, [BLOCK_K, COLUMNS] if BATCH == 1 else [BATCH, BLOCK_K, COLUMNS])
        acc0 = _product(a0, x, acc0, f0, SIDE, SLICES, WIDE)
        if PARTS == 2:
            acc1 = _product(a1, x, acc1, f1, SIDE, SLICES, WIDE)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    square = tl.sum(squares, axis=1)
    if BLOCK_M < 8:
        square = tl.broadcast_to(square, [COLUMNS])
    if SLICES > 1:
        acc0 = tl.sum(acc0, axis=0)
        if PARTS == 2:
            acc1 = tl.sum(acc1, axis=0)
    if SPLIT_K == 1:
        _finish(acc0, acc1, square, first, factor0, factor1, y, e0, e1, e2, e3, e4, e5, N,
                K, J, PARTS, FACTORS, NORM, EPS, EPILOGUE, ORDER)  # fmt: skip
    else:
        SIZE: tl.constexpr = (PARTS * BLOCK_J + NORM) * COLUMNS
        column = tl.arange(0, COLUMNS)
        spot = tl.arange(0, BLOCK_J)[:, None] * COLUMNS + column[None, :]
        base = partial + tl.program_id(0).to(tl.int64) * (SPLIT_K * SIZE)
        mine = base + split * SIZE
        tl.store(mine + spot, acc0)
        if PARTS == 2:
            tl.store(mine + BLOCK_J * COLUMNS + spot, acc1)
        if NORM:
            tl.store(mine + PARTS * BLOCK_J * COLUMNS + column, square)
        # every thread's stores before the ticket, every thread's loads after it
        tl.debug_barrier()
        arrived = tl.atomic_add(tickets + tl.program_id(0), 1, sem="acq_rel", scope="gpu")
        tl.debug_barrier()
        if arrived == SPLIT_K - 1:
            acc0 = tl.zeros([BLOCK_J, COLUMNS], tl.float32)
            acc1 = acc0
            square = tl.zeros([COLUMNS], tl.float32)
            for other in range(SPLIT_K):
                theirs = base + other * SIZE
                acc0 += tl.load(theirs + spot, cache_modifier=".cg")
                if PARTS == 2:
                    acc1 += tl.load(theirs + BLOCK_J * COLUMNS + spot, cache_modifier=".cg")
                if NORM:
                    square += tl.load(theirs + PARTS * BLOCK_J * COLUMNS + column, cache_modifier=".cg")
            _finish(acc0, acc1, square, first, factor0, factor1, y, e0, e1, e2, e3, e4, e5, N,
                    K, J, PARTS, FACTORS, NORM, EPS, EPILOGUE, ORDER)  # fmt: skip
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
    return tiles, tiles * config["SPLIT_K"] * rows * max(8, config["BLOCK_M"])


def takes_order(shape: Mapping[str, int], scheme: str, target: Target) -> bool:
    """Does the product read x in the order of wgmma, if it has been written so? `shape`: K, N."""
    kind = SCHEMES[scheme]
    whole = shape["K"] % (4 * own(kind)) == 0 and (side(kind) != "sums" or kind.group >= _LEAST)
    return whole and "wgmma" in target.features and shape["N"] > 8


def ordered(shape: Mapping[str, int], scheme: str, target: Target) -> bool:
    """Is x, with its norm, worth a kernel of its own that writes it in that order? `shape`: K, NORM, N."""
    worth = shape["N"] > (8 if shape["NORM"] else 32) and shape["K"] <= LONGEST_ROW
    return worth and takes_order(shape, scheme, target)


def supports(shape: Mapping[str, int], scheme: str, target: Target) -> str | None:
    """None if this template takes the product, else the reason why not. `shape`: K, J, PARTS, NORM, ORDERED, N."""
    if "triton" not in target.features:
        return "the target has no Triton"
    if shape["N"] > 64:
        return f"{shape['N']} tokens, wanted 64 at most"
    if shape["PARTS"] == 2 and shape["J"] % 16:
        return f"halves of {shape['J']} rows, wanted a multiple of 16"
    return None


def configs(shape: Mapping[str, int], scheme: str, target: Target) -> list[dict[str, Any]]:
    """Constants worth trying, the default first; `scheme` by name."""
    tiles = [] if shape["ORDERED"] else list(_narrow(shape, target.cores))
    if shape["N"] > 8 and "wgmma" in target.features:
        tiles = [*_wide(shape, target.cores), *tiles]
    found = [_config(shape, scheme, *tile) for tile in tiles]
    fitting = [c for c in found if c is not None and _room(c, shape, scheme) <= target.shared_bytes - 4096]
    return list({repr(c): c for c in fitting}.values())


_LEAST = 64  # columns of a wgmma's step
_Tile = tuple[int, int, int, int, int, int]  # rows in all, columns a slice, slices, splits, stages, warps of a wgmma


def _narrow(shape: Mapping[str, int], cores: int) -> Iterator[_Tile]:
    """For mma: small programs, of one warp where there are rows enough, else of warps along K."""
    few = shape["J"] * shape["PARTS"] < 96 * cores
    alone = [(32, 256, 1, 1, 3, 0), (32, 256, 1, 1, 4, 0), (32, 128, 1, 1, 4, 0), (64, 256, 1, 1, 3, 0),
             (32, 256, 2, 1, 3, 0), (32, 128, 2, 1, 3, 0)]  # fmt: skip
    along = [(16, 256, 4, 1, 3, 0), (16, 128, 4, 1, 3, 0), (16, 128, 4, 1, 4, 0), (32, 128, 4, 1, 3, 0),
             (16, 256, 2, 1, 3, 0), (32, 256, 4, 1, 2, 0), (16, 512, 4, 1, 2, 0)]  # fmt: skip
    split = [(32, 256, 1, 2, 3, 0), (32, 256, 1, 4, 3, 0)]
    yield from [*along, *split, *alone[:3]] if few else [*alone, *along[3:6]]
    yield from [(32, 256, 1, 1, 2, 0), (32, 128, 1, 1, 2, 0)]  # where memory is short


def _wide(shape: Mapping[str, int], cores: int) -> Iterator[_Tile]:
    """For wgmma: groups of four warps, which share the tile of x. About two programs a core are best."""
    few = shape["J"] * shape["PARTS"] < 96 * cores
    for rows, most in ((64, 3), (128, 1)) if few and shape["PARTS"] == 1 else ((128, 2), (64, 1)):
        tiles = -(-shape["J"] * shape["PARTS"] // rows)
        splits = sorted((2, 4, 7, 8, 14, 16), key=lambda s: abs(tiles * s - 2 * cores))
        alone = 2 * tiles > cores  # else there would be too few programs, unless nothing divides K
        for split in [1, *splits[: most - 1]] if alone else [*splits[:most], 1]:
            yield from [(rows, 128, 1, split, 4, 4), (rows, 256, 1, split, 3, 4)]
            if shape["N"] > 32:
                yield from [(rows, 256, 1, split, 2, 4), (rows, 128, 1, split, 3, 4)]
            if rows == 128:
                yield (rows, 128, 1, split, 4, 8)


def _config(
    shape: Mapping[str, int], scheme: str, rows: int, columns: int, slices: int, split: int, stages: int, warps: int
) -> dict[str, Any] | None:
    """None where the tile does not fit the scheme or the product."""
    kind = SCHEMES[scheme]
    in_all = -(-shape["K"] // COLUMNS) * COLUMNS
    unroll = 1
    if side(kind) == "sums":
        columns, unroll = kind.group, 1 if warps else max(1, columns // kind.group)
    step = columns * slices * unroll
    least = 4 * own(kind)  # columns of a lane's own, in four lanes
    uneven = side(kind) == "weights" and columns != least and columns % (2 * least)  # of a word of scales
    rows //= shape["PARTS"]
    if rows < 16 or columns % least or uneven or (warps and (columns < _LEAST or rows < 64)):
        return None
    if split > 1 and (in_all % (step * split) or in_all < 2 * step * split):
        return None
    if step > in_all or -(-in_all // step) * step > in_all * 1.25:
        return None
    block_m = 1 if shape["N"] == 1 else max(8, triton.next_power_of_2(shape["N"]))
    return {
        "BLOCK_J": rows, "BLOCK_K": columns, "BLOCK_M": block_m, "SLICES": slices, "UNROLL": unroll, "SPLIT_K": split,
        "WIDE": int(warps > 0), "num_warps": warps or slices, "num_stages": stages,
    }  # fmt: skip


def _room(config: Mapping[str, Any], shape: Mapping[str, int], scheme: str) -> int:
    """Bytes of shared memory, about."""
    step = config["BLOCK_K"] * config["SLICES"] * config["UNROLL"]
    rows = shape["PARTS"] * config["BLOCK_J"] * SCHEMES[scheme].bits_per_weight / 8
    return int(step * (rows + 2 * config["BLOCK_M"]) * (config["num_stages"] - 1) + 2 * step * config["BLOCK_M"])
