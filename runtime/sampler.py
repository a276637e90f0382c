"""From logits to tokens: greedy, or argmax(log p + Gumbel noise), noise that the position alone decides.

The noise of a token is Philox4x32-10 (Salmon et al., SC'11) of (seed, sequence, position, vocabulary index):
no generator state, so a sample depends neither on the batch around it nor on how many tokens a step yields.
Key = (seed low, seed high); counter = (index // 4, position, sequence, 0); index % 4 picks the word. A kernel
that computes the same words and the same fp32 formula gives the same tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real

import torch
from torch import Tensor

from llmopt.compiler.errors import InputError
from llmopt.runtime.transfer import to_device

_WORD = 0xFFFFFFFF
_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_COLDEST = 1e-30  # divided by less, a logit could overflow fp32


@dataclass(frozen=True)
class SamplingParams:
    """How one sequence is decoded.

    temperature 0 takes the most likely token; else logits / temperature, cut to the `top_k` largest (0: all;
    ties of the k-th stay), then to the smallest set of probability >= `top_p`, as transformers does.
    `stop_token_ids` end the sequence besides the model's own end tokens, which `ignore_eos` turns off.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        numbers = {"max_new_tokens": Integral, "temperature": Real, "top_p": Real, "top_k": Integral, "seed": Integral}
        for name, kind in numbers.items():
            value = getattr(self, name)
            if not isinstance(value, kind) or isinstance(value, bool):
                wanted = "a whole number" if kind is Integral else "a number"
                raise InputError(f"sampling: {name} is {value!r} ({type(value).__name__}); wanted {wanted}")
        stops = self.stop_token_ids
        if not isinstance(stops, tuple) or not all(isinstance(s, Integral) and not isinstance(s, bool) for s in stops):
            raise InputError(f"sampling: stop_token_ids is {stops!r}; wanted a tuple of token ids")
        for ok, name, wanted in (
            (self.max_new_tokens >= 1, "max_new_tokens", "at least 1"),
            (
                math.isfinite(self.temperature) and self.temperature >= 0,
                "temperature",
                "0 (greedy) or a finite positive number",
            ),
            (0 < self.top_p <= 1, "top_p", "a probability in (0, 1]; 1 keeps every token"),
            (self.top_k >= 0, "top_k", "0 (every token) or a positive count"),
            (0 <= self.seed < 2**63, "seed", "an integer in [0, 2**63)"),
        ):
            if not ok:
                raise InputError(f"sampling: {name} is {getattr(self, name)}; wanted {wanted}")


@dataclass(frozen=True)
class SampleRows:
    """The parameters of R rows of logits: tensors [R] on the logits' device, and what the host knows of them.

    `tail` is 1 - top_p (fp32); `sampled`, `max_k` and `nucleus` say which parts of the work some row needs.
    """

    temperature: Tensor
    tail: Tensor
    top_k: Tensor
    seed: Tensor
    sequence: Tensor
    sampled: bool
    max_k: int
    nucleus: bool

    @classmethod
    def of(
        cls, params: Sequence[SamplingParams], sequences: Sequence[int], device: torch.device | str = "cpu"
    ) -> SampleRows:
        """Rows with these parameters; `sequences` are the noise's sequence numbers, in [0, 2**32)."""
        warm = [p for p in params if p.temperature > 0]
        reals = [[p.temperature for p in params], [1.0 - p.top_p for p in params]]
        whole = [[p.top_k for p in params], [p.seed for p in params], list(sequences)]
        temperature, tail = to_device(torch.tensor(reals, dtype=torch.float32), device)
        top_k, seed, sequence = to_device(torch.tensor(whole, dtype=torch.int64), device)
        return cls(
            temperature, tail, top_k, seed, sequence,
            sampled=bool(warm),
            max_k=max((p.top_k for p in warm), default=0),
            nucleus=any(p.top_p < 1 for p in warm),
        )  # fmt: skip


def sample(logits: Tensor, rows: SampleRows, position: Tensor | None = None) -> Tensor:
    """One token per row: logits [R, V] of any float dtype -> int64 [R].

    `position` int64 [R] is the absolute position the new token takes; only sampled rows need it.
    """
    greedy = logits.argmax(-1)
    if not rows.sampled or position is None:
        return greedy
    warm = rows.temperature > 0
    scores = logits.float() / torch.where(warm, rows.temperature.clamp_min(_COLDEST), 1.0)[:, None]
    if rows.max_k:
        scores = keep_top_k(scores, rows.top_k, rows.max_k)
    if rows.nucleus:
        scores = keep_top_p(scores, rows.tail)
    noisy = scores + gumbel(rows.seed, rows.sequence, position, logits.shape[-1])
    return torch.where(warm, noisy.argmax(-1), greedy)


def keep_top_k(scores: Tensor, top_k: Tensor, max_k: int) -> Tensor:
    """Scores [R, V] with all below the row's k-th largest at -inf; top_k int64 [R] <= max_k, 0 keeps all."""
    largest = scores.topk(min(max_k, scores.shape[-1]), dim=-1).values
    kth = largest.gather(-1, (top_k - 1).clamp(0, largest.shape[-1] - 1)[:, None])
    return scores.masked_fill((scores < kth) & (top_k > 0)[:, None], float("-inf"))


def keep_top_p(scores: Tensor, tail: Tensor) -> Tensor:
    """Scores [R, V] with the least likely tokens, of total probability <= `tail` [R], at -inf."""
    ascending, order = scores.sort(dim=-1)
    drop = (ascending.softmax(-1).cumsum(-1) <= tail[:, None]) & (tail > 0)[:, None]
    drop[:, -1] = False
    return scores.masked_fill(torch.empty_like(drop).scatter_(-1, order, drop), float("-inf"))


def gumbel(seed: Tensor, sequence: Tensor, position: Tensor, vocab_size: int) -> Tensor:
    """Gumbel noise fp32 [R, vocab_size] for the rows keyed by int64 [R] seed, sequence and position."""
    block = torch.arange(-(-vocab_size // 4), device=seed.device)
    row = torch.stack((position, sequence, torch.zeros_like(seed)))[..., None].expand(-1, -1, len(block))
    counter = torch.cat((block.expand(1, len(seed), -1), row))
    words = philox(counter, torch.stack((seed & _WORD, seed >> 32))[..., None])
    bits = words.permute(1, 2, 0).flatten(1)[:, :vocab_size]
    # exponential = -log(1 - u): u is finest near 0, where the winners are; u < 1 keeps the noise finite
    u = (bits.float() * 2.0**-32 + 2.0**-33).clamp_max(1 - 2.0**-24)
    return -torch.log(-torch.log1p(-u))


def philox(counter: Tensor, key: Tensor) -> Tensor:
    """Philox4x32-10 of int64 tensors that hold 32-bit words: counter [4, ...], key [2, ...] -> [4, ...]."""
    shape = (2, *[1] * (counter.dim() - 1))
    pair = torch.arange(2, device=counter.device).reshape(shape)
    multiplier, weyl = _M0 + (_M1 - _M0) * pair, _W0 + (_W1 - _W0) * pair
    even, odd = counter[0::2], counter[1::2]
    for number in range(10):
        # int64 products wrap modulo 2**64, which keeps both halves right; the low half stays unmasked until
        # it is returned, as the mask after the next round's xor makes up for it
        product = (even * multiplier).flip(0)
        even = (product >> 32).bitwise_xor_(odd).bitwise_xor_(key + number * weyl).bitwise_and_(_WORD)
        odd = product
    return torch.stack((even, odd & _WORD), dim=1).flatten(0, 1)
