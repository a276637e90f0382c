"""Weight streaming on this CPU: F.linear and the C++ kernel against plain reading, for few rows.

    python benchmarks/cpu_kernels.py --out benchmarks/results/cpu-kernels.json

The shapes are those of an 8-layer Llama (hidden 512, intermediate 1408, vocabulary 8192, 8 query and 4 key/value
heads). Each timing walks all copies of one weight, 96 MiB or more in all, so that no cache can keep them; the two
kernels take turns. Reading is a loop over as many bytes that adds them up on all threads, the best of its rounds.
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from llmopt.codegen.cpp import linear_cpp, load_library
from llmopt.compiler.target import cxx
from llmopt.runtime.measure import environment, write_json

SHAPES = {"qkv": (1024, 512), "o": (512, 512), "gate_up": (2816, 512), "down": (512, 1408), "head": (8192, 512)}
USES = {"qkv": 8, "o": 8, "gate_up": 8, "down": 8, "head": 1}
ROWS = (1, 2, 4, 8, 16)
BYTES = 96 << 20

READER = """
extern "C" float read_all(const float* p, long count) {
  float total = 0;
#pragma omp parallel for simd reduction(+ : total) schedule(static)
  for (long i = 0; i < count; ++i) total += p[i];
  return total;
}
"""


def reader() -> Callable[[torch.Tensor], float]:
    """A function that reads a fp32 tensor on all threads and returns its sum."""
    command = cxx()
    if command is None:
        raise SystemExit("no C++ compiler was found: install g++, or let CXX name one")
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder) / "reader.cpp", Path(folder) / "reader.so"
        source.write_text(READER)
        flags = ["-O3", "-march=native", "-ffast-math", "-funroll-loops", "-fopenmp", "-fPIC", "-shared"]
        subprocess.run([*command, *flags, str(source), "-o", str(library)], check=True)
        read = ctypes.CDLL(str(library)).read_all
    read.argtypes, read.restype = [ctypes.c_void_p, ctypes.c_long], ctypes.c_float
    return lambda tensor: read(tensor.data_ptr(), tensor.numel())


def seconds(runs: list[Callable[[], Any]], rounds: int) -> list[dict[str, float]]:
    """Median and best seconds of each run; they take turns, so that what disturbs the machine disturbs all."""
    times: list[list[float]] = [[] for _ in runs]
    for _ in range(rounds + 1):
        for run, taken in zip(runs, times, strict=True):
            started = time.perf_counter()
            run()
            taken.append(time.perf_counter() - started)
    return [{"median": statistics.median(t[1:]), "best": min(t[1:])} for t in times]


def walk(linear: Callable[..., Any], x: torch.Tensor, weights: list[torch.Tensor]) -> Callable[[], None]:
    """A run that applies `linear` to every weight."""

    def run() -> None:
        for weight in weights:
            linear(x, weight)

    return run


def measure(rounds: int, dtype: torch.dtype) -> dict[str, Any]:
    """Bandwidth of reading, and of both kernels for every shape and number of rows, in GB/s."""
    read, block = reader(), torch.ones(BYTES // 4)
    size = dtype.itemsize
    reading = [seconds([lambda: read(block)], rounds)[0]["best"]]
    rows: list[dict[str, Any]] = []
    for name, (n, k) in SHAPES.items():
        weights = [torch.randn(n, k).to(dtype) for _ in range(-(-BYTES // (n * k * size)))]
        for m in ROWS:
            x = torch.randn(1, m, k).to(dtype)
            runs = [walk(torch.nn.functional.linear, x, weights), walk(linear_cpp, x, weights)]
            for kernel, taken in zip(("F.linear", "linear_cpp"), seconds(runs, rounds), strict=True):
                each = {key: value / len(weights) for key, value in taken.items()}
                gbs = {f"{key}_gbs": n * k * size / value / 1e9 for key, value in each.items()}
                rows.append({"weight": name, "rows": m, "kernel": kernel, "seconds": each, **gbs})
        reading.append(seconds([lambda: read(block)], rounds)[0]["best"])
    return {"read_gbs": BYTES / min(reading) / 1e9, "rows": rows, "token": per_token(rows, size)}


def per_token(rows: list[dict[str, Any]], size: int) -> list[dict[str, Any]]:
    """All products of one decoding step, added up from the single ones."""
    total = sum(USES[name] * n * k * size for name, (n, k) in SHAPES.items())
    found = []
    for m in ROWS:
        for kernel in ("F.linear", "linear_cpp"):
            mine = [r for r in rows if r["rows"] == m and r["kernel"] == kernel]
            taken = {key: sum(USES[r["weight"]] * r["seconds"][key] for r in mine) for key in ("median", "best")}
            gbs = {f"{key}_gbs": total / value / 1e9 for key, value in taken.items()}
            found.append({"rows": m, "kernel": kernel, "bytes": total, "seconds": taken, **gbs})
    return found


def show(result: dict[str, Any]) -> None:
    """A table of medians as shares of the read bandwidth."""
    table = Table(title=f"reading: {result['read_gbs']:.1f} GB/s on {result['threads']} threads")
    for column in ("weight", "rows", "F.linear GB/s", "linear_cpp GB/s", "of reading"):
        table.add_column(column, justify="left" if column == "weight" else "right")
    named = [*result["rows"], *({"weight": "whole step", **r} for r in result["token"])]
    pairs = {(r["weight"], r["rows"]): {} for r in named}
    for r in named:
        pairs[r["weight"], r["rows"]][r["kernel"]] = r["median_gbs"]
    for (weight, m), gbs in pairs.items():
        share = f"{100 * gbs['linear_cpp'] / result['read_gbs']:.0f} %"
        table.add_row(weight, str(m), f"{gbs['F.linear']:.1f}", f"{gbs['linear_cpp']:.1f}", share)
    Console().print(table)


def main() -> None:
    """Read the arguments, measure, print, store."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=15, help="timings of each kernel (default 15)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads to run on")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--out", type=Path, help="write the figures to this JSON file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    load_library()
    with torch.inference_mode():
        result = measure(options.rounds, getattr(torch, options.dtype))
    result = {
        **environment(),
        "dtype": options.dtype,
        **result,
    }
    show(result)
    if options.out:
        write_json(options.out, result)


if __name__ == "__main__":
    main()
