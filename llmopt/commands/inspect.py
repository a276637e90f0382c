"""`llmopt show`, `llmopt diff` and `llmopt bisect`: look at a compilation without running the model's kernels."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
import typer
from torch import Tensor, fx

import llmopt
from llmopt import codegen
from llmopt.codegen.regions import as_function
from llmopt.commands.model import Wanted, notes_to_say, say_notes
from llmopt.compiler import bisect as bisection
from llmopt.compiler import knobs
from llmopt.compiler.calibration_statistics import Statistics
from llmopt.compiler.errors import InputError, did_you_mean
from llmopt.compiler.extra import insert_passes, load_pass
from llmopt.compiler.op import op_of
from llmopt.compiler.pipeline import Context, Pass, Pipeline, hooks_from_knobs, program_diff, program_text
from llmopt.compiler.program import Program
from llmopt.compiler.target import Target
from llmopt.console import Progress, is_artifact, read_text, say, stages, write_code, write_diff, write_json
from llmopt.passes import PASSES
from llmopt.runtime.build import Calibration, capture_any
from llmopt.runtime.cuda import launcher
from llmopt.runtime.executor import Executor
from llmopt.runtime.gpu_code import GpuCode, code_for
from llmopt.runtime.gpu_step import GpuStep
from llmopt.runtime.loader import read_weights
from llmopt.runtime.session import absent

CAPTURE = "capture"
FOUND = 3  # exit code of `bisect` when something is wrong


@dataclass(frozen=True)
class Subject:
    """What is looked at: a model, and how it would be compiled; `extra` are `--with` specs."""

    model: str
    wanted: Wanted
    extra: tuple[str, ...]

    def plan(self, progress: Progress) -> tuple[tuple[Pass, ...], Context]:
        """The passes in order, and their context. Raises RecipeError, PassOrderError, TargetError or InputError."""
        recipe = self.wanted.parsed()
        passes = insert_passes(recipe.build(PASSES), [load_pass(spec) for spec in self.extra])
        target = Target.parse(self.wanted.target) if self.wanted.target else Target.detect()
        usable, data = codegen.usable(target, recipe.providers), self.wanted.data(progress)
        return passes, Context(usable, recipe, knobs.bisect(), calibrate=None if data is None else _Data(data))

    def capture(self, context: Context) -> Program:
        """The program before any pass."""
        return capture_any(self.model, self.wanted.dtype or context.recipe.dtype)

    def stages(self, last: str | None = None) -> Iterator[tuple[str, Program, Program]]:
        """(pass, program before, program after) for each pass up to `last`; the first is the capture itself."""
        with stages(f"compiling {self.model}") as progress:
            passes, context = self.plan(progress)
            names = [CAPTURE, *(p.name for p in passes)]
            if last is not None and last not in names:
                raise InputError(f"the recipe has no pass {last!r}; {did_you_mean(last, names)}")
            progress(CAPTURE)
            before = self.capture(context)
            found = [(CAPTURE, before, before)]
            pipeline = Pipeline(passes, hooks_from_knobs())
            for item in passes[: names.index(last) if last else None]:
                progress(item.name)
                after = pipeline.step(item, before, context)
                found.append((item.name, before, after))
                before = after
        say_notes(notes_to_say(pipeline.reports))
        if last is None:
            _check_read(context)
        yield from found


class _Data:
    """Calibration data, and whether a pass has read them."""

    def __init__(self, data: Calibration) -> None:
        self.data, self.read = data, False

    def __call__(self, program: Program, second_moments: bool) -> Statistics:
        self.read = True
        return self.data(program, second_moments)


def _check_read(context: Context) -> None:
    if isinstance(context.calibrate, _Data) and not context.calibrate.read:
        raise InputError(
            f"--calibration is given, and no pass of recipe {context.recipe.name!r} reads any data; leave it out, or "
            "add a recipe that does (such as +gptq or +weighted)"
        )


def show_graphs(subject: Subject, graph: str | None, after: str | None, provenance: bool) -> None:
    """Print the graphs of a model or an artifact."""
    if is_artifact(subject.model):
        if after or subject.extra:
            raise InputError("an artifact holds the last graphs only; --after and --with want the model's folder")
        subject.wanted.check_artifact(subject.model)
        program = _artifact(subject.model)
    else:
        *_, (_, _, program) = subject.stages(after)
    write_code(program.graph(graph).print(provenance) if graph else program_text(program, provenance))


def _artifact(path: str) -> Program:
    if not is_artifact(path):
        raise InputError(f"{path!r} is no artifact (no manifest.json in it); wanted a folder that llmopt compile wrote")
    with stages(f"loading {path}"):
        return llmopt.load(path).program


def diff_passes(subject: Subject, pass_name: str | None) -> None:
    """Print what each pass changed, or one of them."""
    if is_artifact(subject.model):
        raise InputError("an artifact holds no passes; give a second artifact to compare with, or the model's folder")
    for name, before, after in subject.stages(pass_name):
        if name != CAPTURE and pass_name in (None, name):
            write_diff(_named(program_diff(before, after), f"before {name}", f"after {name}"))


def _named(diff: str, before: str, after: str) -> str:
    head, _, rest = diff.partition("@@")
    return f"--- {before}\n+++ {after}\n@@{rest}" if head else f"--- {before}\n+++ {after}\n"


def diff_artifacts(subject: Subject, right: str) -> None:
    """Print what sets the graphs of two artifacts apart, the subject's and another."""
    left = subject.model
    subject.wanted.check_artifact(left)
    a, b = (program_text(_artifact(path), provenance=False).splitlines() for path in (left, right))
    lines = list(difflib.unified_diff(a, b, left, right, lineterm=""))
    write_diff("\n".join(lines) + "\n" if lines else "")


def read_tokens(path: str) -> Tensor:
    """int64 [B, T] from a file with one sequence of ids a line (spaces or commas between). Raises InputError."""
    rows = []
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        words = line.replace(",", " ").strip("[] \t").split()
        if not all(word.isdecimal() for word in words):
            raise InputError(f"file {path!r}, line {number}: {line.strip()[:40]!r} is not a list of token ids")
        if words:
            rows.append([int(word) for word in words])
    if len({len(row) for row in rows}) != 1:
        raise InputError(f"file {path!r}: sequences of {sorted({len(r) for r in rows})} ids; wanted one length for all")
    return torch.tensor(rows)


class _Steps:
    """Runs steps the way they will be run, providers and compiled regions included.

    Kernels for a GPU that is not there are not run: their regions then are, by the meaning of their ops.
    """

    def __init__(self, target: Target) -> None:
        self.target = target
        self.program: Program | None = None
        self.state: bisection.State = {}
        self.run: Callable[..., Tensor] | None = None

    def __call__(self, program: Program, state: bisection.State, inputs: Mapping[str, Tensor]) -> Tensor:
        if "lowered" not in program.properties:
            return bisection.evaluate_step(program, state, inputs)
        if self.run is None or self.program is not program or self.state is not state:
            self.program, self.state, self.run = program, state, self._made(program, state)
        return self.run(*inputs.values())

    def _made(self, program: Program, state: bisection.State) -> Callable[..., Tensor]:
        code = code_for(program, self.target)
        if not isinstance(code, GpuCode):
            return Executor(program.graph("step"), read_weights(program), state, code)
        if absent(self.target) is not None:
            return Executor(program.graph("step"), read_weights(program), state, _meaning(program))
        device = torch.device("cuda", torch.cuda.current_device())
        pages = {name: tensor.to(device) for name, tensor in state.items()}
        step = GpuStep(code, read_weights(program, device=device), pages, launcher(code.cubin), device)
        return lambda *inputs: step(*(i.to(device) for i in inputs)).cpu()


def _meaning(program: Program) -> Callable[..., Callable[[list[Any]], Any]]:
    """Regions run by the reference meaning of their ops, which write their pages in place as kernels do."""

    def implement(node: fx.Node) -> Callable[..., Any]:
        op = op_of(node.target)
        return node.target if op is None else op.in_place_fn or op.fn  # type: ignore[return-value]

    def region(name: str, shape: object) -> Callable[[list[Any]], Any]:
        run = as_function(program.graph(name), implement)
        return lambda inputs: run(*inputs)

    return region


def bisect_model(subject: Subject, tokens: str | None, as_json: bool) -> None:
    """Find the culprit and print it; exits with FOUND if there is one."""
    ids = None if tokens is None else read_tokens(tokens)
    with stages(f"bisecting {subject.model}") as progress:
        passes, context = subject.plan(progress)
        progress(CAPTURE)
        program = subject.capture(context)
        found = bisection.bisect(program, passes, context, ids, _Steps(context.target), progress)
    _check_read(context)
    if "triton" in context.target.facts and (why := absent(context.target)) is not None:
        say(f"graphs were judged and no kernels: {why}")
    if as_json:
        write_json(_as_dict(found))
    else:
        _say(found)
    if found.culprit is not None:
        raise typer.Exit(FOUND)


def _as_dict(found: bisection.Bisection) -> dict[str, Any]:
    return {
        "limit": found.limit,
        "largest_logit": found.scale,
        "programs_run": found.runs,
        "passes": [{"name": name, **asdict(errors)} for name, errors in found.passes],
        "culprit": None if found.culprit is None else {**asdict(found.culprit), "graph": found.culprit.graph},
    }


def _say(found: bisection.Bisection) -> None:
    print(f"largest logit {found.scale:.4g}; differences up to {found.limit:.3g} are what rounding explains")
    for name, errors in found.passes:
        step = "" if errors.step is None else f", step {errors.step:.3g}"
        verdict = "right" if errors.within(found.limit) else "WRONG"
        print(f"  after {name}: {verdict} (forward {errors.forward:.3g}{step})")
    culprit = found.culprit
    if culprit is None:
        print("nothing is wrong")
        return
    print(f"\nfirst to blame: {culprit}")
    print(f"  {culprit.graph}: {culprit.before.worst:.3g} without it, {culprit.after.worst:.3g} with it")
    if culprit.rule:
        print(f"  LLMOPT_BISECT={culprit.overall} stops right behind it, LLMOPT_BISECT={culprit.overall - 1} before it")
    if found.healed:
        print("  a later pass takes it back: the end result is right")
    print("\nwhat it changed:")
    write_diff(_named(culprit.diff, "without it", "with it"))
