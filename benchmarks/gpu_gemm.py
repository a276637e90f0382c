"""The products of decoding on one GPU: the `gemv` and `gemm` templates against cuBLAS and the memory's own speed.

    python benchmarks/gpu_gemm.py --out gpu_gemm.json                       # all of it
    python benchmarks/gpu_gemm.py --models 8b --tokens 1 8 --only sweep     # a part

`sweep`: each shape, number of tokens and configuration alone, in one CUDA graph over rotating copies of the weights
(400 MB and more, so that no cache holds them), median of the replays; first compared with an fp64 product. `chain`:
all layers' qkv, o, gate_up, down with weights of their own, each reading what the last wrote, in one graph; the
configurations are then exchanged one by one for what is fastest in the chain. `repeat`: 300 calls back to back, equal
bit for bit. Kernels are compiled beforehand, in parallel. Without a GPU it says so and ends.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent))
from _gemm_cases import MODELS, Shape, Variant, compile_all, hooks, variants

from llmopt.runtime.gpu_code import decode_shape
from llmopt.runtime.measure import environment, write_json

COPIED = 400e6


def graph_us(run: Callable[[], None], launches: int, replays: int = 15) -> float:
    """Median microseconds of a launch; `run` makes `launches` of them."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        run()
    times = []
    for _ in range(replays + 2):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / launches)
    return statistics.median(times[2:])


def bandwidth() -> dict[str, float]:
    """TB/s of reading and of copying 2 GiB."""
    size = 1 << 31
    a, b = (torch.randint(0, 255, (size,), dtype=torch.uint8, device="cuda") for _ in range(2))
    out = torch.empty(1 << 20, dtype=torch.int32, device="cuda")
    best = 0.0
    for length, steps in ((4096, 4), (8192, 4), (4096, 16)):
        grid = (size // 4 // (length * steps),)

        def read(length: int = length, steps: int = steps, grid: tuple[int] = grid) -> None:
            hooks().read[grid](a.view(torch.int32), out, length, steps, num_warps=8)

        best = max(best, size / graph_us(read, 1) / 1e6)
    return {"read": best, "copy": 2 * size / graph_us(lambda: b.copy_(a), 1) / 1e6}


class Case:
    """A shape with its data on the GPU: rotating weights, 64 tokens, and the fp64 result of the first copy."""

    def __init__(self, shape: Shape) -> None:
        torch.manual_seed(0)
        self.shape = shape
        copies = max(2, -(-int(COPIED) // shape.nbytes))
        rows = shape.parts * shape.J
        self.weights = [torch.randn(rows, shape.K, device="cuda").mul_(shape.K**-0.5).bfloat16() for _ in range(copies)]
        self.x = torch.randn(64, shape.stride or shape.K, device="cuda").mul_(2).bfloat16()
        self.g = torch.rand(shape.K, device="cuda").add_(0.5).bfloat16() if shape.norm else None
        self.r = torch.randn(64, shape.J, device="cuda").bfloat16() if shape.residual else None
        self.exact = self.plain(self.weights[0].double(), 64, torch.float64)
        torch_error = self.error(self.plain(self.weights[0], 64, torch.bfloat16), 64)
        self.allowed = 1.5 * torch_error

    def plain(self, w: torch.Tensor, tokens: int, dtype: torch.dtype, norm: bool = True) -> torch.Tensor:
        """The same in torch."""
        s = self.shape
        x = self.x[:tokens, : s.K].to(dtype)
        if s.norm and norm:
            x = F.rms_norm(x, (s.K,), None if self.g is None else self.g.to(dtype), 1e-5)
        y = F.linear(x, w)
        if s.parts == 2 and norm:
            gate, up = y.chunk(2, -1)
            y = F.silu(gate) * up
        return y if self.r is None or not norm else y + self.r[:tokens].to(dtype)

    def error(self, y: torch.Tensor, tokens: int) -> float:
        """Relative to fp64, in the norm over all elements."""
        want = self.exact[:tokens]
        return float((y.double() - want).norm() / want.norm())

    def check(self, variant: Variant, tokens: int, calls: int) -> str | None:
        """None if right `calls` times in a row, every one equal to the first."""
        y = torch.full((calls, tokens, self.shape.J), float("nan"), device="cuda", dtype=torch.bfloat16)
        scratch = variant.scratch("cuda")
        for i in range(calls):
            variant.launch(self.weights[0], self.x, self.g, self.r, y[i], tokens, scratch)
        error = self.error(y[0], tokens)
        if not error <= self.allowed:
            return f"error {error:.2e}, torch's bf16 allows {self.allowed:.2e}"
        unequal = int((y != y[0]).any(-1).any(-1).sum())
        return f"{unequal} of {calls} calls differ" if unequal else None

    def time(self, launch: Callable[[torch.Tensor], Any]) -> float:
        """Microseconds a launch over the rotating weights."""
        count = max(24, len(self.weights))

        def run() -> None:
            for i in range(count):
                launch(self.weights[i % len(self.weights)])

        return graph_us(run, count)


def sweep(case: Case, tokens: int, tried: list[Variant]) -> dict[str, Any]:
    """Times of every variant that is right, fastest first, beside cuBLAS with and without the rest."""
    y = torch.empty(tokens, case.shape.J, device="cuda", dtype=torch.bfloat16)
    rows: list[dict[str, Any]] = []
    wrong: dict[str, str] = {}
    for variant in tried:
        try:
            fault = case.check(variant, tokens, 3)
            if fault is None:
                scratch = variant.scratch("cuda")
                us = case.time(lambda w, v=variant, s=scratch: v.launch(w, case.x, case.g, case.r, y, tokens, s))
                rows.append({"us": us, "variant": variant})
        except Exception as error:  # one that does not launch must not end the run
            fault = f"{type(error).__name__}: {error}"
        if fault:
            wrong[variant.text()] = fault
    rows.sort(key=lambda row: row["us"])
    return {
        "shape": case.shape.name, "tokens": tokens, "rows": rows[:10], "wrong": wrong,
        "linear_us": case.time(lambda w: case.plain(w, tokens, torch.bfloat16, norm=False)),
        "whole_us": case.time(lambda w: case.plain(w, tokens, torch.bfloat16)),
    }  # fmt: skip


class Chain:
    """All layers of a model, the four products of each reading what the one before wrote (no attention between)."""

    def __init__(self, model: str, tokens: int) -> None:
        self.layers, shapes = MODELS[model]
        self.shapes, self.tokens = shapes[:4], tokens
        torch.manual_seed(0)
        self.weights = [
            [torch.randn(s.parts * s.J, s.K, device="cuda").mul_(s.K**-0.5).bfloat16() for s in self.shapes]
            for _ in range(self.layers)
        ]
        hidden = self.shapes[0].K
        self.g = torch.ones(hidden, device="cuda", dtype=torch.bfloat16)
        self.start = torch.randn(tokens, hidden, device="cuda").bfloat16()
        self.out = {s.name: torch.empty(tokens, s.J, device="cuda", dtype=torch.bfloat16) for s in self.shapes}
        self.nbytes = self.layers * sum(s.nbytes for s in self.shapes)

    def us(self, chosen: dict[str, Variant], replays: int = 7) -> float:
        """Microseconds a layer."""
        scratch = {name: v.scratch("cuda") for name, v in chosen.items()}
        return graph_us(lambda: self._run(chosen, scratch), self.layers, replays)

    def _run(self, chosen: dict[str, Variant], scratch: dict[str, tuple[Any, Any]]) -> None:
        out, n = self.out, self.tokens
        h = self.start
        for weights in self.weights:
            for shape, w, x, r in zip(
                self.shapes, weights, (h, out["qkv"], out["o"], out["gate_up"]), (None, h, None, out["o"]), strict=True
            ):
                name = shape.name
                chosen[name].launch(w, x, self.g if shape.norm else None, r, out[name], n, scratch[name])
            h = out["down"]

    def torch_us(self) -> float:
        """The same with torch's own kernels."""

        def run() -> None:
            h = self.start
            hidden = self.shapes[0].K
            for qkv, o, gate_up, down in self.weights:
                a = F.linear(F.rms_norm(h, (hidden,), self.g, 1e-5), qkv)
                h = h + F.linear(a[:, : self.shapes[1].K], o)
                gate, up = F.linear(F.rms_norm(h, (hidden,), self.g, 1e-5), gate_up).chunk(2, -1)
                h = h + F.linear(F.silu(gate) * up, down)

        return graph_us(run, self.layers, 7)

    def descend(self, chosen: dict[str, Variant], others: dict[str, list[Variant]]) -> tuple[dict[str, Variant], float]:
        """Exchange one product's variant at a time for what makes the chain fastest, twice round."""
        best = self.us(chosen)
        for _ in range(2):
            before = best
            for name, tried in others.items():
                for variant in tried:
                    us = self.us({**chosen, name: variant}, 5)
                    if us < best * 0.998:
                        best, chosen = us, {**chosen, name: variant}
            if best > before * 0.998:
                break
        return chosen, self.us(chosen, 15)


def chain(model: str, tokens: int, plan: dict[tuple[str, int, Shape], list[Variant]]) -> dict[str, Any]:
    """The chain at the defaults, without programmatic launch, descended, and torch's."""
    built = Chain(model, tokens)
    others = {s.name: [v for v in plan[model, tokens, s] if v.pdl] for s in built.shapes}
    off = {s.name: [v for v in plan[model, tokens, s] if not v.pdl] for s in built.shapes}
    default = {name: tried[0] for name, tried in others.items()}
    result: dict[str, Any] = {
        "model": model, "tokens": tokens, "default_us": built.us(default), "bytes": built.nbytes / built.layers,
        "no_pdl_us": built.us({n: v[0] for n, v in off.items()}), "torch_us": built.torch_us(),
    }  # fmt: skip
    chosen, result["best_us"] = built.descend(default, others)
    result["chosen"] = chosen
    return result


def plan_of(args: argparse.Namespace, failed: dict[Variant, str]) -> dict[tuple[str, int, Shape], list[Variant]]:
    """Variants to try for each (model, bucket, shape)."""
    found = {}
    for model in args.models:
        for shape in MODELS[model][1]:
            for bucket in sorted({int(decode_shape(n)) for n in args.tokens}):
                found[model, bucket, shape] = [v for v in variants(shape, bucket) if v not in failed]
    return found


def show_sweep(model: str, r: dict[str, Any], shape: Shape, read: float, top: int = 3) -> None:
    """A line with the fastest few."""
    fast = " | ".join(f"{row['us']:.2f} {row['variant'].text()}" for row in r["rows"][:top])
    share = shape.nbytes / r["rows"][0]["us"] / 1e6 / read if r["rows"] else 0.0
    head = f"{model:>4} {shape.name:<7} N={r['tokens']:<2} {share:4.0%} cublas {r['linear_us']:.2f}/{r['whole_us']:.2f}"
    print(f"{head} | {fast}" + (f" WRONG {r['wrong']}" if r["wrong"] else ""), flush=True)


def show_chain(r: dict[str, Any], read: float) -> None:
    """Microseconds a layer and the share of reading's speed."""
    share = r["bytes"] / r["best_us"] / 1e6 / read
    chosen = "; ".join(f"{name} {v.text()}" for name, v in r["chosen"].items())
    print(
        f"chain {r['model']} N={r['tokens']} us/layer: best {r['best_us']:.2f} ({share:.1%} of read), default "
        f"{r['default_us']:.2f}, no pdl {r['no_pdl_us']:.2f}, torch {r['torch_us']:.2f} | {chosen}",
        flush=True,
    )


def repeat(case: Case, tokens: int, variant: Variant) -> None:
    """300 calls back to back; says so if they are not all equal."""
    fault = case.check(variant, tokens, 300)
    if fault:
        print(f"WRONG {case.shape.name} N={tokens} {variant.text()}: {fault}", flush=True)


def sweep_all(args: argparse.Namespace, plan: dict[Any, list[Variant]], read: float) -> list[dict[str, Any]]:
    """Every shape at every number of tokens."""
    results = []
    for model in args.models:
        for shape in MODELS[model][1]:
            case = Case(shape)
            for tokens in args.tokens:
                bucket = int(decode_shape(tokens))
                r = sweep(case, tokens, plan[model, bucket, shape][: args.limit])
                if r["rows"] and tokens == bucket:
                    repeat(case, tokens, r["rows"][0]["variant"])
                show_sweep(model, r, shape, read)
                results.append({"model": model, **r})
            del case
            torch.cuda.empty_cache()
    return results


def plain_data(value: Any) -> Any:
    """JSON for a Variant."""
    assert isinstance(value, Variant), value
    from llmopt.codegen.tuning import source_hash

    data = {
        "template": value.template,
        "source": source_hash(value.template),
        "shape": value.shape.sizes(0),
        "config": dict(value.config),
        "pdl": value.pdl,
    }
    return {**data, "text": value.text()}


def accept(path: Path) -> Path:
    """Put what a result file found fastest into the shipped table: in the chain, else alone."""
    from llmopt.codegen import tuning

    results = json.loads(path.read_text())
    swept = [r for r in results["sweep"] if r["rows"] and r["tokens"] == int(decode_shape(r["tokens"]))]
    found = [(r["rows"][0]["variant"], r["tokens"], r["rows"][0]["us"]) for r in swept]
    for r in results["chain"]:
        found += [(variant, r["tokens"], None) for variant in r["chosen"].values()]
    entries: dict[str, dict[str, Any]] = {}
    for variant, tokens, us in found:
        shape = {**variant["shape"], "N": tokens}
        key = tuning.key(variant["template"], shape, "bfloat16")
        entries[key] = {
            "template": variant["template"], "source": variant["source"], "shape": shape, "dtype": "bfloat16",
            "config": variant["config"], "us": us or entries.get(key, {}).get("us"), "device": results["device"],
            "date": results["date"],
        }  # fmt: skip
    return tuning.write("sm_90", entries.values())


def main() -> None:
    """Compile, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--chain-tokens", type=int, nargs="+", default=[1])
    parser.add_argument("--only", choices=["sweep", "chain"])
    parser.add_argument("--limit", type=int, default=None, help="variants of a shape in the sweep")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--accept", type=Path, help="measure nothing: put this file's results into the shipped table")
    args = parser.parse_args()
    if args.accept:
        print(accept(args.accept))
        return
    args.tokens = sorted({*args.tokens, *args.chain_tokens}) if args.only != "sweep" else args.tokens
    if not torch.cuda.device_count():
        print("no NVIDIA GPU here: nothing measured")
        return
    started = time.time()
    wanted = [v for tried in plan_of(args, {}).values() for v in tried]
    failed = compile_all(wanted, len(os.sched_getaffinity(0)))
    print(f"{len(set(wanted))} kernels compiled in {time.time() - started:.0f} s, {len(failed)} failed", flush=True)
    for variant, reason in list(failed.items())[:5]:
        print("  ", variant.shape.name, variant.text(), reason)
    plan = plan_of(args, failed)
    speed = bandwidth()
    device = torch.cuda.get_device_name()
    print(f"{device}: reads {speed['read']:.2f} TB/s, copies {speed['copy']:.2f} TB/s", flush=True)
    results: dict[str, Any] = {
        **environment(),
        "device": device,
        "date": time.strftime("%Y-%m-%d"),
        "bandwidth": speed,
        "sweep": [],
        "chain": [],
    }
    if args.only != "chain":
        results["sweep"] = sweep_all(args, plan, speed["read"])
    if args.only != "sweep":
        for model in args.models:
            for tokens in args.chain_tokens:
                results["chain"].append(chain(model, tokens, plan))
                torch.cuda.empty_cache()
        for r in results["chain"]:
            show_chain(r, speed["read"])
    if args.out:
        write_json(args.out, json.loads(json.dumps(results, default=plain_data)))
    print(f"{time.time() - started:.0f} s in all")


if __name__ == "__main__":
    main()
