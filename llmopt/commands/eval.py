"""`llmopt eval`."""

from __future__ import annotations

import collections
import importlib.util
import math
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from llmopt.commands.figures import deliver
from llmopt.commands.model import Wanted, notes_to_say, say_notes, uncompressed
from llmopt.compiler.calibration_data import read_tokens
from llmopt.compiler.errors import InputError
from llmopt.compiler.pipeline import Context
from llmopt.compiler.program import ModelFacts, Program
from llmopt.console import Progress, bar, is_artifact, say, stages, write_table
from llmopt.model import CompiledModel
from llmopt.passes import PASSES, QuantizeKV
from llmopt.runtime import measure as records
from llmopt.runtime.artifact import Parts
from llmopt.runtime.artifact import load as load_parts
from llmopt.runtime.build import build
from llmopt.runtime.gpu_code import code_for
from llmopt.runtime.layer_error import Loaded, score_errors, stream_errors, weight_errors
from llmopt.runtime.perplexity import Closeness, LogitsFn, Mean, Quality, batched, measure, step_logits, windows
from llmopt.runtime.report import Report
from llmopt.runtime.tokenizer import load_tokenizer

NONE = "none"
PLOTS = (".png", ".svg", ".pdf")
_LARGEST = math.log(sys.float_info.max)  # of what has an exponential


@dataclass(frozen=True)
class Settings:
    """What is measured, as on the command line. Raises InputError for sizes that cannot be."""

    model: str
    data: str
    recipe: str | None = None
    target: str | None = None
    dtype: str | None = None
    against: str | None = None
    windows: int | None = None
    window: int = 1024
    batch: int = 1
    calibration: str | None = None
    statistics: Path | None = None
    bits: float | None = None

    def __post_init__(self) -> None:
        for name, value in (("--window", self.window), ("--batch", self.batch), ("--windows", self.windows)):
            if value is not None and value < 1:
                raise InputError(f"eval: {name} is {value}; wanted at least 1")
        if not Path(self.data).exists():
            raise InputError(f"eval: --data {self.data!r} does not exist; give a file or a folder that does")


@dataclass
class Subject:
    """The program measured, the one it is compared with (None: none), and the windows [W + 1] both read."""

    settings: Settings
    ours: CompiledModel
    theirs: CompiledModel | None
    windows: list[Tensor] = field(repr=False)


def eval_model(settings: Settings, as_json: bool, out: Path | None, plot: Path | None) -> None:
    """Measure, print, and write files if asked to."""
    if plot is not None:
        check_plot(plot)
    with stages(f"preparing {settings.model}") as progress:
        subject = prepared(settings, progress)
    if plot is not None and subject.theirs is None:
        raise InputError(
            f"eval: --plot shows how far {settings.model!r} is from another program, and it is compared with none; "
            "give --against MODEL"
        )
    with bar("windows", len(subject.windows)) as advance:
        figures = measured(subject, lambda q, more: advance(more, f"perplexity {q.perplexity:.4f}"))
    if plot is not None:
        with stages("comparing layers"):
            figures["layers"] = layers(subject)
            draw(figures, plot)
    if not is_artifact(settings.model):
        say_notes(notes_to_say(subject.ours.report.passes))
    deliver(figures, show, out, as_json)
    if settings.against is None and subject.theirs is None and uncompressed(subject.ours.recipe) != subject.ours.recipe:
        say(f"{settings.model} does not hold the uncompressed program; give --against MODEL to compare with it")


def prepared(settings: Settings, progress: Progress = lambda stage: None) -> Subject:
    """Compile or load what is needed, and read the data.

    Raises InputError for what does not fit together, and what compiling and loading raise.
    """
    parts = _parts(settings, progress)
    facts, recipe = parts.program.facts, parts.recipe
    if settings.window > facts.context_length:
        raise InputError(
            f"eval: --window is {settings.window}, and the model's context is {facts.context_length} tokens; wanted "
            "at most that"
        )
    most = min(recipe.dims.sequences[1], recipe.dims.tokens[1])
    if settings.batch > most:
        raise InputError(
            f"eval: --batch is {settings.batch}, and the recipe's dims allow {most} sequences a step; wanted at most "
            "that"
        )
    progress("reading data")
    found = _windows(parts.program.facts, settings)
    other = _other(settings, parts, progress)
    progress("reading weights")
    ours = _opened(parts, settings)
    theirs = None if other is None else _opened(other, settings)
    progress("compiling")
    for model in (ours, theirs):
        if model is not None:  # what runs windows is compiled by the first of them
            collections.deque(step_logits(model.session, found[0][None, :2], 2), maxlen=0)
    return Subject(settings, ours, theirs, found)


def _parts(settings: Settings, progress: Progress) -> Parts:
    model = settings.model
    wanted = Wanted(
        settings.recipe, settings.target, settings.dtype, settings.calibration, settings.statistics, settings.bits
    )
    if is_artifact(model):
        wanted.check_artifact(model)
        progress("loading")
        return load_parts(Path(model))
    wanted.check_runs_here("eval")
    return _built(wanted.build(model, progress))


def _built(made: tuple[Program, Report, Context]) -> Parts:
    program, report, context = made
    return Parts(program, context.recipe, context.target, report, code_for(program, context.target))


def _other(settings: Settings, parts: Parts, progress: Progress) -> Parts | None:
    """What the program is compared with: one compiled as it was, but for the passes that are not exact."""
    plain, against = uncompressed(parts.recipe), settings.against
    if against == NONE or (against is None and (plain == parts.recipe or is_artifact(settings.model))):
        return None
    if against is not None and is_artifact(against):
        progress(f"loading {against}")
        found = load_parts(Path(against))
    else:
        dtype = str(parts.program.facts.dtype).removeprefix("torch.")
        found = _built(build(against or settings.model, plain, parts.target, dtype, progress=progress))
    sizes = parts.program.facts.vocab_size, found.program.facts.vocab_size
    if sizes[0] != sizes[1]:
        raise InputError(
            f"eval: --against {against!r} has a vocabulary of {sizes[1]} tokens and {settings.model!r} one of "
            f"{sizes[0]}; wanted the same one: their distributions cannot be compared otherwise"
        )
    if settings.window > found.program.facts.context_length:
        raise InputError(
            f"eval: --window is {settings.window}, and the context of {against!r} is "
            f"{found.program.facts.context_length} tokens; wanted at most that"
        )
    return found


def _opened(parts: Parts, settings: Settings) -> CompiledModel:
    """The model with a cache of just the size that a batch of windows takes."""
    each = -(-settings.window // parts.recipe.page_size) + parts.program.near_pages
    pages = 1 + settings.batch * each
    size = pages * sum(spec.bytes_per_page for spec in parts.program.state)
    return CompiledModel(*parts, cache_bytes=size or None)


def _windows(facts: ModelFacts, settings: Settings) -> list[Tensor]:
    """Windows [W + 1] of the data; a folder's files follow one another as one text."""
    encode = None if Path(settings.data).suffix == ".safetensors" else _encoder(load_tokenizer(facts.tokenizer))
    texts = read_tokens(settings.data, facts.vocab_size, encode, "data")
    if Path(settings.data).is_dir():
        texts = [torch.cat(texts)]
    return windows(texts, settings.window, settings.windows)


def _encoder(tokenizer: Any) -> Callable[[str], list[int]] | None:
    """A text's tokens and the end of the text."""
    if tokenizer is None:
        return None
    end = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]

    def encode(text: str) -> list[int]:
        ids = list(tokenizer.encode(text, verbose=False))  # longer than the context is no mistake here
        return ids if ids[-1:] == end else ids + end

    return encode


def measured(
    subject: Subject, progress: Callable[[Quality, int], None] = lambda quality, windows: None
) -> dict[str, Any]:
    """Run both programs over the windows; all figures, in JSON types."""
    models = [m for m in (subject.ours, subject.theirs) if m is not None]
    ours, *theirs = (logits_of(m, tokens_at_once(models)) for m in models)
    started = time.perf_counter()
    batches = batched(subject.windows, subject.settings.batch)
    quality = measure(ours, batches, theirs[0] if theirs else None, progress)
    return figures_of(subject, quality, time.perf_counter() - started)


def tokens_at_once(models: Iterable[CompiledModel]) -> int:
    """How many tokens a step of each of them may hold."""
    return min(model.recipe.dims.tokens[1] for model in models)


def logits_of(model: CompiledModel, most: int) -> LogitsFn:
    """What the model's step computes, `most` tokens at a time."""
    session = model.session
    return lambda ids: step_logits(session, ids, most)


def figures_of(subject: Subject, quality: Quality, seconds: float) -> dict[str, Any]:
    """What was measured, on what, with what; JSON types."""
    settings, theirs, against = subject.settings, subject.theirs, None
    if theirs is not None and quality.against is not None:
        against = _compared(quality.against, settings.against or settings.model, theirs)
    return {
        **_described(settings.model, subject.ours),
        "data": Path(settings.data).name, "window": settings.window, "windows": len(subject.windows),
        "batch": settings.batch, "tokens": quality.tokens, "seconds": round(seconds, 3), "scores": scores(subject),
        **_likelihood(quality.nll), "against": against, **records.environment(),
    }  # fmt: skip


def _described(name: str, model: CompiledModel) -> dict[str, Any]:
    return {
        "model": Path(name).name if Path(name).exists() else name,
        "recipe": model.recipe.name,
        "recipe_digest": model.recipe.digest(),
        "target": model.target.name,
        "dtype": str(model.program.facts.dtype).removeprefix("torch."),
        "weight_bytes": sum(w.nbytes for w in model.weights.values()),
    }


def _likelihood(nll: Mean) -> dict[str, Any]:
    perplexity = math.inf if nll.value > _LARGEST else math.exp(nll.value)
    return {"nll": nll.value, "nll_error": nll.error, "perplexity": perplexity}


def _compared(found: Closeness, name: str, model: CompiledModel) -> dict[str, Any]:
    return {
        **_described(name, model), **_likelihood(found.nll),
        "nll_difference": found.difference.value, "nll_difference_error": found.difference.error,
        "kl": found.kl.value, "kl_error": found.kl.error, "kl_largest": found.worst, "top1": found.top1.value,
    }  # fmt: skip


def scores(subject: Subject) -> list[dict[str, Any]]:
    """What a packed cache does to each attention's scores over the first window; empty where keys are not packed."""
    caches = [p for p in subject.ours.recipe.build(PASSES) if isinstance(p, QuantizeKV)]
    ours = subject.ours
    if not caches or "forward" not in ours.program.graphs:
        return []
    loaded = Loaded(ours.program, ours.weights, ours.session.device)
    return [asdict(error) for error in score_errors(loaded, caches[0], subject.windows[0][None, :-1])]


def layers(subject: Subject) -> dict[str, Any]:
    """Errors in the order of the model: of the hidden state over the first window, and of the quantised weights."""
    assert subject.theirs is not None
    loaded = [Loaded(m.program, m.weights, m.session.device) for m in (subject.ours, subject.theirs)]
    stream = stream_errors(loaded[0], loaded[1], subject.windows[0][None, :-1])
    return {
        "hidden_state": [asdict(error) for error in stream],
        "weights": [asdict(error) for error in weight_errors(subject.ours.report)],
    }


def check_plot(path: Path) -> None:
    """Raises InputError before anything is measured: a picture cannot be drawn, or not there."""
    if path.suffix not in PLOTS:
        raise InputError(f"eval: --plot {str(path)!r} has an unknown extension; wanted one of {', '.join(PLOTS)}")
    if not path.absolute().parent.is_dir():
        raise InputError(f"eval: --plot {str(path)!r} cannot be written: there is no folder {str(path.parent)!r}")
    if importlib.util.find_spec("matplotlib") is None:
        raise InputError("eval: --plot needs matplotlib, which is not installed; pip install 'llmopt[plot]'")


def draw(figures: dict[str, Any], path: Path) -> None:
    """Two panels: the hidden state's relative error behind each block, and the weights' signal to noise ratios."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    stream, weights = figures["layers"]["hidden_state"], figures["layers"]["weights"]
    panels = 2 if weights else 1
    width = min(40.0, max(6.0, 0.25 * max(len(stream), len(weights))))
    picture = Figure(figsize=(width, 3.6 * panels), layout="constrained")
    FigureCanvasAgg(picture)
    axes = picture.subplots(panels, 1, squeeze=False)[:, 0]
    picture.suptitle(f"{figures['model']}, {figures['recipe']}, against {figures['against']['recipe']}")
    _panel(axes[0], [e["name"] for e in stream], [e["relative"] for e in stream], "hidden state: relative error")
    axes[0].set_ylim(bottom=0)
    if weights:
        _panel(axes[1], [w["name"] for w in weights], [w["sqnr_db"] for w in weights], "weights: SQNR, dB")
    picture.savefig(path)


def _panel(axes: Any, names: list[str], values: list[float], label: str) -> None:
    axes.plot(range(len(values)), values, marker="o", markersize=3, linewidth=1)
    axes.set_ylabel(label)
    axes.grid(alpha=0.3)
    every = -(-len(names) // 80)  # more could not be read
    axes.set_xticks(range(0, len(names), every), names[::every], rotation=90, fontsize=6)


def show(figures: dict[str, Any]) -> None:
    """The table, and how far apart the programs are."""
    table = Table(
        "model", "recipe", "weights MiB", "nll", "perplexity",
        title=f"{figures['windows']} windows of {figures['window']} tokens of {figures['data']}, {figures['dtype']}, "
        f"{figures['target']}",
    )  # fmt: skip
    other = figures["against"]
    for row in (figures, other) if other else (figures,):
        size = f"{row['weight_bytes'] / 2**20:.1f}"
        table.add_row(row["model"], row["recipe"], size, f"{row['nll']:.5f}", f"{row['perplexity']:.4f}")
    write_table(table)
    if other:
        print(f"KL divergence {_with_error(other, 'kl')} nats a token, at most {other['kl_largest']:.3g}")
        print(f"nll differs by {_with_error(other, 'nll_difference')}")
        print(f"the same most likely token at {other['top1']:.2%} of positions")
    if errors := figures["scores"]:
        worst = max(errors, key=lambda e: e["rmse"])
        mean = sum(e["rmse"] for e in errors) / len(errors)
        print(
            f"packed keys: attention's scores are off by {mean:.3g} (root mean square) on average, most in "
            f"{worst['name']}: {worst['rmse']:.3g}, where they vary by {worst['deviation']:.3g}"
        )
    print(f"{figures['tokens']} tokens in {figures['seconds']:.1f} s")


def _with_error(row: dict[str, Any], key: str) -> str:
    error = row[f"{key}_error"]
    return f"{row[key]:.5f}" + (f" ± {error:.5f}" if error is not None else "")
