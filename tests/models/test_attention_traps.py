"""Attention that looks like a known spelling and is not: the tokens of plain torch, or an error that says why."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import llmopt
from llmopt.compiler.errors import LlmoptError
from llmopt.compiler.program import ModelFacts

VOCAB, WIDTH, HEADS = 32, 64, 4


class Trap(nn.Module):
    """One attention of the kind under test between an embedding and a head."""

    def __init__(self, attend: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attend = attend
        self.table, self.mix, self.head = nn.Embedding(VOCAB, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, VOCAB)
        self.register_buffer("uneven", torch.tensor([1, 3]))

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        x = self.table(input_ids) * 3
        h = self.mix(x).unflatten(-1, (HEADS, WIDTH // HEADS)).transpose(1, 2)
        return self.head(x + 4 * self.attend(self, h).transpose(1, 2).flatten(2))


def causal(h: Tensor) -> Tensor:
    return torch.ones(h.shape[2], h.shape[2], dtype=torch.bool).tril()


def written(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(-2, -1)).masked_fill(~causal(q), float("-inf")).softmax(-1) @ v


def spread(h: Tensor) -> tuple[int, int, int]:
    return h.shape[0], h.shape[2], h.shape[3]


def first_heads_repeated(m: nn.Module, h: Tensor) -> Tensor:
    b, t, d = spread(h)
    k = h[:, :, None][:, :2].expand(b, 2, 2, t, d).reshape(b, 4, t, d)
    return F.scaled_dot_product_attention(h, k, k, is_causal=True)


def one_head_for_all(m: nn.Module, h: Tensor) -> Tensor:
    b, t, d = spread(h)
    k = h.unsqueeze(2)[:, 1:2].expand(b, 1, 4, t, d).reshape(b, 4, t, d)
    return F.scaled_dot_product_attention(h, k, k, is_causal=True)


def uneven_groups(m: nn.Module, h: Tensor) -> Tensor:
    k = h[:, :2].repeat_interleave(m.uneven, dim=1, output_size=4)
    return written(h, k, k)


def scaled_after_a_finite_mask(m: nn.Module, h: Tensor) -> Tensor:
    scores = (h @ h.transpose(-2, -1)).masked_fill(~causal(h), -1e4) * 1e-4
    return scores.softmax(-1) @ h


TRAPS: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "first heads repeated": first_heads_repeated,
    "one head for all": one_head_for_all,
    "uneven groups": uneven_groups,
    "scaled after a finite mask": scaled_after_a_finite_mask,
    "one key head, four value heads": lambda m, h: written(h, h[:, :1], h),
    "four key heads, one value head": lambda m, h: written(h, h, h[:, :1]),
    "keys and values in other groups": lambda m, h: written(
        h, h[:, :1].repeat_interleave(4, 1), h[:, :2].repeat_interleave(2, 1)
    ),
    "one query head": lambda m, h: written(h[:, :1], h, h),
    "even groups": lambda m, h: written(h, h[:, :2].repeat_interleave(2, 1), h[:, 2:].repeat_interleave(2, 1)),
}


@pytest.mark.parametrize("recipe", ["reference", "default"])
@pytest.mark.parametrize("name", TRAPS)
def test_the_tokens_of_torch_or_an_error(name: str, recipe: str) -> None:
    model = Trap(TRAPS[name]).eval()
    refused = ""
    try:
        mine = llmopt.compile(model, recipe=recipe, facts=ModelFacts("trap", VOCAB, 64))
    except LlmoptError as error:
        refused = str(error)
    if refused:
        assert name != "even groups"
        assert "test_attention_traps.py:" in refused
        assert "fix the rewrite" not in refused
        return
    ids = [3, 7, 1, 9, 9, 2]
    want = list(ids)
    with torch.no_grad():
        for _ in range(16):
            at = torch.arange(len(want))[None]
            want.append(int(model(torch.tensor([want]), at)[0, -1].argmax()))
    assert mine.generate(ids, max_new_tokens=16) == want[len(ids) :]


class FarWindow(nn.Module):
    """A window wider than any mask is looked at without cause, kept in a buffer."""

    def __init__(self, context: int, window: int) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCAB, VOCAB)
        self.table.weight.data.copy_(torch.eye(VOCAB))
        distance = torch.arange(context)[:, None] - torch.arange(context)[None]
        self.register_buffer("mask", ((distance >= 0) & (distance < window))[None, None])
        self.head = nn.Linear(VOCAB, VOCAB, bias=False)
        self.head.weight.data.copy_(torch.eye(VOCAB))

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        h = self.table(input_ids)[:, None]
        t = input_ids.shape[1]
        return self.head(F.scaled_dot_product_attention(h * 0, h, h, attn_mask=self.mask[:, :, :t, :t])[:, 0])


def test_a_window_beyond_the_usual_check_is_found() -> None:
    model = FarWindow(5000, 4500).eval()
    mine = llmopt.compile(model, recipe="reference", facts=ModelFacts("far", VOCAB, 5000))
    (node,) = mine.program.graph("forward").calls("attention")
    assert node.args[5] == 4500


def test_a_mask_too_long_to_check_is_refused() -> None:
    with pytest.raises(LlmoptError, match="may change beyond the 8192 tokens checked"):
        llmopt.compile(FarWindow(8300, 8250).eval(), recipe="reference", facts=ModelFacts("far", VOCAB, 8300))
