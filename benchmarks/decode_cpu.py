"""Decoding on the CPU against transformers, eager and compiled by Inductor: the same as `llmopt bench`, with a record.

python benchmarks/decode_cpu.py MODEL --out benchmarks/results/decode-cpu.json
"""

from __future__ import annotations

import argparse
from pathlib import Path

PICO = Path(__file__).resolve().parents[1] / "examples" / "models" / "pico-llama-4m"


def main() -> None:
    """Measure, print, write."""
    from llmopt.bench import Settings, measure
    from llmopt.commands.bench import show
    from llmopt.console import stages
    from llmopt.runtime.measure import write_json

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=str(PICO), help="checkpoint folder or hub id (the embedded model)")
    parser.add_argument("--out", type=Path, help="write the figures to this JSON file")
    parser.add_argument("--recipe", default="default")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--prompt-tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peers", nargs="+", default=["hf-eager", "hf-inductor"])
    args = parser.parse_args()
    settings = Settings(
        args.model, args.recipe, args.dtype, tuple(args.batch), args.new_tokens, args.prompt_tokens, args.rounds,
        tuple(args.peers),
    )  # fmt: skip
    with stages("benchmarking") as progress:
        figures = measure(settings, progress)
    show(figures)
    if args.out:
        write_json(args.out, figures)


if __name__ == "__main__":
    main()
