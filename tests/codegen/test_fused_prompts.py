"""Regions of steps that hold whole prompts: attention by torch, residuals and biases added by the product."""

from __future__ import annotations

import pytest
import torch
from fused_cases import TARGET, Step, check, lowered

from llmopt.codegen.fused import region_code
from llmopt.codegen.kernel import RegionCode
from llmopt.compiler.graph import Graph
from llmopt.compiler.target import Target
from llmopt.runtime import attend
from llmopt.runtime.gpu_step import spent_inputs

PROMPTS = Step("many", (0,) * 9 + (1,) * 9 + (2,) * 5, (*range(9), *range(9), *range(5)), (2,))


def ways(code: RegionCode) -> list[tuple[str | None, str | None]]:
    """(torch's op, the steps it is for) of each call."""
    return [(call.op, call.when) for call in code.calls]


def product(family: str, dtype: torch.dtype, wanted: str) -> tuple[Graph, RegionCode]:
    """The first region with this call in class many."""
    program = lowered(family, dtype)
    for name in spent_inputs(program.graph("step")):
        code = region_code(program.graph(name), "many", TARGET)
        if any(call.op == wanted for call in code.calls):
            return program.graph(name), code
    raise AssertionError(f"{family} has no region with {wanted}")


def test_attention_of_half_precision_has_two_ways() -> None:
    graph = lowered("Llama", torch.bfloat16).graph("attention")
    code = region_code(graph, "many", TARGET)
    assert ways(code)[-2:] == [("attend", "fresh"), (None, "paged")]
    assert {"SCALE", "BLOCK_Q"} <= dict(code.calls[-1].kernel.constants).keys()
    assert {t.shape[0] for t in code.temporaries} == {"N + 255"}


@pytest.mark.parametrize(
    ("family", "dtype", "target"),
    [
        ("Llama", torch.float32, TARGET),
        ("Gemma 2", torch.bfloat16, TARGET),
        ("Llama", torch.bfloat16, Target.parse("cuda:sm_80")),
    ],
)
def test_attention_that_torch_has_no_measured_kernel_for_has_one(
    family: str, dtype: torch.dtype, target: Target
) -> None:
    code = region_code(lowered(family, dtype, target).graph("attention"), "many", target)
    assert {when for _, when in ways(code)} == {None}
    assert all(t.shape[0] == "N" for t in code.temporaries)


@pytest.mark.interp
@pytest.mark.parametrize("family", ["Llama", "Qwen3"])
def test_whole_prompts_attend_by_torch(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attend, "LONG", 4)
    check(lowered(family, torch.float16).graph("attention"), PROMPTS)


@pytest.mark.interp
@pytest.mark.parametrize("spent", [False, True])
def test_a_residual_is_added_by_the_product(spent: bool) -> None:
    graph, code = product("Llama", torch.float16, "linear_add")
    assert ways(code) == [("linear_add", None)]
    (out,) = code.outputs
    assert out.over == code.calls[0].args[2]
    over = int(out.over.removeprefix("in"))
    got = check(graph, PROMPTS, spent={over} if spent else ())
    assert (got[f"in{over}"].data_ptr() == got["out0"].data_ptr()) == spent


@pytest.mark.interp
def test_a_bias_is_added_by_the_product() -> None:
    graph, code = product("Qwen2", torch.float16, "linear_add")
    call = code.calls[-1]
    assert (call.op, code.outputs[0].over) == ("linear_add", None)
    check(graph, PROMPTS)


def test_inputs_are_spent_where_no_later_region_reads_them() -> None:
    """Of a Llama the hidden states in front of both residuals; never weights, pages or a caller's tensors."""
    step = lowered("Llama").graph("step")
    spent, added = spent_inputs(step), 0
    for name, places in spent.items():
        for out in region_code(lowered("Llama").graph(name), "many", TARGET).outputs:
            if not isinstance(out, str) and out.over:
                assert int(out.over.removeprefix("in")) in places
                added += 1
    assert added == 2
    for node in step.fx.nodes:
        if node.op == "call_module":
            assert all(node.args[i].op == "call_function" for i in spent[str(node.target)])


def test_an_input_that_torch_or_the_caller_reads_later_is_not_spent() -> None:
    step = lowered("Llama").graph("step").copy()
    spent = spent_inputs(step)
    node = next(n for n in step.fx.nodes if n.op == "call_module" and spent[str(n.target)])
    place = min(spent[str(node.target)])
    end = step.fx.output_node()
    with step.fx.inserting_before(end):
        view = step.fx.call_function(torch.ops.aten.neg.default, (node.args[place],))
    end.args = ((*end.args[0], view),)
    assert place not in spent_inputs(step)[str(node.target)]
