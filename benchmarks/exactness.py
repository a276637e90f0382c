"""Is what a GPU generates right? Greedy tokens in fp32 against the CPU's, errors in bf16 and fp16 against fp64.

    python benchmarks/exactness.py --models-dir FOLDER

checks every checkpoint in the folder, the small one of the examples, and random models of further families (query and
key norms, soft-caps and windows, biases and one key head, attention sinks).

fp32: a ragged batch of prompts, each prompt alone, and prompts read in small chunks must give the tokens that
transformers' own `generate` gives on the CPU, and so must the recipe `reference`. A token that differs is excused only
if both tokens' logits in fp64 are so near to the best that the rounding of the CPU's own fp32 logits, measured right
there, could turn them round; the result then lists it.

bf16, fp16: the error of logits against fp64 (same weights, whole forward on the CPU) over that of transformers' eager
forward on the same device, for prompts and for tokens decoded with the cache, in a batch and alone, teacher forced. It
may be 1.5 at most.

Whether a prompt's logits are the same bits alone, in a batch and when run again is reported and not judged. Each model
has a process of its own, several run at a time, and the result file is written after each. Exits with 1 if anything
failed.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from _exact_models import (
    CHECKPOINT,
    LENGTHS,
    RANDOM,
    Subject,
    cached_logits,
    exact_logits,
    logits,
    oracle_tokens,
    widened,
)
from _exact_models import subject as made_subject
from _exact_runs import engine, first_difference, forced, greedy, opened
from _gpu_cases import default_out, has_device, say
from _gpu_timing import relative_error
from torch import Tensor

MOST = 1.5
CHUNK = 24
DEFAULT = ("pico", "qwen3", "gemma2", "qwen2", "gpt-oss")
Figures = dict[str, Any]


def check_tokens(subject: Subject, args: argparse.Namespace) -> tuple[Figures, list[str]]:
    """Greedy tokens in fp32 by every way of running; what was found, and what failed."""
    prompts = [subject.ids(length, row) for row, length in enumerate(args.lengths)]
    want = oracle_tokens(subject.model, prompts, args.new_tokens)
    params = greedy(args.new_tokens)
    session = opened(subject.model, args.device)
    runs: dict[str, Callable[[], list[list[int]]]] = {
        "reference on the CPU": lambda: opened(subject.model, "cpu", "reference").engine.generate(prompts, params),
        "batch": lambda: session.engine.generate(prompts, params),
        "alone": lambda: [session.engine.generate([p], params)[0] for p in prompts],
        "chunks": lambda: engine(session, CHUNK).generate(prompts, params),
    }
    exact = widened(subject.model)
    found: Figures = {
        "graphs": 0, "prompts": list(map(len, prompts)), "new_tokens": args.new_tokens, "chunk": CHUNK,
        "distinct_tokens": len({t for tokens in want for t in tokens}), "ways": {},
    }  # fmt: skip
    failed = []
    for name, run in runs.items():
        got = run()
        places = first_difference(got, want)
        differences = [
            difference(subject, exact, [*prompts[row], *want[row][:at]], want[row][at], got[row][at], row)
            for row, at in enumerate(places) if at is not None
        ]  # fmt: skip
        equal, total = sum(args.new_tokens if at is None else at for at in places), args.new_tokens * len(prompts)
        found["ways"][name] = {"equal": equal, "of": total, "differences": differences}
        failed += [f"fp32, {name}: {d}" for d in differences if not d["within_rounding"]]
        say(f"  {subject.name} fp32 {name}: {equal} of {total} tokens equal, {len(differences)} differences")
    found["graphs"] = session.decoder.captured if session.decoder is not None else 0
    if args.device == "cuda" and not found["graphs"]:
        failed.append("fp32: no step was decoded by a graph")
    return found, failed


def difference(subject: Subject, exact: Any, ids: list[int], want: int, got: int, row: int) -> Figures:
    """How far apart two tokens are in fp64 after `ids`, and how far fp32 logits are from fp64 there."""
    truth = exact_logits(exact, ids)[-1]
    rounding = float((logits(subject.model, ids)[-1] - truth).abs().max())
    gap = float((truth[want] - truth[got]).abs())
    best = float(truth.max() - torch.minimum(truth[want], truth[got]))
    return {
        "prompt": row, "position": len(ids), "want": want, "got": got, "gap_fp64": gap, "below_best_fp64": best,
        "rounding_fp32": rounding, "within_rounding": best <= 2 * rounding,
    }  # fmt: skip


def check_errors(subject: Subject, dtype: torch.dtype, args: argparse.Namespace) -> tuple[Figures, list[str]]:
    """Errors of logits in a half precision against fp64, beside those of transformers on the same device."""
    model = copy.deepcopy(subject.model).to(dtype)
    prompts = list(args.lengths)
    ids = [subject.ids(length + args.steps, row) for row, length in enumerate(prompts)]
    exact = widened(model)
    truth = [exact_logits(exact, tokens) for tokens in ids]
    del exact
    session = opened(model, args.device)
    batch = forced(session, ids, prompts)
    again = forced(session, ids, prompts)
    alone = [forced(session, ids[i : i + 1], prompts[i : i + 1]) for i in range(len(ids))]
    eager = model.to("cpu" if args.device == "interpret" else args.device)
    plain = [cached_logits(eager, tokens, length) for tokens, length in zip(ids, prompts, strict=True)]
    halves = {
        "prompt": (0, [t[:n] for t, n in zip(truth, prompts, strict=True)]),
        "decode": (1, [t[n:] for t, n in zip(truth, prompts, strict=True)]),
    }
    found: Figures = {"prompts": prompts, "steps": args.steps, "errors": {}}
    failed = []
    for half, (side, want) in halves.items():
        theirs = [p[side] for p in plain]
        for way, mine in (("batch", batch[side]), ("alone", [a[side][0] for a in alone])):
            ratio, entry = compared(mine, theirs, want)
            found["errors"][f"{half}, {way}"] = entry
            say(f"  {subject.name} {name_of(dtype)} {half}, {way}: {ratio:.3f} times the error of transformers")
            if not ratio <= MOST:  # nan, too
                failed.append(f"{name_of(dtype)}, {half}, {way}: {ratio:.3f} times eager's error, wanted {MOST}")
    found["bits"] = {
        "prompts run again": same(batch[0], again[0]),
        "decode run again": same(batch[1], again[1]),
        "prompts alone as in a batch": same(batch[0], [a[0][0] for a in alone]),
        "decode alone as in a batch": same(batch[1], [a[1][0] for a in alone]),
    }
    return found, failed


def compared(mine: Sequence[Tensor], theirs: Sequence[Tensor], want: Sequence[Tensor]) -> tuple[float, Figures]:
    """(ratio of errors over all, the figures)"""
    ours, eagers = (relative_error(torch.cat([x.cpu() for x in xs]), torch.cat(list(want))) for xs in (mine, theirs))
    each = [relative_error(m.cpu(), w) / relative_error(t.cpu(), w) for m, t, w in zip(mine, theirs, want, strict=True)]
    ratio = ours / eagers
    return ratio, {"error": ours, "eager": eagers, "ratio": ratio, "worst_sequence_ratio": max(each)}


def same(first: Sequence[Tensor], second: Sequence[Tensor]) -> Figures:
    """Are the bits equal, and if not, how far apart is what differs?"""
    pairs = list(zip(first, second, strict=True))
    apart = max(float((a.float() - b.float()).abs().max()) for a, b in pairs)
    return {"equal": sum(torch.equal(a, b) for a, b in pairs), "of": len(pairs), "most_apart": apart}


def name_of(dtype: torch.dtype) -> str:
    """`bfloat16`"""
    return str(dtype).removeprefix("torch.")


def check_model(name: str, args: argparse.Namespace) -> Figures:
    """All checks of a model; one that raises has failed, and the others still run."""
    subject = made_subject(name)
    checks: dict[str, Callable[[], tuple[Figures, list[str]]]] = {"float32": lambda: check_tokens(subject, args)}
    for half in args.dtypes:
        checks[half] = lambda half=half: check_errors(subject, getattr(torch, half), args)  # type: ignore[misc]
    figures: Figures = {"name": subject.name, "parameters": sum(p.numel() for p in subject.model.parameters())}
    figures |= {"torch_products": plain_float32(), "failed": []}
    for check, run in checks.items():
        started = time.perf_counter()
        failed: list[str] = []
        try:
            figures[check], failed = run()
            figures[check]["seconds"] = time.perf_counter() - started
        except Exception as error:  # the other checks say what else is wrong
            failed = [f"{check}: {type(error).__name__}: {str(error)[:2000]}"]
        figures["failed"] += failed
        for line in failed:
            say(f"  {subject.name}: FAILED {line}")
        say(f"  {subject.name} {check}: {time.perf_counter() - started:.1f} s")
        gc.collect()
        if args.device == "cuda":
            torch.cuda.empty_cache()
    return figures


def plain_float32() -> Figures:
    """Turn TF32 off everywhere, and say what torch's products are set to."""
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    matmul = torch.backends.cuda.matmul
    return {
        "tf32": matmul.allow_tf32,
        "bf16_reduced_precision_sums": matmul.allow_bf16_reduced_precision_reduction,
        "fp16_reduced_precision_sums": matmul.allow_fp16_reduced_precision_reduction,
    }


def in_process(name: str, args: argparse.Namespace, argv: Sequence[str]) -> Figures:
    """A model's checks in a process of their own: a kernel at fault leaves no GPU to go on with."""
    threads = str(max(1, (os.cpu_count() or 1) // args.jobs))
    command = [sys.executable, __file__, *argv, "--one", name]
    environment = {"OMP_NUM_THREADS": threads, **os.environ}
    started = time.perf_counter()
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    seconds = time.perf_counter() - started
    say(f"{name}: {seconds:.1f} s")
    try:
        found: Figures = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        found = {"name": name, "failed": [f"its process ended with {done.returncode} and no figures"]}
    return {**found, "seconds": seconds}


def chosen(models: Sequence[str] | None, folder: Path | None) -> list[str]:
    """Names as given, or all folders of models and DEFAULT; a name may be that of a folder in `folder`."""
    found = {p.parent.name: str(p.parent) for p in sorted(folder.glob("*/config.json"))} if folder else {}
    rest = [name for name in DEFAULT if name != "pico" or CHECKPOINT.name not in found]
    wanted = [found.get(name, name) for name in models or (*found, *rest)]
    unknown = [m for m in wanted if m not in ("pico", *RANDOM) and not (Path(m) / "config.json").is_file()]
    if unknown:
        sys.exit(f"{unknown[0]!r} is neither a folder of a checkpoint nor one of pico, {', '.join(RANDOM)}")
    return wanted


def parsed(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = f"checkpoint folders, or {', '.join(('pico', *RANDOM))}"
    parser.add_argument("--models", nargs="+", metavar="MODEL", help=known)
    parser.add_argument("--models-dir", type=Path, help="a folder of checkpoint folders, each a model to check")
    parser.add_argument("--dtypes", nargs="*", choices=("bfloat16", "float16"), help="half precisions to check")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="tokens of the prompts of a batch")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--steps", type=int, default=32, help="tokens decoded in half precisions")
    parser.add_argument("--device", choices=("cuda", "cpu", "interpret"), default="cuda")
    parser.add_argument("--jobs", type=int, help="models at a time (on a GPU 2 cores a model)")
    parser.add_argument("--out", type=Path, help="result file")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    # the interpreter multiplies the bits of bf16 as integers
    args.dtypes = args.dtypes or (("float16",) if args.device == "interpret" else ("bfloat16", "float16"))
    args.jobs = args.jobs or (max(1, (os.cpu_count() or 1) // 2) if args.device == "cuda" else 1)
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Check the models; 1 if anything failed."""
    from llmopt.runtime.measure import environment, write_json

    argv = sys.argv[1:] if argv is None else argv
    args = parsed(argv)
    if args.one:
        print(json.dumps(check_model(args.one, args)))
        return 0
    if not has_device("cpu" if args.device == "interpret" else args.device):
        return 0
    names, started = chosen(args.models, args.models_dir), time.perf_counter()
    args.jobs = min(args.jobs, len(names))
    out = args.out or (default_out("exactness", args.device) if args.device == "cuda" else None)
    figures: Figures = {"device": args.device, "environment": environment()}
    models: dict[str, Figures] = {}
    with ThreadPoolExecutor(args.jobs) as pool:
        for found in pool.map(lambda name: in_process(name, args, argv), names):
            models[found.pop("name")] = found
            if out is not None:
                write_json(out, {**figures, "models": models, "seconds": time.perf_counter() - started})
    failed = [f"{name}: {line}" for name, model in models.items() for line in model["failed"]]
    for line in failed:
        say(f"FAILED {line}")
    verdict = f"{len(failed)} failures in {len(models)} models" if failed else f"all of {len(models)} models are exact"
    say(f"{verdict}; {time.perf_counter() - started:.0f} s")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
