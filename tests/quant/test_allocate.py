"""Mixed precision under a budget, against trying every choice."""

from __future__ import annotations

import itertools
import random

import pytest

from llmopt.compiler.errors import InputError
from llmopt.compiler.quant import allocate as module
from llmopt.compiler.quant.allocate import allocate

Table = dict[str, dict[str, float]]
Sizes = dict[str, dict[str, int]]


def case(seed: int, unit: int = 1) -> tuple[Table, Sizes, int]:
    draw = random.Random(seed)
    costs: Table = {}
    bits: Sizes = {}
    for w in "abcde":
        rows = draw.randint(1, 9) * unit
        bits[w] = {"four": 4 * rows, "six": 6 * rows, "eight": 8 * rows, "whole": 16 * rows}
        costs[w] = {"four": draw.random(), "six": draw.random() / 4, "eight": draw.random() / 16, "whole": 0.0}
    low, high = (sum(pick(s.values()) for s in bits.values()) for pick in (min, max))
    return costs, bits, draw.randint(low, high)


def by_trying(costs: Table, bits: Sizes, budget: int) -> float:
    ways = itertools.product(*(costs[w] for w in costs))
    fits = (way for way in ways if sum(bits[w][o] for w, o in zip(costs, way, strict=True)) <= budget)
    return min(sum(costs[w][o] for w, o in zip(costs, way, strict=True)) for way in fits)


@pytest.mark.parametrize("seed", range(30))
def test_no_choice_within_the_budget_costs_less(seed: int) -> None:
    costs, bits, budget = case(seed, unit=512)
    found = allocate(costs, bits, budget)
    assert sum(bits[w][o] for w, o in found.items()) <= budget
    assert sum(costs[w][o] for w, o in found.items()) == pytest.approx(by_trying(costs, bits, budget), abs=1e-12)


def test_a_coarser_unit_stays_within_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST", 50)
    worse = 0.0
    for seed in range(30):
        costs, bits, budget = case(seed, unit=997)
        found = allocate(costs, bits, budget)
        assert sum(bits[w][o] for w, o in found.items()) <= budget
        worse += sum(costs[w][o] for w, o in found.items()) - by_trying(costs, bits, budget)
    assert 0 < worse < 1.0


def test_a_budget_that_nothing_fits_is_told() -> None:
    costs, bits, _ = case(0)
    least = sum(min(s.values()) for s in bits.values())
    with pytest.raises(InputError, match=f"take {least} bits"):
        allocate(costs, bits, least - 1)
    assert set(allocate(costs, bits, least).values()) == {"four"}


def test_room_to_spare_takes_the_best_of_each() -> None:
    costs, bits, _ = case(1)
    assert set(allocate(costs, bits, 10**9).values()) == {"whole"}
