"""Seconds until a GPU makes its first token: compiled cold, compiled with kernels cached, loaded from an artifact.

    python benchmarks/startup.py --model llama-3.1-8b

Each way runs in a process of its own, and all three must make the same tokens. `cold` starts with empty caches of
kernels, `cached` with those it left; `load` reads the artifact that `cold` saved, with empty caches again, and must
leave no kernel in them: nothing was compiled. What each figure means stands in the result (DEFINITIONS).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

from _gpu_cases import default_out, has_device, say
from _gpu_models import SHAPES, random_model

PROMPT = list(range(3, 35))
NEW_TOKENS = 8
WAYS = ("cold", "cached", "load")
DEFINITIONS = {
    "clock": "starts when Python, torch and llmopt are imported; CUDA's context is made inside of it in way load",
    "compile_s": "llmopt.compile of a transformers model whose weights are on the device: capture, passes, our copy of "
    "the weights, the KV cache",
    "first_token_s": "from the start to the first token behind a prompt of 32 tokens, the kernels it needs compiled",
    "other_classes_s": "compiling what steps of other sizes need, which the artifact holds too",
    "load_s": "llmopt.load of an artifact whose files the page cache holds",
    "weights_s": "of load_s, reading the weights and copying them to the device",
    "hashes_s": "of load_s, sha256 of every file",
    "first_token_weights_resident_s": "first_token_s less weights_s and hashes_s: with the weights on the device",
}


def first_tokens(model: Any) -> tuple[list[int], float]:
    """Greedy tokens after a fixed prompt, and the seconds to the first."""
    started = time.perf_counter()
    made, first = [], 0.0
    for _, token in model.generate(PROMPT, NEW_TOKENS, ignore_eos=True, stream=True):
        first = first or time.perf_counter() - started
        made.append(token)
    return made, first


def compiled(args: argparse.Namespace, save: Path | None) -> dict[str, Any]:
    """Compile a model whose weights are on the device; perhaps save it."""
    import torch

    import llmopt

    source = random_model(args.model, args.device, getattr(torch, args.dtype), args.layers)
    started = time.perf_counter()
    model = llmopt.compile(source, target=torch.device(args.device).type, dtype=args.dtype)
    compiling = time.perf_counter() - started
    tokens, first = first_tokens(model)
    found = {"compile_s": compiling, "first_token_s": compiling + first, "stages_s": dict(model.report.seconds)}
    started = time.perf_counter()
    model.regions.compile_all()
    found["other_classes_s"] = time.perf_counter() - started
    if save is not None:
        started = time.perf_counter()
        model.save(save)
        found["save_s"] = time.perf_counter() - started
    return {**found, "tokens": tokens, "weight_bytes": sum(w.nbytes for w in model.weights.values())}


def loaded(path: Path) -> dict[str, Any]:
    """Load an artifact: in all, and what of it is reading weights and checking hashes."""
    import llmopt
    from llmopt.runtime import artifact, session

    spent = {"weights_s": 0.0, "hashes_s": 0.0}

    def timed(key: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                spent[key] += time.perf_counter() - started

        return call

    reading = mock.patch.object(session, "read_weights", timed("weights_s", session.read_weights))
    checking = mock.patch.object(artifact, "_check_files", timed("hashes_s", artifact._check_files))
    with reading, checking:
        started = time.perf_counter()
        model = llmopt.load(path)
        loading = time.perf_counter() - started
    tokens, first = first_tokens(model)
    total = loading + first
    return {
        "load_s": loading, "first_token_s": total, **spent, "tokens": tokens,
        "first_token_weights_resident_s": total - sum(spent.values()),
    }  # fmt: skip


def child(args: argparse.Namespace) -> dict[str, Any]:
    """One way, in this process."""
    import torch

    if args.one == "load":
        return loaded(args.artifact)
    with torch.no_grad():
        return compiled(args, args.artifact if args.one == "cold" and not args.no_artifact else None)


def run_child(way: str, args: argparse.Namespace, folder: Path, caches: Mapping[str, Path]) -> dict[str, Any]:
    """One way in a fresh process with these caches; adds what lies in them afterwards."""
    command = [sys.executable, __file__, *sys.argv[1:], "--one", way, "--artifact", str(folder / "artifact")]
    environment = os.environ | {name: str(path) for name, path in caches.items()}
    started = time.perf_counter()
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    found["process_s"] = time.perf_counter() - started
    found["cubins"] = len(list(caches["LLMOPT_CACHE"].rglob("*.cubin")))
    found["triton_files"] = sum(p.is_file() for p in caches["TRITON_CACHE_DIR"].rglob("*"))
    say(f"  {way}: " + ", ".join(f"{k} {v:.2f}" for k, v in found.items() if k.endswith("_s") and k != "stages_s"))
    return found


def check(ways: Mapping[str, Mapping[str, Any]]) -> None:
    """Exit if tokens differ or the artifact's path compiled anything."""
    tokens = {way: found["tokens"] for way, found in ways.items()}
    if len({tuple(t) for t in tokens.values()}) > 1:
        sys.exit(f"the ways make different tokens: {tokens}")
    if "load" in ways and (made := ways["load"]["cubins"] + ways["load"]["triton_files"]):
        sys.exit(f"loading the artifact left {made} files of Triton's in empty caches: it compiled")


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All ways, in order."""
    from llmopt.runtime.measure import environment

    ways: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        for way in WAYS[:2] if args.no_artifact else WAYS:
            caches = {n: folder / f"{n}-{way.replace('cached', 'cold')}" for n in ("LLMOPT_CACHE", "TRITON_CACHE_DIR")}
            for path in caches.values():
                path.mkdir(exist_ok=True)
            ways[way] = run_child(way, args, folder, caches)
    check(ways)
    return {
        "model": args.model, "dtype": args.dtype, "layers": args.layers, "ways": ways, "definitions": DEFINITIONS,
        "environment": environment(),
    }  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, or be one of the processes measured."""
    from llmopt.runtime.measure import write_json

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SHAPES, default="llama-3.1-8b", metavar="NAME", help=", ".join(SHAPES))
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--layers", type=int, help="fewer layers than the model has (not for figures)")
    parser.add_argument("--no-artifact", action="store_true", help="neither save nor load (the disk needs the weights)")
    parser.add_argument("--folder", type=Path, help="where caches and the artifact go for the run")
    parser.add_argument("--out", type=Path, help="result file")
    parser.add_argument("--one", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--artifact", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.one:
        print(json.dumps(child(args)))
    elif has_device(args.device):
        figures = measure(args)
        out = args.out or default_out("startup", args.device)
        if out:
            write_json(out, figures)


if __name__ == "__main__":
    main()
