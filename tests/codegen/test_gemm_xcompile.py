"""The `gemv` and `gemm` templates compiled for GPUs that are not there, and what stands in their machine code."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from gemm_cases import Case
from sass import loop

from llmopt.codegen import cubin, tuning
from llmopt.codegen.machine_code import instructions
from llmopt.compiler.target import Target

pytestmark = pytest.mark.xcompile

SHAPES = {
    "qkv": Case(4096, 6144, norm=1),
    "gate_up": Case(4096, 14336, parts=2, norm=1),
    "down": Case(14336, 4096, added=True),
}
ISAS = ["sm_80", "sm_89", "sm_90", "sm_100", "sm_120"]


def compiled(case: Case, template: str, config: Mapping[str, Any], target: Target) -> cubin.Cubin:
    return cubin.compile_kernel(case.kernel(template, config, pdl="pdl" in target.features), target)


def some(code: list[str], *names: str) -> list[str]:
    """The instructions of these names."""
    return [text for text in code if text.startswith(names)]


def from_registers(code: list[str]) -> list[str]:
    """Each wgmma that reads its left operand from registers, and may see the next step's: Triton does not wait."""
    return [text for text in some(code, "HGMMA") if re.search(r", R\d+, gdesc", text)]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("template", ["gemv", "gemm"])
def test_defaults_compile_for_every_gpu(isa: str, template: str) -> None:
    target = Target.parse(f"cuda:{isa}")
    for case in (SHAPES["qkv"], Case(1000, 40, parts=2, norm=1, dtype=torch.float32)):
        tokens = 1 if template == "gemv" else 16
        config = tuning.pick(template, case.sizes(tokens), str(case.dtype).removeprefix("torch."), target)
        made = compiled(case, template, config, target)
        assert made.spills <= 16, config  # two registers, outside the loop


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rows_shorter_than_a_load_compile(dtype: torch.dtype) -> None:
    """A LoRA of rank 4 that was not merged, or of rank 2."""
    case, target = Case(16 // dtype.itemsize // 2, 64, norm=1, dtype=dtype), Target.parse("cuda:sm_90")
    for template, tokens in (("gemv", 1), ("gemm", 8)):
        config = tuning.pick(template, case.sizes(tokens), str(dtype).removeprefix("torch."), target)
        assert compiled(case, template, config, target).spills == 0


@pytest.mark.parametrize("isa", ISAS)
def test_a_norm_in_fp16_compiles_for_every_gpu(isa: str) -> None:
    """It is taken before the product, not after it as in bf16."""
    case, target = replace(SHAPES["qkv"], dtype=torch.float16), Target.parse(f"cuda:{isa}")
    made = compiled(case, "gemm", tuning.pick("gemm", case.sizes(16), "float16", target), target)
    assert made.spills <= 16
    assert not from_registers(instructions(made.data))


@pytest.mark.parametrize(("name", "prefetch"), [("qkv", 0), ("qkv", 1), ("gate_up", 1), ("down", 1)])
def test_gemv_streams_in_16_bytes(name: str, prefetch: int) -> None:
    case, target = SHAPES[name], Target.parse("cuda:sm_90")
    rows = 8 // case.parts
    config = {
        "BLOCK_J": rows, "BLOCK_K": 1024, "PREFETCH": prefetch, "EARLY": 0, "EVICT": "", "ASK": 0, "num_warps": 4,
        "num_stages": 1,
    }  # fmt: skip
    code = instructions(compiled(case, "gemv", config, target).data)
    assert len([text for text in some(loop(code), "LDG") if ".128" in text]) >= 8
    assert not some(loop(code), "LDL", "STL", "SHFL", "STS", "LDS", "BAR")
    # the first weights are under way before the wait for the kernel ahead, or nothing is
    ahead = some(code[: code.index(some(code, "ACQBULK")[0])], "LDG")
    assert len(ahead) >= 8 if prefetch else not ahead


@pytest.mark.parametrize("template", ["gemv", "gemm"])
def test_weights_are_asked_for_before_the_wait(template: str) -> None:
    target = Target.parse("cuda:sm_90")
    for name, early in (("qkv", 0), ("gate_up", 1)):
        case = SHAPES[name]
        config = tuning.pick(template, case.sizes(1), "bfloat16", target) | {"ASK": 1, "EARLY": early}
        code = instructions(compiled(case, template, config, target).data)
        wait = code.index(some(code, "ACQBULK")[0])
        asked = [i for i, text in enumerate(code) if text.startswith("UBLKPF")]
        assert len(asked) == case.parts
        assert asked[-1] < wait
        assert (code.index("PREEXIT") < wait) == bool(early)


@pytest.mark.parametrize("width", [8, 16, 64])
@pytest.mark.parametrize("name", SHAPES)
def test_gemm_copies_weights_in_16_bytes_and_multiplies_from_shared_memory(name: str, width: int) -> None:
    case, target = SHAPES[name], Target.parse("cuda:sm_90")
    config = tuning.pick("gemm", case.sizes(width), "bfloat16", target)
    code = instructions(compiled(case, "gemm", config, target).data)
    assert len([text for text in some(code, "LDGSTS") if ".128" in text]) >= 8
    assert not some(code, "LDL", "STL")
    assert some(code, "HGMMA", "HMMA")
    assert not from_registers(code)
