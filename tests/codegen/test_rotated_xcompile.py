"""The templates `rotated` and `rotated_codes` compiled for GPUs that are not there, and the machine code for sm_90."""

from __future__ import annotations

import pytest
import torch
from attention_cases import ISAS
from rotated_cases import Case
from sass import names

from llmopt.codegen import cubin
from llmopt.codegen.machine_code import instructions
from llmopt.codegen.templates import rotated, rotated_codes
from llmopt.compiler.errors import BuildError
from llmopt.compiler.target import Target

pytestmark = pytest.mark.xcompile

H200 = Target.parse("cuda:sm_90")
DOWN = Case(14336, gated=True)  # 112 * 128: what an 8B model's down projections read
WIDE = Case(28672)  # 128 * 224, of a 70B model


CASES = [
    *((isa, DOWN) for isa in ISAS), *((isa, Case(4096)) for isa in ("sm_80", "sm_100")),
    ("sm_90", WIDE), ("sm_90", Case(128, 32)),
]  # fmt: skip


@pytest.mark.parametrize(("isa", "case"), CASES)
def test_it_compiles_and_nothing_spills(isa: str, case: Case) -> None:
    target = Target.parse(f"cuda:{isa}")
    for tokens in (1, 1024):
        config = rotated.configs(case.sizes(tokens), "bfloat16", target)[0]
        assert cubin.compile_kernel(case.rotated(config, pdl="pdl" in target.features), target).spills == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_other_dtypes_compile(dtype: torch.dtype) -> None:
    case = Case(560, dtype=dtype)
    config = rotated.configs(case.sizes(1), str(dtype).removeprefix("torch."), H200)[0]
    assert cubin.compile_kernel(case.rotated(config), H200).spills == 0


def test_code_that_multiplies_by_what_lies_elsewhere_is_refused() -> None:
    """Right PTX, of which ptxas 12.8 makes descriptors from a register that nothing writes."""
    config = {"ROWS": 128, "SLICE": 16, "REPEAT": 1, "num_warps": 4, "num_stages": 1}
    with pytest.raises(
        BuildError, match=r"ptxas 12\.8 made code of it that reads a register nothing writes \(UIADD3 UR"
    ):
        cubin.compile_kernel(Case(14336).rotated(config), H200)


@pytest.mark.parametrize("order", [4096, 7168, 25600])  # 64 * 64, 64 * 112, 160 * 160
def test_widths_of_models_compile(order: int) -> None:
    for tokens in (1, 16, 1024):
        for config in rotated.configs(Case(order).sizes(tokens), "bfloat16", H200):
            assert cubin.compile_kernel(Case(order).rotated(config, pdl=True), H200).spills == 0, config


@pytest.mark.parametrize("tokens", [1, 1024])
def test_all_choices_compile_and_multiply_on_tensor_cores(tokens: int) -> None:
    for config in rotated.configs(DOWN.sizes(tokens), "bfloat16", H200):
        made = cubin.compile_kernel(DOWN.rotated(config, pdl=True), H200)
        assert made.spills == 0, config
        assert names(instructions(made.data))["HGMMA"], config


@pytest.mark.parametrize("isa", ["sm_100", "sm_120"])
@pytest.mark.parametrize("scheme", ["nvfp4", "mxfp8"])
def test_rounding_behind_it_compiles(isa: str, scheme: str) -> None:
    target = Target.parse(f"cuda:{isa}")
    for case in (DOWN, Case(4096)):
        sizes = case.codes_sizes(scheme, 1)
        if isa == "sm_120" and case is DOWN:
            assert "a tile has 16384 elements; at most 4096" in str(rotated_codes.supports(sizes, scheme, target))
        else:
            config = rotated_codes.configs(sizes, scheme, target)[0]
            made = cubin.compile_kernel(case.rotated_codes(scheme, config, tiled=True, pdl=True), target)
            assert made.spills == 0, (case, config)
