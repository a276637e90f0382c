"""fuse: products with low-bit weights share kernels as others do, or are torch's, with the reason."""

from __future__ import annotations

import logging
from functools import cache
from typing import Any

import pytest
import torch
from gpu_models import tiny
from passes_common import counts

from llmopt.compiler.capture_hf import capture_model
from llmopt.compiler.graph import Graph, target_name
from llmopt.compiler.pipeline import Context, PassReport, Pipeline, verify_hook
from llmopt.compiler.program import Program
from llmopt.compiler.recipe import RECIPES
from llmopt.compiler.target import Target
from llmopt.passes import PASSES

LAYERS = 2
TRITON = Target.parse("cuda:sm_90")


@cache
def lowered(name: str, dtype: torch.dtype = torch.bfloat16, **changes: Any) -> tuple[Program, list[PassReport]]:
    """A tiny Llama by the recipe `name`, for a GPU."""
    recipe = RECIPES[name]
    pipeline = Pipeline(recipe.build(PASSES), [verify_hook])
    program = pipeline.run(capture_model(tiny("llama", dtype, **changes)), Context(TRITON, recipe, None))
    return program, pipeline.reports


def regions(program: Program) -> list[set[str]]:
    """What each region that the step calls computes, views left out, in the order of the calls."""
    called = [program.graph(str(n.target)) for n in program.graph("step").fx.nodes if n.op == "call_module"]
    return [_names(graph) for graph in called]


def _names(graph: Graph) -> set[str]:
    views = {"getitem", "aten.reshape", "aten.transpose", "aten.split_with_sizes", "aten.unsqueeze", "aten.select"}
    return {target_name(n) for n in graph.calls()} - views


@pytest.mark.parametrize(
    ("name", "changes"),
    [("nvfp4", {}), ("int4-asym", {"attention_bias": True, "mlp_bias": True})],
    ids=["nvfp4", "int4-asym with biases"],
)
def test_a_layer_is_five_kernels_as_with_plain_weights(name: str, changes: dict[str, bool]) -> None:
    program, _ = lowered(name, **changes)
    found, plain = regions(program), regions(lowered("default", **changes)[0])
    assert found[2:7] == [
        {"rms_norm", "quantized_linear"},
        {"rope", "kv_write", "attend"},
        {"quantized_linear", "aten.add"},
        {"rms_norm", "quantized_linear", "gated"},
        {"quantized_linear", "aten.add"},
    ]
    swapped = [{n.replace("quantized_", "") for n in names} for names in found]
    assert swapped == plain
    assert len(found) == 5 * LAYERS + 3
    assert program.choices["providers"]["quantized_linear=triton"] == 4 * LAYERS
    assert program.choices["against"] == {}


def test_the_regions_of_equal_layers_are_the_same() -> None:
    program, _ = lowered("nvfp4")
    called = [str(n.target) for n in program.graph("step").fx.nodes if n.op == "call_module"]
    assert called[2:7] == called[7:12]


@pytest.mark.parametrize(
    ("name", "dtype", "why"),
    [
        ("w4a4", torch.bfloat16, "its activations are rounded to nvfp4"),
        ("nvfp4", torch.float32, "low-bit weights are multiplied in bfloat16, and its operand is float32"),
        ("nvfp4", torch.float16, "low-bit weights are multiplied in bfloat16, and its operand is float16"),
    ],
)
def test_what_no_kernel_takes_is_torch_s_and_said(
    name: str, dtype: torch.dtype, why: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "llmopt"):
        program, reports = lowered(name, dtype)
    (warned,) = caplog.messages
    assert warned.startswith("llmopt: torch multiplies with low-bit weights, op by op, which is slow: ")
    assert f"quantized_linear not by triton: {why}" in warned
    step = program.graph("step")
    assert counts(step)["quantized_linear"] == 4 * LAYERS
    assert program.choices["providers"]["quantized_linear=reference"] == 4 * LAYERS
    ((said, times),) = program.choices["against"].items()
    assert said.startswith(f"quantized_linear not by triton: {why}")
    assert times == 4 * LAYERS
    (note,) = (n for report in reports for n in report.stats.notes if n.startswith("by torch"))
    assert note.startswith(f"by torch: quantized_linear: {why}")
    assert note.endswith(f"(x{4 * LAYERS})")
    assert {"aten.add", "rms_norm"} in regions(program), "what stands around such a product is kernels over rows"
