"""`llmopt compile` and `llmopt run`."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import llmopt
from llmopt.compiler.errors import InputError, TargetError
from llmopt.compiler.pipeline import Context, Exact, PassReport
from llmopt.compiler.program import Program
from llmopt.compiler.recipe import Recipe, with_bits
from llmopt.compiler.target import Target
from llmopt.console import (
    Progress,
    check_output,
    is_artifact,
    read_text,
    report_table,
    say,
    stages,
    write_json,
    write_table,
)
from llmopt.model import CompiledModel
from llmopt.passes import PASSES
from llmopt.runtime.build import Calibration, build
from llmopt.runtime.gpu_code import code_for
from llmopt.runtime.report import Report
from llmopt.runtime.session import absent

MOST_NOTES = 12  # on a terminal


@dataclass(frozen=True)
class Sampling:
    """How to generate; see `CompiledModel.generate`."""

    max_new_tokens: int
    temperature: float
    top_p: float
    seed: int
    stream: bool


@dataclass(frozen=True)
class Wanted:
    """What to compile a model to; see the options of `llmopt compile`. The recipe is `default` if none is given."""

    recipe: str | None = None
    target: str | None = None
    dtype: str | None = None
    calibration: str | None = None
    statistics: Path | None = None
    bits: float | None = None

    def parsed(self) -> Recipe:
        """The recipe, with `bits`. Raises RecipeError."""
        recipe = Recipe.parse("default" if self.recipe is None else self.recipe)
        return recipe if self.bits is None else with_bits(recipe, self.bits)

    def data(self, progress: Progress) -> Calibration | None:
        """What passes learn from, None if nothing is given. Raises InputError: --statistics without --calibration."""
        if self.statistics is not None and self.calibration is None:
            raise InputError(
                f"--statistics {str(self.statistics)!r} says where to keep what is learned, and --calibration, what to "
                "learn from, is missing; give it (it may be the file of statistics itself)"
            )

        def told(value: str, done: int, total: int) -> None:
            progress(f"calibration, {done / total:.0%}")

        return None if self.calibration is None else Calibration(self.calibration, self.statistics, told)

    def build(self, model: str, progress: Progress) -> tuple[Program, Report, Context]:
        """The lowered program. Raises what `parsed` and `data` do, and what compiling does."""
        recipe, data = self.parsed(), self.data(progress)
        return build(model, recipe, self.target, self.dtype, progress=progress, calibration=data)

    def check_artifact(self, model: str) -> None:
        """InputError if something is asked of the artifact `model` that was decided when it was compiled."""
        given = [f"--{f.name}" for f in fields(self) if getattr(self, f.name) is not None]
        if given:
            raise InputError(
                f"{model!r} is an artifact, which was compiled with its own recipe, target and dtype; leave out "
                f"{' and '.join(given)}, or compile the model again"
            )

    def check_runs_here(self, command: str) -> None:
        """TargetError if what is wanted cannot run on this machine."""
        if self.target is not None and (why := absent(Target.parse(self.target))) is not None:
            raise TargetError(
                f"{command}: a model for target {self.target} cannot run here: {why}; leave out --target to run on "
                "this machine, or `llmopt compile` it for that one and run the artifact there"
            )


def compiled(model: str, wanted: Wanted, progress: Progress) -> CompiledModel:
    """A model compiled in this process, its regions included, so that all waiting is over when it is returned."""
    program, report, context = wanted.build(model, progress)
    regions = code_for(program, context.target)
    started = time.perf_counter()
    regions.compile_all(lambda key: progress(f"compiling {key}"))
    report.seconds["regions"] = time.perf_counter() - started
    progress("reading weights")
    return CompiledModel(program, context.recipe, context.target, report, regions)


def compile_to(model: str, out: Path, wanted: Wanted, as_json: bool) -> None:
    """Compile and save; prints what each pass did."""
    check_output(out)
    started = time.perf_counter()
    with stages(f"compiling {model}") as progress:
        made = compiled(model, wanted, progress)
        choices = made.report.choices
        if "without_kernels" in choices and "triton" in choices["allowed"]:
            raise InputError(
                f"{choices['without_kernels']}: nothing was written, as such an artifact is of no use; change that, or "
                "give --recipe reference if it is meant"
            )
        progress("writing")
        made.save(out)
    say_notes(notes_to_say(made.report.passes))
    seconds = time.perf_counter() - started
    size = sum(p.stat().st_size for p in out.rglob("*") if p.is_file())
    if as_json:
        recipe_said, target_said = made.recipe.to_dict(), made.target.to_dict()
        write_json(
            {"artifact": str(out), "bytes": size, "seconds": round(seconds, 3), "recipe": recipe_said,
             "target": target_said, "report": made.report.to_dict()}
        )  # fmt: skip
        return
    write_table(report_table(made.report))
    print(f"wrote {out} ({size / 2**20:.1f} MiB) in {seconds:.1f} s")


def opened(model: str, wanted: Wanted, progress: Progress) -> CompiledModel:
    """A model from an artifact, or compiled now."""
    if not is_artifact(model):
        return compiled(model, wanted, progress)
    wanted.check_artifact(model)
    progress("loading")
    return llmopt.load(model)


def uncompressed(recipe: Recipe) -> Recipe:
    """The recipe without the passes that are not exact; the same recipe if all are."""
    exact = tuple(spec for spec in recipe.passes if isinstance(PASSES[spec.name].meaning, Exact))
    return recipe if exact == recipe.passes else replace(recipe, name="uncompressed", passes=exact)


def notes_to_say(passes: Iterable[PassReport]) -> list[str]:
    """What passes that the default recipe lacks have to say, such as too few tokens to learn from, or what a rotation
    leaves out. Whoever names a recipe with them asks for what they do."""
    default = {spec.name for spec in Recipe.parse("default").passes}
    return [
        f"note: {entry.name}: {note}" for entry in passes if entry.name not in default for note in entry.stats.notes
    ]


def say_notes(notes: Sequence[str]) -> None:
    """Those of `notes_to_say` on stderr, the first few."""
    for note in notes[:MOST_NOTES]:
        say(note)
    if len(notes) > MOST_NOTES:
        say(f"note: {len(notes) - MOST_NOTES} more; the report has them all")


def gather(prompts: list[str], prompt_file: str | None) -> list[str]:
    """The prompts given as arguments, in a file, or on stdin. Raises InputError."""
    if prompts and prompt_file:
        raise InputError("prompts are given both as arguments and as --prompt-file; give one of the two")
    if prompt_file is None and not prompts and sys.stdin.isatty():
        raise InputError("no prompt is given; pass it as an argument, with --prompt-file FILE, or on stdin")
    found = prompts or [read_text(prompt_file or "-")]
    if "" in found:
        raise InputError("the prompt is empty; give at least one character of text")
    return found


def run_prompts(
    model: str,
    prompts: list[str],
    prompt_file: str | None,
    sampling: Sampling,
    wanted: Wanted,
) -> None:
    """Generate and print; what it cost goes to stderr."""
    from llmopt.runtime.sampler import SamplingParams

    SamplingParams(sampling.max_new_tokens, sampling.temperature, sampling.top_p, 0, sampling.seed)  # raises early
    texts = gather(prompts, prompt_file)
    wanted.check_runs_here("run")
    with stages(f"preparing {model}") as progress:
        ready = opened(model, wanted, progress)
    if not is_artifact(model):
        say_notes(notes_to_say(ready.report.passes))
    options = {
        "max_new_tokens": sampling.max_new_tokens, "temperature": sampling.temperature, "top_p": sampling.top_p,
        "seed": sampling.seed,
    }  # fmt: skip
    if len(texts) == 1 and sampling.stream:
        _stream_one(ready, texts[0], options)
    else:
        _print_all(ready, texts, options)


def _stream_one(model: CompiledModel, text: str, options: dict[str, Any]) -> None:
    started = time.perf_counter()
    first = 0.0
    for _, piece in model.generate([text], stream=True, **options):
        first = first or time.perf_counter() - started
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")
    seconds = time.perf_counter() - started
    say(f"first token after {first * 1e3:.0f} ms, all after {seconds:.2f} s")


def _print_all(model: CompiledModel, texts: list[str], options: dict[str, Any]) -> None:
    started = time.perf_counter()
    with stages("generating"):
        made = model.generate(texts, **options)
    for index, text in enumerate(made):
        if len(made) > 1:
            print(f"--- prompt {index}")
        print(text)
    say(f"{len(made)} prompts in {time.perf_counter() - started:.2f} s")
