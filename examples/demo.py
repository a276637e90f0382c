"""The demo: compile a small model, see what each pass did, generate, and compare with plain PyTorch.

python examples/demo.py [--recipe default]
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
MODEL = Path(__file__).resolve().parent / "models" / "pico-llama-4m"
PROMPT = 'class Config:\n    """Configuration of the server."""\n\n    def __init__(self, host, port):'


def main() -> None:
    """Compile, print, generate, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(MODEL), help="checkpoint folder or hub id (the embedded model)")
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--recipe", default="default")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory", action=argparse.BooleanOptionalAction, default=True, help="measure it, too")
    args = parser.parse_args()
    sys.stdout.reconfigure(line_buffering=True)

    from rich.console import Console
    from rich.table import Table
    from transformers.utils import logging

    from llmopt.bench import OURS, Llmopt, Settings, measure, ratios
    from llmopt.console import report_table, stages, write_table

    logging.disable_progress_bar()
    settings = Settings(
        args.model,
        args.recipe,
        "float32",
        (1,),
        args.new_tokens,
        prompt_tokens=32,
        rounds=args.rounds,
        peers=("hf-eager",),
    )
    print(f"compiling {args.model} with recipe {args.recipe}\n")
    with stages("compiling") as progress:
        ours = Llmopt(settings, progress)
    model = ours.model
    write_table(report_table(model.report))
    choices = ", ".join(f"{name} x{count}" for name, count in model.report.choices.get("providers", {}).items())
    print(f"providers: {choices}")
    for name, seconds in model.report.seconds.items():
        print(f"{name}: {seconds:.1f} s")

    print(f"\n{args.prompt}", end="")
    for _, piece in model.generate([args.prompt], max_new_tokens=args.new_tokens, stream=True):
        print(piece, end="", flush=True)
    print("\n")

    with stages("comparing with plain PyTorch") as progress:
        figures = measure(settings, progress, memory=args.memory, ours=ours)
    names = {OURS: "llmopt", "hf-eager": "plain PyTorch (transformers)"}
    table = Table("", *(names[row["peer"]] for row in figures["results"]), title="one prompt, fp32, CPU")
    rows = figures["results"]
    table.add_row("tokens per second", *(f"{row['decode_tokens_per_s']:.1f}" for row in rows))
    table.add_row("time to first token", *(f"{row['first_token_ms']:.1f} ms" for row in rows))
    peaks = figures["peak_rss_bytes"]
    if peaks:
        table.add_row("peak memory (own process)", *(f"{peaks[row['peer']] / 2**20:.0f} MiB" for row in rows))
    table.add_row("same tokens", *("yes" if row["identical_tokens"] else "no" for row in rows))
    Console(width=None if sys.stdout.isatty() else 100).print(table)
    print("\n".join(ratios(rows)))


if __name__ == "__main__":
    main()
