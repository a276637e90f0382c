"""Steps whose weights and activations are low-bit, for GPUs with scaled matrix instructions, through Triton's
interpreter: which kernels they are, and how exact. No such GPU has run them."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from fused_cases import Step, reference, run
from interpreted import rounding
from lowbit_steps import Case, by_reference, errors, lowered
from torch import nn

from llmopt.codegen.kernel import RegionCode
from llmopt.runtime.prepared import only_prepared
from llmopt.runtime.session import Session, open_session

pytestmark = [pytest.mark.interp, pytest.mark.timeout(600)]

TARGET = "cuda:sm_100"
WHOLE = Case("w4a4", "nvfp4", (("intermediate_size", 128),))
BIASED = Case("w4a4", "nvfp4", (("attention_bias", True), ("mlp_bias", True)))  # halves end inside a tile of rows, too


class HeadNorm(nn.Module):
    """A product of what attention made, normed head by head as [B, H, T, D]."""

    def __init__(self, product: nn.Linear, heads: int) -> None:
        super().__init__()
        self.product, self.heads = product, heads
        self.weight = nn.Parameter(torch.rand(product.in_features // heads).to(product.weight.dtype) + 0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, T, K] -> [B, T, N]."""
        heads = x.unflatten(-1, (self.heads, -1)).transpose(1, 2).float()
        normed = heads * torch.rsqrt(heads.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.product((self.weight * normed.to(x.dtype)).transpose(1, 2).flatten(-2))


class NormedHeads(Case):
    """A model with such products behind attention."""

    def model(self) -> Any:
        """As every case's, changed."""
        model = super().model()
        for layer in model.model.layers:
            layer.self_attn.o_proj = HeadNorm(layer.self_attn.o_proj, model.config.num_attention_heads)
        return model


HEADS = NormedHeads("w4a4", "nvfp4", WHOLE.changes)

STEPS = (
    Step.decoding("1", (20,)),
    Step.decoding("8", (0, 17, 33)),
    Step("many", (0, 0, 0, 1, 2, 2), (5, 6, 7, 18, 0, 1), (2, 3, 5)),
)


@cache
def opened(case: Case) -> Session:
    """Over interpreted kernels."""
    from llmopt.codegen.interpret import launcher

    program, recipe, target, code = lowered(case, TARGET)
    return open_session(program, recipe, target, code, launcher=launcher, device="cpu")


def calls(region: RegionCode) -> list[str]:
    """Templates and ops of torch, in order."""
    return [str(c.op) if c.kernel is None else c.kernel.template.partition(":")[0] for c in region.calls]


@pytest.mark.parametrize("case", [WHOLE, BIASED], ids=["whole", "biased"])
def test_logits_are_as_near_to_fp64_as_the_reference_s(case: Case) -> None:
    """Rounding activations takes both far away from it."""
    with rounding():
        ours, theirs = errors(case, opened(case)), errors(case, by_reference(case))
    for kind, error in ours.items():
        assert error <= 1.2 * theirs[kind], f"{kind}: {error:.2g} from fp64, the reference {theirs[kind]:.2g}"


@pytest.mark.parametrize("step", STEPS, ids=lambda s: s.shape)
@pytest.mark.parametrize("case", [WHOLE, BIASED, HEADS], ids=["whole", "biased", "heads"])
def test_a_region_is_what_the_reference_makes_of_it(case: Case, step: Step) -> None:
    """Within some roundings to bf16, norms, gates, biases and residuals included: a code apart would be seen."""
    program, _, target, _ = lowered(case, TARGET)
    make = torch.Generator().manual_seed(3)
    for node in program.graph("step").fx.nodes:
        if node.op == "call_module" and any(program.graph(str(node.target)).calls("quantized_linear")):
            graph = program.graph(str(node.target))
            inputs = []
            for at, inner in zip(node.args, graph.inputs(), strict=True):
                shape = [size if isinstance(size, int) else len(step.positions) for size in inner.meta["val"].shape]
                is_weight = at.op == "get_attr"
                x = program.weights[at.target].load() if is_weight else torch.randn(shape, generator=make).bfloat16()
                inputs.append(x)
            with rounding():
                got = run(graph, inputs, step, target=target)["out0"].double()
            want = reference(graph, inputs, wide=False)["out0"].double()
            assert float((got - want).norm() / want.norm()) <= 0.01, (node.target, step.shape)


def test_a_product_is_two_kernels_in_every_class() -> None:
    program, _, _, code = lowered(WHOLE, TARGET)
    called = [str(n.target) for n in program.graph("step").fx.nodes if n.op == "call_module"]
    two = ["rounded", "scaled"]
    behind = {"1": ["gemv"], "8": ["gemm"], "many": ["rows", "linear"]}
    for shape, head in behind.items():
        made = [code.code(name, shape) for name in called]
        assert [region.notes for region in made] == [()] * len(called)
        attention = [made[3]]
        assert [calls(region) for region in made if region not in attention] == [["rows"], ["rows"], *[two] * 4, head]
        assert [len(region.prepared) for region in made] == [0, 0, 1, 0, 1, 1, 1, 0]
        assert [region.prepared for region in made] == [code.code(name, "64").prepared for name in called]
    for name in called:
        region = code.code(name, "many")
        kernels = {k.digest(): k for k in region.kernels()}
        assert RegionCode.from_data(region.to_data(), kernels) == region


def test_a_norm_and_a_gate_are_part_of_them() -> None:
    *_, code = lowered(WHOLE, TARGET)
    first, second = (call.kernel for call in code.code("gemm_2", "8").calls)
    assert first is not None
    assert second is not None
    assert dict(first.constants)["NORM"] == 1
    assert dict(second.constants)["PARTS"] == 2


def test_halves_that_end_inside_a_tile_of_rows_are_gated_by_a_kernel_over_rows() -> None:
    *_, code = lowered(BIASED, TARGET)
    region = code.code("gemm_2", "8")
    assert calls(region) == ["rounded", "scaled", "rows"]
    (note,) = region.notes
    assert "its row 96 begins a part; wanted a multiple of 128" in note


def test_what_lies_in_another_order_is_made_by_a_kernel_over_rows_first() -> None:
    *_, code = lowered(HEADS, TARGET)
    region = code.code("gemm_1", "8")
    assert calls(region) == ["rows", "rounded", "scaled"]
    (note,) = region.notes
    assert note.startswith("a kernel over rows makes what is rounded: ")
    made, rounded = region.calls[0].args, region.calls[1].args
    assert "tmp0" in made
    assert "in0" in made
    assert "tmp0" in rounded


def test_weights_stay_on_the_host() -> None:
    program, *_ = lowered(WHOLE, TARGET)
    assert len(only_prepared(program)) == 4 * 3  # codes, scales, global scale


@pytest.mark.parametrize(
    ("recipe", "target", "why"),
    [
        (
            "w4a4",
            "cuda:sm_90",
            "its activations are rounded to nvfp4, and this GPU has no instruction for scaled products",
        ),
        ("w8a8", "cuda:sm_90", "its weights are in int8 and activations in int8; kernels take both in one of mxfp4,"),
        (
            "w8a8",
            TARGET,
            "its weights are in int8 and activations in int8; kernels take both in one of mxfp4, mxfp8, nv",
        ),
    ],
)
def test_what_is_not_taken_says_why(recipe: str, target: str, why: str) -> None:
    program, *_ = lowered(Case(recipe, "int8"), target)
    assert any(why in str(text) for text in program.choices["against"])
