"""Attention over packed keys and values on one GPU, against bf16 pages and FlexAttention's; and what packing costs.

    python benchmarks/kv_attention.py [--cases 8x32768 1x131072] [--packings int4-h128/int4 int8/int8]

Llama-3.1-8B's heads (32 query heads, 8 key/value heads, 128 channels), one new token a sequence. Before anything is
timed: every configuration's error against fp64 over what the pages hold, and 300 calls back to back, equal bit for bit.
Medians of CUDA graph replays, contenders take turns; bytes a second stand beside the copy and read rates of the run.
`write`: a step's tokens normed, rotated and stored, packed against as they are, by one template.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import triton
from _attention_cases import LLAMA, Decode
from _attention_turns import times
from _gemm_cases import H200, compile_all
from _gpu_cases import default_out, has_device
from _gpu_timing import Denominators
from _packed_cases import Compiled, PackedDecode
from gpu_attention import attempt, flex_paged

from llmopt.codegen import tuning
from llmopt.codegen.splits import splits as splits_for
from llmopt.codegen.templates import decode_packed
from llmopt.compiler.target import Target
from llmopt.runtime.gpu_code import decode_shape
from llmopt.runtime.measure import environment, write_json

PACKINGS = ("int4-h128/int4", "int4/int4", "int4-h16/int4", "int4-h128/int4-h128", "int8/int8", "fp8/fp8",
            "nvfp4/nvfp4")  # fmt: skip
MOST = 0.02  # error of the largest value
LAYERS = 4  # launches a graph
WRITES = 64  # the same of writes, which are short


def name_of(config: Mapping[str, Any], splits: int) -> str:
    """`32/1/3 early x16`."""
    early = " early" if config["EARLY"] else ""
    return f"{config['BLOCK_T']}/{config['num_warps']}/{config['num_stages']}{early} x{splits}"


def is_int4(packing: str) -> int:
    """Are keys and values both?"""
    return int(all(half.startswith("int4") for half in packing.split("/")))


def repeated(case: PackedDecode, config: Mapping[str, Any], splits: int) -> int:
    """Calls out of 300, back to back, whose bits differ from the first one's."""
    case.launch(config, splits)
    first, unlike = case.out.clone(), torch.zeros((), device="cuda", dtype=torch.int64)
    for _ in range(300):
        case.launch(config, splits)
        unlike += (case.out != first).any()
    return int(unlike)


def packing_row(
    plain: Decode, packing: str, target: Target, whole: bool
) -> tuple[dict[str, Any], Callable[[], object]]:
    """What a packing's configurations take and how exact they are; and launches with the constants that ship. Exits
    where a result is wrong."""
    case = PackedDecode(plain, *packing.split("/"))
    base = splits_for(plain.batch, LLAMA.HKV, plain.context, target, packed=True)
    shape = {**LLAMA.shape, "PAGE": plain.page, "N": int(decode_shape(plain.batch)), "INT4": is_int4(packing)}
    configs = decode_packed.configs(shape, "bfloat16", target)
    tried: dict[str, float] = {}
    unlike, worst = 0, 0.0
    for config in configs if whole else configs[:1]:
        for splits in dict.fromkeys((base, 2 * base, max(1, base // 2)) if whole else (base,)):
            case.out.zero_()
            try:
                unlike += repeated(case, config, splits)
            except triton.TritonError as error:
                tried[name_of(config, splits)] = float("nan")
                print(f"{packing} {name_of(config, splits)}: {type(error).__name__}")
                continue
            worst = max(worst, case.error())
            if not worst <= MOST or unlike:
                raise SystemExit(f"WRONG: {packing} {name_of(config, splits)}: error {worst}, {unlike} calls unlike")
            run = {"": lambda c=config, s=splits: [case.launch(c, s) for _ in range(LAYERS)]}
            tried[name_of(config, splits)] = times(run, LAYERS, 6)[""]
    shipped = tuning.pick("decode_packed", shape, "bfloat16", target)
    row = {
        "packing": packing, "bytes": case.bytes, "error": worst, "unlike": unlike, "bytes_unlike": case.stored(),
        "tried": tried, "timed": name_of(shipped, base),
    }  # fmt: skip
    return row, lambda: [case.launch(shipped, base) for _ in range(LAYERS)]


def attention_case(batch: int, context: int, args: argparse.Namespace, target: Target) -> dict[str, Any]:
    """All packings and peers of one size, in turns."""
    torch.compiler.reset()
    torch.cuda.empty_cache()
    plain = Decode(LLAMA, batch, context, args.page)
    base = splits_for(batch, LLAMA.HKV, context, target)
    shape = {**LLAMA.shape, "PAGE": args.page, "N": int(decode_shape(batch))}
    config = tuning.pick("decode_attention", shape, "bfloat16", target)

    def ours() -> object:
        return [plain.launch(config, base) for _ in range(LAYERS)]

    ours()
    rows, runs = {}, {"bf16": ours}
    for number, packing in enumerate(args.packings):
        rows[packing], runs[packing] = packing_row(plain, packing, target, number < args.whole)
    flex = {f"flex{p}": attempt(lambda p=p: flex_paged(batch, context, p)) for p in args.flex}
    runs |= {n: (lambda run=run: [run() for _ in range(LAYERS)]) for n, run in flex.items() if not isinstance(run, str)}
    us = times(runs, LAYERS, 12)
    size = {"bf16": plain.bytes, **{name: row["bytes"] for name, row in rows.items()}}
    return {
        "batch": batch, "context": context, "page": args.page, "error": plain.error(2), "us": us, "packings": rows,
        "bytes_per_s": {n: size.get(n, plain.bytes) / t * 1e6 for n, t in us.items()},
        "failed": {n: run for n, run in flex.items() if isinstance(run, str)},
    }  # fmt: skip


def write_case(tokens: int, packings: list[str]) -> dict[str, Any]:
    """Microseconds to prepare and store so many tokens, each of its own sequence."""
    plain = Decode(LLAMA, tokens, 64, 16)
    made = {packing: PackedDecode(plain, *packing.split("/")) for packing in packings}
    runs: dict[str, Callable[[], object]] = {
        packing: lambda case=case: [case.write(False) for _ in range(WRITES)] for packing, case in made.items()
    }
    first = next(iter(made.values()))
    # as they are, whichever way is the faster
    plain = {f"plain {n}": lambda n=n: [first.write(True, n) for _ in range(WRITES)] for n in (1, 3, 6)}
    us = times({**plain, **runs}, WRITES, 12)
    return {"tokens": tokens, "us": {"plain": min(us[name] for name in plain), **{name: us[name] for name in runs}}}


def to_compile(args: argparse.Namespace, target: Target) -> list[Compiled]:
    """All decoding kernels that will be launched."""
    found = []
    for number, packing in enumerate(args.packings):
        shape = {**LLAMA.shape, "PAGE": args.page, "N": 1, "INT4": is_int4(packing)}
        configs = decode_packed.configs(shape, "bfloat16", target)
        some = configs if number < args.whole else configs[:1]
        found += [Compiled(LLAMA, args.page, packing, tuple(config.items())) for config in some]
    return found


def show(result: Mapping[str, Any]) -> None:
    """The tables."""
    print(f"copy {result['copy_bytes_per_s'] / 1e12:.2f} TB/s, read {result['read_bytes_per_s'] / 1e12:.2f}")
    for case in result["attention"]:
        print(f"{case['batch']}x{case['context']} page {case['page']}: us, GB/s, times bf16")
        for name, us in case["us"].items():
            about = case["packings"].get(name)
            said = "" if about is None else f"  {about['timed']}, error {about['error']:.1e}"
            said += "" if about is None else f", own bytes unlike {about['bytes_unlike']:.1%}"
            rate = case["bytes_per_s"][name]
            print(f"  {name:22s} {us:9.2f} {rate / 1e9:7.0f} {case['us']['bf16'] / us:6.2f}x{said}")
        for name, row in case["packings"].items():
            fast = sorted(row["tried"].items(), key=lambda item: item[1])[:6]
            print(f"    {name}: " + "  ".join(f"{n} {us:.1f}" for n, us in fast))
        for name, why in case["failed"].items():
            print(f"  {name}: {why}")
    for case in result["write"]:
        print(f"write of {case['tokens']}: " + "  ".join(f"{n} {us:.2f}" for n, us in case["us"].items()))


def main() -> None:
    """Measure, and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=["8x32768", "1x131072"])
    parser.add_argument("--packings", nargs="+", default=list(PACKINGS))
    parser.add_argument("--whole", type=int, default=1, help="how many packings have all configurations tried")
    parser.add_argument("--flex", type=int, nargs="*", default=[16, 128], help="pages of FlexAttention's")
    parser.add_argument("--page", type=int, default=16)
    parser.add_argument("--write", type=int, nargs="*", default=[1, 32, 128, 2048])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if not has_device("cuda"):
        return
    started = time.perf_counter()
    compile_all(to_compile(args, H200), os.cpu_count() or 1)
    target, rates = Target.detect("cuda"), Denominators("cuda")
    rates()
    found = [attention_case(*map(int, case.split("x")), args, target) for case in args.cases]
    rates()
    result = {
        "attention": found, "write": [write_case(tokens, args.packings) for tokens in args.write], **rates.to_dict(),
        "wall_s": time.perf_counter() - started, "environment": environment(),
    }  # fmt: skip
    out = args.out or default_out("kv-attention", "cuda")
    if out:
        write_json(out, result)
    show(result)


if __name__ == "__main__":
    main()
