"""The layout of a step, and torch's attention by it, against the op's meaning."""

from __future__ import annotations

import pytest
import torch

from llmopt.compiler.ops.attention import attend
from llmopt.runtime.attend import Run, StepLayout, flash


def test_runs_are_cut_where_the_sequence_or_the_position_jumps() -> None:
    seqs, at = torch.tensor([0, 0, 0, 2, 1, 1, 1]), torch.tensor([[3, 4, 5, 6, 0, 1, 9]])
    layout = StepLayout.of(seqs, at)
    assert layout.runs == (Run(0, 0, 3, 3), Run(2, 3, 1, 6), Run(1, 4, 2, 0), Run(1, 6, 1, 9))
    tiles = [[0, 0, 2, 3], [0, 2, 1, 5], [2, 3, 1, 6], [1, 4, 2, 0], [1, 6, 1, 9]]
    assert layout.tiles(2).tolist() == tiles
    assert layout.tiles(2) is layout.tiles(2)
    assert layout.tiles(2).dtype == torch.int32


@pytest.mark.parametrize(("tokens", "long"), [(300, True), (100, False)])
def test_long_runs_go_to_torch(tokens: int, long: bool) -> None:
    assert StepLayout.of(torch.zeros(tokens, dtype=torch.int64), torch.arange(tokens)[None]).long == long


def test_flash_is_causal_attention_over_the_pages() -> None:
    make = torch.Generator().manual_seed(1)
    counts, have, size = (7, 5, 1), (0, 6, 9), 4
    seqs = torch.arange(3).repeat_interleave(torch.tensor(counts))
    at = torch.cat([torch.arange(n) + first for n, first in zip(counts, have, strict=True)])
    tables = (torch.randperm(12, generator=make) + 1).view(3, 4)
    q = torch.randn(13, 4, 8, generator=make, dtype=torch.float64)
    k, v = (torch.randn(13, 2, size, 8, generator=make, dtype=torch.float64) for _ in "kv")
    out = torch.full_like(q, torch.nan)
    flash(q, k, v, tables, StepLayout.of(seqs, at[None]), out, 0.3)
    want = attend(q.transpose(0, 1)[None], k, v, tables, seqs, at[None], None, 0.3, 0, 0.0)[0].transpose(0, 1)
    torch.testing.assert_close(out, want)
