"""`llmopt bench`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.table import Table

from llmopt.bench import Settings, measure, ratios
from llmopt.commands.figures import deliver
from llmopt.commands.model import Wanted, say_notes
from llmopt.compiler.errors import InputError
from llmopt.console import stages, write_table

COLUMNS = (
    "batch", "peer", "decode tok/s", "all tok/s", "first token ms", "median s", "min s", "p90 s", "of read bw",
    "peak RSS MiB", "tokens",
)  # fmt: skip


def bench_model(
    model: str,
    wanted: Wanted,
    batch: str,
    new_tokens: int,
    prompt_tokens: int,
    rounds: int,
    peers: str,
    out: Path | None,
    as_json: bool,
) -> None:
    """Measure, print, and write a file if asked to."""
    names = tuple(name.strip() for name in peers.split(",") if name.strip())
    recipe, dtype = wanted.recipe or "default", wanted.dtype or "float32"
    learning = wanted.calibration, wanted.statistics, wanted.bits
    settings = Settings(model, recipe, dtype, _batches(batch), new_tokens, prompt_tokens, rounds, names, *learning)
    with stages(f"benchmarking {model}") as progress:
        figures = measure(settings, progress)
    say_notes(figures["notes"])
    deliver(figures, show, out, as_json)


def _batches(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise InputError(f"bench: --batch is {text!r}; wanted whole numbers separated by commas, such as 1,8") from None


def show(figures: dict[str, Any]) -> None:
    """The table and the ratios."""
    said = figures["settings"]
    lengths = f"{said['prompt_tokens']} + {said['new_tokens']} tokens"
    table = Table(*COLUMNS, title=f"{said['model']}, {said['dtype']}, {lengths}, {figures['threads']} threads")
    for row in figures["results"]:
        seconds = row["seconds"]
        peak = figures["peak_rss_bytes"].get(row["peer"])
        table.add_row(
            str(row["batch"]), row["peer"], f"{row['decode_tokens_per_s']:.1f}", f"{row['tokens_per_s']:.1f}",
            f"{row['first_token_ms']:.1f}", *(f"{seconds[k]:.3f}" for k in ("median", "min", "p90")),
            f"{row['read_bandwidth_share']:.0%}", f"{peak / 2**20:.0f}" if peak else "-",
            "identical" if row["identical_tokens"] else "differ",
        )  # fmt: skip
    write_table(table)
    for line in ratios(figures["results"]):
        print(line)
    for name, note in figures["peers"].items():
        print(f"{name}: {note}")
    print(
        f"{figures['cpu']}, {figures['threads']} threads, "
        f"reads {figures['read_bandwidth_bytes_per_s'] / 1e9:.1f} GB/s, "
        f"load average {figures['load_average']:.1f}; torch {figures['torch']}, transformers {figures['transformers']}"
    )
