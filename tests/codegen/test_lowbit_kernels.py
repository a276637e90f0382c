"""The `lowbit` template in Triton's interpreter, against fp64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from lowbit_cases import Case, Data

from llmopt.codegen.lowbit_layout import in_order, own, side
from llmopt.codegen.templates import lowbit
from llmopt.compiler.quant.schemes import SCHEMES
from llmopt.compiler.target import Target

pytestmark = pytest.mark.interp

BASE = {
    "BLOCK_J": 32, "BLOCK_K": 256, "BLOCK_M": 8, "SLICES": 1, "UNROLL": 1, "SPLIT_K": 1, "WIDE": 0,
    "num_warps": 1, "num_stages": 3,
}  # fmt: skip


def config(case: Case, **changed: Any) -> dict[str, Any]:
    """Steps of 256 columns, where nothing else is said."""
    found = {**BASE, **changed}
    kind = SCHEMES[case.scheme]
    if side(kind) == "sums":
        found |= {"BLOCK_K": kind.group, "UNROLL": changed.get("UNROLL", found["BLOCK_K"] // kind.group)}
    return found


def right(data: Data, y: torch.Tensor) -> None:
    """About as near to fp64 as torch in bf16 with the exact weights, and nothing left out."""
    assert data.error(y) <= 1.5 * data.error(data.plain(torch.bfloat16))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("tokens", [1, 3])
def test_every_scheme_is_the_product(scheme: str, tokens: int) -> None:
    """A rest of rows and of columns; one token is loaded for all eight columns."""
    case = Case(scheme, 512 - 64, 24, norm=tokens % 2)
    data = Data.of(case, tokens)
    right(data, data.run(config(case, BLOCK_M=1 if tokens == 1 else 8)))


@pytest.mark.parametrize(("tokens", "width"), [(8, 8), (16, 16), (40, 64), (64, 64)])
@pytest.mark.parametrize("scheme", ["nvfp4", "mxfp4", "mxfp6_e3m2", "int4_g128_asym", "int8"])
def test_any_number_of_tokens_in_the_order_of_both_instructions(scheme: str, tokens: int, width: int) -> None:
    case = Case(scheme, 256, 64, norm=1, added=True)
    data = Data.of(case, tokens)
    changed = {"BLOCK_J": 64, "BLOCK_M": width, "WIDE": int(tokens > 8)}
    if side(SCHEMES[scheme]) == "sums":
        changed["UNROLL"] = 1
    right(data, data.run(config(case, **changed)))


@pytest.mark.parametrize("scheme", ["nvfp4", "mxfp4", "mxfp6_e3m2", "int4_g128", "int8"])
def test_tokens_may_come_in_the_order_of_wgmma(scheme: str) -> None:
    case = Case(scheme, 512, 64, added=True, ordered=1)
    data = Data.of(case, 33)
    changed = {"BLOCK_J": 64, "BLOCK_M": 64, "WIDE": 1}
    if side(SCHEMES[scheme]) == "sums":
        changed["UNROLL"] = 1
    right(data, data.run(config(case, **changed)))


@pytest.mark.parametrize("scheme", ["nvfp4", "mxfp6_e2m3", "mxfp8", "int4_g32", "fp8_channel"])
def test_halves_that_begin_inside_are_gated(scheme: str) -> None:
    case = Case(scheme, 256, 48, parts=2, norm=1, skip=16)
    data = Data.of(case, 3)
    right(data, data.run(config(case, BLOCK_J=16)))
    one = Data.of(case, 1)
    right(one, one.run(config(case, BLOCK_J=16, BLOCK_M=1)))


@pytest.mark.parametrize("scheme", ["nvfp4", "int4_g64"])
@pytest.mark.parametrize(("slices", "split"), [(2, 1), (1, 2), (4, 3)])
def test_k_is_shared_among_warps_and_programs(scheme: str, slices: int, split: int) -> None:
    """Splits that do not divide K, too; two calls share their tickets."""
    case = Case(scheme, 1024, 16, norm=1, added=True)
    data = Data.of(case, 1)
    chosen = config(case, BLOCK_J=16, BLOCK_M=1, BLOCK_K=128, SLICES=slices, UNROLL=1, SPLIT_K=split, num_warps=slices)
    right(data, data.run(chosen, calls=split))


@pytest.mark.parametrize("scheme", ["nvfp4", "mxfp4", "mxfp6_e2m3", "mxfp8"])
@pytest.mark.parametrize(("slices", "tokens"), [(1, 1), (4, 1), (1, 33)])
def test_a_step_of_half_a_word_of_scales(scheme: str, slices: int, tokens: int) -> None:
    case = Case(scheme, 1024 - 64, 64, norm=1)
    data = Data.of(case, tokens)
    half = 4 * SCHEMES[scheme].group
    if SCHEMES[scheme].element.bits == 6:
        half = max(half, 128)  # columns of three words
    wide = {"BLOCK_M": 64, "BLOCK_J": 64, "WIDE": 1} if tokens > 8 else {"BLOCK_M": 1, "BLOCK_J": 16}
    right(data, data.run(config(case, BLOCK_K=half, SLICES=slices, num_warps=slices, **wide)))


@pytest.mark.parametrize("scheme", ["nvfp4", "mxfp4", "int4_g128"])
def test_the_result_may_be_written_in_the_order_of_another_scheme_s_product(scheme: str) -> None:
    kind = SCHEMES[scheme]
    case = Case("nvfp4", 256, 256, added=True)
    plain = Data.of(case, 8).run(config(case))
    moved = Data.of(replace(case, order=own(kind)), 8).run(config(case))
    parts, axes = in_order(kind)
    wanted = plain.unflatten(-1, (-1, *parts)).permute(0, 1, *(2 + axis for axis in axes)).flatten(1)
    assert not torch.equal(moved, plain)
    assert torch.equal(moved, wanted)


def test_no_element_is_far_off() -> None:
    """A norm over all elements would not see one."""
    case = Case("nvfp4", 512, 64)
    data = Data.of(case, 8)
    got = data.run(config(case)).double()
    assert torch.all((got - data.want).abs() <= data.want.abs() / 256 + data.want.abs().mean() / 4096)


@pytest.mark.parametrize("scheme", ["nvfp4", "int4_g128", "mxfp4"])
def test_the_first_choices_are_right(scheme: str) -> None:
    target = Target.parse("cuda:sm_90")
    for case, tokens in ((Case(scheme, 1024, 32, norm=1), 1), (Case(scheme, 512, 64, parts=2, norm=1), 40)):
        data = Data.of(case, tokens)
        found = lowbit.configs({**case.sizes(tokens)}, scheme, target)
        right(data, data.run(found[0]))


def test_what_is_not_taken_has_a_reason() -> None:
    target = Target.parse("cuda:sm_90")
    sizes = Case("nvfp4", 256, 32, parts=2).sizes(8)
    assert lowbit.supports(sizes, "nvfp4", target) is None
    assert "65 tokens" in (lowbit.supports({**sizes, "N": 65}, "nvfp4", target) or "")
    assert "halves" in (lowbit.supports({**sizes, "J": 24}, "nvfp4", target) or "")
    assert "Triton" in (lowbit.supports(sizes, "nvfp4", replace(target, features=frozenset())) or "")
