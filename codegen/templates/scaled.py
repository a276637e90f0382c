"""Products of low-bit codes by low-bit codes: y = EPILOGUE(Q(x) Q(W)^T) by a GPU's own scaled matrix instructions.

Both operands are packed codes with a scale for every GROUP of them, as `scaled_layout` lays the weight out and the
template `rounded` writes x; the tensor core multiplies codes and scales alike (tcgen05.mma or mma.sync, both with
`block_scale`) and sums in fp32. What is left are global scales, one of the weight and one a token, which are factors of
the sums. Weights are the left operand, 128 rows a program, the tokens are its columns: a few, padded to 16, in
decoding, else tiles of 128. Nothing is masked along K: codes of either side are padded with zeros.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import triton
import triton.language as tl

from llmopt.codegen.scaled_layout import PAIRS, ROWS, padded
from llmopt.codegen.templates.small_floats import decoded, exponent_value
from llmopt.compiler.quant.schemes import SCHEMES
from llmopt.compiler.target import Target

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
# Columns of a product: below 16 Triton 3.6 and 3.7 decode the codes for sm_100, or fail. 32 fill the lanes of tensor
# memory that hold x's scales, the plainest form there is; few tokens wait for weights anyway.
FEWEST, FEWEST_IN_TENSOR_MEMORY = 16, 32


@triton.jit
def _tiled_scales(
    scales, tile, column, TILES: tl.constexpr, APART: tl.constexpr, GROUP: tl.constexpr, KP: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Scales [128 TILES, BLOCK_K / GROUP] of a tile of 128 rows and the one APART tiles on. They lie as tensor memory
    wants them, and are copied there as they are: Triton knows this form by the load of one row in two dimensions."""
    COUNT: tl.constexpr = BLOCK_K // GROUP // 4
    spot = (tile.to(tl.int64) * (KP // GROUP // 4) + column // (4 * GROUP)) * 512
    byte = tl.arange(0, TILES * COUNT * 512)[None, :]
    if TILES > 1:
        byte = byte // (COUNT * 512) * (APART * (KP // GROUP // 4) * 512) + byte % (COUNT * 512)
    held = tl.reshape(tl.load(scales + spot + byte), [TILES, COUNT, 32, 4, 4])
    return tl.reshape(tl.permute(held, 0, 3, 2, 1, 4), [TILES * 128, BLOCK_K // GROUP])


@triton.jit
def _product(a, a_scales, x, x_scales, acc, ELEMENT: tl.constexpr, GROUP: tl.constexpr):
    if INTERPRETED:  # which has no scaled product
        a = _values(a, a_scales, ELEMENT, GROUP)
        x = _values(x, x_scales, ELEMENT, GROUP)
        return tl.dot(a, tl.trans(x), acc, input_precision="ieee")
    else:
        return tl.dot_scaled(a, a_scales, ELEMENT, tl.trans(x), x_scales, ELEMENT, acc)


@triton.jit
def _values(codes, scales, ELEMENT: tl.constexpr, GROUP: tl.constexpr):
    """What codes and scales stand for: fp32 [rows, columns]."""
    ROWS: tl.constexpr = codes.shape[0]
    COUNT: tl.constexpr = scales.shape[1]
    codes = codes.to(tl.int32)
    if ELEMENT == "e2m1":
        codes = tl.reshape(tl.join(codes & 15, codes >> 4), [ROWS, COUNT * GROUP])
    scale = decoded(scales, "e4m3") if GROUP == 16 else exponent_value(scales.to(tl.int32))
    values = tl.reshape(decoded(codes, ELEMENT), [ROWS, COUNT, GROUP]) * scale[:, :, None]
    return tl.reshape(values, [ROWS, COUNT * GROUP])


@triton.jit
def _finish(
    acc, first, start, factor, x_factor, y, e0, e1, e2, e3, e4, e5, N, J: tl.constexpr, PARTS: tl.constexpr,
    FACTORS: tl.constexpr, EPILOGUE: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    m = start.to(tl.int64) + tl.arange(0, BLOCK_M)[None, :]
    n = first + tl.arange(0, BLOCK_J)[:, None]
    if FACTORS:
        acc = acc * (tl.load(factor) * tl.load(x_factor + m, mask=m < N, other=0.0))
    if PARTS == 2:
        acc0, acc1 = tl.split(tl.permute(tl.reshape(acc, [2, BLOCK_J, BLOCK_M]), 1, 2, 0))
    else:
        acc0 = acc
        acc1 = acc
    ok = (m < N) & (n < J)
    value = EPILOGUE(acc0, acc1, m, n, ok, e0, e1, e2, e3, e4, e5)
    tl.store(y + m * J + n, value.to(y.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=["N"])
def scaled(
    w, scales, factor, x, x_scales, x_factor, y, e0, e1, e2, e3, e4, e5, N, tickets, partial,
    ELEMENT: tl.constexpr, GROUP: tl.constexpr, FACTORS: tl.constexpr, KP: tl.constexpr, J: tl.constexpr,
    OFFSET0: tl.constexpr, OFFSET1: tl.constexpr, PARTS: tl.constexpr, EPILOGUE: tl.constexpr, BLOCK_J: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr, SPLIT_K: tl.constexpr, TILED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """y[m, j] = EPILOGUE of row OFFSET0 + j (and OFFSET1 + j, both multiples of 128) of W with token m, m < N.

    w uint8 (or fp8) [rows, bytes of KP codes], scales [tiles of 128 rows, KP / GROUP / 4, 512] and factor fp32 [1]:
    `scaled_layout`'s, factor None unless FACTORS. x [N, bytes of KP codes], x_scales and x_factor fp32 [N]: the
    template `rounded`'s, x_scales [N, KP / GROUP], or with TILED (BLOCK_M is 128 then) as those of the weight. Scales
    are E4M3 if GROUP is 16, else E8M0. Grid (cdiv(J, 128), SPLIT_K, cdiv(N, BLOCK_M)). With SPLIT_K > 1, which takes
    one tile of tokens: tickets i32 [cdiv(J, 128)], zero before and after, partial fp32 [cdiv(J, 128) * SPLIT_K * PARTS
    * 128 * BLOCK_M]; else both None. Two parts are one product of 256 rows: Triton 3.6 cannot compile two products that
    share x's scales.
    """
    BYTES: tl.constexpr = BLOCK_K // 2 if ELEMENT == "e2m1" else BLOCK_K
    WIDTH: tl.constexpr = KP // BLOCK_K * BYTES
    STEPS: tl.constexpr = KP // (BLOCK_K * SPLIT_K)
    ROWS: tl.constexpr = PARTS * BLOCK_J
    APART: tl.constexpr = (OFFSET1 - OFFSET0) // BLOCK_J
    first = tl.program_id(0) * BLOCK_J
    split = tl.program_id(1)
    start = tl.program_id(2) * BLOCK_M
    row = tl.arange(0, ROWS)[:, None]
    tile = tl.program_id(0) + OFFSET0 // BLOCK_J
    own = w + (first + OFFSET0).to(tl.int64) * WIDTH
    if PARTS == 2:
        own = own + (row // BLOCK_J).to(tl.int64) * ((APART - 1) * BLOCK_J * WIDTH)
    byte = tl.arange(0, BYTES)[None, :]
    # tokens past the end repeat the last one; they are not stored
    m = tl.minimum(tl.arange(0, BLOCK_M)[:, None], N - 1 - start)
    x += start.to(tl.int64) * WIDTH
    if not TILED:
        x_scales += start.to(tl.int64) * (KP // GROUP)
    acc = tl.zeros([ROWS, BLOCK_M], tl.float32)
    if PDL:
        tl.extra.cuda.gdc_wait()
    for step in range(STEPS):
        at = split * STEPS + step
        k = at * BLOCK_K
        a = tl.load(own + row * WIDTH + (at * BYTES + byte))
        ours = _tiled_scales(scales, tile, k, PARTS, APART, GROUP, KP, BLOCK_K)
        tokens = tl.load(x + m * WIDTH + (at * BYTES + byte))
        if TILED:
            theirs = _tiled_scales(x_scales, tl.program_id(2), k, 1, 0, GROUP, KP, BLOCK_K)
        else:
            theirs = tl.load(x_scales + m * (KP // GROUP) + (k // GROUP + tl.arange(0, BLOCK_K // GROUP)[None, :]))
        acc = _product(a, ours, tokens, theirs, acc, ELEMENT, GROUP)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    if SPLIT_K == 1:
        _finish(acc, first, start, factor, x_factor, y, e0, e1, e2, e3, e4, e5, N,
                J, PARTS, FACTORS, EPILOGUE, BLOCK_J, BLOCK_M)  # fmt: skip
    else:
        SIZE: tl.constexpr = ROWS * BLOCK_M
        spot = row * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
        base = partial + tl.program_id(0).to(tl.int64) * (SPLIT_K * SIZE)
        tl.store(base + split * SIZE + spot, acc)
        # every thread's stores before the ticket, every thread's loads after it
        tl.debug_barrier()
        arrived = tl.atomic_add(tickets + tl.program_id(0), 1, sem="acq_rel", scope="gpu")
        tl.debug_barrier()
        if arrived == SPLIT_K - 1:
            acc = tl.zeros([ROWS, BLOCK_M], tl.float32)
            for other in range(SPLIT_K):
                acc += tl.load(base + other * SIZE + spot, cache_modifier=".cg")
            _finish(acc, first, start, factor, x_factor, y, e0, e1, e2, e3, e4, e5, N,
                    J, PARTS, FACTORS, EPILOGUE, BLOCK_J, BLOCK_M)  # fmt: skip
            tl.store(tickets + tl.program_id(0), 0)


def tiled(tokens: int, target: Target) -> bool:
    """Do scales of so many tokens lie as tensor memory wants them?"""
    return tokens > 64 and "tcgen05" in target.features


def grid(shape: Mapping[str, int], config: Mapping[str, Any]) -> tuple[int | str, ...]:
    """Programs of a launch, as sizes of `codegen.kernel`."""
    return (-(-shape["J"] // ROWS), config["SPLIT_K"], f"cdiv(N, {config['BLOCK_M']})")


def scratch(shape: Mapping[str, int], config: Mapping[str, Any]) -> tuple[int, int]:
    """Lengths of `tickets` (i32, zeroed once and kept) and `partial` (fp32, temporary); 0, 0 if neither is used."""
    if config["SPLIT_K"] == 1:
        return 0, 0
    tiles = -(-shape["J"] // ROWS)
    return tiles, tiles * config["SPLIT_K"] * shape["PARTS"] * ROWS * config["BLOCK_M"]


def supports(shape: Mapping[str, int], scheme: str, target: Target) -> str | None:
    """None if this template takes the product, else the reason why not. `shape`: K, J, PARTS, N; `scheme` of both."""
    if "triton" not in target.features:
        return "the target has no Triton"
    if "scaled_mma" not in target.features:
        return f"{target.name} has no scaled matrix instruction"
    if (scheme, scheme) not in PAIRS:
        return f"scheme {scheme}, wanted one that the instruction takes on both sides"
    if shape["PARTS"] == 2 and shape["J"] % ROWS:
        return f"halves of {shape['J']} rows, wanted a multiple of {ROWS}"
    return None


def configs(shape: Mapping[str, int], scheme: str, target: Target) -> list[dict[str, Any]]:
    """Constants worth trying, the default first; all fit the target's shared memory."""
    kind, whole = SCHEMES[scheme], padded(SCHEMES[scheme], shape["K"])
    many, tensor_memory = shape["N"] > 64, "tcgen05" in target.features
    width = max(FEWEST_IN_TENSOR_MEMORY if tensor_memory else FEWEST, triton.next_power_of_2(shape["N"]))
    if many:
        width = ROWS if tensor_memory else 64
    # sums are all in registers at the end: 128 of a thread, and where they are there throughout, 64
    few = shape["PARTS"] * width <= (128 if tensor_memory else 64)
    found: list[dict[str, Any]] = []
    for columns in (1024 // kind.element.bits, 2048 // kind.element.bits):
        stage = (shape["PARTS"] * ROWS + width) * columns * (kind.element.bits + 8 / kind.group) / 8
        stages = min(4, int((target.shared_bytes - 8192) // stage))
        if whole % columns or (stages < 2 and found):
            continue
        for split in [1] if many else _splits(shape, whole // columns, target.cores):
            tile = {"BLOCK_J": ROWS, "BLOCK_K": columns, "BLOCK_M": width, "SPLIT_K": split}
            # what ptxas spills for sm_100: in four warps sums beside others' partial ones, in eight those of two parts
            warps = 4 if few and not (tensor_memory and split > 1 and shape["PARTS"] == 1) else 8
            found.append({**tile, "num_warps": warps, "num_stages": stages})
    return found


def _splits(shape: Mapping[str, int], steps: int, cores: int) -> list[int]:
    """Ways along K: the fewest that give every multiprocessor a program first; only such as leave 4 steps each."""
    programs = -(-shape["J"] // ROWS)
    ways = [s for s in (1, 2, 4, 7, 8) if s == 1 or (steps % s == 0 and steps >= 4 * s and programs * s <= 4 * cores)]
    enough = [s for s in ways if programs * s >= cores]
    first = enough[0] if enough else ways[-1]
    return [first, *(s for s in ways if s != first)]
