"""Models that cannot be cached: an error that names the line, or else exactly the tokens of plain torch.

Each case puts one line between a GPT's blocks and its final norm. Nothing that lets tokens or sequences see each other
outside of causal attention may compile into something else.
"""

from __future__ import annotations

import math
import re

import pytest
import torch
import torch.nn.functional as F
from models.scratch import CONTEXT, GPT, HEADS, VOCAB, WIDTH, greedy, randomized
from torch import Tensor, nn

import llmopt
from llmopt.compiler.errors import LlmoptError
from llmopt.compiler.program import ModelFacts

PROMPTS = [[5], [7, 8], [3, 1, 4, 1, 5, 9, 2, 6], list(range(40, 57))]


class Odd(GPT):
    """A GPT with one more step, `odd(self, x [B, T, WIDTH], input_ids, position_ids)`, before its final norm."""

    def __init__(self, odd) -> None:
        super().__init__()
        self.odd = odd
        self.mix = nn.Parameter(torch.empty(CONTEXT, CONTEXT))
        self.conv = nn.Conv1d(WIDTH, WIDTH, 3)
        self.gru = nn.GRU(WIDTH, WIDTH, batch_first=True)
        self.register_buffer("seen", torch.zeros(WIDTH))

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        x = self.tokens(input_ids) + self.places(position_ids)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(self.odd(self, x, input_ids, position_ids)))


def heads(x: Tensor) -> Tensor:
    return x.view(x.shape[0], x.shape[1], HEADS, WIDTH // HEADS).transpose(1, 2)


def merged(x: Tensor) -> Tensor:
    return x.transpose(1, 2).reshape(x.shape[0], x.shape[2], WIDTH)


def attend(x: Tensor, mask: Tensor) -> Tensor:
    return merged(F.scaled_dot_product_attention(heads(x), heads(x), heads(x), attn_mask=mask))


def causal(t: int) -> Tensor:
    return torch.tril(torch.ones(t, t, dtype=torch.bool))


def bidirectional(m, x, ids, at):
    return merged(F.scaled_dot_product_attention(heads(x), heads(x), heads(x)))


def prefix_mask(m, x, ids, at):
    return attend(x, causal(x.shape[1]) | (torch.arange(x.shape[1]) < 4))


def alibi(m, x, ids, at):
    t = torch.arange(x.shape[1])
    bias = (t[None] - t[:, None]) * 0.5
    return attend(x, bias.masked_fill(t[None] > t[:, None], -math.inf).float())


def window_of_half_the_tokens(m, x, ids, at):
    return attend(x, causal(x.shape[1]) & ~torch.tril(torch.ones_like(causal(x.shape[1])), -(x.shape[1] // 2) - 1))


def mask_of_the_tokens(m, x, ids, at):
    return attend(x, causal(x.shape[1]) & (ids != 3)[:, None, None] | torch.eye(x.shape[1], dtype=torch.bool))


def mask_below_the_softcap(m, x, ids, at):
    scores = heads(x) @ heads(x).transpose(-1, -2) / 4
    scores = torch.tanh(scores.masked_fill(~causal(x.shape[1]), -math.inf) / 5.0) * 5.0
    return merged(F.softmax(scores, -1) @ heads(x))


def anticausal(m, x, ids, at):
    return attend(x, causal(x.shape[1]).T)


def over_sequences(m, x, ids, at):
    return (
        F.scaled_dot_product_attention(*(heads(x.transpose(0, 1)),) * 3, is_causal=True)
        .transpose(1, 2)
        .reshape(x.shape[1], x.shape[0], WIDTH)
        .transpose(0, 1)
    )


def batch_and_heads_swapped(m, x, ids, at):
    q = heads(x).transpose(0, 1)
    return merged(F.scaled_dot_product_attention(q, q, q, is_causal=True).transpose(0, 1))


def linear_attention(m, x, ids, at):
    return ((x @ x.transpose(1, 2)) * causal(x.shape[1])) @ x


def einsum_over_tokens(m, x, ids, at):
    return x + torch.einsum("btc,bsd->btd", x, x) * 0.01


def causal_convolution(m, x, ids, at):
    return x + m.conv(F.pad(x.transpose(1, 2), (2, 0))).transpose(1, 2)


def recurrence(m, x, ids, at):
    return x + m.gru(x)[0]


def token_shift(m, x, ids, at):
    return x + torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], 1)


def padded_shift(m, x, ids, at):
    return x + F.pad(x, (0, 0, 1, 0))[:, :-1]


def rolled(m, x, ids, at):
    return x + torch.roll(x, 1, 1)


def flipped(m, x, ids, at):
    return x + x.flip(1)


def running_sum(m, x, ids, at):
    return x + x.cumsum(1) * 0.1


def mean_of_tokens(m, x, ids, at):
    return x + x.mean(1, keepdim=True)


def mean_of_all(m, x, ids, at):
    return x - x.mean()


def largest_of_all(m, x, ids, at):
    return x / x.abs().max()


def largest_along_no_axis(m, x, ids, at):
    return x / x.abs().amax(dim=())


def norm_of_all(m, x, ids, at):
    return x / x.norm()


def variance_of_tokens(m, x, ids, at):
    return x / (x.var(1, keepdim=True, correction=0) + 1)


def softmax_over_tokens(m, x, ids, at):
    return x * x.softmax(1)


def sorted_tokens(m, x, ids, at):
    return x.sort(dim=1).values


def group_norm(m, x, ids, at):
    return F.group_norm(x.transpose(1, 2), 4).transpose(1, 2)


def group_norm_hidden(m, x, ids, at):
    return F.group_norm(x.transpose(1, 2)[..., None], 4)[..., 0].transpose(1, 2)


def instance_norm(m, x, ids, at):
    return F.instance_norm(x.transpose(1, 2)).transpose(1, 2)


def pooled(m, x, ids, at):
    return x + F.avg_pool1d(F.pad(x.transpose(1, 2), (2, 0)), 3, 1).transpose(1, 2)


def fourier(m, x, ids, at):
    return torch.fft.fft(x, dim=1).real


def features_from_tokens(m, x, ids, at):
    return x.reshape(x.shape[0], WIDTH, x.shape[1]).transpose(1, 2)


def reinterpreted(m, x, ids, at):
    return x.transpose(1, 2).reshape(x.shape)


def scrambled_batch(m, x, ids, at):
    return x.transpose(0, 1).reshape(x.shape)


def mixer(m, x, ids, at):
    return (x.transpose(1, 2) @ m.mix[: x.shape[1], : x.shape[1]].triu()).transpose(1, 2)


def batch_mean(m, x, ids, at):
    return x - x.mean(0)


def batch_softmax(m, x, ids, at):
    return x * x.softmax(0)


def first_token(m, x, ids, at):
    return x + x[:, :1]


def last_token(m, x, ids, at):
    return x + x[:, -1:]


def last_token_by_select(m, x, ids, at):
    return x + x.select(1, -1)[:, None]


def previous_by_gather(m, x, ids, at):
    return x + x.gather(1, (at - 1).clamp(min=0)[..., None].expand(-1, -1, WIDTH))


def previous_by_index(m, x, ids, at):
    return x + x[:, (torch.arange(x.shape[1]) - 1).clamp(min=0)]


def one_index_for_all(m, x, ids, at):
    return x + x.gather(2, torch.zeros(1, 1, 1, dtype=torch.int64))


def root_of_the_count(m, x, ids, at):
    return x * x.shape[1] ** -0.5


def count_by_fill(m, x, ids, at):
    return x + torch.full((1,), x.shape[1]) * 0.1


def count_by_full_like(m, x, ids, at):
    return x + torch.full_like(x, x.shape[1]) * 0.1


def count_by_logarithm(m, x, ids, at):
    return x * math.log(x.shape[1] + 1)


def row_of_the_count(m, x, ids, at):
    return x + m.places.weight[x.shape[1] - 1]


def counted_from_the_end(m, x, ids, at):
    return x + (torch.arange(x.shape[1]) - x.shape[1])[:, None] * 0.1


def even_numbers(m, x, ids, at):
    return x + m.places.weight[: 2 * x.shape[1] : 2]


def reversed_numbers(m, x, ids, at):
    return x + m.places(torch.arange(x.shape[1] - 1, -1, -1))


def spread_from_0_to_1(m, x, ids, at):
    return x + torch.linspace(0, 1, x.shape[1])[:, None]


def position_from_the_last(m, x, ids, at):
    return x + (at - at[:, -1:])[..., None] * 0.1


def position_from_the_largest(m, x, ids, at):
    return x + (at - at.max())[..., None] * 0.1


def branch_on_values(m, x, ids, at):
    return x if x.sum() > 0 else -x


def branch_on_the_count(m, x, ids, at):
    return x if x.shape[1] > 4 else -x


def random_numbers(m, x, ids, at):
    return x + torch.rand_like(x)


def dropout_left_on(m, x, ids, at):
    return F.dropout(x, 0.5, training=True)


def keeps_state(m, x, ids, at):
    m.seen += 1
    return x + m.seen


def unfolded(m, x, ids, at):
    return x + F.pad(x, (0, 0, 2, 0)).unfold(1, 3, 1).mean(-1)


def duplicated(m, x, ids, at):
    return x.repeat(1, 2, 1)[:, : x.shape[1]]


def pairs_of_tokens(m, x, ids, at):
    return x + torch.cdist(x, x).sum(-1, keepdim=True)


ODD = [
    bidirectional, prefix_mask, alibi, window_of_half_the_tokens, mask_of_the_tokens, mask_below_the_softcap,
    anticausal, over_sequences, batch_and_heads_swapped, linear_attention, einsum_over_tokens, causal_convolution,
    recurrence,
    token_shift, padded_shift, rolled, flipped, running_sum, mean_of_tokens, mean_of_all, largest_of_all,
    largest_along_no_axis, norm_of_all, variance_of_tokens, softmax_over_tokens, sorted_tokens, group_norm,
    group_norm_hidden, instance_norm, pooled, fourier, features_from_tokens, reinterpreted, scrambled_batch, mixer,
    batch_mean, batch_softmax, first_token, last_token, last_token_by_select, previous_by_gather, previous_by_index,
    one_index_for_all, root_of_the_count, count_by_fill, count_by_full_like, count_by_logarithm, row_of_the_count,
    counted_from_the_end, even_numbers, reversed_numbers, spread_from_0_to_1, position_from_the_last,
    position_from_the_largest, branch_on_values, branch_on_the_count, random_numbers, dropout_left_on, keeps_state,
    unfolded, duplicated, pairs_of_tokens,
]  # fmt: skip
EQUAL = {one_index_for_all}  # may compile, if it means the same
SAYS = {
    bidirectional: "neither is_causal nor a mask",
    prefix_mask: "neither causal nor a causal sliding window",
    alibi: "a position bias",
    window_of_half_the_tokens: "depends on the number of tokens",
    mask_of_the_tokens: "depends on the tokens",
    mask_below_the_softcap: "masked before the soft-cap",
    mean_of_tokens: "works along the token axis",
    mean_of_all: "works along the token axis",
    root_of_the_count: "computes with the number of tokens",
    first_token: "works along the token axis",
    batch_mean: "mixes sequences",
    random_numbers: "random",
    keeps_state: "seen",
    branch_on_the_count: "5 <=",
    causal_convolution: "conv1d",
}


@pytest.mark.parametrize("odd", ODD, ids=lambda f: f.__name__)
def test_an_error_that_names_the_line_or_the_same_tokens(odd):
    model = randomized(Odd(odd))
    try:
        compiled = llmopt.compile(model, recipe="reference", facts=ModelFacts("Odd", VOCAB, CONTEXT))
    except LlmoptError as error:
        message = str(error)
        assert re.search(r"(test_unsupported|scratch)\.py:\d+", message), message
        assert "wanted" in message
        assert SAYS.get(odd, "") in message
    else:
        assert odd in EQUAL, "compiled; if that is right, say so in EQUAL"
        assert compiled.generate(PROMPTS, max_new_tokens=10) == [greedy(model, p, 10) for p in PROMPTS]


def test_the_line_named_is_the_one_at_fault():
    line = Odd.forward.__code__.co_firstlineno + 4  # torch keeps the frames of forwards, not of functions they call
    with pytest.raises(LlmoptError, match=rf"test_unsupported\.py:{line}\b.*aten\.mean -> f32\[B, 1, 64\]"):
        llmopt.compile(randomized(Odd(mean_of_tokens)), recipe="reference", facts=ModelFacts("Odd", VOCAB, CONTEXT))


class LastOnly(GPT):
    """Returns the logits of the last token."""

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        return super().forward(input_ids, position_ids)[:, -1:]


def test_logits_of_the_last_token_only_are_refused():
    with pytest.raises(LlmoptError, match=r"logits \[B, T, 96\]"):
        llmopt.compile(randomized(LastOnly()), recipe="reference")
