"""A decoding step on one GPU against transformers and Inductor: all peers in one process, numerics first.

    python benchmarks/decode.py --models llama-3.1-8b --batch 1 --ctx 512 1024 --out benchmarks/results/decode_h200.json
    python benchmarks/decode.py --merge part1.json part2.json --out benchmarks/results/decode_h200.json

Random weights N(0, 0.02), the same in all peers; the cache is filled by reading a random prompt. Before anything is
timed, each peer's logits are compared with fp64 ones: an error above 1.5 times that of transformers' eager forward ends
the script. Then the peers run in turns, `--steps` steps that follow each other a turn, token in, token out. The result
file is rewritten after every case; a case measured again replaces the older one.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from _gpu_models import SHAPES, Weights, plain_weights, random_model, reference_logits, step_bytes
from _gpu_peers import OURS, PEERS, SPARE, Case, Peer
from _gpu_timing import LEAD, Clock, Denominators, interleaved, kernels, relative_error, summary
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel

RESULTS = Path(__file__).resolve().parent / "results"
MODELS = ("llama-3.1-8b", "llama-3.2-1b", "qwen3-0.6b")
DEFAULT = (
    "hf-eager", "hf-reduce-overhead", "hf-max-autotune", "plain-reduce-overhead", "plain-max-autotune",
    "plain-flex-max-autotune", OURS,
)  # fmt: skip
LIKE = "hf-eager"  # whose error is the measure
MOST = 1.5
SOUND = 0.1  # an error of the eager forward above this means that the fp64 evaluation is of another model
GATED = 4  # sequences of a case that are evaluated in fp64
WARM = 4  # steps after which a peer is compiled, recorded and settled


class GateError(RuntimeError):
    """A peer's logits are too far from the fp64 ones."""


def gate(peers: dict[str, Peer], weights: Weights, case: Case) -> dict[str, float]:
    """Relative error of each peer's first decoding step against fp64. Raises GateError."""
    rows = min(GATED, case.batch)
    want = reference_logits(weights, case.ids[:rows])
    errors = {}
    for name, peer in peers.items():
        peer.rewind()
        errors[name] = relative_error(peer.step()[:rows], want)
    most = MOST * errors[LIKE] if LIKE in errors else SOUND
    if errors.get(LIKE, 0.0) > SOUND:
        raise GateError(f"{LIKE} is {errors[LIKE]:.3f} from the fp64 logits, wanted at most {SOUND}: {errors}")
    for name, error in errors.items():
        if not error <= most:
            raise GateError(
                f"{name} is {error:.5f} from the fp64 logits, wanted at most {most:.5f} ({MOST} times {LIKE}'s); "
                f"nothing was timed; all errors: {errors}"
            )
    return errors


def prepare(name: str, case: Case, clock: Clock) -> tuple[Peer, float]:
    """A peer ready to be timed, and the seconds its compilation and first steps took (prompt included)."""
    started = time.perf_counter()
    peer = PEERS[name](case)
    peer.rewind()
    for _ in range(WARM):
        peer.step()
    clock.wait()
    return peer, time.perf_counter() - started


def measure_case(
    model: PreTrainedModel, weights: Weights, batch: int, context: int, args: argparse.Namespace
) -> dict[str, Any]:
    """All figures of one case. Raises GateError."""
    from llmopt.runtime.measure import environment

    device = model.device
    clock = Clock(str(device))
    generator = torch.Generator(device).manual_seed(batch * 65536 + context)
    ids = torch.randint(0, model.config.vocab_size, (batch, context + 1), generator=generator, device=device)
    case = Case(model, weights, ids, compiled=args.compile)
    peers: dict[str, Peer] = {}
    seconds: dict[str, float] = {}
    failed: dict[str, str] = {}
    for name in args.peers:
        try:
            peers[name], seconds[name] = prepare(name, case, clock)
            say(f"  {name}: ready in {seconds[name]:.1f} s")
        except Exception as error:  # one peer's failure is a result, too
            failed[name] = f"{type(error).__name__}: {str(error)[:600]}"
            say(f"  {name}: FAILED: {failed[name]}")
    errors = gate(peers, weights, case)
    denominators = Denominators(str(device))
    found = interleaved(peers, args.rounds, args.steps, clock, denominators)
    base = denominators.to_dict()
    needed = step_bytes(weights, batch, context)
    rows = []
    for name, peer in peers.items():
        row = {
            "peer": name, "note": peer.note, "ms": summary(found[name]["ms"]),
            "host_ms": summary(found[name]["host_ms"]), "error": errors[name], "ready_s": seconds[name],
            **kernels(peer, clock),
        }  # fmt: skip
        if base:
            row["read_bandwidth_share"] = needed / (row["ms"]["median"] / 1e3) / base["read_bytes_per_s"]
        rows.append(row)
    return {
        "model": args.name, "dtype": str(model.dtype).removeprefix("torch."), "batch": batch, "context": context,
        "layers": model.config.num_hidden_layers, "static_cache": context + SPARE, "bytes_per_step": needed,
        "gate": f"fp64, {min(GATED, batch)} of {batch} sequences, at most {MOST} times {LIKE}'s error",
        "steps_per_turn": args.steps, "untimed_steps_per_turn": LEAD, **base,
        "peers": rows, "failed": failed, "environment": environment(),
    }  # fmt: skip


def say(text: str) -> None:
    """Progress, on stderr, at once."""
    print(text, file=sys.stderr, flush=True)


def show(case: dict[str, Any]) -> None:
    """The case as a table."""
    table = Table(title=f"{case['model']} {case['dtype']}, batch {case['batch']}, context {case['context']}")
    for column in ("peer", "ms", "p90", "host ms", "kernels", "busy ms", "of read", "error", "ready s"):
        table.add_column(column, justify="left" if column == "peer" else "right")
    for r in case["peers"]:
        busy, share = r.get("busy_us"), r.get("read_bandwidth_share")
        table.add_row(
            r["peer"], f"{r['ms']['median']:.3f}", f"{r['ms']['p90']:.3f}", f"{r['host_ms']['median']:.3f}",
            str(r.get("kernels", "-")), "-" if busy is None else f"{busy / 1e3:.3f}",
            "-" if share is None else f"{share:.1%}", f"{r['error']:.5f}", f"{r['ready_s']:.1f}",
        )  # fmt: skip
    console = Console(width=140)
    console.print(table)
    if "read_bytes_per_s" in case:
        console.print(
            f"read {case['read_bytes_per_s'] / 1e12:.2f} TB/s, copy {case['copy_bytes_per_s'] / 1e12:.2f} TB/s, "
            f"bf16 matmul {case['matmul_bf16_flop_per_s'] / 1e12:.0f} TFLOP/s"
        )
    for name, why in case["failed"].items():
        console.print(f"{name} failed: {why}", markup=False)


def key(case: dict[str, Any]) -> tuple[Any, ...]:
    """What makes two cases the same measurement."""
    return case["model"], case["dtype"], case["batch"], case["context"]


def merged(old: Sequence[dict[str, Any]], new: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Cases of both, the new ones in place of old ones of the same key."""
    cases = {key(c): c for c in old}
    cases.update({key(c): c for c in new})
    return list(cases.values())


def read_cases(path: Path | None) -> list[dict[str, Any]]:
    """The cases of a result file; none if there is no file."""
    return json.loads(path.read_text())["cases"] if path is not None and path.exists() else []


def slug() -> str:
    """`h200` on an NVIDIA H200."""
    words = torch.cuda.get_device_name().lower().split()
    return "-".join(w for w in words if w not in ("nvidia", "geforce"))


def free() -> None:
    """Give back what the last case held: compiled graphs and their pools, caches."""
    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@torch.no_grad()
def run(args: argparse.Namespace) -> None:
    """Every case, written as soon as it is there."""
    from llmopt.runtime.measure import write_json

    cases = read_cases(args.out)
    started = time.perf_counter()
    for args.name in args.models:
        model = random_model(args.name, args.device, getattr(torch, args.dtype), args.layers)
        weights = plain_weights(model)
        for batch, context in [(b, c) for b in args.batch for c in args.ctx]:
            spent = time.perf_counter() - started
            if spent > 60 * args.minutes:
                say(f"{spent:.0f} s are gone: no new case is begun (--minutes {args.minutes:g})")
                return
            say(f"{args.name}, batch {batch}, context {context}:")
            case = measure_case(model, weights, batch, context, args)
            show(case)
            cases = merged(cases, [case])
            if args.out:
                write_json(args.out, {"cases": cases})
            free()
        del model, weights
        free()


def parser() -> argparse.ArgumentParser:
    """The options."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--models", nargs="+", choices=SHAPES, default=MODELS, metavar="NAME", help=", ".join(SHAPES))
    made.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    made.add_argument("--ctx", type=int, nargs="+", default=[512, 1024], help="tokens in the cache")
    made.add_argument("--peers", nargs="+", choices=PEERS, default=DEFAULT, metavar="PEER", help=", ".join(PEERS))
    made.add_argument("--rounds", type=int, default=20, help="turns of each peer")
    made.add_argument("--steps", type=int, default=10, help="timed steps of a turn")
    made.add_argument("--dtype", default="bfloat16")
    made.add_argument("--device", default="cuda")
    made.add_argument("--layers", type=int, help="fewer layers than the model has (not for figures)")
    made.add_argument("--minutes", type=float, default=1e9, help="begin no case after this long")
    made.add_argument("--no-compile", dest="compile", action="store_false", help="peers of torch.compile run eagerly")
    made.add_argument("--out", type=Path, help="result file; cases already in it stay")
    made.add_argument("--merge", type=Path, nargs="+", help="measure nothing: put the cases of these files into --out")
    return made


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, or merge."""
    from llmopt.runtime.measure import write_json

    args = parser().parse_args(argv)
    if LEAD + args.steps > SPARE:
        sys.exit(f"--steps is {args.steps}; wanted at most {SPARE - LEAD}, the room a static cache has")
    if args.merge:
        cases = read_cases(args.out)
        for path in args.merge:
            cases = merged(cases, read_cases(path))
        write_json(args.out or RESULTS / "decode.json", {"cases": cases})
        return
    if torch.device(args.device).type == "cuda" and not torch.cuda.is_available():
        say("this machine has no GPU: nothing is measured")
        return
    try:
        run(args)
    except GateError as error:
        sys.exit(f"numerics: {error}")


if __name__ == "__main__":
    main()
