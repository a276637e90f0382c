"""Models that compute their weights or read heads in an order of their own: tokens of a GPU's kernels, interpreted."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import llmopt
from llmopt.compiler.program import ModelFacts
from llmopt.compiler.recipe import Recipe
from llmopt.runtime.build import build
from llmopt.runtime.engine import SamplingParams
from llmopt.runtime.gpu_code import code_for
from llmopt.runtime.session import open_session

pytestmark = [pytest.mark.interp, pytest.mark.timeout(600)]

F = nn.functional
FACTS = ModelFacts("computed", 64, 64)
TAILS = {
    "scaled by head": lambda o: (o * torch.tensor([0.5, 2.0, -1.0, 1.5])[:, None, None]).transpose(1, 2).flatten(2),
    "channels before heads": lambda o: o.permute(0, 2, 3, 1).flatten(2),
}


class Computed(nn.Module):
    """A product whose weight is a tanh and one of two vectors, a norm whose weight is a softplus; heads [4] of [4]."""

    def __init__(self, tail):
        super().__init__()
        torch.manual_seed(2)
        self.embed, self.qkv = nn.Embedding(64, 16), nn.Linear(16, 48, bias=False)
        self.w, self.g = nn.Parameter(torch.randn(16, 16)), nn.Parameter(torch.randn(16))
        self.down, self.up = nn.Linear(16, 4, bias=False), nn.Linear(4, 16, bias=False)
        self.head, self.tail = nn.Linear(16, 64, bias=False), tail

    def forward(self, input_ids, position_ids):
        h = self.embed(input_ids)
        q, k, v = (x.unflatten(-1, (4, 4)).transpose(1, 2) for x in self.qkv(h).chunk(3, -1))
        h = h + F.linear(self.tail(F.scaled_dot_product_attention(q, k, v, is_causal=True)), torch.tanh(self.w))
        h = h + self.up(self.down(h))  # a LoRA of rank 4
        scale = torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-5)
        return self.head(F.softplus(self.g) * (h * scale))


@pytest.mark.parametrize("name", TAILS)
def test_tokens_are_the_reference_s(name):
    from llmopt.codegen.interpret import launcher

    prompts, params = [[3, 1, 4, 1, 5], [9], [2, 6, 5]], SamplingParams(max_new_tokens=4)
    recipe = Recipe.parse("default")
    program, report, context = build(Computed(TAILS[name]).eval(), recipe, "cuda:sm_90", facts=FACTS)
    notes = [note for passed in report.passes for note in passed.stats.notes]
    assert any(note.startswith("kernels: attention x1, gemm x5") for note in notes), notes
    code = code_for(program, context.target)
    session = open_session(program, recipe, context.target, code, launcher=launcher, device="cpu")
    wanted = llmopt.compile(Computed(TAILS[name]).eval(), recipe="reference", target="cpu", facts=FACTS)
    for some in (prompts, prompts[:1]):
        expected = wanted.engine.generate(some, params)
        assert len({token for tokens in expected for token in tokens}) > 2
        assert session.engine.generate(some, params) == expected
    # heads that are scaled cross as they are, [1, H, N, D], which a product does not read itself
    said = {note for region in code.codes.values() for note in region.notes}
    assert bool(said) == (name == "scaled by head")
    assert all(note.startswith("torch multiplies") for note in said)
