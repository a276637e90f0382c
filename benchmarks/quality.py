"""What recipes cost in accuracy: perplexity, KL divergence and top-1 agreement with the uncompressed program.

    python benchmarks/quality.py --models-dir FOLDER --tokens HELDOUT.safetensors --recipes default nvfp4 nvfp4+search

measures every checkpoint in the folder under every recipe, as `llmopt eval` does, and writes
benchmarks/results/quality.json after each. What is in that file already (same model, recipe, target, dtype, data and
windows) is not measured again, so an interrupted run goes on where it was; `--again` measures all anew. A recipe that
cannot be compiled is told, and the others go on. Exits with 1 if there was one.

Recipes that learn (GPTQ, weighted scales, mixed precision) do so from --calibration, by default the last quarter of the
tokens, which then must not be among the windows read. Statistics are gathered once a model and kept in --statistics.

Without --tokens, a Python file of the checkout is read and nothing is written.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from llmopt.commands.eval import Settings, Subject, figures_of, logits_of, prepared, tokens_at_once
from llmopt.commands.model import uncompressed
from llmopt.compiler.checkpoint import DTYPES
from llmopt.compiler.errors import InputError, LlmoptError
from llmopt.compiler.recipe import RECIPES, Recipe
from llmopt.compiler.target import Target
from llmopt.console import bar
from llmopt.runtime.layer_error import weight_errors
from llmopt.runtime.measure import write_json
from llmopt.runtime.perplexity import LogitsFn, batched, measure
from llmopt.runtime.report import Report

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "benchmarks" / "results" / "quality.json"
KEYS = ("model", "recipe_digest", "target", "dtype", "data", "window", "asked_windows")
Figures = dict[str, Any]


class Remembered:
    """The logits of a program that is compared with many others, computed once: fp32 [W, V] a window, in memory."""

    def __init__(self, logits: LogitsFn) -> None:
        self.logits = logits
        self.known: list[list[Tensor]] = []
        self.at = 0

    def __call__(self, ids: Tensor) -> Iterator[Tensor]:
        if self.at == len(self.known):
            self.known.append([piece.cpu() for piece in self.logits(ids)])
        self.at += 1
        yield from self.known[self.at - 1]


class Bench:
    """One model under many recipes; the uncompressed program is compiled and run once for those that share it."""

    def __init__(self, model: Path, args: argparse.Namespace) -> None:
        self.model, self.args = model, args
        self.plain: Recipe | None = None
        self.base: Subject | None = None
        self.remembered: Remembered | None = None

    def settings(self, recipe: str, against: str | None) -> Settings:
        """As `llmopt eval` has them."""
        args = self.args
        common = Settings(
            str(self.model), str(args.tokens), recipe, args.target, args.dtype, against, args.windows, args.window
        )
        if not learns(Recipe.parse(recipe)):
            return common
        kept_at = args.statistics / f"{self.model.name}-{args.dtype}.safetensors"
        return replace(common, calibration=str(calibration_data(args)), statistics=kept_at)

    def run(self, name: str) -> Figures:
        """The figures of a recipe."""
        recipe = Recipe.parse(name)
        plain = uncompressed(recipe)
        shared = self.base is not None and self.plain is not None and plain.digest() == self.plain.digest()
        subject = prepared(self.settings(name, "none" if shared or plain == recipe else None))
        if shared and self.base is not None:
            subject = replace(subject, settings=self.settings(name, None), theirs=self.base.theirs)
        elif subject.theirs is not None:
            self.base, self.plain, self.remembered = subject, plain, None
        if plain == recipe:
            subject = replace(subject, theirs=None)
        quality, seconds = self._measured(subject)
        return {
            **figures_of(subject, quality, seconds),
            "recipe": name,
            "asked_windows": self.args.windows,
            "bits_per_weight": bits_per_weight(subject.ours.report, DTYPES[self.args.dtype].itemsize * 8),
            "sqnr_db": {error.name: error.sqnr_db for error in weight_errors(subject.ours.report)},
        }

    def _measured(self, subject: Subject) -> tuple[Any, float]:
        models = [m for m in (subject.ours, subject.theirs) if m is not None]
        most = tokens_at_once(models)
        other = None
        if subject.theirs is not None:
            self.remembered = self.remembered or Remembered(logits_of(subject.theirs, most))
            self.remembered.at, other = 0, self.remembered
        started = time.perf_counter()
        with bar(f"{self.model.name}", len(subject.windows)) as advance:
            quality = measure(
                logits_of(subject.ours, most), batched(subject.windows, 1), other,
                lambda q, more: advance(more, f"{subject.ours.recipe.name}: {q.perplexity:.4f}"),
            )  # fmt: skip
        return quality, time.perf_counter() - started


def learns(recipe: Recipe) -> bool:
    """Does it need calibration data?"""
    options = {name: value for spec in recipe.passes for name, value in spec.options}
    return options.get("method") == "gptq" or bool(options.get("weighted")) or bool(options.get("bits"))


def calibration_data(args: argparse.Namespace) -> Path:
    """--calibration, or the last quarter of the tokens as a file of their own."""
    if args.calibration is not None:
        return args.calibration
    made = args.statistics / "calibration.safetensors"
    if not made.is_file():
        if args.tokens.suffix != ".safetensors":
            raise InputError(
                f"{args.tokens.name} is no token file, to learn from a quarter of it; give --calibration FILE"
            )
        tokens = load_file(args.tokens)["tokens"].flatten()
        first = len(tokens) * 3 // 4
        if args.windows is None or args.windows * args.window + 1 > first:
            raise InputError(
                f"{args.windows or 'all'} windows of {args.window} tokens reach into the last quarter of {len(tokens)} "
                "tokens, which recipes learn from; give fewer --windows, or --calibration FILE"
            )
        args.statistics.mkdir(parents=True, exist_ok=True)
        save_file({"tokens": tokens[first:].clone()}, made)
    return made


def bits_per_weight(report: Report, before: int) -> float | None:
    """Bits of the quantised weights, scales included, of which each had `before`; None if there are none."""
    found = [f for entry in report.passes for f in entry.stats.figures.values() if f.get("bytes_before")]
    whole = sum(f["bytes_before"] for f in found)
    return before * sum(f["bytes"] for f in found) / whole if whole else None


def default_recipes() -> list[str]:
    """`default` and every built-in recipe that is not exact."""
    return ["default", *(name for name, recipe in RECIPES.items() if uncompressed(recipe) != recipe)]


def measured_before(out: Path | None) -> list[Figures]:
    """The rows of the result file."""
    return json.loads(out.read_text())["rows"] if out is not None and out.is_file() else []


def key_of(row: Figures) -> tuple[Any, ...]:
    """What tells one measurement from another."""
    return tuple(row[key] for key in KEYS)


def wanted_key(model: Path, recipe: str, args: argparse.Namespace) -> tuple[Any, ...]:
    """The key that a measurement would have."""
    target = args.target or Target.detect().name
    return model.name, Recipe.parse(recipe).digest(), target, args.dtype, args.tokens.name, args.window, args.windows


def kept(rows: list[Figures], row: Figures) -> list[Figures]:
    """The rows with this one in the place of an older one of its key, or at the end."""
    at = next((i for i, old in enumerate(rows) if key_of(old) == key_of(row)), len(rows))
    return [*rows[:at], row, *rows[at + 1 :]]


def say(row: Figures) -> None:
    """One line."""
    other = row["against"]
    close = f", KL {other['kl']:.5f}, top-1 {other['top1']:.2%}" if other else ""
    bits = f", {row['bits_per_weight']:.3f} bits" if row["bits_per_weight"] else ""
    print(f"{row['model']} {row['recipe']}: perplexity {row['perplexity']:.4f}{close}{bits}, {row['seconds']:.0f} s")


def parsed(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models-dir", type=Path, default=ROOT / "examples" / "models", help="a folder of checkpoints")
    parser.add_argument("--tokens", type=Path, help="as --data of `llmopt eval`")
    parser.add_argument("--recipes", nargs="+", help="names, files, or several joined with + (all that compress)")
    parser.add_argument("--dtype", default="float32", choices=sorted(DTYPES))
    parser.add_argument("--target", help="this machine if not given")
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--windows", type=int, default=40, help="read so many windows; 0 reads all")
    parser.add_argument("--calibration", type=Path, help="as of `llmopt compile` (the last quarter of the tokens)")
    parser.add_argument("--statistics", type=Path, help="a folder to keep what is learned in (a temporary one)")
    parser.add_argument("--out", type=Path, help="the result file (benchmarks/results/quality.json)")
    parser.add_argument("--again", action="store_true", help="measure what was measured before, too")
    args = parser.parse_args(argv)
    args.out = args.out or (OUT if args.tokens else None)
    args.tokens, args.windows = args.tokens or ROOT / "docs" / "generate.py", args.windows or None
    return args


def main(argv: list[str] | None = None) -> int:
    """Measure, print, write; 1 if a recipe failed."""
    args = parsed(sys.argv[1:] if argv is None else argv)
    models = sorted(p.parent for p in args.models_dir.glob("*/config.json"))
    if not models:
        sys.exit(f"{args.models_dir} has no checkpoint: wanted folders with config.json in it")
    with tempfile.TemporaryDirectory() as folder:
        args.statistics = args.statistics or Path(folder)
        return int(measured_all(models, args))


def measured_all(models: Sequence[Path], args: argparse.Namespace) -> bool:
    """Every recipe of every model; has any failed?"""
    rows, failed = measured_before(args.out), False
    for model in models:
        bench = Bench(model, args)
        for recipe in args.recipes or default_recipes():
            try:
                if not args.again and wanted_key(model, recipe, args) in map(key_of, rows):
                    continue
                row = bench.run(recipe)
            except LlmoptError as error:
                print(f"{model.name} {recipe}: {str(error).splitlines()[0]}", file=sys.stderr)
                failed = True
                continue
            say(row)
            rows = kept(rows, row)
            if args.out is not None:
                write_json(args.out, {"rows": rows})
            gc.collect()
    return failed


if __name__ == "__main__":
    sys.exit(main())
