"""Every region of lowered steps, its code run by Triton's interpreter, against its own graph in fp64."""

from __future__ import annotations

import re

import pytest
import torch
from fused_cases import TARGET, Step, check, lowered, regions

from llmopt.codegen.fused import region_code
from llmopt.compiler.target import Target

pytestmark = pytest.mark.interp

AMPERE = Target.parse("cuda:sm_80")
FAMILIES = ("Llama", "Qwen3", "Gemma 2", "Qwen2", "Phi-2")
STEPS = (
    Step.decoding("1", (20,)),
    Step.decoding("8", (0, 17, 33)),
    Step("many", (0, 0, 0, 1, 2, 2), (5, 6, 7, 18, 0, 1), (2, 3, 5)),
)


@pytest.mark.parametrize("step", STEPS, ids=lambda s: s.shape)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_region_s_code_computes_what_its_graph_says(family: str, step: Step) -> None:
    program = lowered(family)
    for name in regions(program):
        check(program.graph(name), step)


@pytest.mark.parametrize("step", STEPS, ids=lambda s: s.shape)
def test_in_fp16_it_is_no_further_off_than_torch(step: Step) -> None:
    """The interpreter multiplies no bf16, and on sm_90 it lacks an instruction of prefill in half precision."""
    program = lowered("Gemma 2", torch.float16, AMPERE)
    for name in regions(program):
        check(program.graph(name), step, target=AMPERE)


def test_keys_in_parts_and_other_classes() -> None:
    program = lowered("Qwen3")
    for name in regions(program):
        check(program.graph(name), Step.decoding("16", (2, 40, 31, 47, 16, 15, 3, 0, 1)), parts=3)


def test_a_region_for_several_tokens_is_one_kernel_and_none_of_torch_s() -> None:
    for name in regions(program := lowered("Qwen3")):
        for shape in ("1", "8", "64"):
            code = region_code(program.graph(name), shape, TARGET)
            assert code.notes == ()
            assert [call.op for call in code.calls] == [None], (name, shape)


def test_a_product_too_wide_for_a_kernel_s_tensors_is_torch_s_between_kernels_over_rows() -> None:
    """Seven tensors read behind the product: one kernel takes six."""
    program = lowered("Qwen3")
    graph = program.graph("gemm").copy()
    (result,) = graph.outputs()
    with graph.fx.inserting_before(graph.fx.output_node()):
        for i in range(7):
            with graph.fx.inserting_before(next(iter(graph.fx.nodes))):
                other = graph.fx.placeholder(f"other{i}")
                other.meta["val"] = result.meta["val"]
            result = graph.fx.call_function(torch.ops.aten.add.Tensor, (result, other))
            result.meta["val"] = other.meta["val"]
    graph.fx.output_node().args = ((result,),)
    graph.fx.lint()
    code = region_code(graph, "8", TARGET)
    assert [call.op for call in code.calls] == [None, "linear", None]
    (note,) = code.notes
    assert re.match(r"torch multiplies, between kernels over rows: .*6", note)
    check(graph, Step.decoding("8", (0, 17, 33)))


def test_q_k_and_v_made_ahead_where_they_take_too_many_tensors() -> None:
    """Queries, keys and values of tensors of their own each, with cos and sin and the norms' weights: seven in all."""
    graph = lowered("Qwen3").graph("attention").copy()
    first = graph.inputs()[0]
    for getitem in list(graph.calls("getitem")):
        with graph.fx.inserting_before(first):
            own = graph.fx.placeholder(f"own{getitem.args[1]}")
        own.meta["val"] = getitem.meta["val"]
        getitem.replace_all_uses_with(own)
    graph.fx.eliminate_dead_code()
    graph.fx.erase_node(first)
    code = region_code(graph, "8", TARGET)
    assert [call.kernel.template.partition(":")[0] for call in code.calls] == ["rows", "rows", "decode_attention"]
    (note,) = code.notes
    assert re.match(r"q, k and v are made by kernels over rows: .*6", note)
    check(graph, Step.decoding("8", (0, 17, 33)))
