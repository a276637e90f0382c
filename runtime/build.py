"""From a model to a Program ready to run: capture, the recipe's passes, and the report of what they did."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn
from torch.export import ExportedProgram
from transformers import PreTrainedModel

from llmopt import codegen
from llmopt.compiler import knobs
from llmopt.compiler.calibration import Progress, Settings, Values, calibrate
from llmopt.compiler.calibration_data import TokenSource
from llmopt.compiler.calibration_statistics import Statistics
from llmopt.compiler.capture import capture
from llmopt.compiler.capture_hf import capture_hf, capture_model
from llmopt.compiler.checkpoint import DTYPES
from llmopt.compiler.errors import InputError, did_you_mean
from llmopt.compiler.pipeline import Context, Hook, Pipeline, hooks_from_knobs
from llmopt.compiler.program import ModelFacts, Program
from llmopt.compiler.recipe import PassSpec, Recipe
from llmopt.compiler.target import Target
from llmopt.passes import PASSES, KeepCodes
from llmopt.runtime.report import Report
from llmopt.runtime.tokenizer import load_tokenizer


@dataclass(frozen=True)
class Calibration:
    """Data for passes that want any: what `calibration.calibrate` takes, and the file its statistics are kept in.

    `progress(value, done, total)` is told of each value of each window.
    """

    source: TokenSource | Statistics
    keep: Path | None = None
    progress: Progress | None = None

    def __call__(self, program: Program, second_moments: bool, values: Values | None = None) -> Statistics:
        """Statistics of the program as it is now; on a GPU if there is one, in less than half of its free memory.

        `values` as `calibrate` takes them. Raises InputError.
        """
        # what is kept is to serve every recipe that comes later
        settings = Settings(second_moments=second_moments or (self.keep is not None and values is None))
        if torch.cuda.is_available():
            settings = replace(settings, device="cuda", memory=_bound(*torch.cuda.mem_get_info()))
        tokenizer = load_tokenizer(program.facts.tokenizer)
        encode = None if tokenizer is None else lambda text: tokenizer(text, verbose=False)["input_ids"]
        path = self.keep if values is None else None
        return calibrate(
            program, self.source, encode=encode, path=path, settings=settings, values=values, progress=self.progress
        )


def _bound(free: int, total: int) -> int:
    """Half of a GPU's free memory, in whole sixteenths of all where there is one: a run that was stopped goes on only
    with values in the groups they were in, so that a few megabytes more or less must not make others.
    """
    half, step = free // 2, total // 16
    return half // step * step or max(half, 1)


Source = str | Path | nn.Module | ExportedProgram


def capture_any(source: Source, dtype: str | None = None, facts: ModelFacts | None = None) -> Program:
    """A Program from any source llmopt takes. Raises InputError or CaptureError.

    `facts` is needed for an ExportedProgram, and for a module whose vocabulary and context cannot be told from it.
    """
    if dtype is not None and dtype not in DTYPES:
        raise InputError(f"dtype {dtype!r} is not supported; {did_you_mean(str(dtype), DTYPES)}")
    if isinstance(source, (str, Path)):
        return capture_hf(str(source), DTYPES[dtype] if dtype else None)
    if isinstance(source, PreTrainedModel):
        return capture_model(source)
    if isinstance(source, (nn.Module, ExportedProgram)):
        return capture(source, facts or facts_from(source))
    raise InputError(
        f"a model of type {type(source).__name__} cannot be compiled; wanted a folder, a hub id, an "
        "nn.Module or an ExportedProgram"
    )


def facts_from(source: nn.Module | ExportedProgram) -> ModelFacts:
    """Vocabulary and context of a plain module, from its attributes or the sizes of its tables."""
    if isinstance(source, ExportedProgram):
        raise InputError(
            "an ExportedProgram does not say its context length; pass "
            "facts=ModelFacts(name, vocab_size, context_length)"
        )
    vocab = getattr(source, "vocab_size", None)
    context = getattr(source, "context_length", None) or getattr(source, "max_seq_len", None)
    tables = [m for m in source.modules() if isinstance(m, nn.Embedding)]
    heads = [m for m in source.modules() if isinstance(m, nn.Linear)]
    vocab = vocab or (heads[-1].out_features if heads else None)
    if vocab is None:
        raise InputError(
            f"{type(source).__name__}: the vocabulary size cannot be told (no attribute vocab_size, no nn.Linear); "
            "pass facts=ModelFacts(name, vocab_size, context_length)"
        )
    learned = [t.num_embeddings for t in tables if t.num_embeddings != vocab]
    dtype = next((p.dtype for p in source.parameters()), torch.float32)
    return ModelFacts(type(source).__name__, int(vocab), int(context or min(learned, default=2048)), (), dtype)


def keeping_codes(recipe: Recipe) -> Recipe:
    """The recipe with `keep-codes`, for a model whose checkpoint holds codes: behind the structural passes."""
    names = [spec.name for spec in recipe.passes]
    if KeepCodes.name in names:
        return recipe
    at = next((i for i, name in enumerate(names) if name in ("quantize", "quantize-kv", "fuse", "lower")), len(names))
    return replace(recipe, passes=(*recipe.passes[:at], PassSpec(KeepCodes.name), *recipe.passes[at:]))


def learns(recipe: Recipe) -> bool:
    """Does a pass of the recipe read calibration data?"""
    options = [dict(spec.options) for spec in recipe.passes if spec.name == "quantize"]
    return any(o.get("method") == "gptq" or o.get("weighted") or o.get("bits") is not None for o in options)


def build(
    source: Source | Program,
    recipe: Recipe | str = "default",
    target: Target | str | None = None,
    dtype: str | None = None,
    facts: ModelFacts | None = None,
    hooks: Sequence[Hook] = (),
    progress: Callable[[str], None] = lambda stage: None,
    calibration: Calibration | None = None,
) -> tuple[Program, Report, Context]:
    """Capture `source` and run the recipe's passes over it; `progress` is called with the name of each stage."""
    recipe = Recipe.parse(recipe) if isinstance(recipe, str) else recipe
    passes = recipe.build(PASSES)
    target = Target.parse(target) if isinstance(target, str) else target or Target.detect()
    target = codegen.usable(target, knobs.provider() or recipe.providers)
    asked: list[str] = []

    def statistics(program: Program, second_moments: bool) -> Statistics:
        assert calibration is not None
        asked.append(program.facts.name)
        progress("calibration")
        return calibration(program, second_moments)

    report = Report()
    started = time.perf_counter()
    progress("capture")
    wanted = dtype or recipe.dtype
    program = source.copy() if isinstance(source, Program) else capture_any(source, wanted, facts)
    report.seconds["capture"] = time.perf_counter() - started
    if program.coded:
        recipe = keeping_codes(recipe)
        passes = recipe.build(PASSES)
    context = Context(target, recipe, knobs.bisect(), calibrate=None if calibration is None else statistics)
    pipeline = Pipeline(passes, [*hooks_from_knobs(), *hooks], report.passes)
    for item in passes:
        progress(item.name)
        program = pipeline.step(item, program, context)
    if calibration is not None and not asked:
        raise InputError(
            f"calibration data were given, but no pass of recipe {recipe.name!r} reads any; leave them out, or add a "
            "recipe that does (such as +gptq or +weighted)"
        )
    report.seconds["passes"] = time.perf_counter() - started - report.seconds["capture"]
    report.choices = program.choices
    return program, report, context
