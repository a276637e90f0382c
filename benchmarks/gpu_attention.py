"""Paged attention on one GPU: correctness first, then its cost within a step, and against FlexAttention and SDPA.

    python benchmarks/gpu_attention.py [--only repeat latency prefill decode] [--models 8b 1b 0.6b] [--tiles 4]
    python benchmarks/gpu_attention.py --accept gpu_attention.json     # latency's best into the shipped table

`latency` puts the decoding kernel between the products before and after it, for three models, and gives microseconds a
layer above the same graph without attention (`_attention_chain.py`). `decode` and `prefill` are of Llama-3.1-8B's heads
(32 query heads, 8 key/value heads, 128 channels, bf16): medians of CUDA graph replays, contenders take turns, bytes a
second stand beside the copy and read rates of the same run. `repeat`: 300 calls back to back, equal bit for bit.
Decoding kernels are compiled beforehand, in parallel. Without a GPU it says so and ends.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import triton
from _attention_cases import LLAMA, MODELS, Decode, Prefill
from _attention_chain import PAGE, cost, name_of, to_compile
from _attention_turns import times
from _gemm_cases import H200, compile_all
from _gpu_cases import default_out
from _gpu_timing import Denominators
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

from llmopt.codegen import tuning
from llmopt.codegen.splits import splits as splits_for
from llmopt.codegen.templates import decode_attention as decode
from llmopt.codegen.templates import prefill_attention as prefill
from llmopt.compiler.target import Target
from llmopt.runtime.gpu_code import decode_shape
from llmopt.runtime.measure import environment, write_json

PARTS = ("repeat", "latency", "prefill", "decode")
GATED = {"repeat", "decode"}  # whose configurations are checked first, over pages of CHECKED tokens
CHECKED = (16, 64)
SHORT = ((1, 512), (1, 1024), (16, 1024))
LONG = ((1, 131072), (8, 32768), (64, 8192))
PROMPTS = ((1, 2048, 0), (4, 2048, 0), (2, 512, 1536))
FLEX_BYTES = 60e9  # the most that FlexAttention's copy of keys and values may take
SLOWER = 1.03  # times a long context's best that constants for short ones may take

Config = Mapping[str, Any]


def checked(config: Config) -> float:
    """The worst error over small sizes with one, some and many parts; inf if what is written is wrong."""
    worst = 0.0
    small, large = CHECKED
    for batch, context, page, splits in ((3, 700, small, 1), (2, 1000, large, 8), (1, 33, small, 5), (1, 1, small, 2)):
        case = Decode(LLAMA, batch, context, page)
        case.launch(config, splits)
        right = case.stored() and not case.tickets.any()
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
    case, wrong = Decode(LLAMA, 8, 4096, 16), {}
    for config in configs:
        splits = splits_for(8, LLAMA.HKV, 4096, target)
        case.launch(config, splits)
        first, unlike = case.out.clone(), torch.zeros((), device="cuda", dtype=torch.int64)
        for _ in range(300):
            case.launch(config, splits)
            unlike += (case.out != first).any()
        wrong[name_of(config)] = int(unlike)
    return wrong


def flex_paged(batch: int, context: int, page: int, device: str = "cuda") -> Callable[[], Tensor]:
    """FlexAttention's paged decoding: one query a sequence, pages as torch's own PagedAttention hands them out.

    Raises MemoryError: the pages would take more than FLEX_BYTES.
    """
    from torch.nn.attention.experimental._paged_attention import PagedAttention
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention, noop_mask

    count = batch * (context // page)
    needed = 4 * LLAMA.HKV * count * page * LLAMA.D
    if needed > FLEX_BYTES:
        raise MemoryError(f"its pages take {needed / 1e9:.0f} GB, at most {FLEX_BYTES / 1e9:.0f} are given to it")
    paged = PagedAttention(count, page, batch, device)
    for row in range(batch):
        paged.reserve(torch.tensor(row, device=device), torch.tensor(context, device=device))
    logical = create_block_mask(noop_mask, batch, None, 1, context, device=device, BLOCK_SIZE=(128, page))
    mask = paged.convert_logical_block_mask(logical)
    k, v = (torch.randn(1, LLAMA.HKV, count * page, LLAMA.D, device=device, dtype=torch.bfloat16) for _ in "kv")
    q = torch.randn(batch, LLAMA.HQ, 1, LLAMA.D, device=device, dtype=torch.bfloat16)
    # past the limit it would run uncompiled, with scores and copies of every key in memory
    torch._dynamo.config.recompile_limit = 256
    compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True)
    options = {"BLOCK_N": page} if page < 64 else None
    return lambda: compiled(q, k, v, block_mask=mask, enable_gqa=True, kernel_options=options)


def sdpa(batch: int, context: int) -> Callable[[], Tensor]:
    """SDPA's flash kernel over contiguous keys and values."""
    shape = (batch, LLAMA.HKV, context, LLAMA.D)
    k, v = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in "kv")
    q = torch.randn(batch, LLAMA.HQ, 1, LLAMA.D, device="cuda", dtype=torch.bfloat16)

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
    """Every tile at three numbers of parts, in a graph of four launches, and every way to begin of the best two; then
    in turns `ours`, which is what the runtime launches, the `best` of those, and peers."""
    torch.compiler.reset()  # compiled forms of the last case go
    torch.cuda.empty_cache()
    case, base = Decode(LLAMA, batch, context, page), splits_for(batch, LLAMA.HKV, context, target)
    tried: dict[str, tuple[float, Config, int]] = {}

    def attend(config: Config, splits: int) -> Callable[[], object]:
        return lambda: [case.launch(config, splits) for _ in range(4)]

    def time_all(listed: list[Any], counts: list[int]) -> None:
        for config, splits in ((c, s) for c in listed for s in counts):
            us = times({"": attend(config, splits)}, 4, 6)[""]
            tried[f"{name_of(config)} x{splits}"] = us, config, splits

    plain = [c for c in configs if not c["PEEL"] and not c["AHEAD"]]
    time_all(plain, list(dict.fromkeys((base, 2 * base, max(1, base // 2)))))
    fast = sorted(tried.values(), key=lambda row: row[0])
    tiles = {name_of(config): config for _, config, _ in fast[:4]}
    time_all([c for tile in list(tiles.values())[:2] for c in decode.starts(tile)[1:]], [base])
    best = attend(*min(tried.values(), key=lambda row: row[0])[1:])
    best()
    shape = {**LLAMA.shape, "PAGE": page, "N": int(decode_shape(batch))}
    shipped = tuning.pick("decode_attention", shape, "bfloat16", target)
    ours = attend(shipped, base)
    ours()
    sizes = (page, 128) if peers else (page,)
    made = {f"flex{p}": attempt(lambda p=p: flex_paged(batch, context, p)) for p in sizes}
    if peers:
        made["sdpa"] = attempt(lambda: sdpa(batch, context))
    runs = {n: (lambda run=run: [run() for _ in range(4)]) for n, run in made.items() if not isinstance(run, str)}
    us = times({"ours": ours, "best": best, **runs}, 4, 12)
    case.launch(shipped, base)
    return {
        "batch": batch, "context": context, "page": page, "error": case.error(2), "us": us,
        "shipped": f"{name_of(shipped)} x{base}",
        "tried": {name: row[0] for name, row in tried.items()},
        "bytes_per_s": {n: case.bytes / t * 1e6 for n, t in us.items()},
        "failed": {n: run for n, run in made.items() if isinstance(run, str)},
    }  # fmt: skip


def prefill_row(batch: int, count: int, have: int, configs: list[dict[str, Any]]) -> dict[str, Any]:
    """The Triton kernel's configurations and torch's kernel over whole prompts, against SDPA without pages."""
    case, worst, wrong = Prefill(batch, count, have, 16), 0.0, 0
    q, k, v = case.contiguous()
    mask = causal_lower_right(count, have + count)

    def contiguous() -> Tensor:
        return scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)

    runs: dict[str, Callable[[], object]] = {"sdpa": contiguous, **({} if have else {"whole": case.whole})}
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
    return row | {"flop_per_s": {name: case.flops / t * 1e6 for name, t in us.items()}}


def top(tried: Mapping[str, float], count: int = 4) -> str:
    """The fastest few."""
    return "  ".join(f"{name} {us:.2f}" for name, us in sorted(tried.items(), key=lambda item: item[1])[:count])


def show(result: Mapping[str, Any]) -> None:
    """The table, last in the output."""
    copy, read = result["copy_bytes_per_s"], result["read_bytes_per_s"]
    print(f"\n{result['gpu']['name']}: copy {copy / 1e12:.2f} TB/s, read {read / 1e12:.2f}; {result['wall_s']:.0f} s")
    print("configurations: swap/tile/warps/stages, how it begins, xparts; us")
    if "gate" in result:
        print("gate: errors", {n: e if isinstance(e, str) else f"{e:.1e}" for n, e in result["gate"].items()})
    if "repeat" in result:
        print("calls of 300 unlike the first:", {k: v for k, v in result["repeat"].items() if v} or "none")
    for row in result.get("latency", ()):
        head = f"latency {row['model']} {row['batch']}x{row['context']} (+{row['without_us']:.2f} without)"
        print(f"{head}: default {row['us'].get(row['default'], float('nan')):.2f} us a layer; {top(row['us'], 6)}")
        for name, why in row["failed"].items():
            print(f"  {name}: {why}")
    for row in result.get("decode", ()):
        print(
            f"decode {row['batch']}x{row['context']} page {row['page']}, error {row['error']:.1e}: {top(row['tried'])}"
        )
        for name, us in row["us"].items():
            rate, ratio = row["bytes_per_s"][name], us / row["us"]["ours"]
            shares = f"{rate / copy:6.1%} of copy, {rate / read:6.1%} of read"
            print(f"  {name:8s} {us:9.2f} us {rate / 1e9:7.0f} GB/s {shares}, {ratio:.2f} of ours")
        for name, why in row["failed"].items():
            print(f"  {name}: {why}")
    for row in result.get("prefill", ()):
        print(
            f"prefill {row['batch']}x{row['count']} after {row['have']}: error {row['error']:.1e}, {row['unlike']} of "
            f"20 calls a kernel unlike the first; tile/keys/warps/stages, us (TFLOP/s)"
        )
        print("  " + "  ".join(f"{n} {us:.1f} ({row['flop_per_s'][n] / 1e12:.0f})" for n, us in row["us"].items()))


def chosen(result: Mapping[str, Any], model: str, batch: int) -> dict[str, Any] | None:
    """The constants that cost least over all short contexts of a model's batch, the parts as the runtime makes them,
    and that no long context of the same bucket is much slower with."""
    rows = [r for r in result.get("latency", ()) if (r["model"], r["batch"]) == (model, batch)]
    usual: list[dict[str, float]] = []
    for r in rows:
        known = {name: us for name, us in {**r["tried"], **r["us"]}.items() if name not in r["failed"]}
        usual.append({n.rpartition(" x")[0]: us for n, us in known.items() if n.endswith(f" x{r['parts']}")})
    names = set.intersection(*(set(u) for u in usual)) if usual else set()
    for row in result.get("decode", ()):
        if model == LLAMA.name and decode_shape(row["batch"]) == decode_shape(batch):
            best = min(row["tried"].values())
            long = {
                n.rpartition(" x")[0].removesuffix(" early") for n, us in row["tried"].items() if us <= SLOWER * best
            }
            names &= {n for n in names if n.removesuffix(" early") in long}
    if not names:
        return None
    name = min(names, key=lambda n: sum(u[n] for u in usual))
    return dict(rows[0]["configs"][name])


def accept(path: Path) -> None:
    """Put latency's best of a result file into the shipped table; says where none holds for long contexts too."""
    result = json.loads(path.read_text())
    entries = []
    for model, batch in dict.fromkeys((r["model"], r["batch"]) for r in result["latency"]):
        config = chosen(result, model, batch)
        if config is None:
            print(f"{model}, batch {batch}: nothing is fast in short and in long contexts; the table stays")
            continue
        page = next(r["page"] for r in result["latency"] if r["model"] == model)
        shape = {**MODELS[model].shape, "PAGE": page, "N": int(decode_shape(batch))}
        entries.append({
            "template": "decode_attention", "source": result["source"], "shape": shape, "dtype": "bfloat16",
            "config": config, "us": None, "device": result["gpu"]["name"], "date": result["date"][:10],
        })  # fmt: skip
    print(tuning.write("sm_90", entries))


def parser() -> argparse.ArgumentParser:
    """The options."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    made.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), help="of latency")
    made.add_argument("--tiles", type=int, help="the first so many tiles of the configurations")
    made.add_argument("--pages", type=int, nargs="+", default=[16, 64], help="of decode")
    made.add_argument("--out", type=Path, help="result file")
    made.add_argument("--accept", type=Path, help="measure nothing: put this file's results into the shipped table")
    return made


def run(options: argparse.Namespace) -> None:
    """All parts; the file is rewritten after each."""
    began, out = time.perf_counter(), options.out or default_out("attention", "cuda")
    wanted = to_compile(options.models, PAGE, H200, options.tiles) if "latency" in options.only else []
    if GATED & set(options.only):
        for page in {*CHECKED, *options.pages}:
            wanted += to_compile([LLAMA.name], page, H200, options.tiles)
    failed = compile_all(wanted, len(os.sched_getaffinity(0)))
    print(
        f"{len(set(wanted))} kernels compiled in {time.perf_counter() - began:.0f} s, {len(failed)} failed", flush=True
    )
    torch.manual_seed(0)
    target = Target.detect("cuda")
    rates = Denominators("cuda")
    rates()
    result: dict[str, Any] = {**environment(), **rates.to_dict(), "source": tuning.source_hash("decode_attention")}
    del rates
    result["uncompiled"] = {f"{c.heads.name} {name_of(dict(c.config))}": why for c, why in failed.items()}
    listed = decode.configs({**LLAMA.shape, "PAGE": 16}, "bfloat16", target)
    plain = [c for c in listed if not c["PEEL"] and not c["AHEAD"]][: options.tiles]
    several = prefill.configs({**LLAMA.shape, "PAGE": 16}, "bfloat16", target)
    configs = listed if options.tiles is None else plain
    if GATED & set(options.only):
        # what is wrong is shown, and not timed
        result["gate"] = errors = gate(configs)
        configs = [c for c in configs if not isinstance(errors[name_of(c)], str) and errors[name_of(c)] <= 0.01]
    steps: dict[str, Callable[[], object]] = {
        "repeat": lambda: repeat(configs, target),
        "latency": lambda: [cost(m, b, t, target, options.tiles) for m in options.models for b, t in SHORT],
        "prefill": lambda: [prefill_row(*sizes, several) for sizes in PROMPTS],
        "decode": lambda: [decode_row(b, t, p, configs, target, p == options.pages[0]) for b, t in LONG
                           for p in options.pages],
    }  # fmt: skip
    for step in options.only:
        result[step] = steps[step]()
        result["wall_s"] = time.perf_counter() - began
        print(f"{step} done at {result['wall_s']:.0f} s", flush=True)
        if out:
            write_json(out, result)
    show(result)


def main() -> None:
    """Run what is asked for; see the module's docstring."""
    options = parser().parse_args()
    if options.accept:
        accept(options.accept)
    elif not torch.cuda.device_count():
        print("no NVIDIA GPU here: nothing measured")
    else:
        run(options)


if __name__ == "__main__":
    main()
