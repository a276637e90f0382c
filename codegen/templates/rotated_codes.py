"""Vectors times a Hadamard matrix, rounded to low-bit codes token by token: `rotated` and `rounded` in one kernel.

What is measured and rounded is the rotation's result in bf16, as when the two run one after the other.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import triton
import triton.language as tl

from llmopt.codegen.rotation_layout import width
from llmopt.codegen.templates.paged import dot
from llmopt.codegen.templates.rotated import signs, turned
from llmopt.codegen.templates.rounded import global_scale, store_codes
from llmopt.compiler.target import Target

LARGEST = 16384  # elements of a tile: more do not fit the registers of a program


@triton.jit
def rotated_codes(
    left, right, codes, scales, factor, e0, e1, e2, e3, e4, e5, A: tl.constexpr, B: tl.constexpr,
    BLOCKS: tl.constexpr, ELEMENT: tl.constexpr, GROUP: tl.constexpr, FACTORS: tl.constexpr, K: tl.constexpr,
    KP: tl.constexpr, LOAD_X: tl.constexpr, ROWS: tl.constexpr, TILED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Codes and scales, as `rounded` stores them, of token m (program_id 0) times the matrix of signs, normalised.

    left, right int8: `rotation_layout.Signs`. A program has the token's block program_id 1, or with A = 1 ROWS of its
    blocks; with FACTORS it has all there are. K = KP.
    """
    WIDTH: tl.constexpr = max(16, triton.next_power_of_2(B))
    COUNT: tl.constexpr = WIDTH // GROUP
    j, row = tl.arange(0, WIDTH)[None, :], tl.arange(0, ROWS)
    right_signs = signs(right, WIDTH, 0, WIDTH, 0, WIDTH, tl.bfloat16)
    left_signs = signs(left, ROWS, 0, ROWS, 0, ROWS, tl.bfloat16) if A > 1 else None
    m = tl.program_id(0).to(tl.int64)
    token = tl.full([1, 1], 0, tl.int64) + m
    # where a row of the tile begins among the token's elements
    start = tl.program_id(1) * (A * B) + row * B if A > 1 else (tl.program_id(1) * ROWS + row) * B
    there = row < A if A > 1 else start < K
    if PDL:
        tl.extra.cuda.gdc_wait()
    x = LOAD_X(token, start[:, None] + j, there[:, None] & (j < B), e0, e1, e2, e3, e4, e5)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    x = dot(x.to(tl.bfloat16), right_signs, tl.zeros([ROWS, WIDTH], tl.float32))
    x = turned(x, left_signs) * (A * B) ** -0.5
    x = x.to(tl.bfloat16).to(tl.float32)  # 0 in rows and columns that pad
    unit = tl.full([1], 1.0, tl.float32)
    if FACTORS:
        unit = global_scale(tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF), ELEMENT)
    inside = tl.arange(0, COUNT)[None, :]
    group = tl.reshape((start // GROUP)[:, None] + inside, [ROWS * COUNT])
    ok = tl.reshape(there[:, None] & (inside < B // GROUP), [ROWS * COUNT])
    x = tl.reshape(x, [ROWS * COUNT, GROUP])
    store_codes(x, group, ok, m, unit, codes, scales, ELEMENT, GROUP, FACTORS, KP, TILED)
    if FACTORS:
        one = tl.arange(0, 1)
        tl.store(factor + m + one, unit, mask=one == tl.program_id(1))


def grid(shape: Mapping[str, int], config: Mapping[str, Any]) -> tuple[int | str, ...]:
    """Programs of a launch, as sizes of `codegen.kernel`."""
    return ("N", shape["BLOCKS"] if shape["A"] > 1 else -(-shape["BLOCKS"] // config["ROWS"]))


def supports(shape: Mapping[str, int], scheme: str, target: Target) -> str | None:
    """None if this template takes the rotation, else why not. `shape`: A, B, BLOCKS a token, K, KP (padded), GROUP,
    FACTORS, N (tokens)."""
    if "triton" not in target.features:
        return "the target has no Triton"
    if shape["K"] != shape["KP"]:
        return f"{shape['K']} columns are padded to {shape['KP']}"
    if shape["B"] % shape["GROUP"]:
        return f"groups of {shape['GROUP']} do not divide rows of {shape['B']}"
    tile = width(shape["B"]) * _rows(shape)
    most = LARGEST if {"wgmma", "tcgen05"} & target.features else LARGEST // 4
    if tile > most:
        return f"a tile has {tile} elements; at most {most} fit the registers of a program"
    if shape["FACTORS"] and shape["A"] > 1 and shape["BLOCKS"] > 1:
        return f"{shape['BLOCKS']} blocks share a token's global scale, and a program has one of them"
    return None


def configs(shape: Mapping[str, int], scheme: str, target: Target) -> list[dict[str, Any]]:
    """Constants worth trying, the default first."""
    rows = _rows(shape)
    warps = (8, 4, 16) if rows * width(shape["B"]) > 4096 else (4, 2, 8)
    return [{"ROWS": rows, "num_warps": n, "num_stages": 1} for n in warps]


def _rows(shape: Mapping[str, int]) -> int:
    """Of a program's tile: of a block's matrix, or blocks; a global scale is measured over all of them."""
    return width(shape["A"] if shape["A"] > 1 else shape["BLOCKS"] if shape["FACTORS"] else 1)
