"""Low-bit weights as bf16, for products of more tokens than `lowbit` takes, which are torch's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import triton
import triton.language as tl

from llmopt.codegen.templates.lowbit import _part
from llmopt.compiler.target import Target

SPAN = tl.constexpr(256)  # columns of a program: a multiple of every group, and what columns are padded to


@triton.jit
def decoded(
    w, scales, factor, y, ELEMENT: tl.constexpr, SIDE: tl.constexpr, SCALE: tl.constexpr, GROUP: tl.constexpr,
    FACTORS: tl.constexpr, K: tl.constexpr, J: tl.constexpr, BLOCK_J: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """y [J, K] of w, scales and factor as `lowbit` takes them; grid (cdiv(J, BLOCK_J), cdiv(K, SPAN))."""
    OWN: tl.constexpr = GROUP if SIDE == "weights" else 8
    KP: tl.constexpr = (K + 255) // 256 * 256
    BATCH: tl.constexpr = SPAN // GROUP if SIDE == "sums" else 1
    S: tl.constexpr = BLOCK_J // 16
    # stripes past the end repeat the last one; they are not stored
    stripe = tl.minimum(tl.program_id(0) * S + tl.arange(0, S), (J - 1) // 16).to(tl.int64)
    start = tl.program_id(1) * SPAN
    values, each = _part(
        w, scales, stripe, start, ELEMENT, SIDE, SCALE, GROUP, OWN, KP, BATCH, SPAN // BATCH, False, None
    )
    values = values.to(tl.float32)
    if SIDE == "sums":
        values = values * each
    if BATCH > 1:
        values = tl.reshape(tl.permute(values, 1, 0, 2), [BLOCK_J, SPAN])
    # back from the order that a product wants columns in: the inverse of `in_order`
    values = tl.permute(tl.reshape(values, [BLOCK_J, SPAN // (4 * OWN), OWN // 8, 2, 4, 4]), 0, 1, 4, 2, 3, 5)
    values = tl.reshape(values, [BLOCK_J, SPAN])
    row = tl.program_id(0) * BLOCK_J + tl.arange(0, BLOCK_J)[:, None]
    column = start + tl.arange(0, SPAN)[None, :]
    if FACTORS == 1:
        values = values * tl.load(factor)
    if FACTORS == 2:
        values = values * tl.load(factor + tl.minimum(row, J - 1))
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    tl.store(y + row.to(tl.int64) * K + column, values.to(y.dtype.element_ty), mask=(row < J) & (column < K))


def grid(shape: Mapping[str, int], config: Mapping[str, Any]) -> tuple[int | str, ...]:
    """Programs of a launch."""
    return (-(-shape["J"] // config["BLOCK_J"]), -(-shape["K"] // SPAN.value))


def supports(shape: Mapping[str, int], scheme: str, target: Target) -> str | None:
    """None if this template takes the weight, else the reason why not. `shape`: K, J."""
    return None if "triton" in target.features else "the target has no Triton"


def configs(shape: Mapping[str, int], scheme: str, target: Target) -> list[dict[str, Any]]:
    """Constants worth trying, the default first; `scheme` by name."""
    tiles = ((32, 4), (16, 4), (64, 8), (64, 4), (16, 2))
    return [{"BLOCK_J": rows, "num_warps": warps, "num_stages": 1} for rows, warps in tiles]
