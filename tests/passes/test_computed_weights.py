"""Products and norms whose weight is computed from parameters: folded, raised, and kernels like any other."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from passes_common import counts, run
from torch import Tensor, nn

from llmopt.compiler.capture import capture
from llmopt.compiler.graph import Graph
from llmopt.compiler.pipeline import Context, Pipeline, forward_error, verify_hook
from llmopt.compiler.program import ModelFacts, Program
from llmopt.compiler.recipe import RECIPES
from llmopt.compiler.target import Target
from llmopt.passes import Canonicalize, Fuse, InsertKVCache, RaiseAten
from llmopt.passes.fusible import reason_against
from llmopt.passes.partition import partition

TARGET = Target.parse("cuda:sm_90")
F = nn.functional


class Block(nn.Module):
    """Attention, and a test's way with a square weight and a vector behind it."""

    def __init__(self, behind: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.embed, self.qkv = nn.Embedding(96, 32), nn.Linear(32, 96, bias=False)
        self.w, self.g = nn.Parameter(torch.randn(32, 32)), nn.Parameter(torch.rand(32))
        self.head = nn.Linear(32, 96, bias=False)
        self.behind = behind

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        h = self.embed(input_ids)
        q, k, v = (x.unflatten(-1, (2, 16)).transpose(1, 2) for x in self.qkv(h).chunk(3, -1))
        h = h + F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        return self.head(h + self.behind(h, self.w, self.g))


def block(behind: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Program:
    torch.manual_seed(0)
    return capture(Block(behind).eval(), ModelFacts("block", 96, 64))


def fused(program: Program, fold: bool = True) -> tuple[Graph, list[str]]:
    pipeline = Pipeline((RaiseAten(), Canonicalize(), InsertKVCache(), Fuse()), [verify_hook])
    context = Context(TARGET, RECIPES["default"], None, fold_weights=fold)
    return pipeline.run(program, context).graph("step"), pipeline.reports[-1].stats.notes


SPELLINGS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "tanh": lambda h, w, g: F.linear(h, torch.tanh(w)),
    "mask": lambda h, w, g: F.linear(h, w * (w > 0)),
    "scale": lambda h, w, g: F.linear(h, w * g[:, None]),
    "weight norm": lambda h, w, g: F.linear(h, g[:, None] * w / w.norm(dim=1, keepdim=True)),
    "matmul": lambda h, w, g: h @ torch.tanh(w),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_product_with_a_computed_weight_is_a_product(spelling: str) -> None:
    raised, _ = run(block(SPELLINGS[spelling]), RaiseAten())
    after, _ = run(raised, Canonicalize())
    assert counts(after.graph("forward"))["linear"] == 3
    error, scale = forward_error(raised, after)
    assert error <= 64 * torch.finfo(torch.float32).eps * scale
    _, notes = fused(block(SPELLINGS[spelling]))
    assert "gemm x3" in notes[0]
    assert not [n for n in notes if n.startswith("by torch")]


def test_a_norm_with_a_computed_weight_is_a_norm() -> None:
    def behind(h: Tensor, w: Tensor, g: Tensor) -> Tensor:
        return F.softplus(g) * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-5))

    raised, _ = run(block(behind), RaiseAten())
    after, _ = run(raised, Canonicalize())
    assert counts(after.graph("forward"))["rms_norm"] == 1
    error, scale = forward_error(raised, after)
    assert error <= 64 * torch.finfo(torch.float32).eps * scale


def test_where_weights_may_change_torch_multiplies_and_it_is_said() -> None:
    step, notes = fused(block(SPELLINGS["tanh"]), fold=False)
    (product,) = step.calls("aten.linear")
    assert [n for n in step.calls() if n.meta["kernel"] == product.meta["kernel"]] == [product]
    assert any(n.startswith("by torch: aten.linear: ") for n in notes), notes


def test_an_aten_linear_with_a_weight_is_torch_s_too() -> None:
    """Its name is not that of llmopt's own op, which the templates multiply."""
    step, _ = fused(block(SPELLINGS["tanh"]))
    product = next(step.calls("linear"))
    assert reason_against(product, TARGET) is None
    product.target = torch.ops.aten.linear.default
    assert reason_against(product, TARGET) == "aten.linear is not among the ops that can be printed"
    assert [k.kind for k in partition(step, TARGET) if product in k.nodes] == ["torch"]
