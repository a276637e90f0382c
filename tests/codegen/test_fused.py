"""Every region of lowered steps, its code run by Triton's interpreter, against its own graph in fp64."""

from __future__ import annotations

import pytest
import torch
from fused_cases import Step, inputs_of, lowered, reference, regions, run

pytestmark = pytest.mark.interp

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
        check(family, name, step)


def check(family: str, name: str, step: Step, parts: int = 1) -> None:
    torch.manual_seed(0)
    graph = lowered(family).graph(name)
    inputs = inputs_of(graph, step)
    exact, plain = reference(graph, inputs, wide=True), reference(graph, inputs, wide=False)
    got = run(graph, inputs, step, parts)
    for place, wanted in exact.items():
        assert got[place].shape == wanted.shape, (name, place)
        allowed = 4 * (plain[place] - wanted).abs().max() + 1e-6 * wanted.abs().max()
        error = (got[place] - wanted).abs().max()
        assert error <= allowed, f"{name} {place}: off by {error:.2g}, torch by {allowed / 4:.2g}"
