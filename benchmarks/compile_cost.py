"""Cost of compiling a large model: from a 70B Llama config on the meta device to the lowered step.

    python benchmarks/compile_cost.py --out benchmarks/results/compile-cost.json

No weight is ever allocated. Each depth runs in a process of its own, so that peak memory is that depth's; the peer in
the same process is what every torch-based compiler pays before it can begin, `torch.export` of the same model.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

DEPTHS = (10, 20, 40, 80)
LLAMA_70B = {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
}


def measure(layers: int) -> dict[str, Any]:
    """Seconds and peak bytes of one depth, in this process."""
    import torch
    from transformers import LlamaConfig

    from llmopt.compiler import capture as capture_module
    from llmopt.compiler.capture_hf import capture_config
    from llmopt.runtime.build import build

    exporting: list[float] = []
    export = capture_module.export_module

    def timed(*args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        try:
            return export(*args, **kwargs)
        finally:
            exporting.append(time.perf_counter() - started)

    capture_module.export_module = timed
    config = LlamaConfig(num_hidden_layers=layers, **LLAMA_70B)
    started = time.perf_counter()
    program = capture_config(config, torch.bfloat16)
    captured = time.perf_counter() - started
    program, report, _ = build(program, "default")
    total = time.perf_counter() - started
    weights = sum(w.nbytes for w in program.used_weights().values())
    calls = [str(n.target) for n in program.graph("step").fx.nodes if n.op == "call_module"]
    return {
        "layers": layers,
        "weight_gb": weights / 1e9,
        "nodes_captured": report.passes[0].nodes_before,
        "export_s": exporting[0],
        "capture_s": captured,
        "passes_s": total - captured,
        "total_s": total,
        "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
        "match_attempts": sum(r.stats.attempts for r in report.passes),
        "distinct_regions": len(set(calls)),
        "region_calls": len(calls),
        "ms_by_pass": {r.name: r.ms for r in report.passes},
    }


def exponent(rows: list[dict[str, Any]]) -> float:
    """Growth of the passes' time with the number of nodes: slope of the log-log fit."""
    x = [math.log(r["nodes_captured"]) for r in rows]
    y = [math.log(r["passes_s"]) for r in rows]
    mx, my = sum(x) / len(x), sum(y) / len(y)
    return sum((a - mx) * (b - my) for a, b in zip(x, y, strict=True)) / sum((a - mx) ** 2 for a in x)


def show(rows: list[dict[str, Any]], growth: float) -> None:
    """The table."""
    table = Table(title="70B Llama config, meta device to lowered step")
    columns = (
        "layers",
        "nodes",
        "export s",
        "capture s",
        "passes s",
        "total s",
        "peak GB",
        "match attempts",
        "regions",
    )
    for name in columns:
        table.add_column(name, justify="right")
    for r in rows:
        seconds = [f"{r[k]:.2f}" for k in ("export_s", "capture_s", "passes_s", "total_s", "peak_gb")]
        regions = f"{r['distinct_regions']} for {r['region_calls']}"
        table.add_row(str(r["layers"]), str(r["nodes_captured"]), *seconds, str(r["match_attempts"]), regions)
    console = Console()
    console.print(table)
    console.print(f"passes grow with nodes ** {growth:.2f}")


def main() -> None:
    """Run each depth in a process of its own."""
    from llmopt.runtime.measure import environment, write_json

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the figures to this JSON file")
    parser.add_argument("--depths", type=int, nargs="+", default=DEPTHS, help="numbers of layers")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one is not None:
        print(json.dumps(measure(args.one)))
        return
    rows = []
    for depth in args.depths:
        done = subprocess.run(
            [sys.executable, __file__, "--one", str(depth)], capture_output=True, text=True, check=True
        )
        rows.append(json.loads(done.stdout.splitlines()[-1]))
    growth = exponent(rows) if len(rows) > 1 else float("nan")
    show(rows, growth)
    if args.out:
        write_json(args.out, {**environment(), "config": LLAMA_70B, "growth_exponent": growth, "depths": rows})


if __name__ == "__main__":
    main()
