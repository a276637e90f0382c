"""The `lowbit` template compiled for GPUs that are not there, and what stands in its machine code."""

from __future__ import annotations

from typing import Any

import pytest
import triton
import triton.language as tl
from lowbit_cases import Case
from sass import MOVES, loop, names, overwritten, undisturbed

from llmopt.codegen import cubin
from llmopt.codegen.machine_code import instructions
from llmopt.codegen.templates import lowbit
from llmopt.codegen.templates.paged import drain
from llmopt.compiler.target import Target

pytestmark = pytest.mark.xcompile

ISAS = ["sm_80", "sm_89", "sm_90", "sm_100", "sm_120"]
GATE_UP = {"K": 4096, "J": 14336, "parts": 2, "norm": 1}
DOWN = {"K": 14336, "J": 4096, "added": True}


def compiled(case: Case, config: dict[str, Any], target: Target) -> cubin.Cubin:
    return cubin.compile_kernel(case.kernel(config, pdl="pdl" in target.features), target)


def first(case: Case, tokens: int, target: Target) -> dict[str, Any]:
    return lowbit.configs(case.sizes(tokens), case.scheme, target)[0]


def weights_of_a_thread(case: Case, config: dict[str, Any]) -> float:
    """That a turn of the loop multiplies."""
    columns = config["BLOCK_K"] * config["SLICES"] * config["UNROLL"]
    return case.parts * config["BLOCK_J"] * columns / (32 * config["num_warps"])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(
    ("scheme", "tokens"),
    [("nvfp4", 1), ("nvfp4", 16), ("mxfp4", 8), ("int4_g128_asym", 1), ("mxfp6_e3m2", 1), ("fp8_block", 8)],
)
def test_defaults_compile_for_every_gpu(isa: str, scheme: str, tokens: int) -> None:
    target = Target.parse(f"cuda:{isa}")
    case = Case(scheme, 4096, 1024)
    assert compiled(case, first(case, tokens, target), target).spills == 0


@pytest.mark.parametrize(
    ("scheme", "tokens", "most"),
    [
        ("nvfp4", 1, 2.9), ("nvfp4", 8, 3.6), ("mxfp4", 1, 2.8), ("mxfp4", 8, 3.5), ("int4_g128", 1, 2.4),
        ("int4_g128_asym", 1, 2.5), ("int4_g32", 1, 2.9), ("mxfp6_e2m3", 1, 3.1), ("mxfp6_e3m2", 1, 3.1),
        ("mxfp8", 1, 2.8), ("fp8_channel", 1, 2.7), ("fp8_block", 1, 2.9), ("int8", 1, 3.7),
    ],
)  # fmt: skip
@pytest.mark.parametrize("name", ["gate_up", "down"])
def test_weights_become_operands_where_they_are(scheme: str, tokens: int, most: float, name: str) -> None:
    """Nothing is exchanged between lanes, nothing goes back to memory, and few instructions are spent on a weight."""
    case, target = Case(scheme, **(GATE_UP if name == "gate_up" else DOWN)), Target.parse("cuda:sm_90")
    config = first(case, tokens, target)
    repeated = undisturbed(compiled(case, config, target))
    count = names(repeated)
    assert count["HMMA"]
    assert not [name for name in MOVES if count[name]]
    assert not count["LDG"], "a load that is not under way a turn ahead"
    assert len(repeated) / weights_of_a_thread(case, config) <= most + 0.25 * (name == "down")


@pytest.mark.parametrize(
    ("scheme", "tokens", "most"),
    [("nvfp4", 16, 3.4), ("nvfp4", 32, 3.8), ("nvfp4", 64, 4.5), ("mxfp4", 16, 3.6), ("int4_g128", 16, 3.0)],
)
def test_more_tokens_share_wgmma(scheme: str, tokens: int, most: float) -> None:
    case, target = Case(scheme, **DOWN), Target.parse("cuda:sm_90")
    config = first(case, tokens, target)
    repeated = undisturbed(compiled(case, config, target))
    count = names(repeated)
    assert count["HGMMA"]
    assert not count["SHFL"]
    assert len(repeated) / weights_of_a_thread(case, config) <= most


@pytest.mark.parametrize(
    ("scheme", "tokens", "most"),
    [("nvfp4", 16, 3.7), ("nvfp4", 64, 4.4), ("mxfp4", 64, 4.4), ("int4_g128", 32, 3.3), ("mxfp6_e2m3", 16, 4.1)],
)
@pytest.mark.parametrize("name", ["gate_up", "down"])
def test_tokens_in_order_are_copied_to_where_wgmma_reads_them(scheme: str, tokens: int, most: float, name: str) -> None:
    shape = {"K": 4096, "J": 14336, "parts": 2} if name == "gate_up" else DOWN
    case, target = Case(scheme, **shape, ordered=1, order=16), Target.parse("cuda:sm_90")
    config = first(case, tokens, target)
    repeated = undisturbed(compiled(case, config, target))
    count = names(repeated)
    assert count["HGMMA"]
    assert not [name for name in (*MOVES, "LDG") if count[name]]
    assert len(repeated) / weights_of_a_thread(case, config) <= most


@triton.jit
def from_registers(w, x, y, STEPS: tl.constexpr, DRAIN: tl.constexpr):
    """A product whose left operand is made in registers and whose right one is copied ahead, so that the compiler lets
    products of one turn of the loop run on into the next."""
    row, column, token = tl.arange(0, 128)[:, None], tl.arange(0, 128)[None, :], tl.arange(0, 64)[None, :]
    acc = tl.zeros([128, 64], tl.float32)
    for step in range(STEPS):
        a = tl.load(w + row * (STEPS * 128) + step * 128 + column).to(tl.bfloat16)
        acc = tl.dot(a, tl.load(x + (step * 128 + tl.trans(column)) * 64 + token), acc)
        if DRAIN:
            drain()
    tl.store(y + row * 64 + token, acc)


@pytest.mark.parametrize("drained", [False, True])
def test_the_check_sees_registers_written_too_early(drained: bool) -> None:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = {"w": "*i8", "x": "*bf16", "y": "*fp32", "STEPS": "constexpr", "DRAIN": "constexpr"}
    aligned = {(i,): [["tt.divisibility", 16]] for i in range(3)}
    source = ASTSource(from_registers, types, {"STEPS": 64, "DRAIN": drained}, aligned)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4, "num_stages": 4})
    repeated = loop(instructions(made.asm["cubin"]))
    assert names(repeated)["HGMMA"]
    assert bool(overwritten(repeated)) != drained
