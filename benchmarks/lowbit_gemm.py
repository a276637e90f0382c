"""The products of decoding with low-bit weights on one GPU: `lowbit` against cuBLAS bf16, tinygemm and gemlite.

    python benchmarks/lowbit_gemm.py --only compile --jobs 2          # needs no GPU: fills LLMOPT_CACHE
    python benchmarks/lowbit_gemm.py --minutes 3.5 --out lowbit.json
    python benchmarks/lowbit_gemm.py --merge lowbit.json --out benchmarks/results/lowbit-gemm_h200.json
    python benchmarks/lowbit_gemm.py --accept benchmarks/results/lowbit-gemm_h200.json   # into codegen/tuned/

Each case (scheme, shape, tokens, x as it is or in wgmma's order) alone, most wanted first: every configuration is
compared with an fp64 product of the exactly dequantised weights, then 300 calls back to back with the first of them,
and what is right is timed in turns with the peers, each a CUDA graph of 24 launches or more over rotating copies of the
weights (6 and 400 MB at least); medians. `chain`: 32 layers' four products with weights of their own, each reading what
the last wrote, in one graph. The result file is written after every case. Only kernels that the cache has are tried;
--compile fills it.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent))
from _gpu_timing import Clock, Denominators
from _lowbit_cases import (
    COPIED,
    H200,
    MODELS,
    SHAPES,
    Operands,
    Shape,
    Variant,
    Weights,
    summary,
    tensors,
    variants,
)
from _lowbit_chain import chain
from _lowbit_compile import compile_all, there
from _lowbit_files import Job, accept, fastest, merged
from _lowbit_peers import INT4, Bf16, checked

from llmopt.codegen.kernel import Launch, Launcher
from llmopt.codegen.lowbit_layout import Laid
from llmopt.compiler.errors import BuildError
from llmopt.compiler.quant.schemes import SCHEMES as KINDS
from llmopt.runtime.measure import environment, write_json

CALLS = 300
KEPT = 4  # the fastest configurations that a result file has, and the fastest without an early start
ROUNDS = 9


def jobs(models: Iterable[str]) -> list[Job]:
    """What is measured, most wanted first."""
    found: list[Job] = []
    for model in models:
        shapes = [MODELS[model][name] for name in SHAPES]
        alone = [shape.plain() for shape in shapes]
        ordered = [shape.given_order() for shape in shapes]
        four_bits = "nvfp4", "int4_g128", "mxfp4", "int4_g128_f16"
        more = "mxfp6_e2m3", "fp8_channel", "mxfp8", "int8"
        found += [(scheme, shape, 1) for scheme in four_bits for shape in shapes]
        found += [("nvfp4", shape, 1) for shape in alone]
        found += [(scheme, shape, tokens) for tokens in (64, 32, 16) for scheme in four_bits for shape in ordered]
        found += [(scheme, shape, n) for n, shape in ((1, shapes[0]), (16, ordered[0])) for scheme in more]
        found += [("nvfp4", shape, 8) for shape in shapes]
    return found


@dataclass(frozen=True)
class Timed:
    """What runs so many launches; a graph does not keep the tensors that it reads, so `of` does."""

    replay: Callable[[], None]
    launches: int
    of: Any = None


class Bench:
    """Weights, operands and peers, made once each; launches of variants."""

    def __init__(self, device: str) -> None:
        self.device, self.clock = device, Clock(device)
        self.ready = self._launcher()
        self.weights: dict[tuple[str, Shape], Weights] = {}
        self.operands: dict[Shape, Operands] = {}
        self.exact: dict[tuple[str, Shape], tuple[torch.Tensor, float, float]] = {}
        self.bf16: dict[Shape, Bf16] = {}

    def _launcher(self) -> Launcher:
        if self.device == "cpu":
            from llmopt.codegen.interpret import launcher as interpreter

            return interpreter
        from llmopt.codegen.cubin import compile_kernel
        from llmopt.runtime.cuda import launcher

        return launcher(lambda kernel: compile_kernel(kernel, H200), self.device)

    def of(self, scheme: str, shape: Shape) -> tuple[Weights, Operands]:
        """Made when first asked for, with the fp64 result and torch's own error."""
        shape = replace(shape, ordered=0)
        if (scheme, shape) not in self.weights:
            operands = self.operands.setdefault(shape, Operands(shape, self.device))
            made = Weights(scheme, shape, self.device, COPIED if self.device == "cuda" else 0.0)
            self.weights[scheme, shape] = made
            want = operands.plain(made.matrix(torch.float64), 64)
            torchs = operands.plain(made.matrix(torch.bfloat16), 64).double()
            self.exact[scheme, shape] = want, float((torchs - want).norm() / want.norm()), _far(torchs, want)
        return self.weights[scheme, shape], self.operands[shape]

    def launch(self, variant: Variant) -> Callable[..., None]:
        """launch(laid, y, operands beside, tokens)."""
        run, grid, scratch = self.ready(variant.kernel()), variant.grid(), variant.scratch(self.device)

        def call(laid: Laid, y: torch.Tensor, beside: list[torch.Tensor], tokens: int, run: Launch = run) -> None:
            run(grid, [*tensors(laid), y, *beside, tokens, *scratch])

        return call

    def beside(self, variant: Variant) -> list[torch.Tensor]:
        """What a launch of the variant reads besides weights."""
        operands = self.of(variant.scheme, variant.shape)[1]
        return operands.normed(KINDS[variant.scheme]) if variant.shape.ordered else operands.beside()

    def fault(self, variant: Variant, call: Callable[..., None], tokens: int) -> tuple[str | None, float]:
        """What is wrong with a variant's results, and its error relative to fp64."""
        weights, _ = self.of(variant.scheme, variant.shape)
        want, torchs, torchs_far = self.exact[variant.scheme, replace(variant.shape, ordered=0)]
        want = want[:tokens]
        calls = CALLS if self.device == "cuda" else 2
        y = torch.full((calls, tokens, variant.shape.J), float("nan"), device=self.device, dtype=torch.bfloat16)
        beside = self.beside(variant)
        for i in range(calls):
            call(weights.copies[0], y[i], beside, tokens)
        error = float((y[0].double() - want).norm() / want.norm())
        slack = 1.0 if self.device == "cuda" else 4.0  # the interpreter cuts bf16 off
        if not error <= 1.5 * slack * torchs:
            return f"error {error:.2e}, torch's bf16 is {torchs:.2e}", error
        # behind a norm and a gate elements differ by far more than their share of the whole: as torch's do
        far, most = _far(y[0].double(), want), max(1.5 * torchs_far, float(want.square().mean().sqrt()) / 32)
        if not far <= slack * most:
            return f"one element is {far:.2e} off, torch's farthest in bf16 {torchs_far:.2e}", error
        unequal = int((y != y[0]).any(-1).any(-1).sum())
        return (f"{unequal} of {calls} calls differ" if unequal else None), error

    def graph(self, call: Callable[[Any], None], copies: list[Any], least: int = 24) -> Timed:
        """Launches over the copies, captured."""
        count = max(least, len(copies)) if self.device == "cuda" else 1
        if self.device == "cpu":
            return Timed(lambda: call(copies[0]), 1)
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            call(copies[0])
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for i in range(count):
                call(copies[i % len(copies)])
        return Timed(graph.replay, count, call)

    def in_turns(self, graphs: Mapping[str, Timed]) -> dict[str, float]:
        """Median microseconds of a launch, all timed in turns; the first round does not count."""
        rounds = ROUNDS if self.device == "cuda" else 1
        marks: list[tuple[str, list[Any]]] = []
        for index in range(rounds + 1):
            for name, timed in graphs.items():
                start = self.clock.mark()
                timed.replay()
                if index:
                    marks.append((name, [start, self.clock.mark()]))
        self.clock.wait()
        times: dict[str, list[float]] = {name: [] for name in graphs}
        for name, pair in marks:
            times[name].append(self.clock.between(pair)[0] * 1e3 / graphs[name].launches)
        return {name: statistics.median(us) for name, us in times.items()}


def _far(y: torch.Tensor, want: torch.Tensor) -> float:
    """How far the farthest element is off, beyond a rounding of its own."""
    return float(((y - want).abs() - want.abs() / 128).max())


def measure(bench: Bench, job: Job, tried: list[Variant], said: dict[str, str]) -> dict[str, Any]:
    """All variants of a job that are right, and the peers."""
    scheme, shape, tokens = job
    weights, operands = bench.of(scheme, shape)
    y = torch.empty(tokens, shape.J, device=bench.device, dtype=torch.bfloat16)
    graphs: dict[str, Timed] = {}
    errors, wrong = {}, {}
    by_name = {variant.text(): variant for variant in tried}
    for name, variant in by_name.items():
        try:
            call = bench.launch(variant)
            fault, errors[name] = bench.fault(variant, call, tokens)
            if fault is None:
                beside = bench.beside(variant)
                graphs[name] = bench.graph(lambda laid, c=call, b=beside: c(laid, y, b, tokens), list(weights.copies))
        except (RuntimeError, BuildError) as error:
            fault = f"{type(error).__name__}: {str(error)[:200]}"
        if fault:
            wrong[name] = fault
    alone = shape.plain()
    bf16 = bench.bf16.setdefault(alone, Bf16(alone, bench.device))
    x = operands.x[:tokens, : shape.K].contiguous()
    graphs["cublas"] = bench.graph(lambda w: F.linear(x, w), bf16.copies)
    for peer, make in INT4.items() if scheme.startswith("int4") else ():
        try:
            made = checked(make(alone, 128, bench.device), x)
            graphs[peer] = bench.graph(lambda w, p=made: p.run(x, w), list(made.copies))
        except Exception as error:  # whatever stops a peer is told
            said[f"{peer} {shape.model} {scheme} {shape.name} {tokens}"] = f"{type(error).__name__}: {str(error)[:300]}"
    us = bench.in_turns(graphs)
    peers = {name: us.pop(name) for name in ("cublas", *INT4) if name in us}
    rows = [
        {"us": us[name], "error": errors[name], **summary(by_name[name])} for name in sorted(us, key=us.__getitem__)
    ]
    without = [row for row in rows[KEPT:] if not row["pdl"]]
    return {
        "scheme": scheme, "model": shape.model, "name": shape.name, "ordered": shape.ordered,
        "tokens": tokens, "bytes": weights.nbytes, "torch_error": bench.exact[scheme, replace(shape, ordered=0)][1],
        "peers_us": peers, "rows": [*rows[:KEPT], *without[:1]], "wrong": wrong,
    }  # fmt: skip


def show(r: dict[str, Any], top: int = 4) -> None:
    """A line with the fastest few."""
    fast = " | ".join(f"{row['us']:.2f} {row['text']}" for row in r["rows"][:top])
    off = next((row["us"] for row in r["rows"] if not row["pdl"]), 0.0)
    best = r["rows"][0]["us"] if r["rows"] else float("nan")
    peers = " ".join(f"{name} {us:.2f} ({us / best:.2f}x)" for name, us in r["peers_us"].items())
    error = r["rows"][0]["error"] if r["rows"] else float("nan")
    print(
        f"{r['model']} {r['scheme']} {r['name']}{' in order' * r['ordered']} N={r['tokens']} "
        f"{r['bytes'] / best / 1e6:.2f} TB/s {peers} err {error:.1e}/{r['torch_error']:.1e} no-pdl {off:.2f} | {fast}"
        + (f" WRONG {r['wrong']}" if r["wrong"] else ""),
        flush=True,
    )


def run(args: argparse.Namespace, plan: dict[Job, list[Variant]]) -> None:
    """Measure what time allows."""
    end = time.perf_counter() + 60 * args.minutes
    denominators = Denominators(args.device)
    denominators()
    results: dict[str, Any] = {**environment(), "cases": [], "chain": [], "said": {}}
    results["device"] = torch.cuda.get_device_name() if args.device == "cuda" else "the interpreter"
    bench = Bench(args.device)
    best: dict[tuple[str, str, int], dict[str, Variant]] = {}
    for job, tried in plan.items():
        if time.perf_counter() > end:
            print("time is up", flush=True)
            break
        r = measure(bench, job, tried, results["said"])
        show(r)
        results["cases"].append(r)
        scheme, shape, tokens = job
        fastest = next((row["text"] for row in r["rows"] if row["pdl"]), None)
        chosen = best.setdefault((shape.model, scheme, tokens), {})
        for variant in (v for v in tried if v.text() == fastest and not shape.ordered):
            chosen[shape.name] = variant
        if set(SHAPES) == set(chosen) and shape.name in SHAPES and not shape.ordered:
            try:
                results["chain"].append(chain(bench, shape.model, scheme, tokens, chosen))
            except (RuntimeError, BuildError) as error:
                print(f"chain: {error}", flush=True)
        if args.out:
            write_json(args.out, {**results, "bandwidth": {"read": denominators.read, "copied": denominators.copied}})
    denominators()
    results["bandwidth"] = {"read": denominators.read, "copied": denominators.copied}
    print({k: [f"{x / 1e12:.2f}" for x in v] for k, v in results["bandwidth"].items()}, results["said"])
    if args.out:
        write_json(args.out, results)


def _without(variant: Variant) -> Variant:
    return replace(variant, pdl=0)


def main() -> None:
    """Compile, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: interpreted, to see it work")
    parser.add_argument("--models", nargs="+", default=["8b", "70b-tp8"], choices=list(MODELS))
    parser.add_argument("--schemes", nargs="+", help="only these")
    parser.add_argument("--tokens", type=int, nargs="+", help="only these")
    parser.add_argument("--names", nargs="+", help="only these shapes")
    parser.add_argument("--minutes", type=float, default=3.5)
    parser.add_argument("--limit", type=int, default=None, help="variants of a case")
    parser.add_argument("--again", type=Path, nargs="+", help="only the variants that these files have")
    parser.add_argument("--cases", type=int, default=None, help="the first so many")
    parser.add_argument("--jobs", type=int, default=2, help="processes that compile")
    parser.add_argument("--only", choices=["compile"])
    parser.add_argument("--compile", type=float, default=0.0, metavar="SECONDS", help="first compile what is missing")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--merge", type=Path, nargs="+", help="measure nothing: put these files into --out")
    parser.add_argument("--accept", type=Path, help="measure nothing: put a merged file into the shipped table")
    args = parser.parse_args()
    if args.merge:
        write_json(args.out, merged(args.merge))
        return
    if args.accept:
        print(accept(args.accept))
        return
    wanted = [
        job for job in jobs(args.models)
        if (not args.schemes or job[0] in args.schemes) and (not args.tokens or job[2] in args.tokens)
        and (not args.names or job[1].name in args.names)
    ][: args.cases]  # fmt: skip
    plan = {job: variants(*job)[: args.limit] for job in wanted}
    if args.again:
        plan = fastest(plan, args.again)
    for (_, shape, _), tried in plan.items():
        if shape.name in SHAPES and not shape.ordered:
            tried += [v for v in (_without(w) for w in tried[:3]) if v not in tried]
    if args.only == "compile" or args.compile:
        seconds = args.compile or 60 * args.minutes
        compile_all([v for tried in plan.values() for v in tried], args.jobs, seconds)
    if args.only == "compile":
        return
    if args.device == "cpu":
        run(args, plan)
        return
    if not torch.cuda.device_count():
        print("no NVIDIA GPU here: nothing measured")
        return
    ready = {job: [v for v in tried if there(v.kernel())] for job, tried in plan.items()}
    print(f"{sum(map(len, ready.values()))} of {sum(map(len, plan.values()))} variants are compiled", flush=True)
    run(args, ready)


if __name__ == "__main__":
    main()
