"""Products that are not with weights: what becomes pointwise, and what may not."""

from __future__ import annotations

import pytest
import torch
from passes_common import counts, run
from torch import Tensor, nn

from llmopt.compiler.capture import capture
from llmopt.compiler.errors import PassMatchedNothing
from llmopt.compiler.evaluate import evaluate
from llmopt.compiler.program import ModelFacts
from llmopt.passes import RaiseAten


class Angles(nn.Module):
    """RoPE's angles as a product of frequencies [1, D, W] and positions [B, W, T] (W copies of them)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.table = nn.Embedding(96, 96)
        self.register_buffer("inv", torch.rand(96, width) * 7)
        self.width = width

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        at = position_ids[:, None, :].float().expand(-1, self.width, -1)
        inv = self.inv[None].expand(position_ids.shape[0], -1, -1)
        return self.table(input_ids) + (inv @ at).transpose(1, 2).cos()


def test_a_product_along_one_element_is_a_mul_of_the_same_bits() -> None:
    model = Angles(1)
    after, _ = run(capture(model, ModelFacts("angles", 96, 64)), RaiseAten())
    found = counts(after.graph("forward"))
    assert found["aten.mul"] == 1
    assert "aten.matmul" not in found
    ids = torch.arange(12).view(2, 6)
    given = {"input_ids": ids, "position_ids": ids * 4099}
    (made,) = evaluate(after.graph("forward"), given, after.weights)
    assert torch.equal(made, model(ids, ids * 4099))


def test_a_product_along_two_stays() -> None:
    with pytest.raises(PassMatchedNothing):
        run(capture(Angles(2), ModelFacts("angles", 96, 64)), RaiseAten())
