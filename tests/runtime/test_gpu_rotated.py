"""Steps with rotations in them on a GPU, also through Triton's interpreter: which kernels they are, and how exact."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
from fused_cases import Step, reference, run
from gpu_models import ragged
from interpreted import rounding
from lowbit_steps import HANDED, PAGE, Case, by_reference, errors, lowered

from llmopt.codegen.kernel import RegionCode
from llmopt.compiler.program import Program
from llmopt.compiler.recipe import PassSpec, Recipe
from llmopt.runtime.build import build
from llmopt.runtime.engine import SamplingParams
from llmopt.runtime.gpu_code import GpuCode, code_for
from llmopt.runtime.session import Session, open_session

pytestmark = pytest.mark.timeout(600)

# blocks of 96 by one matrix, of 480 = 20 * 24 by two; under low-bit weights, handed over in their order; rounded, too
ONE = Case("rotate-online", "", (("num_hidden_layers", 2),))
TWO = Case("rotate-online", "", (("intermediate_size", 480),))
LOW = Case("nvfp4+rotate-online", "", HANDED)
ROUNDED = Case("w4a4+rotate-online", "nvfp4", (("intermediate_size", 1024),))


def calls(region: RegionCode) -> list[str]:
    """Templates and ops of torch, in order."""
    return [str(c.op) if c.kernel is None else c.kernel.template.partition(":")[0] for c in region.calls]


def check(case: Case, session: Session) -> None:
    """As near to fp64 as the reference, whose error is that of bf16 weights in another basis."""
    ours, theirs = errors(case, session), errors(case, by_reference(case))
    for kind, error in ours.items():
        assert error <= 1.5 * theirs[kind], f"{kind}: {error:.2g} from fp64, the reference {theirs[kind]:.2g}"


@pytest.mark.interp
@pytest.mark.parametrize("case", [ONE, TWO], ids=["one", "two"])
def test_logits_are_as_near_to_fp64_as_the_reference_s(case: Case) -> None:
    from llmopt.codegen.interpret import launcher

    program, recipe, target, code = lowered(case)
    with rounding():
        check(case, open_session(program, recipe, target, code, launcher=launcher, device="cpu"))


@pytest.mark.interp
def test_swiglu_is_part_of_the_product_or_of_the_rotation() -> None:
    """Few tokens are gated where their product is made, all over the GPU; many where they are turned."""
    program, *_, code = lowered(TWO)
    for shape, product in (("1", ["gemv"]), ("8", ["gemm"]), ("many", ["rows", "linear"])):
        region = code.code("gemm_2", shape)
        assert calls(region) == [*product, "rotated"]
        assert region.notes == ()
    graph = program.graph("gemm_2")
    torch.manual_seed(0)
    step = Step("many", (0, 0, 1), (4, 5, 0), (1, 2))
    with rounding():
        check_region(program, "gemm_2", step)
    assert any(graph.calls("gated"))


@pytest.mark.interp
def test_what_is_turned_is_handed_over_in_the_next_product_s_order() -> None:
    *_, code = lowered(LOW)
    alone, together = code.code("gemm_2", "8"), code.code("gemm_2", "16")
    assert [dict(c.kernel.constants).get("ORDER") for c in alone.calls if c.kernel] == [0, 0]
    assert [dict(c.kernel.constants).get("ORDER") for c in together.calls if c.kernel][-2:] == [0, 16]
    assert calls(code.code("gemm_3", "16")) == ["lowbit"]


@cache
def with_r3() -> tuple[Program, GpuCode]:
    """Queries and keys are turned, too."""
    base = Recipe.parse("rotate-online")
    passes = tuple(PassSpec.of(s.name, r3=True, r4=True) if s.name == "rotate-hadamard" else s for s in base.passes)
    program, _, context = build(ONE.model(), replace(base, name="r3", passes=passes, page_size=PAGE), "cuda:sm_90")
    code = code_for(program, context.target)
    assert isinstance(code, GpuCode)
    return program, code


@pytest.mark.interp
@pytest.mark.parametrize("shape", ["8", "many"])
def test_queries_and_keys_are_turned_with_their_rope_in_one_kernel(shape: str) -> None:
    program, code = with_r3()
    turned = [name for name in code.names() if name.startswith("rotation")]
    assert len(turned) == 2  # queries and keys have different numbers of heads
    step = Step.decoding("8", (0, 17, 33)) if shape == "8" else Step("many", (0, 0, 1), (4, 5, 0), (1, 2))
    for name in turned:
        assert calls(code.code(name, shape)) == ["rotated"]
        assert any(program.graph(name).calls("rope"))
        with rounding():
            check_region(program, name, step)


def check_region(program: Program, name: str, step: Step) -> None:
    """With its own matrices, no further from fp64 than torch's, or than a rounding to bf16."""
    graph = program.graph(name)
    torch.manual_seed(0)
    inputs = []
    for node in graph.inputs():
        size = [s if isinstance(s, int) else len(step.positions) for s in node.meta["val"].shape]
        inputs.append(torch.randn(size).to(node.meta["val"].dtype))
    for node in program.graph("step").fx.nodes:
        if node.op == "call_module" and node.target == name:
            for at, argument in enumerate(node.args):
                if argument.op == "get_attr":
                    inputs[at] = program.weights[str(argument.target)].load()
    got = run(graph, inputs, step)["out0"]
    want, plain = (reference(graph, inputs, wide)["out0"].double() for wide in (True, False))
    assert (got.double() - want).norm() <= max(1.2 * (plain - want).norm(), 2.0**-8 * want.norm())


@pytest.mark.interp
def test_codes_of_what_is_turned_are_made_by_the_same_kernel() -> None:
    program, recipe, target, code = lowered(ROUNDED, "cuda:sm_100")
    (name,) = (n for n in code.names() if "rotated_codes" in calls(code.code(n, "1")))
    for shape in ("1", "8", "many"):
        assert calls(code.code(name, shape)) == ["rotated_codes", "scaled"]
        assert code.code(name, shape).notes == ()
    from llmopt.codegen.interpret import launcher

    with rounding():
        check(ROUNDED, open_session(program, recipe, target, code, launcher=launcher, device="cpu"))


@pytest.mark.interp
def test_where_one_kernel_cannot_round_what_it_turns_there_are_two() -> None:
    case = Case("w4a4+rotate-online", "nvfp4", (("intermediate_size", 480),))
    *_, code = lowered(case, "cuda:sm_100")
    found = [code.code(n, "1") for n in code.names() if "rotated" in calls(code.code(n, "1"))]
    assert [calls(region) for region in found] == [["rotated", "rounded", "scaled"]]
    assert "rotated by a kernel ahead of the one that rounds" in found[0].notes[0]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("case", [ONE, TWO, LOW], ids=["one", "two", "low"])
def test_a_gpu_s_logits_are_as_near_to_fp64(case: Case) -> None:
    program, recipe, target, code = lowered(case, "cuda")
    session = open_session(program, recipe, target, code)
    check(case, session)
    made = session.engine.generate(ragged(5, 9), SamplingParams(max_new_tokens=6))
    assert made == session.engine.generate(ragged(5, 9), SamplingParams(max_new_tokens=6))
