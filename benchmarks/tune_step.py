"""Constants of kernels chosen by what whole decoding steps take, and where a step's time goes.

    python benchmarks/tune_step.py --diagnose --out tune.json                  # the tables' choice, then a search
    python benchmarks/tune_step.py --models llama-3.1-8b --only diagnose
    python benchmarks/tune_step.py --only compile                              # needs no GPU: fills LLMOPT_CACHE
    python benchmarks/tune_step.py --accept tune.json                          # into codegen/tuned/

A step is built and captured as the runtime does, over random weights and a cache of random keys and values, with a few
layers of the model. All kernels to try are compiled first, in parallel. Then one kernel's constants are exchanged at a
time (descent by coordinates) and the step is timed in turns with the best one so far; cases of one model and batch are
searched together, as they share kernels. Logits may be 1.1 times as far from fp64 as the first step's. The result file
is written after every case and when time is up. Without a GPU it says so and ends; `--device interpret` runs it on a
CPU in a python started with TRITON_INTERPRET=1, to see that it works.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from _gpu_cases import has_device, say
from _gpu_models import SHAPES
from _tune_search import Alone, Config, Descent, Tried, candidates, entries, read_alone, short
from _tune_steps import SPARE, Built, Case, Codes, Configs, Subject, Turns

from llmopt.codegen import tuning
from llmopt.codegen.kernel import Kernel
from llmopt.compiler.errors import BuildError
from llmopt.compiler.target import Target

MODELS = ("llama-3.1-8b", "llama-3.2-1b", "qwen3-0.6b")
MOST = 1.1  # times the first step's error against fp64
LEAD = 2  # untimed replays of a burst


class _TimeIsUp(Exception):
    pass


@dataclass
class Clocked:
    """Seconds since the start, and the moment when everything ends."""

    started: float
    end: float

    def say(self, text: str) -> None:
        """A line with the seconds so far."""
        say(f"[{time.perf_counter() - self.started:6.1f}] {text}")

    def left(self) -> float:
        """Seconds."""
        return self.end - time.perf_counter()


class Group:
    """The cases of one model and batch: one search, over steps in all their contexts."""

    def __init__(self, subject: Subject, batch: int, contexts: Sequence[int], limit: int, alone: Alone) -> None:
        self.subject, self.batch, self.contexts = subject, batch, contexts
        self.codes: Codes = subject.codes(batch)
        self.choices = self.codes.choices
        self.others = {k: candidates(c, subject.target, limit, alone) for k, c in self.choices.items()}
        self.cases: list[Case] = []

    @property
    def name(self) -> str:
        """`llama-3.1-8b 1x512+1024`."""
        return f"{self.subject.name} {self.batch}x{'+'.join(map(str, self.contexts))}"

    def wanted(self) -> list[list[Kernel]]:
        """Kernels in the order they are wanted: the tables' choice, then the first of each key, the second, ..."""
        found = [self.codes.kernels({})]
        for rank in itertools.zip_longest(*([(k, c) for c in configs] for k, configs in self.others.items())):
            found.append([])
            for key, config in filter(None, rank):
                try:
                    found[-1] += self.codes.kernels({key: config}, key)
                except BuildError as error:
                    say(f"  {key}: {short(config)}: {error}")
        return found

    def build(self, configs: Configs) -> list[Built]:
        """The step in each context. Raises BuildError."""
        return [case.build(configs) for case in self.cases]


def compiled(groups: Sequence[Group], clock: Clocked, seconds: float) -> dict[str, Any]:
    """Compile what the groups want, most wanted first, for so many seconds; what there is then is tried."""
    from llmopt.codegen.cubin import describe
    from llmopt.codegen.cubin_parallel import compile_all

    target = groups[0].subject.target
    ranks = itertools.zip_longest(*(g.wanted() for g in groups), fillvalue=[])
    kernels = list(dict.fromkeys(k for rank in ranks for of_group in rank for k in of_group))
    end = time.perf_counter() + min(seconds, clock.left())
    failed: list[str] = []

    def progress(done: int, total: int) -> None:
        if done % 50 == 0:
            clock.say(f"compiled {done} of {total}")
        if time.perf_counter() > end:
            raise _TimeIsUp

    started, todo = time.perf_counter(), kernels
    before = sum(_cached(k, target) for k in kernels)
    clock.say(f"{len(kernels)} kernels, {before} in the cache")
    while todo:
        try:
            compile_all(todo, target, progress=progress)
            break
        except _TimeIsUp:
            clock.say("no more time to compile")
            break
        except BuildError as error:  # one that does not compile is left out
            failed.append(str(error)[:300])
            rest = [k for k in todo if not str(error).startswith(describe(k, target.isa))]
            if len(rest) == len(todo):
                raise
            todo = rest
    ready = {k for k in kernels if _cached(k, target)}
    _leave_out(groups, ready)
    took = time.perf_counter() - started
    clock.say(f"{len(ready)} of {len(kernels)} kernels are there after {took:.1f} s, {len(failed)} do not compile")
    return {"kernels": len(kernels), "cached_before": before, "ready": len(ready), "seconds": took, "failed": failed}


def _cached(kernel: Kernel, target: Target) -> bool:
    from llmopt.codegen.cubin import cached

    try:
        return cached(kernel, target) is not None
    except BuildError:  # it does not fit the target
        return False


def _leave_out(groups: Sequence[Group], ready: set[Kernel]) -> None:
    """Constants whose kernels are not there are not tried."""
    for group in groups:
        for key, configs in group.others.items():
            group.others[key] = [c for c in configs if _there(group.codes, key, c, ready)]


def _there(codes: Codes, key: str, config: Config, ready: set[Kernel]) -> bool:
    try:
        return ready.issuperset(codes.kernels({key: config}, key))
    except BuildError:
        return False


def search(group: Group, args: argparse.Namespace, clock: Clocked, seconds: float, row: dict[str, Any]) -> None:
    """The tables' choice, improved for so many seconds; figures of all that was tried go into `row`, come what may."""
    turns = Turns(args.device, args.steps, LEAD)
    end = time.perf_counter() + min(seconds, clock.left())
    first = group.build({})
    row["errors"] = errors = [case.error(step) for case, step in zip(group.cases, first, strict=True)]

    def times(a: list[Built], b: list[Built], rounds: int) -> list[list[list[float]]]:
        return [turns(case, pair, rounds) for case, *pair in zip(group.cases, a, b, strict=True)]

    def fault(steps: list[Built]) -> str | None:
        for case, step, most in zip(group.cases, steps, errors, strict=True):
            error = case.error(step)
            if not error <= MOST * most:  # nan, too
                return f"wrong: {error:.5f} from fp64 at {case.context}, wanted {MOST * most:.5f}"
        return None

    def told(key: str, tried: Tried) -> None:
        figures = " ".join(f"{us:.1f}" for us in tried.us)
        if tried.verdict != "slower" or args.verbose:
            clock.say(f"{tried.verdict}: {tried.ratio:.4f} ({figures} us) {key}: {short(tried.config)}")

    descent = Descent(group.build, times, fault, lambda: time.perf_counter() > end, args.margin, args.rounds, told)
    try:
        last = descent.run(first, group.others)
        pairs = [[statistics.median(us) for us in pair] for pair in times(first, last, args.rounds + 2)]
        row["before_us"], row["after_us"] = map(list, zip(*pairs, strict=True))
        for case, (before, after) in zip(group.cases, pairs, strict=True):
            clock.say(f"{group.subject.name} {group.batch}x{case.context}: {before:.1f} us, chosen {after:.1f} us")
        row["finished"] = time.perf_counter() <= end
        row["parts"] = parts(group, descent.chosen, last, turns, args, clock)
    finally:
        row["kernels"] = [_row(group, key, descent) for key in group.choices]


def _row(group: Group, key: str, descent: Descent) -> dict[str, Any]:
    choice = group.choices[key]
    return {
        "regions": group.codes.regions(key), "template": choice.module, "source": tuning.source_hash(choice.module),
        "shape": choice.shape, "dtype": choice.dtype, "incumbent": choice.config,
        "chosen": descent.chosen.get(key, choice.config), "left": len(group.others[key]),
        "tried": [asdict(t) for t in descent.tried.get(key, ())],
    }  # fmt: skip


def parts(
    group: Group, configs: dict[str, Config], usual: list[Built], turns: Turns, args: argparse.Namespace, clock: Clocked
) -> list[dict[str, Any]]:
    """Steps with a context's keys in more and fewer parts than `codegen.splits` says, which no table holds."""
    found = []
    for case, step in zip(group.cases, usual, strict=True):
        tried = [
            p for p in dict.fromkeys((step.parts // 2, step.parts * 2, step.parts * 3 // 2)) if 0 < p != step.parts
        ]
        tried = [] if clock.left() < 0 else tried
        us = [
            statistics.median(t)
            for t in turns(case, [step, *(case.build(configs, parts=p) for p in tried)], args.rounds)
        ]
        row = {"context": case.context, "us": dict(zip([step.parts, *tried], us, strict=True))}
        clock.say(f"{case.context} keys by parts, the usual first: {row['us']}")
        found.append(row)
    return found


def diagnosed(group: Group, args: argparse.Namespace) -> dict[str, Any]:
    """Where the time of the tables' choice goes, printed; beside a search for one context only."""
    from _tune_diagnose import diagnose

    found = []
    for case in group.cases if args.only == "diagnose" else group.cases[:1]:
        lines, data = diagnose(case, {}, Turns(args.device, args.steps, LEAD), args.rounds)
        print("\n".join(lines), flush=True)
        found.append({"context": case.context, **data})
    return {"model": group.subject.name, "layers": group.subject.layers, "batch": group.batch, "contexts": found}


def measure(groups: Sequence[Group], args: argparse.Namespace, clock: Clocked, results: dict[str, Any]) -> None:
    """Every group, for an equal share of what time is left but no longer than asked for."""
    gc.collect()
    gc.freeze()  # captures collect garbage; what is here stays
    if args.device == "cuda" and (args.diagnose or args.only == "diagnose"):
        for group in groups:
            if clock.left() > 0:
                results["diagnoses"].append(diagnosed(group, args))
    if args.only == "diagnose":
        return
    for index, group in enumerate(groups):
        seconds = min(args.seconds * len(group.contexts), clock.left() / (len(groups) - index))
        if seconds <= 0:
            return
        clock.say(f"{group.name}: {sum(map(len, group.others.values()))} to try in {seconds:.0f} s")
        row = {"model": group.subject.name, "layers": group.subject.layers, "batch": group.batch,
               "contexts": group.contexts}  # fmt: skip
        results["cases"].append(row)
        search(group, args, clock, seconds, row)
        _write(args.out, results)


def _write(out: Path | None, results: dict[str, Any]) -> None:
    from llmopt.runtime.measure import write_json

    if out is not None:
        write_json(out, results)


def grouped(args: argparse.Namespace, clock: Clocked) -> list[Group]:
    """The models built, and what is to be searched."""
    alone = read_alone(json.loads(args.alone.read_text())) if args.alone else {}
    groups = []
    for name in args.models:
        device = "compile" if args.only == "compile" else args.device
        subject = Subject(name, device, getattr(torch, args.dtype), args.layers)
        cases = {(batch, context): None for batch, context in args.cases}
        opened = subject.open(cases) if device != "compile" else {}
        for batch in dict.fromkeys(b for b, _ in cases):
            group = Group(subject, batch, [c for b, c in cases if b == batch], args.limit, alone)
            group.cases = [case for (b, _), case in opened.items() if b == batch]
            groups.append(group)
        clock.say(f"{name}: {subject.layers} layers built")
    return groups


def run(args: argparse.Namespace) -> None:
    """Build, compile, measure."""
    from llmopt.runtime.measure import environment

    clock = Clocked(time.perf_counter(), time.perf_counter() + 60 * args.minutes)
    groups = grouped(args, clock)
    results: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if args.device == "cuda" and args.only != "compile" else "none",
        "date": time.strftime("%Y-%m-%d"), "environment": environment(), "steps": args.steps, "rounds": args.rounds,
        "margin": args.margin, "compile": None, "diagnoses": [], "cases": [],
    }  # fmt: skip
    if args.only == "diagnose":
        for group in groups:
            group.others = {key: [] for key in group.others}
    if args.device == "cuda" or args.only == "compile":
        results["compile"] = compiled(groups, clock, args.compile_seconds)
    if args.only != "compile":
        try:
            measure(groups, args, clock, results)
        finally:
            _write(args.out, results)
            clock.say("done")


def _case(text: str) -> tuple[int, int]:
    batch, _, context = text.partition("x")
    if not (batch.isdecimal() and context.isdecimal() and 0 < int(batch) <= 64 and int(context) > 0):
        raise argparse.ArgumentTypeError(f"{text!r}; wanted BATCHxCONTEXT, at most 64 sequences, such as 1x512")
    return int(batch), int(context)


def parser() -> argparse.ArgumentParser:
    """The options."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--models", nargs="+", choices=SHAPES, default=MODELS, metavar="NAME", help=", ".join(SHAPES))
    made.add_argument("--cases", nargs="+", type=_case, default=[(1, 512), (1, 1024), (16, 1024)], metavar="BxCTX")
    made.add_argument("--layers", type=int, default=8, help="of the model")
    made.add_argument("--seconds", type=float, default=40, help="of search a case")
    made.add_argument("--minutes", type=float, default=2.3, help="when everything stops; what was found is written")
    made.add_argument("--compile-seconds", type=float, default=1e9, help="compile no more after this long")
    made.add_argument("--limit", type=int, default=10, help="constants to try for a kernel")
    made.add_argument("--margin", type=float, default=0.003, help="by which share a step must be faster, twice")
    made.add_argument("--rounds", type=int, default=3, help="turns of each step in a comparison")
    made.add_argument("--steps", type=int, default=12, help="replays of a turn")
    made.add_argument("--alone", type=Path, help="a result of gpu_gemm.py: what was fast alone is tried first")
    made.add_argument("--diagnose", action="store_true", help="also say where the time of the first step goes")
    made.add_argument("--only", choices=("compile", "diagnose", "tune"))
    made.add_argument("--verbose", action="store_true", help="say what was slower, too")
    made.add_argument("--dtype", default="bfloat16")
    made.add_argument("--device", default="cuda", choices=("cuda", "interpret"))
    made.add_argument("--out", type=Path, help="result file")
    made.add_argument("--accept", type=Path, help="measure nothing: put this file's choices into the shipped table")
    return made


def main(argv: Sequence[str] | None = None) -> None:
    """Compile, measure, or accept."""
    args = parser().parse_args(argv)
    if LEAD + args.steps > SPARE:
        sys.exit(f"--steps is {args.steps}; wanted at most {SPARE - LEAD}, the room behind a context")
    if args.accept:
        print(tuning.write("sm_90", entries(json.loads(args.accept.read_text()))))
    elif args.only == "compile" or args.device == "interpret" or has_device(args.device):
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        run(args)


if __name__ == "__main__":
    main()
