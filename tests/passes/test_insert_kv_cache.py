"""insert-kv-cache: the step's form, that it computes what the plain forward does, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from passes_common import counts, llama, run
from torch import Tensor, nn

from llmopt.compiler.capture import capture
from llmopt.compiler.errors import PassMatchedNothing, PassOrderError
from llmopt.compiler.evaluate import evaluate
from llmopt.compiler.program import ModelFacts, Program
from llmopt.passes import Canonicalize, InsertKVCache, RaiseAten

PAGE = 16


def cached(program: Program) -> Program:
    return run(program, RaiseAten(), Canonicalize(), InsertKVCache())[0]


def run_step(program: Program, state: dict[str, Tensor], tokens: list[tuple[int, int, int]], rows: list[int]) -> Tensor:
    """One step over (token id, position, sequence) triples; sequence s owns pages 1 + 4 s ... 4 + 4 s."""
    ids, at, seqs = (torch.tensor(x) for x in zip(*tokens, strict=True))
    tables = torch.tensor([[1 + 4 * s + i for i in range(4)] for s in range(3)])
    inputs = {
        "input_ids": ids[None],
        "position_ids": at[None],
        "slots": tables[seqs, at // PAGE] * PAGE + at % PAGE,
        "seq_ids": seqs,
        "block_tables": tables,
        "rows": torch.tensor(rows),
        **state,
    }
    logits, *written = evaluate(program.graph("step"), inputs, program.weights)
    state.update(zip(state, written, strict=True))
    return logits  # type: ignore[no-any-return]


def pages(program: Program) -> dict[str, Tensor]:
    return {s.name: torch.full((16, *s.shape), float("nan"), dtype=s.dtype) for s in program.state}


def plain_logits(program: Program, ids: list[int]) -> Tensor:
    inputs = {"input_ids": torch.tensor([ids]), "position_ids": torch.arange(len(ids))[None]}
    return evaluate(program.graph("forward"), inputs, program.weights)[0][0]  # type: ignore[no-any-return]


def test_every_attention_becomes_two_writes_and_an_attend() -> None:
    program = cached(llama(layers=3))
    found = counts(program.graph("step"))
    assert (found["attention"], found["kv_write"], found["attend"]) == (0, 6, 3)
    assert counts(program.graph("forward"))["attention"] == 3
    assert [s.name for s in program.state] == [f"{x}_pages_{i}" for i in range(3) for x in "kv"]
    assert program.state[0].shape == (2, PAGE, 8)
    names = [n.name for n in program.graph("step").inputs()]
    assert names[:6] == ["input_ids", "position_ids", "slots", "seq_ids", "block_tables", "rows"]


def test_steps_over_mixed_sequences_equal_the_plain_forward() -> None:
    program = cached(llama())
    torch.manual_seed(1)
    texts = [torch.randint(96, (n,)).tolist() for n in (37, 5, 20)]
    want = [plain_logits(program, t) for t in texts]
    state = pages(program)
    # prompts in uneven pieces, interleaved; pages start as NaN, so that a read of an unwritten slot shows
    order = [(0, 0, 9), (1, 0, 4), (2, 0, 1), (0, 9, 37), (2, 1, 20), (1, 4, 5)]
    for group in (order[:3], order[3:5], order[5:]):
        tokens = [(texts[s][p], p, s) for s, low, high in group for p in range(low, high)]
        logits = run_step(program, state, tokens, list(range(len(tokens))))
        for (_, position, sequence), row in zip(tokens, logits, strict=True):
            torch.testing.assert_close(row, want[sequence][position], rtol=2e-5, atol=2e-5)


def test_rows_pick_the_logits_wanted() -> None:
    program = cached(llama())
    tokens = [(t, t, 0) for t in range(9)]
    every = run_step(program, pages(program), tokens, list(range(9)))
    some = run_step(program, pages(program), tokens, [8, 2])
    torch.testing.assert_close(some, every[[8, 2]])


class Counting(nn.Module):
    """Numbers its tokens itself: `arange` or the first T rows of a table."""

    def __init__(self, sliced: bool) -> None:
        super().__init__()
        self.sliced = sliced
        self.table, self.places = nn.Embedding(96, 32), nn.Embedding(64, 32)
        self.qkv, self.head = nn.Linear(32, 96), nn.Linear(32, 96, bias=False)

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        length = input_ids.shape[1]
        places = self.places.weight[:length] if self.sliced else self.places(torch.arange(length))
        x = self.table(input_ids) + places
        q, k, v = (y.unflatten(-1, (4, 8)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.head(x + y.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("sliced", [False, True])
def test_a_model_that_counts_its_tokens_is_given_positions(sliced: bool) -> None:
    torch.manual_seed(2)
    program = cached(capture(Counting(sliced).eval(), ModelFacts("counting", 96, 64)))
    ids = torch.randint(96, (11,)).tolist()
    want = plain_logits(program, ids)
    state = pages(program)
    run_step(program, state, [(ids[p], p, 1) for p in range(6)], [0])
    logits = run_step(program, state, [(ids[p], p, 1) for p in range(6, 11)], list(range(5)))
    torch.testing.assert_close(logits, want[6:], rtol=2e-5, atol=2e-5)


def test_a_model_without_attention_is_an_error() -> None:
    class Bigram(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(96, 16), nn.Linear(16, 96)

        def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
            return self.head(self.table(input_ids))

    with pytest.raises(PassMatchedNothing, match="insert-kv-cache"):
        cached(capture(Bigram().eval(), ModelFacts("bigram", 96, 64)))


def test_it_wants_a_raised_program() -> None:
    with pytest.raises(PassOrderError, match="raised"):
        run(llama(layers=1), InsertKVCache())
