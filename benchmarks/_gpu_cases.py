"""What the GPU benchmarks of peers share: cases of random tokens, the numerics gate, turns, tables, result files."""

from __future__ import annotations

import gc
import json
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from _gpu_models import Rounded, Weights, plain_weights, random_model, reference_logits
from _gpu_peers import Case, Peer
from _gpu_timing import LEAD, Clock, Denominators, interleaved, kernels, relative_error, summary
from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).resolve().parent / "results"
LIKE = "hf-eager"  # whose error is the measure
MOST = 1.5
SOUND = 0.1  # an error of the eager forward above this means that the fp64 evaluation is of another model
GATED = 4  # sequences of a case that are evaluated in fp64
WARM = 4  # steps after which a peer is compiled, recorded and settled


class GateError(RuntimeError):
    """A peer's logits are too far from the fp64 ones."""


def gate(peers: Mapping[str, Peer], case: Case, ids: torch.Tensor) -> dict[str, float]:
    """Relative error of the logits [B, V] of each peer's first step against fp64 ones after ids [B, T], of the weights
    as the peer rounds them.

    Raises GateError: one is above MOST times that of LIKE (above SOUND where LIKE is no peer).
    """
    rows = min(GATED, case.batch)
    want: dict[tuple[str, str], torch.Tensor] = {}
    errors = {}
    for name, peer in peers.items():
        how = getattr(peer, "scheme", ""), getattr(peer, "scale", "")
        if how not in want:
            layers = Rounded(case.weights.layers, *how) if how[0] else case.weights.layers
            want[how] = reference_logits(case.weights._replace(layers=layers), ids[:rows])
        peer.rewind()
        errors[name] = relative_error(peer.step()[:rows], want[how])
    if errors.get(LIKE, 0.0) > SOUND:
        raise GateError(f"{LIKE} is {errors[LIKE]:.3f} from the fp64 logits, wanted at most {SOUND}: {errors}")
    most = MOST * errors[LIKE] if LIKE in errors else SOUND
    for name, error in errors.items():
        if not error <= most:  # nan, too
            raise GateError(
                f"{name} is {error:.5f} from the fp64 logits, wanted at most {most:.5f} ({MOST} times {LIKE}'s); "
                f"nothing was timed; all errors: {errors}"
            )
    return errors


def prepared(
    makers: Mapping[str, Callable[[Case], Peer]], case: Case, clock: Clock
) -> tuple[dict[str, Peer], dict[str, float], dict[str, str]]:
    """Peers that run, the seconds until each did (prompt, compilation and first steps), and why the others do not."""
    peers: dict[str, Peer] = {}
    seconds: dict[str, float] = {}
    failed: dict[str, str] = {}
    for name, make in makers.items():
        started = time.perf_counter()
        try:
            peer = make(case)
            peer.rewind()
            for _ in range(WARM):
                peer.step()
            clock.wait()
        except Exception as error:  # a peer that does not run is a result, too
            failed[name] = f"{type(error).__name__}: {str(error)[:600]}"
            say(f"  {name}: FAILED: {failed[name]}")
            continue
        peers[name], seconds[name] = peer, time.perf_counter() - started
        say(f"  {name}: ready in {seconds[name]:.1f} s")
    return peers, seconds, failed


def random_case(model: Any, weights: Weights, batch: int, tokens: int, compiled: bool, kept: dict[str, Any]) -> Case:
    """Fixed random ids [batch, tokens]."""
    generator = torch.Generator(model.device).manual_seed(batch * 65536 + tokens)
    ids = torch.randint(0, model.config.vocab_size, (batch, tokens), generator=generator, device=model.device)
    return Case(model, weights, ids, compiled, kept)


def measure(
    makers: Mapping[str, Callable[[Case], Peer]], case: Case, gated: torch.Tensor, rounds: int, steps: int
) -> dict[str, Any]:
    """Gate, time and count every peer of a case; `gated` are the ids that the first step's logits follow.

    Raises GateError.
    """
    from llmopt.runtime.measure import environment

    device = str(case.model.device)
    clock = Clock(device)
    peers, seconds, failed = prepared(makers, case, clock)
    errors = gate(peers, case, gated)
    denominators = Denominators(device)
    found = interleaved(peers, rounds, steps, clock, denominators)
    rows = [
        {
            "peer": name, "note": peer.note, "ms": summary(found[name]["ms"]),
            "host_ms": summary(found[name]["host_ms"]), "error": errors[name], "ready_s": seconds[name],
            "saved_bytes": getattr(peer, "saved_bytes", 0),
            **kernels(peer, clock),
        }
        for name, peer in peers.items()
    ]  # fmt: skip
    return {
        "dtype": str(case.model.dtype).removeprefix("torch."), "layers": case.model.config.num_hidden_layers,
        "gate": f"fp64, {min(GATED, case.batch)} of {case.batch} sequences, at most {MOST} times {LIKE}'s error",
        "steps_per_turn": steps, "untimed_steps_per_turn": LEAD, **denominators.to_dict(),
        "peers": rows, "failed": failed, "environment": environment(),
    }  # fmt: skip


def each_case(
    models: Iterable[str], sizes: Sequence[tuple[int, int]], args: Any, run: Callable[[Any, Weights, Any], Any]
) -> None:
    """Call run(model, weights, (name, batch, tokens, kept)) for every model and size, memory freed in between."""
    started = time.perf_counter()
    for name in models:
        model = random_model(name, args.device, getattr(torch, args.dtype), args.layers)
        weights, kept = plain_weights(model), {}
        for batch, tokens in sizes:
            spent = time.perf_counter() - started
            if spent > 60 * args.minutes:
                say(f"{spent:.0f} s are gone: no new case is begun (--minutes {args.minutes:g})")
                return
            say(f"{name}, batch {batch}, {tokens} tokens:")
            run(model, weights, (name, batch, tokens, kept))
            free()
        del model, weights
        kept.clear()
        free()


def free() -> None:
    """Give back what the last case held: compiled graphs and their pools, caches."""
    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def say(text: str) -> None:
    """Progress, on stderr, at once."""
    print(text, file=sys.stderr, flush=True)


def has_device(device: str) -> bool:
    """Whether this machine has the device; says so if not."""
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        say("this machine has no GPU: nothing is measured")
        return False
    return True


def show(case: Mapping[str, Any], title: str) -> None:
    """The case as a table."""
    table = Table(title=title)
    for column in ("peer", "ms", "p90", "host ms", "kernels", "copies", "busy ms", "of read", "error", "ready s"):
        table.add_column(column, justify="left" if column == "peer" else "right")
    for r in case["peers"]:
        busy, share = r.get("busy_us"), r.get("read_bandwidth_share")
        table.add_row(
            r["peer"], f"{r['ms']['median']:.3f}", f"{r['ms']['p90']:.3f}", f"{r['host_ms']['median']:.3f}",
            str(r.get("kernels", "-")), str(r.get("copies", "-")), "-" if busy is None else f"{busy / 1e3:.3f}",
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


# result files: {"cases": [...]}, each case with its own environment and denominators


def key(case: Mapping[str, Any]) -> tuple[Any, ...]:
    """What makes two cases the same measurement."""
    return case["model"], case["dtype"], case["batch"], case["tokens"]


def merged(old: Sequence[dict[str, Any]], new: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Cases of both, the new ones in place of old ones of the same key."""
    cases = {key(c): c for c in old}
    cases.update({key(c): c for c in new})
    return list(cases.values())


def read_cases(path: Path | None) -> list[dict[str, Any]]:
    """The cases of a result file; none if there is no file."""
    return json.loads(path.read_text())["cases"] if path is not None and path.exists() else []


def add_cases(path: Path, new: Sequence[dict[str, Any]]) -> None:
    """Put cases into a result file, whole or not at all."""
    from llmopt.runtime.measure import write_json

    write_json(path, {"cases": merged(read_cases(path), new)})


def default_out(stem: str, device: str) -> Path | None:
    """results/STEM_h200.json on an NVIDIA H200; nothing on a CPU."""
    if torch.device(device).type != "cuda":
        return None
    words = torch.cuda.get_device_name().lower().split()
    return RESULTS / f"{stem}_{'-'.join(w for w in words if w not in ('nvidia', 'geforce'))}.json"


def add_options(parser: Any, peers: Iterable[str], default: Sequence[str]) -> None:
    """Options of both benchmarks."""
    parser.add_argument("--peers", nargs="+", choices=peers, default=default, metavar="PEER", help=", ".join(peers))
    parser.add_argument("--rounds", type=int, default=20, help="turns of each peer")
    parser.add_argument("--steps", type=int, default=10, help="timed steps of a turn")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--layers", type=int, help="fewer layers than the model has (not for figures)")
    parser.add_argument("--minutes", type=float, default=1e9, help="begin no case after this long")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="torch.compile's peers run eagerly")
    parser.add_argument("--out", type=Path, help="result file; cases already in it stay")
