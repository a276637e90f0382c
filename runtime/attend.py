"""Which tokens of a step follow one another, told once a step on the host; and torch's attention of whole prompts.

Attention of mixed steps needs this on the host: tiles for `prefill_attention`, and where all that a step holds are
prompts from their beginning, their lengths for torch's kernel over the keys and values just made, the faster of the
two where prompts are long. One `StepLayout` serves every layer of a step.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from llmopt.codegen.kernel import FRESH, PAGED
from llmopt.runtime.transfer import to_device

# tokens a prompt has on average for torch's kernel to be taken: it is launched anew for each length, which short
# prompts do not repay; where exactly they begin to has not been measured
LONG = 512


class Run(NamedTuple):
    """`tokens` tokens from `first` on of a step: consecutive positions, from `position`, of table row `row`."""

    row: int
    first: int
    tokens: int
    position: int


@dataclass(frozen=True)
class StepLayout:
    """The runs of a step, in the order of its tokens, for kernels on `device`."""

    runs: tuple[Run, ...]
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    _tiles: dict[int, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    @classmethod
    def of(cls, seq_ids: Tensor, positions: Tensor, device: torch.device | None = None) -> StepLayout:
        """From seq_ids int64 [N] and positions int64 [1, N]; if they lie on a device, waits for it and copies them.

        `device` is where the step runs, if they lie elsewhere.
        """
        seq, at = torch.stack((seq_ids, positions.view(-1))).cpu()
        begins = torch.ones(len(seq), dtype=torch.bool)
        begins[1:] = (seq[1:] != seq[:-1]) | (at[1:] != at[:-1] + 1)
        firsts = begins.nonzero().squeeze(1)
        counts = torch.diff(firsts, append=torch.tensor([len(seq)]))
        fields = (seq[firsts].tolist(), firsts.tolist(), counts.tolist(), at[firsts].tolist())
        return cls(tuple(Run(*run) for run in zip(*fields, strict=True)), device or seq_ids.device)

    def tiles(self, block_q: int) -> Tensor:
        """int32 [T, 4] on the device, for `prefill_attention`: the runs cut into at most `block_q` tokens; kept."""
        if block_q not in self._tiles:
            cut = [
                (run.row, run.first + i, min(block_q, run.tokens - i), run.position + i)
                for run in self.runs
                for i in range(0, run.tokens, block_q)
            ]
            self._tiles[block_q] = to_device(torch.tensor(cut, dtype=torch.int32), self.device)
        return self._tiles[block_q]

    @cached_property
    def kind(self) -> str:
        """One of `codegen.kernel.WHEN`: prompts from their beginning, long ones, or anything else."""
        tokens = sum(run.tokens for run in self.runs)
        whole = all(run.position == 0 for run in self.runs)
        return FRESH if whole and tokens >= LONG * len(self.runs) else PAGED

    def batches(self, multiple: int) -> Iterator[tuple[int, int, int]]:
        """(first token, runs, tokens of each), runs of equal lengths as one where that is such a multiple."""
        for tokens, runs in itertools.groupby(self.runs, lambda run: run.tokens):
            alike = list(runs)
            if tokens % multiple == 0:
                yield alike[0].first, len(alike), tokens
            else:
                yield from ((run.first, 1, tokens) for run in alike)


def attend(
    q: Tensor, k: Tensor, v: Tensor, layout: StepLayout, out: Tensor, *, scale: float, multiple: int
) -> Tensor | None:
    """Causal attention of whole prompts over themselves, by torch: written into out [1, N, Hq * D], or given back.

    q [P, Hq, D], k and v [P, Hkv, D], P >= N + multiple - 1: prompts are read as if their lengths were multiples, as
    torch's kernel may be planned anew for each length. What follows a prompt's end is seen by none of its tokens, but
    is multiplied by 0, and nan if it is not finite: so prompts are taken from the last to the first, and what follows
    one, which is another's and used by then, is zeroed. k and v are used up.
    """
    batches = list(layout.batches(multiple))
    for first, batch, tokens in reversed(batches):
        padded = -(-tokens // multiple) * multiple
        if padded > tokens:
            for tensor in (k, v):
                tensor[first + tokens : first + padded].zero_()
        x, y, z = (t[first : first + batch * padded].unflatten(0, (batch, padded)).transpose(1, 2) for t in (q, k, v))
        made = scaled_dot_product_attention(x, y, z, is_causal=True, scale=scale, enable_gqa=True)
        rows = made.transpose(1, 2).flatten(0, 1)[: batch * tokens].flatten(1)
        if len(batches) == 1:
            return rows[None]
        out[0, first : first + batch * tokens] = rows
    return None
