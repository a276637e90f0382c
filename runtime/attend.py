"""Which tokens of a step follow one another, told once a step on the host; and torch's flash attention by that.

Attention of mixed steps needs this on the host twice: tiles for `prefill_attention`, and lengths for a call of
torch's kernel for each prompt, which is the faster of the two where prompts are long. One copy from the device, made
by `StepLayout.of`, serves every layer of a step.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

# tokens a run has on average for torch's kernel, with its gathered keys and its launches for each run, to be faster
LONG = 256


class Run(NamedTuple):
    """`tokens` tokens from `first` on of a step: consecutive positions, from `position`, of table row `row`."""

    row: int
    first: int
    tokens: int
    position: int


@dataclass(frozen=True)
class StepLayout:
    """The runs of a step, in the order of its tokens, for tensors on `device`."""

    runs: tuple[Run, ...]
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    _tiles: dict[int, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    @classmethod
    def of(cls, seq_ids: Tensor, positions: Tensor) -> StepLayout:
        """From seq_ids int64 [N] and positions int64 [1, N]; copies both to the host, which waits for the device."""
        seq, at = torch.stack((seq_ids, positions.view(-1))).cpu()
        begins = torch.ones(len(seq), dtype=torch.bool)
        begins[1:] = (seq[1:] != seq[:-1]) | (at[1:] != at[:-1] + 1)
        firsts = begins.nonzero().squeeze(1)
        counts = torch.diff(firsts, append=torch.tensor([len(seq)]))
        fields = (seq[firsts].tolist(), firsts.tolist(), counts.tolist(), at[firsts].tolist())
        return cls(tuple(Run(*run) for run in zip(*fields, strict=True)), seq_ids.device)

    def tiles(self, block_q: int) -> Tensor:
        """int32 [T, 4] on the device, for `prefill_attention`: the runs cut into at most `block_q` tokens; kept."""
        if block_q not in self._tiles:
            cut = [
                (run.row, run.first + i, min(block_q, run.tokens - i), run.position + i)
                for run in self.runs
                for i in range(0, run.tokens, block_q)
            ]
            self._tiles[block_q] = torch.tensor(cut, dtype=torch.int32).to(self.device)
        return self._tiles[block_q]

    @property
    def long(self) -> bool:
        """Are the runs so long that `flash` is faster than tiles over pages?"""
        return sum(run.tokens for run in self.runs) >= LONG * len(self.runs)


def flash(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, tables: Tensor, layout: StepLayout, out: Tensor, scale: float
) -> None:
    """Write causal attention of each run into out [N, Hq, D]: torch's kernel over keys gathered from the pages.

    q [N, Hq, D]; k_pages, v_pages [P, Hkv, page, D]; tables int64 [S, M]. Window, softcap and sinks it does not have.
    """
    size = k_pages.shape[2]
    for run in layout.runs:
        length = run.position + run.tokens
        pages = tables[run.row, : -(-length // size)]
        k, v = (p[pages].transpose(0, 1).flatten(1, 2)[None, :, :length] for p in (k_pages, v_pages))
        x = q[run.first : run.first + run.tokens].transpose(0, 1)[None]
        if run.position == 0:
            y = scaled_dot_product_attention(x, k, v, is_causal=True, scale=scale, enable_gqa=True)
        else:
            from torch.nn.attention.bias import causal_lower_right  # here, as it imports all of torch._dynamo

            mask = causal_lower_right(run.tokens, length)
            y = scaled_dot_product_attention(x, k, v, attn_mask=mask, scale=scale, enable_gqa=True)
        out[run.first : run.first + run.tokens] = y[0].transpose(0, 1)
