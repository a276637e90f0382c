"""The layout of a step, and torch's attention of whole prompts by it, against the op's meaning."""

from __future__ import annotations

import pytest
import torch

from llmopt.compiler.ops.attention import attention
from llmopt.runtime import torch_calls
from llmopt.runtime.attend import LONG, Run, StepLayout, attend


def layout(*prompts: int, position: int = 0) -> StepLayout:
    """Prompts of these lengths, the first of them from `position` on."""
    seqs = torch.arange(len(prompts)).repeat_interleave(torch.tensor(prompts))
    at = torch.cat([torch.arange(n) for n in prompts])
    at[: prompts[0]] += position
    return StepLayout.of(seqs, at[None])


def test_runs_are_cut_where_the_sequence_or_the_position_jumps() -> None:
    seqs, at = torch.tensor([0, 0, 0, 2, 1, 1, 1]), torch.tensor([[3, 4, 5, 6, 0, 1, 9]])
    layout = StepLayout.of(seqs, at)
    assert layout.runs == (Run(0, 0, 3, 3), Run(2, 3, 1, 6), Run(1, 4, 2, 0), Run(1, 6, 1, 9))
    tiles = [[0, 0, 2, 3], [0, 2, 1, 5], [2, 3, 1, 6], [1, 4, 2, 0], [1, 6, 1, 9]]
    assert layout.tiles(2).tolist() == tiles
    assert layout.tiles(2) is layout.tiles(2)
    assert layout.tiles(2).dtype == torch.int32


@pytest.mark.parametrize(
    ("prompts", "position", "kind"),
    [
        ((LONG,), 0, "fresh"),
        ((LONG - 1,), 0, "paged"),
        ((LONG,), 1, "paged"),
        ((2 * LONG, LONG // 2), 0, "fresh"),
        ((LONG, 1), 0, "paged"),
    ],
)
def test_only_long_prompts_from_their_beginning_are_torchs(prompts: tuple[int, ...], position: int, kind: str) -> None:
    assert layout(*prompts, position=position).kind == kind


def test_equal_lengths_are_one_batch_where_they_need_no_padding() -> None:
    assert list(layout(8, 8, 4, 5, 5).batches(4)) == [(0, 2, 8), (16, 1, 4), (20, 1, 5), (25, 1, 5)]


@pytest.mark.parametrize("prompts", [(8,), (8, 8), (7,), (7, 7), (8, 5, 1), (3, 8, 8)])
def test_prompts_attend_to_themselves(prompts: tuple[int, ...]) -> None:
    make = torch.Generator().manual_seed(1)
    count, multiple = sum(prompts), 4
    q, k, v = (torch.randn(count + multiple - 1, h, 8, generator=make, dtype=torch.float64) for h in (4, 2, 2))
    for tensor in (k, v):
        tensor[count:] = torch.nan
    want, first = [], 0
    for n in prompts:
        one = [t[first : first + n].transpose(0, 1)[None] for t in (q, k, v)]
        want.append(attention(*one, None, 0.3, 0, 0.0)[0].transpose(0, 1).flatten(1))
        first += n
    out = torch.full((1, count, 32), torch.nan, dtype=torch.float64)
    given = attend(q, k, v, layout(*prompts), out, scale=0.3, multiple=multiple)
    got = out if given is None else given
    torch.testing.assert_close(got, torch.cat(want)[None])
    assert got.is_contiguous()


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("prompts", [(7, 5), (5, 1, 1, 3), (6, 8, 8), (8, 8), (5,)], ids=str)
def test_no_prompt_sees_what_is_not_finite_in_another(prompts: tuple[int, ...], value: float) -> None:
    count, multiple = sum(prompts), 4
    for bad, owner in enumerate(torch.arange(len(prompts)).repeat_interleave(torch.tensor(prompts)).tolist()):
        make = torch.Generator().manual_seed(1)
        tensors = [torch.randn(count + multiple - 1, h, 8, generator=make) for h in (4, 2, 2)]
        for tensor in tensors:
            tensor[bad] = tensor[count:] = value
        out = torch.full((1, count, 32), torch.nan)
        given = attend(*tensors, layout(*prompts), out, scale=0.3, multiple=multiple)
        finite = (out if given is None else given)[0].isfinite().all(-1).split(prompts)
        assert [bool(run.all()) for run in finite] == [run != owner for run in range(len(prompts))]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("added", ["over", "beside", "bias"])
def test_a_sum_with_a_product_is_rounded_once(added: str, dtype: torch.dtype) -> None:
    make = torch.Generator().manual_seed(2)
    x, weight, other = (torch.randn(*shape, generator=make).to(dtype) for shape in ((1, 5, 24), (16, 24), (1, 5, 16)))
    other = other[0, 0] if added == "bias" else other
    want = x.double() @ weight.double().T + other.double()
    plain = (x @ weight.T + other).double()
    out = other if added == "over" else torch.full((1, 5, 16), torch.nan, dtype=dtype)
    torch_calls.linear_add(x, weight, other, out)
    assert (out.double() - want).norm() <= 1.01 * (plain - want).norm()
