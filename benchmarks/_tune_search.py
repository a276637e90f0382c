"""The search of `tune_step.py`: which constants are tried for a kernel, and the descent over all kernels of a step.

Nothing here knows of a GPU: what builds, times and checks a step is handed in.
"""

from __future__ import annotations

import importlib
import itertools
import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from llmopt.codegen import tuning
from llmopt.codegen.hooks import TEMPLATES
from llmopt.compiler.errors import BuildError
from llmopt.compiler.target import Target

Config = dict[str, Any]
Alone = Mapping[str, Mapping[str, float]]  # microseconds of a launch alone, by tuning.key and `spelled` constants

# constants that are 0 or 1: what happens around the wait for the kernel ahead, and within the kernel
BEFORE = ("EARLY", "ASK")
WITHIN = ("PREFETCH", "PEEL", "SWAP")
FAR = 1.15  # constants this much slower than the best when alone are not tried
HOPELESS = 1.02  # nor, in later passes, those that made the step this much slower


def spelled(config: Mapping[str, Any]) -> str:
    """The same text for the same constants."""
    return json.dumps(config, sort_keys=True)


def short(config: Mapping[str, Any]) -> str:
    """`BLOCK_J 8 BLOCK_K 2048 PREFETCH 1 warps 4 stages 1`; zeros and empty ones left out."""
    return " ".join(f"{k.removeprefix('num_')} {v}" for k, v in sorted(config.items()) if v not in (0, ""))


def candidates(choice: tuning.Choice, target: Target, limit: int, alone: Alone) -> list[Config]:
    """Constants to try in place of the choice's, most promising first, `limit` at most: the choice with switches
    turned, then those that were fast alone, then the template's own list."""
    module = importlib.import_module(f"{TEMPLATES}.{choice.module}")
    config, listed = choice.config, module.configs(choice.shape, choice.dtype, target)
    # times may be older than some of the template's constants
    known = {spelled({**listed[0], **json.loads(text)}): us
             for text, us in alone.get(tuning.key(choice.module, choice.shape, choice.dtype), {}).items()}  # fmt: skip
    best = min(known.values(), default=0.0)
    fast = [json.loads(text) for text, us in sorted(known.items(), key=lambda item: item[1]) if us <= FAR * best]
    slow = {text for text, us in known.items() if us > FAR * best}
    before = [{**config, **turned} for turned in _turned(config, BEFORE)]  # the choice itself first
    within = [{**config, **turned} for turned in _turned(config, WITHIN)]
    rest = [{**c, **turned} for turned in _turned(config, BEFORE) for c in listed]
    if "EVICT" in config:
        within.append({**config, "EVICT": "" if config["EVICT"] else "evict_first"})
    found = {spelled(c): c for c in [*before, *within, *fast, *rest] if c.keys() == config.keys()}
    found.pop(spelled(config), None)
    return [c for text, c in found.items() if text not in slow][:limit]


def _turned(config: Mapping[str, Any], switches: Sequence[str]) -> list[Config]:
    """All settings of the switches that there are, those of `config` first."""
    here = [s for s in switches if s in config]
    ways = itertools.product(*((config[s], 1 - config[s]) for s in here))
    return [dict(zip(here, values, strict=True)) for values in ways]


def read_alone(data: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """What a result of gpu_gemm.py says of launches alone."""
    found: dict[str, dict[str, float]] = {}
    for swept in data["sweep"]:
        for row in swept["rows"]:
            variant = row["variant"]
            if variant["pdl"]:
                key = tuning.key(variant["template"], {**variant["shape"], "N": swept["tokens"]}, "bfloat16")
                found.setdefault(key, {})[spelled(variant["config"])] = row["us"]
    return found


@dataclass
class Tried:
    """Constants tried in place of others: `us` of the step in each context, `ratio` to the step it would replace."""

    config: Config
    verdict: str  # slower, noise, chosen, or what was wrong with it
    us: list[float] = field(default_factory=list)
    ratio: float = math.inf


@dataclass
class Descent:
    """Exchanges one kernel's constants at a time for what makes the step faster, over all contexts together.

    `build(configs)` makes a step in all contexts and may raise BuildError; `times(a, b, rounds)` gives, for each
    context, microseconds of both in each round; `fault(step)` says what is wrong with its results, or None; `over()`
    whether time is up. A step is accepted if it is faster by `margin` in two sets of rounds, and in no context slower.
    """

    build: Callable[[Mapping[str, Config]], Any]
    times: Callable[[Any, Any, int], Sequence[Sequence[Sequence[float]]]]
    fault: Callable[[Any], str | None]
    over: Callable[[], bool]
    margin: float
    rounds: int
    told: Callable[[str, Tried], None] = lambda key, tried: None
    chosen: dict[str, Config] = field(default_factory=dict)
    tried: dict[str, list[Tried]] = field(default_factory=dict)

    def run(self, best: Any, others: Mapping[str, Sequence[Config]], passes: int = 2) -> Any:
        """The fastest step found, from the step `best` and what to try for each key."""
        for index in range(passes):
            before = dict(self.chosen)
            for key, configs in others.items():
                for config in configs:
                    if self.over():
                        return best
                    if config != self.chosen.get(key) and (index == 0 or self._worth(key, config)):
                        best = self._try(best, key, config)
            if self.chosen == before:
                break
        return best

    def _worth(self, key: str, config: Config) -> bool:
        return any(t.config == config and t.ratio < HOPELESS for t in self.tried.get(key, ()))

    def _try(self, best: Any, key: str, config: Config) -> Any:
        tried = Tried(config, "slower")
        self.tried.setdefault(key, []).append(tried)
        try:
            step = self.build({**self.chosen, key: config})
        except BuildError as error:
            tried.verdict = f"does not build: {str(error)[:300]}"
            self.told(key, tried)
            return best
        if self._faster(best, step, tried, self.rounds):
            fault = self.fault(step)
            again = fault is None and self._faster(best, step, tried, self.rounds + 2)
            tried.verdict = "chosen" if again else fault or "noise"
        self.told(key, tried)
        if tried.verdict != "chosen":
            return best
        self.chosen[key] = config
        return step

    def _faster(self, best: Any, step: Any, tried: Tried, rounds: int) -> bool:
        pairs = [(statistics.median(a), statistics.median(b)) for a, b in self.times(best, step, rounds)]
        tried.us = [b for _, b in pairs]
        ratios = [b / a for a, b in pairs]
        tried.ratio = statistics.geometric_mean(ratios)
        return tried.ratio < 1 - self.margin and max(ratios) < 1 + self.margin


def entries(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Table entries for what a result file's cases chose; kernels that have changed since are left out."""
    found = []
    for case in results["cases"]:
        for part in case["kernels"]:
            same = part["source"] == tuning.source_hash(part["template"])
            if same and part["chosen"] != part["incumbent"]:
                known = {k: part[k] for k in ("template", "source", "shape", "dtype")}
                about = {"us": None, "device": results["device"], "date": results["date"]}
                found.append({**known, "config": part["chosen"], **about})
    return found
