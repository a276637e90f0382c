"""The sampling kernel gives the tokens of `runtime.sampler`, and moves its rows on, in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from llmopt.runtime.sampler import SampleRows, SamplingParams
from llmopt.runtime.sampler import sample as reference

pytestmark = pytest.mark.interp

WIDTH, PAGE = 4, 8


def run(logits, params, positions, block=256, moves=None):
    """(tokens, positions, slots, tables) after the kernel; rows are of sequences 0, 1, ..."""
    from llmopt.codegen.templates.sample import sample

    count, vocab = logits.shape
    rows = SampleRows.of(params, list(range(count)))
    moves = torch.ones(count, dtype=torch.int64) if moves is None else moves
    tokens, slots = torch.full((count,), -1), torch.full((count,), -1)
    positions = positions.clone()
    tables = torch.randperm(count * WIDTH).view(count, WIDTH)
    blocks = -(-vocab // block)
    best, places = torch.full((count * blocks,), torch.nan), torch.full((count * blocks,), -1, dtype=torch.int32)
    tickets = torch.zeros(count, dtype=torch.int32)
    sample[(count, blocks)](
        logits, rows.temperature, rows.seed, rows.sequence, moves, tables, tokens, positions, slots, best, places,
        tickets, WIDTH, V=vocab, BLOCK=block, BLOCKS=blocks, ROOM=1 << (blocks - 1).bit_length(), PAGE=PAGE, PDL=False,
    )  # fmt: skip
    assert not tickets.any(), "tickets go back to zero"
    return tokens, positions, slots, tables


@pytest.mark.parametrize("vocab", [1000, 256, 77])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_are_those_of_the_reference_sampler(vocab, dtype):
    count = 16
    logits = (torch.randn(count, vocab, generator=torch.Generator().manual_seed(vocab)) * 3).to(dtype)
    params = [SamplingParams(temperature=(i % 3) * (0.2 + i / 8), seed=i * 98765432101) for i in range(count)]
    positions = torch.randint(30, (count,), generator=torch.Generator().manual_seed(0))
    tokens, after, slots, tables = run(logits, params, positions)
    expected = reference(logits, SampleRows.of(params, list(range(count))), positions + 1)
    assert tokens.tolist() == expected.tolist()
    assert torch.equal(after, positions + 1)
    assert torch.equal(slots, tables[torch.arange(count), after // PAGE] * PAGE + after % PAGE)


def test_equal_logits_go_to_the_lowest_index_within_and_across_blocks():
    logits = torch.zeros(3, 600)
    logits[0, [300, 310]] = 5.0
    logits[1, [310, 511, 512]] = 5.0
    tokens, *_ = run(logits, [SamplingParams()] * 3, torch.zeros(3, dtype=torch.int64))
    assert tokens.tolist() == [300, 310, 0]


def test_padding_rows_stay_and_a_position_past_the_table_stays_in_it():
    positions = torch.tensor([5, 5, WIDTH * PAGE - 1])
    moves = torch.tensor([1, 0, 1])
    _, after, slots, tables = run(torch.randn(3, 300), [SamplingParams()] * 3, positions, moves=moves)
    assert after.tolist() == [6, 5, WIDTH * PAGE]
    assert int(slots[2]) // PAGE == int(tables[2, -1])


def test_rows_of_no_finite_logit_still_give_a_token_of_the_vocabulary():
    logits = torch.full((2, 77), float("-inf"))
    warm = SamplingParams(temperature=1.0)
    tokens, *_ = run(logits, [SamplingParams(), warm], torch.zeros(2, dtype=torch.int64))
    assert ((tokens >= 0) & (tokens < 77)).all()
