"""A decoding step on one GPU against transformers and Inductor: all peers in one process, numerics first.

    python benchmarks/decode.py --models llama-3.1-8b --batch 1 --ctx 512 1024
    python benchmarks/decode.py --merge part1.json part2.json --out benchmarks/results/decode_h200.json

Random weights N(0, 0.02), the same in all peers; the cache is filled by reading a random prompt. Before anything is
timed, each peer's logits are compared with fp64 ones: an error above 1.5 times that of transformers' eager forward ends
the script. Then the peers run in turns, `--steps` steps that follow each other a turn, token in, token out, timed by
CUDA events. The result file (benchmarks/results/decode_GPU.json) is rewritten after every case; a case measured again
replaces the older one.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from _gpu_cases import (
    RESULTS,
    GateError,
    add_cases,
    add_options,
    default_out,
    each_case,
    has_device,
    measure,
    random_case,
    read_cases,
    show,
)
from _gpu_models import SHAPES, Weights, step_bytes
from _gpu_peers import OURS, PEERS, SPARE
from _gpu_timing import LEAD

MODELS = ("llama-3.1-8b", "llama-3.2-1b", "qwen3-0.6b")
DEFAULT = (
    "hf-eager", "hf-reduce-overhead", "hf-max-autotune", "plain-reduce-overhead", "plain-max-autotune",
    "plain-flex-max-autotune", OURS,
)  # fmt: skip


def measure_case(
    model: Any, weights: Weights, name: str, batch: int, context: int, args: argparse.Namespace, kept: dict[str, Any]
) -> dict[str, Any]:
    """All figures of one case. Raises GateError."""
    case = random_case(model, weights, batch, context + 1, args.compile, kept)
    makers = {peer: PEERS[peer] for peer in args.peers}
    found = measure(makers, case, case.ids, args.rounds, args.steps)
    needed = step_bytes(weights, batch, context)
    if "read_bytes_per_s" in found:
        for row in found["peers"]:
            read = needed - row["saved_bytes"]
            row["read_bandwidth_share"] = read / (row["ms"]["median"] / 1e3) / found["read_bytes_per_s"]
    about = {"model": name, "batch": batch, "tokens": context, "static_cache": context + SPARE}
    return {**about, "bytes_per_step": needed, **found}


@torch.no_grad()
def run(args: argparse.Namespace) -> None:
    """Every case, written as soon as it is there."""
    out = args.out or default_out("decode", args.device)

    def one(model: Any, weights: Weights, about: tuple[str, int, int, dict[str, Any]]) -> None:
        name, batch, context, kept = about
        case = measure_case(model, weights, name, batch, context, args, kept)
        show(case, f"decoding step, {name} {args.dtype}, batch {batch}, context {context}")
        if out:
            add_cases(out, [case])

    each_case(args.models, [(b, c) for b in args.batch for c in args.ctx], args, one)


def parser() -> argparse.ArgumentParser:
    """The options."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--models", nargs="+", choices=SHAPES, default=MODELS, metavar="NAME", help=", ".join(SHAPES))
    made.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    made.add_argument("--ctx", type=int, nargs="+", default=[512, 1024], help="tokens in the cache")
    made.add_argument("--merge", type=Path, nargs="+", help="measure nothing: put the cases of these files into --out")
    add_options(made, PEERS, DEFAULT)
    return made


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, or merge."""
    args = parser().parse_args(argv)
    if LEAD + args.steps > SPARE:
        sys.exit(f"--steps is {args.steps}; wanted at most {SPARE - LEAD}, the room a static cache has")
    if args.merge:
        for path in args.merge:
            add_cases(args.out or RESULTS / "decode.json", read_cases(path))
    elif has_device(args.device):
        try:
            run(args)
        except GateError as error:
            sys.exit(f"numerics: {error}")


if __name__ == "__main__":
    main()
