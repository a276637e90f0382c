"""The templates `rounded` and `scaled` compiled for GPUs that are not there, and the instructions that multiply."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
from sass import names
from scaled_cases import Case

from llmopt.codegen import cubin
from llmopt.codegen.machine_code import instructions
from llmopt.codegen.templates import rounded, scaled
from llmopt.compiler.target import Target

pytestmark = pytest.mark.xcompile

TAKEN = ("nvfp4", "mxfp4", "mxfp8")
# machine code of tcgen05.mma and of mma.sync with block_scale; 4X: a scale every 16 columns
INSTRUCTIONS = {
    "sm_100": {"nvfp4": r"UTCOMMA\.4X ", "mxfp4": r"UTCOMMA ", "mxfp8": r"UTCQMMA "},
    "sm_120": {"nvfp4": r"OMMA\.SF", "mxfp4": r"OMMA\.SF", "mxfp8": r"QMMA\.SF"},
}
SM_100 = Target.parse("cuda:sm_100")
GATE_UP = {"K": 4096, "J": 14336, "parts": 2}
DOWN = {"K": 14336, "J": 4096, "added": True}
QKV = {"K": 4096, "J": 6144}


def made(case: Case, tokens: int, target: Target) -> cubin.Cubin:
    """`scaled` by its first constants."""
    case = replace(case, many=scaled.tiled(tokens, target))
    config = scaled.configs(case.sizes(tokens), case.scheme, target)[0]
    return cubin.compile_kernel(case.scaled(config, pdl=True), target)


@pytest.mark.parametrize("tokens", [1, 32, 64, 1024])
@pytest.mark.parametrize("scheme", TAKEN)
@pytest.mark.parametrize("isa", INSTRUCTIONS)
@pytest.mark.parametrize("shape", [GATE_UP, DOWN, QKV], ids=["gate_up", "down", "qkv"])
def test_it_multiplies_by_the_gpu_s_scaled_instructions(
    isa: str, scheme: str, tokens: int, shape: dict[str, Any]
) -> None:
    target = Target.parse(f"cuda:{isa}")
    found = made(Case(scheme, **shape), tokens, target)
    code = instructions(found.data)
    assert found.spills == 0
    assert any(re.match(INSTRUCTIONS[isa][scheme], text) for text in code), sorted(names(code))
    assert not any(re.match(r"HMMA|UTCHMMA", text) for text in code), "codes that are decoded first"


@pytest.mark.parametrize("isa", ["sm_90", "sm_100", "sm_120"])
@pytest.mark.parametrize("scheme", TAKEN)
@pytest.mark.parametrize(("norm", "tokens"), [(0, 1), (1, 1), (1, 1024)])
def test_rounding_compiles(isa: str, scheme: str, norm: int, tokens: int) -> None:
    target = Target.parse(f"cuda:{isa}")
    case = Case(scheme, 4096, 128, norm=norm, many=scaled.tiled(tokens, target))
    for config in rounded.configs(case.rows_sizes(tokens), scheme, target):
        assert cubin.compile_kernel(case.rounded(config, pdl=True), target).spills == 0


@pytest.mark.parametrize(("scheme", "parts"), [*((scheme, 2) for scheme in TAKEN), ("nvfp4", 1)])
@pytest.mark.parametrize("isa", INSTRUCTIONS)
def test_all_choices_compile_and_none_spills(isa: str, scheme: str, parts: int) -> None:
    target = Target.parse(f"cuda:{isa}")
    for tokens in (8, 1024):
        case = Case(scheme, 2048, 1024, parts=parts, many=scaled.tiled(tokens, target))
        for config in scaled.configs(case.sizes(tokens), scheme, target):
            assert cubin.compile_kernel(case.scaled(config, pdl=True), target).spills == 0, config


def test_scales_of_the_weight_are_copied_to_tensor_memory_as_they_are() -> None:
    for scheme in TAKEN:
        for case in (Case(scheme, **GATE_UP), Case(scheme, **DOWN)):
            assert names(instructions(made(case, 1, SM_100).data))["UTCCP"]


def test_no_other_gpu_is_given_such_products() -> None:
    for isa in ("sm_80", "sm_89", "sm_90"):
        sizes = Case("nvfp4", **DOWN).sizes(1)
        assert "no scaled matrix instruction" in (scaled.supports(sizes, "nvfp4", Target.parse(f"cuda:{isa}")) or "")
