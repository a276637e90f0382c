"""Passes and the pipeline that runs them: one list, one hook after each pass.

A pass is a frozen dataclass whose fields are its options. It edits a copy of the Program; the copy is taken only when
the pass returns, so a pass that fails leaves nothing behind. The hook serves everything that watches: verification,
dumps and diffs, timing, the numerics check.
"""

from __future__ import annotations

import difflib
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch

from llmopt.compiler import knobs
from llmopt.compiler.calibration_statistics import Statistics
from llmopt.compiler.errors import InputError, PassMatchedNothing, PassOrderError, VerifyError
from llmopt.compiler.evaluate import evaluate
from llmopt.compiler.program import Program
from llmopt.compiler.recipe import Recipe
from llmopt.compiler.rewrite import NearMiss, RewriteRecord, Stats
from llmopt.compiler.target import Target


@dataclass(frozen=True)
class Exact:
    """The pass keeps the function: same result up to rounding."""


@dataclass(frozen=True)
class Approx:
    """The pass changes results; `what` says in which way. How much is measured (`llmopt eval`), not proved."""

    what: str


@dataclass
class PassStats:
    """What a pass did, summed over its rule applications and its own edits.

    `rejected` counts (rule, reason) of matches that were turned down; `near` holds the best near miss of each rule that
    rewrote nothing (looked up only when someone asks). `figures` are by weight: what it became, bytes, accuracy; what
    is known only once a weight is read stands there from then on.
    """

    matched: int = 0
    rewritten: int = 0
    per_rule: Counter[str] = field(default_factory=Counter)
    rejected: Counter[tuple[str, str]] = field(default_factory=Counter)
    log: list[RewriteRecord] = field(default_factory=list)
    attempts: int = 0
    notes: list[str] = field(default_factory=list)
    figures: dict[str, dict[str, Any]] = field(default_factory=dict)
    applied: list[Stats] = field(default_factory=list, repr=False)

    def add(self, stats: Stats) -> None:
        """Count a rule application."""
        self.matched += stats.matched
        self.rewritten += stats.rewritten
        self.per_rule += stats.per_rule
        self.rejected += stats.rejected
        self.log += stats.log
        self.attempts += stats.attempts
        self.applied.append(stats)

    def record(self, rule: str, root: str, source: str) -> None:
        """Count one edit the pass made itself."""
        self.matched += 1
        self.rewritten += 1
        self.per_rule[rule] += 1
        self.log.append(RewriteRecord(rule, root, source))

    def nearest(self) -> NearMiss | None:
        """The near miss that matched the largest part of its pattern."""
        found = [miss for stats in self.applied for miss in stats.near_misses.values()]
        return max(found, key=lambda miss: miss.matched / miss.total, default=None)


@dataclass
class Context:
    """What a pass may ask: the target, the recipe, and how many rewrites are still allowed (None: any number)."""

    target: Target
    recipe: Recipe
    rewrites_left: int | None = None
    strict: bool = True  # False for graphs that are only part of a model: what cannot be raised stays as it is
    fold_weights: bool = True  # False where weights may change later: nothing is computed from them ahead of time
    calibrate: Callable[[Program, bool], Statistics] | None = None  # None where no data were given

    def statistics(self, program: Program, wanted_by: str, second_moments: bool) -> Statistics:
        """Statistics of the program as it is now, with second moments or with their diagonals alone.

        Raises InputError: no data were given, or they cannot be used.
        """
        if self.calibrate is None:
            raise InputError(
                f"{wanted_by} needs calibration data, and none were given; pass calibration=FILE (tokens, text, or "
                "saved statistics), on the command line --calibration FILE"
            )
        return self.calibrate(program, second_moments)

    def spend(self, rewrites: int) -> None:
        """Count rewrites against the allowance."""
        if self.rewrites_left is not None:
            self.rewrites_left -= rewrites


@dataclass(frozen=True)
class Pass:
    """Base of all passes; a subclass names itself and says what it needs, gives and means."""

    name: ClassVar[str]
    requires: ClassVar[frozenset[str]] = frozenset()
    ensures: ClassVar[frozenset[str]] = frozenset()
    meaning: ClassVar[Exact | Approx] = Exact()
    must_match: ClassVar[bool] = True

    def run(self, program: Program, context: Context) -> PassStats:
        """Edit `program` in place and say what was done."""
        raise TypeError(f"pass {type(self).__name__} does not define run")


@dataclass
class PassReport:
    """What one pass did: its statistics, its time, and the graphs' sizes before and after."""

    name: str
    stats: PassStats
    ms: float
    nodes_before: int
    nodes_after: int
    verify_ms: float = 0.0


Hook = Callable[[Program, Pass, Program, PassReport], None]


@dataclass
class Pipeline:
    """An ordered list of passes with the hooks that watch them."""

    passes: Sequence[Pass]
    hooks: Sequence[Hook] = ()
    reports: list[PassReport] = field(default_factory=list)

    def run(self, program: Program, context: Context) -> Program:
        """The program after all passes. Raises what the passes and hooks raise, naming the pass and those before it."""
        for item in self.passes:
            program = self.step(item, program, context)
        return program

    def step(self, item: Pass, program: Program, context: Context) -> Program:
        """Run one pass and the hooks."""
        missing = item.requires - program.properties
        if missing:
            raise PassOrderError(
                f"pass {item.name!r} requires {', '.join(sorted(missing))}, which no pass before it ensured "
                f"(ran: {', '.join(r.name for r in self.reports) or 'none'}); move it behind the pass that does"
            )
        after = program.copy()
        started = time.perf_counter()
        stats = item.run(after, context)
        report = PassReport(item.name, stats, (time.perf_counter() - started) * 1e3, _size(program), _size(after))
        if item.must_match and stats.rewritten == 0 and context.rewrites_left is None and context.strict:
            raise PassMatchedNothing(_nothing(item, stats))
        after.properties = program.properties | item.ensures
        self.reports.append(report)
        started = time.perf_counter()
        for hook in self.hooks:
            hook(program, item, after, report)
        report.verify_ms = (time.perf_counter() - started) * 1e3
        return after


def _size(program: Program) -> int:
    return sum(len(g) for g in program.graphs.values())


def _nothing(item: Pass, stats: PassStats) -> str:
    miss = stats.nearest()
    nearest = f"nearest: {miss}" if miss else "no rule came near"
    return f"pass {item.name!r} rewrote nothing; {nearest}; take it out of the recipe, or change the model to match"


def verify_hook(before: Program, item: Pass, after: Program, report: PassReport) -> None:
    """Structure of every graph: fx's own lint, values present, weights known."""
    for graph in after.graphs.values():
        graph.fx.lint()
        for node in graph.fx.nodes:
            if node.op == "get_attr" and node.target not in after.weights:
                raise VerifyError(
                    f"after pass {item.name!r}: graph {graph.name} reads weight {node.target!r}, which the program "
                    "does not have; a pass must add the Fold before it adds the node"
                )
            if node.op == "call_function" and "val" not in node.meta:
                raise VerifyError(
                    f"after pass {item.name!r}: %{node.name} has no fake value; make nodes with the Builder"
                )


class DumpHook:
    """Writes `NN_pass.py` and `NN_pass.diff` for each pass into a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.count = 0
        folder.mkdir(parents=True, exist_ok=True)

    def __call__(self, before: Program, item: Pass, after: Program, report: PassReport) -> None:
        if self.count == 0:
            self._write("00_captured.py", program_text(before))
        self.count += 1
        stem = f"{self.count:02d}_{item.name.replace('-', '_')}"
        self._write(stem + ".py", program_text(after))
        self._write(stem + ".diff", program_diff(before, after))

    def _write(self, name: str, text: str) -> None:
        path = self.folder / name
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_text(text)
        os.replace(temporary, path)


def program_text(program: Program, provenance: bool = True) -> str:
    """All graphs of a program as readable code."""
    return "\n".join(g.print(provenance) for g in program.graphs.values())


def program_diff(before: Program, after: Program) -> str:
    """Unified diff of two programs' texts, without provenance so that only changes show."""
    a, b = (program_text(p, provenance=False).splitlines() for p in (before, after))
    return "\n".join(difflib.unified_diff(a, b, "before", "after", lineterm="")) + "\n"


def numerics_hook(before: Program, item: Pass, after: Program, report: PassReport) -> None:
    """For an Exact pass that keeps `forward`: same logits on fixed tokens, to rounding (in the program's dtype)."""
    if isinstance(item.meaning, Approx) or "forward" not in before.graphs or "forward" not in after.graphs:
        return
    error, scale = forward_error(before, after)
    limit = 64 * torch.finfo(before.facts.dtype).eps * scale
    if not error <= limit:
        raise VerifyError(
            f"after pass {item.name!r}: logits moved by {error:.3g} (largest logit {scale:.3g}), wanted at most "
            f"{limit:.3g} from an exact pass; find the rewrite with `llmopt bisect`"
        )


def forward_error(a: Program, b: Program, tokens: int = 12) -> tuple[float, float]:
    """(largest difference, largest magnitude) of two programs' logits on the same fixed token ids [2, tokens]."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(a.facts.vocab_size, (2, min(tokens, a.facts.context_length)), generator=generator)
    inputs = {"input_ids": ids, "position_ids": torch.arange(ids.shape[1]).expand(ids.shape).contiguous()}
    (want,) = evaluate(a.graph("forward"), inputs, a.weights)
    (got,) = evaluate(b.graph("forward"), inputs, b.weights)
    difference = (got.double() - want.double()).abs().max()
    return float(difference), float(want.double().abs().max())


def debug_hook(before: Program, item: Pass, after: Program, report: PassReport) -> None:
    """Prints to stderr what LLMOPT_DEBUG asks for: statistics, graphs, rewrites, near misses."""
    level, stats = knobs.debug(), report.stats
    said = [
        f"{item.name}: matched {stats.matched}, rewrote {stats.rewritten} {dict(stats.per_rule)}, {report.ms:.0f} ms"
    ]
    said += [f"  declined {count}: {rule}: {why}" for (rule, why), count in stats.rejected.items()]
    if level >= 2:
        said.append(program_text(after))
    if level >= 3:
        said += [f"  {record.rule} at %{record.root} ({record.source})" for record in stats.log]
    if level >= 4:
        said += [f"  near: {miss}" for applied in stats.applied for miss in applied.near_misses.values()]
    print("\n".join(said), file=sys.stderr)


def hooks_from_knobs() -> list[Hook]:
    """The hooks the environment asks for; structure is always verified unless LLMOPT_VERIFY=0."""
    hooks: list[Hook] = [debug_hook] if knobs.debug() else []
    if knobs.verify() > 0:
        hooks.append(verify_hook)
    if knobs.numerics():
        hooks.append(numerics_hook)
    folder = knobs.dump()
    if folder:
        hooks.append(DumpHook(folder))
    return hooks
