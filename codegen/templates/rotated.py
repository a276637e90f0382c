"""Vectors times a Hadamard matrix (`ops.rotate`), with what makes them from the products before: SwiGLU and the like.

A block of A * B elements is a matrix X [A, B], and the result is L^T X R: two products with matrices of signs on the
tensor cores, which cost less than the bytes that are moved (HadaCore, arXiv 2412.08832, makes its butterflies so).
Signs are exact in any dtype. Sums of the first product are split into two bf16 numbers for the second one, so nothing
but the result is rounded to bf16; other dtypes are multiplied in full fp32.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import triton
import triton.language as tl

from llmopt.codegen.rotation_layout import width
from llmopt.codegen.templates.order import place
from llmopt.codegen.templates.paged import dot
from llmopt.compiler.target import Target

WIDEST = tl.constexpr(128)  # columns of a tile that are loaded at once, for want of registers


@triton.jit
def signs(matrix, W: tl.constexpr, top, ROWS: tl.constexpr, first, COUNT: tl.constexpr, dtype: tl.constexpr):
    """ROWS rows from `top` on, and of these COUNT columns from `first` on, of a matrix int8 [W, W]."""
    row = top + tl.arange(0, ROWS)[:, None]
    found = tl.load(matrix + row * W + first + tl.arange(0, COUNT)[None, :])
    return found.to(tl.float32).to(dtype)  # the interpreter has no cast from int8 to bf16


@triton.jit
def turned(y, left):
    """left y in fp32 for y [A, .] = x right; y itself where left, [A, A], is None."""
    if left is not None:
        high = y.to(left.dtype)
        z = dot(left, high, tl.zeros(y.shape, tl.float32))
        if left.dtype != tl.float32:
            z = dot(left, (y - high.to(tl.float32)).to(left.dtype), z)
        y = z
    return y


@triton.jit(do_not_specialize=["N"])
def rotated(
    left, right, y, e0, e1, e2, e3, e4, e5, N, A: tl.constexpr, B: tl.constexpr, BLOCKS: tl.constexpr,
    INNER: tl.constexpr, ORDER: tl.constexpr, LOAD_X: tl.constexpr, ROWS: tl.constexpr, SLICE: tl.constexpr,
    REPEAT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """y of N tokens, each LOAD_X(m, k) of BLOCKS blocks of A * B elements k, times the matrix of signs, normalised.

    left, right int8: `rotation_layout.Signs`; y [., N, INNER]: of a token's elements INNER lie together,
    in the order that ORDER says (`order.place`).
    Grid (programs of REPEAT tiles, cdiv(B, SLICE)): a tile is a block, or with A = 1 ROWS blocks, and SLICE columns.
    """
    WIDTH: tl.constexpr = max(16, triton.next_power_of_2(B))  # `rotation_layout.width`, which kernels cannot call
    PIECE: tl.constexpr = min(WIDTH, WIDEST)
    x_type: tl.constexpr = tl.bfloat16 if y.dtype.element_ty == tl.bfloat16 else tl.float32
    first = tl.program_id(1) * SLICE
    c = first + tl.arange(0, SLICE)[None, :]
    row = tl.arange(0, ROWS)[:, None]
    right_signs = signs(right, WIDTH, 0, PIECE, first, SLICE, x_type)
    left_signs = signs(left, ROWS, 0, ROWS, 0, ROWS, x_type) if A > 1 else None
    if PDL:
        tl.extra.cuda.gdc_wait()
    for repeat in range(REPEAT):
        tile = tl.program_id(0).to(tl.int64) * REPEAT + repeat
        # in rows of the same tile stand the rows of one block's matrix, or blocks
        unit = tile + row * 0 if A > 1 else tile * ROWS + row
        m, start = unit // BLOCKS, unit % BLOCKS * (A * B) + (row * B if A > 1 else 0)
        ok = (m < N) & (row < A) if A > 1 else m < N
        if WIDTH == PIECE:
            j = tl.arange(0, WIDTH)[None, :]
            x = LOAD_X(m, start + j, ok & (j < B), e0, e1, e2, e3, e4, e5).to(y.dtype.element_ty).to(x_type)
            sums = dot(x, right_signs, tl.zeros([ROWS, SLICE], tl.float32))
        else:
            sums = tl.zeros([ROWS, SLICE], tl.float32)
            for piece in range(0, WIDTH, PIECE):
                j = piece + tl.arange(0, PIECE)[None, :]
                x = LOAD_X(m, start + j, ok & (j < B), e0, e1, e2, e3, e4, e5).to(y.dtype.element_ty).to(x_type)
                sums = dot(x, signs(right, WIDTH, piece, PIECE, first, SLICE, x_type), sums)
        z = turned(sums, left_signs) * (A * B) ** -0.5
        k = start + c
        tl.store(
            y + ((k // INNER) * N + m) * INNER + place(k % INNER, ORDER), z.to(y.dtype.element_ty), mask=ok & (c < B)
        )
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()


def grid(shape: Mapping[str, int], config: Mapping[str, Any]) -> tuple[int | str, ...]:
    """Programs of a launch, as sizes of `codegen.kernel`."""
    tiles = config["REPEAT"] * (1 if shape["A"] > 1 else config["ROWS"])
    return (f"cdiv(N * {shape['BLOCKS']}, {tiles})", -(-shape["B"] // config["SLICE"]))


def supports(shape: Mapping[str, int], dtype: str, target: Target) -> str | None:
    """None if this template takes the rotation, else why not. `shape`: A, B, BLOCKS a token, N (tokens)."""
    return None if "triton" in target.features else "the target has no Triton"


def configs(shape: Mapping[str, int], dtype: str, target: Target) -> list[dict[str, Any]]:
    """Constants worth trying, the default first: few tokens are cut into slices, many share the loads of signs."""
    whole, rows = width(shape["B"]), width(shape["A"]) if shape["A"] > 1 else 16
    if dtype != "bfloat16":  # fp32 products are no tensor cores' work
        found = [_config(rows, 16, 1, 4)]
    elif shape["A"] == 1:
        few = [_config(16, whole, 1, 4), _config(16, min(whole, 32), 1, 2), _config(16, 16, 1, 1)]
        found = [_config(64, whole, 4, 4), _config(128, whole, 2, 8), *few] if shape["N"] > 64 else few
    else:
        # where products take operands from memory, registers are left for more columns
        large, wide = bool({"wgmma", "tcgen05"} & target.features), whole > WIDEST.value
        if rows > 128:
            tried = [(32, 4, 8, 1), (32, 1, 8, 1)][shape["N"] <= 64 :] if large else [(16, 1, 8, 1)]
        elif shape["N"] <= 64:
            # ptxas may build the second product's descriptors wrongly (`machine_code.never_written`): not so with eight
            # warps on 128 rows, and two warps multiply by mma.sync, which has none
            warps = 8 if rows > 64 else 2
            tried = [(64, 1, 8, 1), (32, 1, warps, 1)] if shape["N"] > 8 else [(32, 1, warps, 1)]
            tried = [(16, 1, warps, 1)] * (large and not wide and shape["N"] <= 8) + tried
        elif large and not wide:
            tried = [(128, 8, 8, 3), (128, 4, 8, 2), (128, 4, 8, 1), (64, 4, 8, 1), (64, 1, 8, 1)]
        else:
            tried = [(64, 4, 8, 1), (64, 1, 8, 1)] if large or not wide else [(32, 4, 8, 1), (32, 1, 8, 1)]
        found = [_config(rows, min(whole, slice_), *more) for slice_, *more in tried]
    return list({repr(config): config for config in found}.values())


def _config(rows: int, slice_: int, repeat: int, warps: int, stages: int = 1) -> dict[str, Any]:
    return {"ROWS": rows, "SLICE": slice_, "REPEAT": repeat, "num_warps": warps, "num_stages": stages}
