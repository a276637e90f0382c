"""Paged attention on one GPU: correctness first, then decode and prefill against FlexAttention and SDPA.

    python benchmarks/gpu_attention.py [--only repeat,latency,prefill,decode] [--pages 16,64] [--quick]

Shapes are those of Llama-3.1-8B (32 query heads, 8 key/value heads, 128 channels, bf16). A time is the median of CUDA
graph replays; contenders take turns. Key/value bytes a second stand beside the copy and read rates of the same run.
JSON goes to $OUT/gpu_attention.json (or the working directory), a table to the end of the output.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from _attention_cases import HKV, HQ, SHAPE, D, Decode, Prefill, read
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

from llmopt.codegen.splits import splits as splits_for
from llmopt.codegen.templates import decode_attention as decode
from llmopt.codegen.templates import prefill_attention as prefill
from llmopt.compiler.target import Target

CASES = ((1, 131072), (8, 32768), (64, 8192))
PROMPTS = ((1, 2048, 0), (4, 2048, 0), (2, 512, 1536))


def graphed(run: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """`run` warmed up and captured."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


def times(runs: dict[str, Callable[[], object]], per: int, rounds: int) -> dict[str, float]:
    """Median microseconds of a `per`-th of each run, replayed in turns."""
    graphs, seen = {name: graphed(run) for name, run in runs.items()}, {name: list[float]() for name in runs}
    for _ in range(rounds):
        for name, graph in graphs.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            seen[name].append(start.elapsed_time(end) * 1e3 / per)
    return {name: statistics.median(us[1:]) for name, us in seen.items()}


def bandwidth() -> dict[str, float]:
    """Copy (bytes read and written) and read rates in GB/s over 2 GiB."""
    x = torch.randint(0, 1000, (1 << 29,), device="cuda", dtype=torch.int32)
    y, steps = torch.empty_like(x), 64
    runs = {"copy": lambda: y.copy_(x), "read": lambda: read[(x.numel() // (steps * 4096),)](x, y, steps, BLOCK=4096)}
    us = times(runs, 1, 12)
    return {"copy": 2 * x.numel() * 4 / us["copy"] / 1e3, "read": x.numel() * 4 / us["read"] / 1e3}


def name_of(config: dict[str, Any]) -> str:
    """swap/tile/warps/stages/peel."""
    keys = ("SWAP", "BLOCK_T", "num_warps", "num_stages", "PEEL")
    return "/".join(str(config[key]) for key in keys)


def checked(config: dict[str, Any]) -> float:
    """The worst error over small sizes with one, some and many parts; inf if what is written is wrong."""
    worst = 0.0
    for batch, context, page, splits in ((3, 700, 16, 1), (2, 1000, 64, 8), (1, 33, 16, 5), (1, 1, 16, 2)):
        case = Decode(batch, context, page)
        case.launch(config, splits)
        own_k, own_v = (pages[0][case.slots // page, :, case.slots % page] for pages in (case.k, case.v))
        off = (own_k.float() - case.rotated(HQ, HKV).float()).abs().max() / own_k.float().abs().max()
        same = torch.equal(own_v, case.qkv.view(batch, -1, D)[:, HQ + HKV :])
        right = off <= 0.01 and same and not case.tickets.any()
        worst = max(worst, case.error() if right else float("inf"))
    return worst


def gate(configs: list[dict[str, Any]]) -> dict[str, Any]:
    """The error of every configuration, or why it does not run."""
    seen: dict[str, Any] = {}
    for config in configs:
        try:
            seen[name_of(config)] = checked(config)
        except triton.TritonError as error:
            seen[name_of(config)] = f"{type(error).__name__}: {error}"[:160]
    return seen


def repeat(configs: list[dict[str, Any]], target: Target) -> dict[str, int]:
    """Calls out of 300, back to back, whose bits differ from the first one's."""
    case, wrong = Decode(8, 4096, 16), {}
    for config in configs:
        splits = splits_for(8, HKV, 4096, target)
        case.launch(config, splits)
        first, unlike = case.out.clone(), torch.zeros((), device="cuda", dtype=torch.int64)
        for _ in range(300):
            case.launch(config, splits)
            unlike += (case.out != first).any()
        wrong[name_of(config)] = int(unlike)
    return wrong


def flex_paged(batch: int, context: int, page: int, device: str = "cuda") -> Callable[[], Tensor]:
    """FlexAttention's paged decoding: one query a sequence, pages as torch's own PagedAttention hands them out."""
    from torch.nn.attention.experimental._paged_attention import PagedAttention
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention, noop_mask

    count = batch * (context // page)
    paged = PagedAttention(count, page, batch, device)
    for row in range(batch):
        paged.reserve(torch.tensor(row, device=device), torch.tensor(context, device=device))
    logical = create_block_mask(noop_mask, batch, None, 1, context, device=device, BLOCK_SIZE=(128, page))
    mask = paged.convert_logical_block_mask(logical)
    k, v = (torch.randn(1, HKV, count * page, D, device=device, dtype=torch.bfloat16) for _ in "kv")
    q = torch.randn(batch, HQ, 1, D, device=device, dtype=torch.bfloat16)
    compiled = torch.compile(flex_attention, dynamic=False)
    options = {"BLOCK_N": page} if page < 64 else None
    return lambda: compiled(q, k, v, block_mask=mask, enable_gqa=True, kernel_options=options)


def sdpa(batch: int, context: int) -> Callable[[], Tensor]:
    """SDPA's flash kernel over contiguous keys and values."""
    k, v = (torch.randn(batch, HKV, context, D, device="cuda", dtype=torch.bfloat16) for _ in "kv")
    q = torch.randn(batch, HQ, 1, D, device="cuda", dtype=torch.bfloat16)

    def run() -> Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return scaled_dot_product_attention(q, k, v, enable_gqa=True)

    return run


def attempt(make: Callable[[], Callable[[], object]]) -> Callable[[], object] | str:
    """A contender that has run once, or in one line why it does not run."""
    try:
        run = make()
        run()
        torch.cuda.synchronize()
        return run
    except Exception as error:
        return f"{type(error).__name__}: {error}".replace("\n", " ")[:160]


def decode_row(
    batch: int, context: int, page: int, configs: list[dict[str, Any]], target: Target, peers: bool
) -> dict[str, Any]:
    """Every configuration at two numbers of parts, in a graph of four launches; peers in turns with the best."""
    torch.compiler.reset()  # a limit on recompilations would end FlexAttention's compiled form
    case, base = Decode(batch, context, page), splits_for(batch, HKV, context, target)
    tried: dict[str, float] = {}
    best: tuple[float, Callable[[], object]] = (float("inf"), lambda: None)
    for config in configs:
        for splits in dict.fromkeys((base, 2 * base, max(1, base // 2))):
            run = lambda config=config, splits=splits: [case.launch(config, splits) for _ in range(4)]  # noqa: E731
            us = times({"": run}, 4, 6)[""]
            tried[f"{name_of(config)} x{splits}"] = us
            best = min(best, (us, run), key=lambda pair: pair[0])
    best[1]()
    sizes = (page, 128) if peers else (page,)
    made = {f"flex{p}": attempt(lambda p=p: flex_paged(batch, context, p)) for p in sizes}
    if peers:
        made["sdpa"] = attempt(lambda: sdpa(batch, context))
    runs = {n: (lambda run=run: [run() for _ in range(4)]) for n, run in made.items() if not isinstance(run, str)}
    us = times({"ours": best[1], **runs}, 4, 12)
    row = {"batch": batch, "context": context, "page": page, "error": case.error(2), "us": us, "tried": tried}
    return row | {
        "gbs": {n: case.bytes / t / 1e3 for n, t in us.items()},
        "failed": {n: run for n, run in made.items() if isinstance(run, str)},
    }


def latency_row(batch: int, context: int, page: int, configs: list[dict[str, Any]]) -> dict[str, Any]:
    """Microseconds a launch in a chain of 32 over distinct caches: rotation, the write and the combination included."""
    case, runs = Decode(batch, context, page, layers=32), {}
    for config in configs:
        for keys in (32, 64, 128, 256):
            splits = context // keys
            runs[f"{name_of(config)} x{splits}"] = lambda config=config, splits=splits: [
                case.launch(config, splits, layer) for layer in range(32)
            ]
    tried = {name: times({name: run}, 32, 6)[name] for name, run in runs.items()}
    best = min(tried, key=tried.__getitem__)
    return {"batch": batch, "context": context, "page": page, "us": tried[best], "best": best, "tried": tried}


def prefill_row(batch: int, count: int, have: int, configs: list[dict[str, Any]]) -> dict[str, Any]:
    """The Triton kernel's configurations, and of whole prompts torch's by `runtime.attend`, against SDPA by itself."""
    case, worst, wrong = Prefill(batch, count, have, 16), 0.0, 0
    q, k, v = case.contiguous()
    mask = causal_lower_right(count, have + count)

    def contiguous() -> Tensor:
        return scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)

    runs: dict[str, Callable[[], object]] = {"sdpa": contiguous}
    if not have:
        runs["whole"] = partial(case.whole, case.own())
    for config in configs:
        name = "/".join(str(config[key]) for key in ("BLOCK_Q", "BLOCK_T", "num_warps", "num_stages"))
        runs[name] = lambda config=config: case.launch(config)
    for name, run in list(runs.items())[1:]:
        case.out.zero_()
        run()
        worst, first = max(worst, case.error()), case.out.clone()
        for _ in range(20):
            run()
            wrong += int((case.out != first).any())
        if not worst <= 0.02:
            raise SystemExit(f"WRONG: prefill {name} {batch}x{count} after {have}: error {worst}")
    us = times(runs, 1, 12)
    row = {"batch": batch, "count": count, "have": have, "error": worst, "unlike": wrong, "us": us}
    return row | {"tflops": {name: case.flops / t / 1e6 for name, t in us.items()}}


def top(tried: dict[str, float], count: int = 4) -> str:
    """The fastest few."""
    return "  ".join(f"{name} {us:.2f}" for name, us in sorted(tried.items(), key=lambda item: item[1])[:count])


def report(result: dict[str, Any]) -> None:
    """The table, last in the output."""
    rates = result["bandwidth"]
    print(f"\n{result['device']}: copy {rates['copy']:.0f} GB/s, read {rates['read']:.0f}; {result['wall']:.0f} s")
    print("configurations: swap/tile/warps/stages/peel xparts, us")
    if "gate" in result:
        print("gate: errors", {n: e if isinstance(e, str) else f"{e:.1e}" for n, e in result["gate"].items()})
    if "repeat" in result:
        print("calls of 300 unlike the first:", {k: v for k, v in result["repeat"].items() if v} or "none")
    for row in result.get("decode", ()):
        print(
            f"decode {row['batch']}x{row['context']} page {row['page']}, error {row['error']:.1e}: {top(row['tried'])}"
        )
        for name, us in row["us"].items():
            share = row["gbs"][name] / rates["copy"]
            ratio = us / row["us"]["ours"]
            print(f"  {name:8s} {us:9.2f} us {row['gbs'][name]:7.0f} GB/s {share:6.1%} of copy, {ratio:.2f} of ours")
        for name, why in row["failed"].items():
            print(f"  {name}: {why}")
    for row in result.get("latency", ()):
        print(f"latency {row['batch']}x{row['context']} page {row['page']}: {row['us']:.2f} us  {top(row['tried'])}")

    for row in result.get("prefill", ()):
        print(
            f"prefill {row['batch']}x{row['count']} after {row['have']}: error {row['error']:.1e}, {row['unlike']} of "
            f"20 calls a kernel unlike the first; tile/keys/warps/stages, us (TFLOP/s)"
        )
        print("  " + "  ".join(f"{n} {us:.1f} ({row['tflops'][n]:.0f})" for n, us in row["us"].items()))


def main() -> None:
    """Run what is asked for; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="repeat,latency,prefill,decode")
    parser.add_argument("--pages", default="16,64")
    parser.add_argument("--quick", action="store_true", help="the first four configurations only")
    options = parser.parse_args()
    began, only = time.perf_counter(), options.only.split(",")
    torch.manual_seed(0)
    target = Target.detect("cuda")
    configs = decode.configs({**SHAPE, "PAGE": 16}, "bfloat16", target)[: 4 if options.quick else None]
    pages = [int(p) for p in options.pages.split(",")]
    result: dict[str, Any] = {"device": torch.cuda.get_device_name(), "bandwidth": bandwidth(), "gate": gate(configs)}
    # what is wrong is shown, and not timed
    errors = result["gate"]
    configs = [c for c in configs if not isinstance(errors[name_of(c)], str) and errors[name_of(c)] <= 0.01]
    flat = [c for c in configs if not c["PEEL"]]
    several = prefill.configs({**SHAPE, "PAGE": 16}, "bfloat16", target)
    steps: dict[str, Callable[[], object]] = {
        "repeat": lambda: repeat(configs, target),
        "latency": lambda: [latency_row(b, t, 16, configs) for b in (1, 4, 16) for t in (512, 1024)],
        "prefill": lambda: [prefill_row(*sizes, several) for sizes in PROMPTS],
        "decode": lambda: [decode_row(b, t, p, flat, target, p == pages[0]) for b, t in CASES for p in pages],
    }
    for step in only:
        result[step] = steps[step]()
        result["wall"] = time.perf_counter() - began
        print(f"{step} done at {result['wall']:.0f} s", flush=True)
        (Path(os.environ.get("OUT", ".")) / "gpu_attention.json").write_text(json.dumps(result, indent=1))
    report(result)


if __name__ == "__main__":
    main()
