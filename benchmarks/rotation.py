"""SwiGLU and rotation of what down projections read, in one kernel on one GPU, against copying the same bytes.

    python benchmarks/rotation.py [--tokens 1 8 64 2048]

Peers: Inductor's SwiGLU without any rotation, and with one by two small matrix products (`rotate` as it is defined, in
bf16). Before anything is timed: every configuration's error against fp64, and 300 calls back to back, equal bit for
bit. Medians of CUDA graph replays, contenders take turns.
"""

# ruff: noqa: ANN001, ANN201 (Triton gives the parameters of kernels their meaning)

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from _attention_turns import times
from _gemm_cases import H200, compile_all
from _gpu_cases import default_out, has_device
from _gpu_timing import Denominators
from torch import Tensor

from llmopt.codegen import tuning
from llmopt.codegen.kernel import evaluate
from llmopt.codegen.rotation_layout import lay_signs, sides
from llmopt.codegen.templates import rotated
from llmopt.compiler.hadamard import Rotation
from llmopt.compiler.target import Target
from llmopt.runtime.gpu_code import MANY, decode_shape
from llmopt.runtime.measure import environment, write_json

CALLS = 8  # launches a graph
MOST = 0.01  # error in the norm: bf16's rounding is 0.002


@triton.jit
def swiglu(m, k, ok, e0, e1, e2, e3, e4, e5):
    K: tl.constexpr = WIDTH
    gate = tl.load(e0 + m * (2 * K) + k, mask=ok, other=0.0).to(tl.float32)
    return gate * tl.sigmoid(gate) * tl.load(e0 + m * (2 * K) + K + k, mask=ok, other=0.0).to(tl.float32)


@triton.jit
def alone(m, k, ok, e0, e1, e2, e3, e4, e5):
    return tl.load(e0 + m * WIDTH + k, mask=ok, other=0.0).to(tl.float32)


WIDTH = tl.constexpr(14336)


def shape_of(tokens: int) -> dict[str, int]:
    """What the template is asked about."""
    a, b = sides(*map(len, Rotation(WIDTH.value).factors))
    kind = 1024 if tokens > 64 else int(decode_shape(tokens))
    return {"A": a, "B": b, "BLOCKS": 1, "N": kind}


@dataclass(frozen=True)
class Compiled:
    """A kernel to be compiled without tensors, for `_gemm_cases.compile_all`."""

    config: tuple[tuple[str, Any], ...]
    gated: bool

    def compile(self) -> None:
        """Into Triton's cache."""
        from triton.runtime.jit import MockTensor

        i, x = MockTensor(torch.int8), MockTensor(torch.bfloat16)
        given = (i, i, x, x, None, None, None, None, None, 1)
        rotated.rotated.warmup(*given, grid=(1, 1), **constants(dict(self.config), self.gated))


def constants(config: Mapping[str, Any], gated: bool) -> dict[str, Any]:
    """Every constant of the kernel, and how it is launched."""
    shape = {name: size for name, size in shape_of(1).items() if name != "N"}
    more = {"INNER": WIDTH.value, "ORDER": 0, "LOAD_X": swiglu if gated else alone, "PDL": True, "launch_pdl": True}
    return {**shape, **more, **config}


def name_of(config: Mapping[str, Any]) -> str:
    """`32 columns x1, 8 warps, 1 stages`."""
    return f"{config['SLICE']} columns x{config['REPEAT']}, {config['num_warps']} warps, {config['num_stages']} stages"


class Turned:
    """Gates and ups [N, 2 K] that are to be multiplied and turned, or what is to be turned [N, K]."""

    def __init__(self, tokens: int, gated: bool) -> None:
        make, self.gated = torch.Generator("cuda").manual_seed(0), gated
        self.x = torch.randn(tokens, (1 + gated) * WIDTH.value, device="cuda", generator=make).bfloat16()
        self.y = torch.empty(tokens, WIDTH.value, device="cuda", dtype=torch.bfloat16)
        self.factors = [f.cuda() for f in Rotation(WIDTH.value).factors]
        self.signs = lay_signs(*(f.float() for f in self.factors))

    def launch(self, config: Mapping[str, Any]) -> None:
        """Once."""
        tokens = len(self.x)
        grid = tuple(evaluate(g, {"N": tokens}) for g in rotated.grid(shape_of(tokens), config))
        given = (self.signs.left, self.signs.right, self.y, self.x, None, None, None, None, None, tokens)
        rotated.rotated[grid](*given, **constants(config, self.gated))

    def wanted(self) -> Tensor:
        """In fp64, of gated values in bf16."""
        x = self.x.double()
        if self.gated:
            gate, up = x.chunk(2, -1)
            x = (F.silu(gate) * up).bfloat16().double()
        return Rotation(WIDTH.value).turned(x)

    def plain(self, turn: bool) -> Callable[[], object]:
        """Inductor's, with or without the rotation."""
        left, right = (f.bfloat16() for f in self.factors)

        def run(x: Tensor) -> Tensor:
            gate, up = x.chunk(2, -1) if self.gated else (x, x)
            gated = F.silu(gate) * up if self.gated else x
            return (left.T @ (gated.unflatten(-1, (len(left), len(right))) @ right)).flatten(-2) if turn else gated

        compiled = torch.compile(run, fullgraph=True, dynamic=False)
        return lambda: [compiled(self.x) for _ in range(CALLS)]


def checked(case: Turned, config: Mapping[str, Any], want: Tensor) -> float:
    """The error in the norm. Exits where it is too large, or calls differ."""
    case.y.zero_()
    case.launch(config)
    error = float((case.y.double() - want).norm() / want.norm())
    first, unlike = case.y.clone(), torch.zeros((), device="cuda", dtype=torch.int64)
    for _ in range(300):
        case.launch(config)
        unlike += (case.y != first).any()
    if not error <= MOST or int(unlike):
        raise SystemExit(f"WRONG: {name_of(config)}: error {error}, {int(unlike)} of 300 calls unlike the first")
    return error


def one(tokens: int, gated: bool, target: Target) -> dict[str, Any]:
    """All contenders for so many tokens."""
    torch.compiler.reset()
    case, shape = Turned(tokens, gated), shape_of(tokens)
    want, configs = case.wanted(), rotated.configs(shape, "bfloat16", target)
    errors = {name_of(c): checked(case, c, want) for c in configs}
    runs: dict[str, Callable[[], object]] = {
        name_of(c): lambda c=c: [case.launch(c) for _ in range(CALLS)] for c in configs
    }
    half = torch.empty((2 + gated) * WIDTH.value * tokens, device="cuda", dtype=torch.uint8)
    other = torch.empty_like(half)
    runs["copy"] = lambda: [other.copy_(half) for _ in range(CALLS)]
    runs["by inductor"] = case.plain(True)
    if gated:
        runs["swiglu alone by inductor"] = case.plain(False)
    return {
        "tokens": tokens, "class": MANY if tokens > 64 else decode_shape(tokens), "gated": gated,
        "us": times(runs, CALLS, 12), "errors": errors, "bytes": 2 * len(half),
        "shipped": name_of(tuning.pick("rotated", shape, "bfloat16", target)),
    }  # fmt: skip


def main() -> None:
    """Measure, and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8, 64, 2048])
    parser.add_argument("--show", type=int, default=100, help="so many of the fastest are printed")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if not has_device("cuda"):
        return
    started = time.perf_counter()
    configs = [c for n in args.tokens for c in rotated.configs(shape_of(n), "bfloat16", H200)]
    compile_all([Compiled(tuple(c.items()), gated) for c in configs for gated in (True, False)], os.cpu_count() or 1)
    target, rates = Target.detect("cuda"), Denominators("cuda")
    rates()
    cases = [one(tokens, gated, target) for tokens in args.tokens for gated in (True, False)]
    rates()
    result = {
        "width": WIDTH.value, "cases": cases, **rates.to_dict(), "wall_s": time.perf_counter() - started,
        "environment": environment(),
    }  # fmt: skip
    out = args.out or default_out("rotation", "cuda")
    if out:
        write_json(out, result)
    for case in cases:
        print(f"{case['tokens']} tokens, {'SwiGLU and ' * case['gated']}rotation, shipped {case['shipped']}")
        for name, us in sorted(case["us"].items(), key=lambda item: item[1])[: args.show]:
            print(f"  {us:8.2f} us  {case['bytes'] / us / 1e6:6.2f} TB/s  {name}")


if __name__ == "__main__":
    main()
