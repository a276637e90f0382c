"""Bisection: which pass, and which single rewrite of it, makes the logits leave what rounding explains.

Passes are judged one after the other, each by running its result and comparing with the captured forward: `forward`
as it stands, and `step` over a scratch cache, read in chunks and token by token. Within the first pass whose result is
wrong, a binary search over the number of allowed rewrites ends at two neighbouring counts, the smaller one right and
the larger one wrong; both were run, so the blame holds even where the error does not grow monotonically. The limit is
no magic number: it is a multiple of what rounding every weight once more does to the same logits.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, fx

from llmopt.compiler.errors import InputError
from llmopt.compiler.evaluate import evaluate
from llmopt.compiler.graph import origin, target_name
from llmopt.compiler.pipeline import Context, Pass, PassStats, Pipeline, program_diff
from llmopt.compiler.program import Program, Weight
from llmopt.compiler.rewrite import RewriteRecord

SLACK = 4.0  # how many roundings of every weight are forgiven
_PLENTY = 2**40

State = dict[str, Tensor]
StepRunner = Callable[[Program, State, Mapping[str, Tensor]], Tensor]


@dataclass(frozen=True)
class Errors:
    """Largest differences from the captured logits; `step` is None before there is a step. NaN counts as wrong."""

    forward: float
    step: float | None = None

    def within(self, limit: float) -> bool:
        """Are both at most `limit`?"""
        return self.forward <= limit and (self.step is None or self.step <= limit)

    @property
    def worst(self) -> float:
        """The larger one."""
        found = [e for e in (self.forward, self.step) if e is not None]
        return math.nan if any(map(math.isnan, found)) else max(found)


@dataclass(frozen=True)
class Culprit:
    """What is to blame: a rewrite (`rule` set), or all that a pass does besides counted rewrites (`rule` empty).

    `number` counts rewrites within the pass, `overall` over all passes (LLMOPT_BISECT=overall stops right behind it);
    `before` and `after` are the errors without and with it; `diff` is what exactly it changed.
    """

    pass_name: str
    rule: str
    node: str
    module: str
    source: str
    number: int
    overall: int
    before: Errors
    after: Errors
    diff: str

    @property
    def graph(self) -> str:
        """Where the fault shows first: `forward` or `step`."""
        return "forward" if not self.after.forward <= self.before.forward * 2 or self.after.step is None else "step"

    def __str__(self) -> str:
        if not self.rule:
            return f"pass {self.pass_name!r}, by edits that are not counted rewrites"
        at = " ".join(p for p in (self.module, self.source) if p)
        return f"pass {self.pass_name!r}, rewrite {self.number}: rule {self.rule} at %{self.node} ({at})"


@dataclass
class Bisection:
    """The outcome: the limit used, the errors after each pass, and the culprit (None: nothing is wrong)."""

    limit: float
    scale: float
    passes: list[tuple[str, Errors]] = field(default_factory=list)
    culprit: Culprit | None = None
    runs: int = 0

    @property
    def healed(self) -> bool:
        """Was something wrong after a pass in the middle, but nothing at the end?"""
        return self.culprit is not None and self.passes[-1][1].within(self.limit)


def bisect(
    program: Program,
    passes: Sequence[Pass],
    context: Context,
    tokens: Tensor | None = None,
    run_step: StepRunner | None = None,
    progress: Callable[[str], None] = lambda stage: None,
) -> Bisection:
    """Run `passes` over the captured `program` and blame the first rewrite that is not Exact.

    `tokens` int64 [B, T] (T at least 4) are what is compared, fixed random ones by default. `run_step` runs a step
    whose ops were given to compiled providers; by default a step is evaluated by the ops' reference meaning. Raises
    InputError for unusable tokens, and whatever a pass raises.
    """
    ids = _tokens(program, tokens)
    judge = _Judge(program, ids, run_step or evaluate_step, context.recipe.page_size)
    outcome = Bisection(judge.limit, judge.scale)
    spent, found = 0, None
    current = program
    pipeline = Pipeline(passes)
    for item in passes:
        progress(f"after {item.name}")
        allowance = replace(context, rewrites_left=_PLENTY)
        after = pipeline.step(item, current, allowance)
        errors = judge(after)
        outcome.passes.append((item.name, errors))
        assert allowance.rewrites_left is not None
        count = _PLENTY - allowance.rewrites_left
        if found is None and not errors.within(judge.limit):
            progress(f"searching {count} rewrites of {item.name}")
            found = _search(item, current, (after, errors), count, spent, judge, context)
        current, spent = after, spent + count
    outcome.culprit, outcome.runs = found, judge.runs
    return outcome


class _Judge:
    """Compares programs with the captured one on fixed tokens."""

    def __init__(self, captured: Program, ids: Tensor, run_step: StepRunner, page_size: int) -> None:
        self.ids, self.run_step, self.page_size, self.runs = ids, run_step, page_size, 0
        self._held: dict[int, tuple[Weight, Tensor]] = {}
        self.want = _forward(self._holding(captured), ids)
        self.scale = float(self.want.abs().max())
        eps = torch.finfo(captured.facts.dtype).eps
        shaken = replace(captured, weights={n: _shaken(n, w, eps) for n, w in captured.weights.items()})
        noise = float((_forward(shaken, ids) - self.want).abs().max())
        self.limit = SLACK * max(noise, eps * self.scale)

    def _holding(self, program: Program) -> Program:
        """The program with weights that are read once and kept: every run needs nearly the same ones."""
        return replace(program, weights={n: self._kept(w) for n, w in program.weights.items()})

    def _kept(self, weight: Weight) -> Weight:
        def load() -> Tensor:
            if id(weight) not in self._held:
                self._held[id(weight)] = weight, weight.load()
            return self._held[id(weight)][1]

        return replace(weight, load=load)

    def __call__(self, program: Program) -> Errors:
        self.runs += 1
        program = self._holding(program)
        forward = float((_forward(program, self.ids) - self.want).abs().max())
        if "step" not in program.graphs:
            return Errors(forward)
        worst = 0.0
        near = program.near_pages
        state: State = {s.name: torch.zeros((self._pages(near), *s.shape), dtype=s.dtype) for s in program.state}
        for at in _chunks(self.ids):
            logits = self.run_step(program, state, self._inputs(at, near)).double()
            want = torch.stack([self.want[b, t] for b, t in at])
            difference = float((logits - want).abs().max())
            worst = difference if math.isnan(difference) else max(worst, difference)
            if math.isnan(worst):
                break
        return Errors(forward, worst)

    def _pages(self, near: int) -> int:
        return 1 + self.ids.shape[0] * (self._columns() + near)

    def _columns(self) -> int:
        return -(-self.ids.shape[1] // self.page_size)

    def _inputs(self, at: list[tuple[int, int]], near: int) -> dict[str, Tensor]:
        """A step's inputs for these (sequence, position) pairs; pages lie in reverse, so that their order counts."""
        count, columns = self.ids.shape[0], self._columns() + near
        tables = torch.arange(count * columns, 0, -1).reshape(count, columns)
        sequences, positions = (torch.tensor(x) for x in zip(*at, strict=True))
        pages = tables[sequences, positions // self.page_size]
        return {
            "input_ids": self.ids[sequences, positions][None],
            "position_ids": positions[None],
            "slots": pages * self.page_size + positions % self.page_size,
            "seq_ids": sequences,
            "block_tables": tables,
            "rows": torch.arange(len(at)),
        }


def _chunks(ids: Tensor) -> Iterator[list[tuple[int, int]]]:
    """Steps that read the tokens: the most of every sequence, the rest of all but one token, then one token alone."""
    count, length = ids.shape
    first = length // 2
    yield [(b, t) for b in range(count) for t in range(first)]
    yield [(b, t) for b in range(count) for t in range(first, length - 1)]
    yield [(count - 1, length - 1)]


def evaluate_step(program: Program, state: State, inputs: Mapping[str, Tensor]) -> Tensor:
    """Logits [R, V] of a step by the reference meaning of its ops; `state` takes on the written pages."""
    step = program.graph("step")
    written = {_state_of(n): n for op in ("kv_write", "near_write") for n in step.calls(op)}
    if any(n.op == "call_module" for n in step.fx.nodes) or set(written) != set(state):
        raise InputError(
            "this step is cut into compiled regions, which the reference meaning cannot run; give bisect a run_step, "
            "or use a recipe with providers: [reference]"
        )
    logits = step.outputs()[0]
    got, *pages = evaluate(step, {**inputs, **state}, program.weights, [logits, *written.values()])
    state.update(zip(written, pages, strict=True))
    return got  # type: ignore[no-any-return]


def _state_of(write: fx.Node) -> str:
    """The state that a write is the last or the last but one of."""
    while write.op == "call_function":
        write = write.args[0]  # type: ignore[assignment]
    return write.name


def _forward(program: Program, ids: Tensor) -> Tensor:
    """fp64 copies of the logits [B, T, V] that `forward` computes in its own precision."""
    positions = torch.arange(ids.shape[1]).expand(ids.shape).contiguous()
    (got,) = evaluate(program.graph("forward"), {"input_ids": ids, "position_ids": positions}, program.weights)
    return got.double()  # type: ignore[no-any-return]


def _shaken(name: str, weight: Weight, eps: float) -> Weight:
    """The weight with each element one rounding off, up or down."""
    if not weight.dtype.is_floating_point:
        return weight

    def load() -> Tensor:
        tensor = weight.load()
        generator = torch.Generator().manual_seed(sum(name.encode()))
        signs = torch.randint(0, 2, tensor.shape, generator=generator).to(tensor.dtype) * 2 - 1
        return tensor + tensor * (signs * eps)

    return replace(weight, load=load)


def _tokens(program: Program, tokens: Tensor | None) -> Tensor:
    facts = program.facts
    if tokens is None:
        generator = torch.Generator().manual_seed(0)
        return torch.randint(facts.vocab_size, (2, min(12, facts.context_length)), generator=generator)
    if tokens.dim() != 2 or tokens.shape[0] < 1 or not 4 <= tokens.shape[1] <= facts.context_length:
        raise InputError(
            f"bisect: tokens have shape {tuple(tokens.shape)}; wanted [B, T] with T from 4 to the model's context of "
            f"{facts.context_length}: give sequences of one length"
        )
    worst = int(tokens.max()) if int(tokens.min()) >= 0 else int(tokens.min())
    if not 0 <= worst < facts.vocab_size:
        raise InputError(
            f"bisect: token id {worst} is not in [0, {facts.vocab_size}); use ids of this model's tokenizer"
        )
    return tokens


def _search(
    item: Pass,
    before: Program,
    wrong: tuple[Program, Errors],
    count: int,
    spent: int,
    judge: _Judge,
    context: Context,
) -> Culprit:
    """The culprit among the `count` rewrites of a pass that turns `before` (right) into something wrong."""

    def limited(rewrites: int) -> tuple[Program, Errors, PassStats]:
        after = before.copy()
        stats = item.run(after, replace(context, rewrites_left=rewrites))
        return after, judge(after), stats

    low = limited(0)
    if count == 0 or not low[1].within(judge.limit):
        after, errors = wrong if count == 0 else low[:2]
        return Culprit(item.name, "", "", "", "", 0, spent, judge(before), errors, program_diff(before, after))
    good, bad = 0, count
    high = limited(count)
    while bad - good > 1:
        middle = (good + bad) // 2
        tried = limited(middle)
        if tried[1].within(judge.limit):
            good, low = middle, tried
        else:
            bad, high = middle, tried
    return _blame(item, before, (low, high), bad, spent)


_Run = tuple[Program, Errors, PassStats]


def _blame(item: Pass, before: Program, runs: tuple[_Run, _Run], number: int, spent: int) -> Culprit:
    """Name the one rewrite that the second run has and the first has not."""
    (good, good_errors, good_stats), (bad, bad_errors, bad_stats) = runs
    more = Counter(bad_stats.log) - Counter(good_stats.log)
    record = next((r for r in reversed(bad_stats.log) if r in more), RewriteRecord("", "", ""))
    node = _find(good, record.root) or _find(before, record.root)
    module = origin(node).module if node is not None else ""
    diff = program_diff(good, bad)
    at = (record.rule, record.root, module, record.source)
    return Culprit(item.name, *at, number, spent + number, good_errors, bad_errors, diff)


def _find(program: Program, name: str) -> fx.Node | None:
    return next((n for g in program.graphs.values() for n in g.fx.nodes if n.name == name and target_name(n)), None)
