"""Mixed precision: which scheme each weight gets so that all together stay within a number of bits a weight.

One scheme for each weight, the sum of their costs least, the sum of their bytes bounded: a multiple-choice knapsack.
Bytes are counted in the largest unit that divides all of them, so that dynamic programming over the budget is exact for
real models (a decoder's matrices have few sizes); with more than MOST units they are rounded up, and the choice stays
within the budget.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from llmopt.compiler.errors import InputError

MOST = 100_000  # units of the budget


def allocate(
    costs: Mapping[str, Mapping[str, float]],
    bits: Mapping[str, Mapping[str, int]],
    budget: int,
) -> dict[str, str]:
    """For each weight (a key of `costs` and `bits`) the name of one of its options.

    costs[w][o]: what option o of weight w costs in accuracy; bits[w][o]: its size in bits, scales and all; `budget`:
    the most bits all may take. Raises InputError: the budget is too small.
    """
    least = check_budget(bits, budget)
    # what is above everybody's smallest option is what is left to be shared
    spare = budget - least
    extra = {w: {o: size - min(sizes.values()) for o, size in sizes.items()} for w, sizes in bits.items()}
    unit = _unit([e for options in extra.values() for e in options.values()], spare)
    room = spare // unit
    best = torch.zeros(room + 1, dtype=torch.float64)
    picks: list[Tensor] = []
    for w, options in extra.items():
        names = sorted(options, key=lambda o: (options[o], costs[w][o]))
        tried = torch.full((len(names), room + 1), math.inf, dtype=torch.float64)
        for row, name in enumerate(names):
            need = -(-options[name] // unit)
            if need <= room:
                tried[row, need:] = best[: room + 1 - need] + costs[w][name]
        best, pick = tried.min(0)
        picks.append(pick)
    return _walk_back(extra, costs, picks, int(best.argmin()), unit)


def check_budget(bits: Mapping[str, Mapping[str, int]], budget: int, count: int | None = None) -> int:
    """The least bits that all weights can take, `bits` and `budget` as in `allocate`; `count` is how many numbers they
    hold, if an error is to speak of bits a weight. Raises InputError: the budget is too small.
    """
    least = sum(min(sizes.values()) for sizes in bits.values())
    if least > budget:
        raise InputError(
            f"mixed precision: the weights take {_said(least, count)} in their smallest schemes, and the budget is "
            f"{_said(budget, count)}; raise the budget (`bits`, --bits), or let smaller schemes be chosen (`choices`)"
        )
    return least


def _said(bits: int, count: int | None) -> str:
    # rounded up, so that what is said to be needed is enough
    return f"{bits} bits" if count is None else f"{math.ceil(1e4 * bits / count) / 1e4:g} bits a weight"


def _walk_back(
    extra: Mapping[str, Mapping[str, int]],
    costs: Mapping[str, Mapping[str, float]],
    picks: list[Tensor],
    at: int,
    unit: int,
) -> dict[str, str]:
    found: dict[str, str] = {}
    for (w, options), pick in zip([*extra.items()][::-1], picks[::-1], strict=True):
        names = sorted(options, key=lambda o: (options[o], costs[w][o]))
        found[w] = names[int(pick[at])]
        at -= -(-options[found[w]] // unit)
    return {w: found[w] for w in extra}


def _unit(sizes: list[int], spare: int) -> int:
    exact = math.gcd(*sizes) or 1
    return exact if spare // exact <= MOST else -(-spare // MOST)
