"""Kernels of the `gemv` and `gemm` templates with hand-written hooks, their data and their meaning in fp64."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from interpreted import rounding
from torch import Tensor

from llmopt.codegen.kernel import Kernel

HOOKS = """
import triton
import triton.language as tl

@triton.jit
def load_x(m, k, ok, e0, e1, e2, e3, e4, e5):
    return tl.load(e0 + m * {stride} + k, mask=ok, other=0.0).to(tl.float32)

@triton.jit
def load_g(k, ok, e0, e1, e2, e3, e4, e5):
    return tl.load(e1 + k, mask=ok, other=0.0).to(tl.float32)

@triton.jit
def plain(acc0, acc1, m, n, ok, e0, e1, e2, e3, e4, e5):
    return acc0

@triton.jit
def added(acc0, acc1, m, n, ok, e0, e1, e2, e3, e4, e5):
    bias = tl.load(e3 + n, mask=n < {J}, other=0.0).to(tl.float32)
    return acc0 + bias + tl.load(e2 + m * {J} + n, mask=ok, other=0.0).to(tl.float32)

@triton.jit
def gated(acc0, acc1, m, n, ok, e0, e1, e2, e3, e4, e5):
    return acc0 * tl.sigmoid(acc0) * acc1
"""
NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
EPS = 1e-5


@dataclass(frozen=True)
class Case:
    """A product: rows `skip` and on of w [skip + parts * J, K]; `added`: bias and residual; parts 2: gated halves."""

    K: int
    J: int
    parts: int = 1
    norm: int = 0
    added: bool = False
    skip: int = 0
    dtype: torch.dtype = torch.bfloat16

    def sizes(self, tokens: int) -> dict[str, int]:
        """What a template's `configs` reads."""
        return {"K": self.K, "J": self.J, "PARTS": self.parts, "NORM": self.norm, "N": tokens}

    def kernel(self, template: str, config: Mapping[str, Any], pdl: bool = False) -> Kernel:
        """As `codegen.fused` makes it; parameters without a tensor are constants of None."""
        pointer = f"*{NAMES[self.dtype]}"
        types = [("w", pointer), ("y", pointer), ("e0", pointer)]
        types += [("e1", pointer)] * self.norm + [("e2", pointer), ("e3", pointer)] * self.added + [("N", "i32")]
        types += [("tickets", "*i32"), ("partial", "*fp32")] * (config.get("SPLIT_K", 1) > 1)
        absent = ["e1", "e2", "e3", "e4", "e5"] + ["tickets", "partial"] * (template == "gemm")
        constants = {
            **{name: None for name in absent if name not in dict(types)}, "K": self.K, "J": self.J,
            "OFFSET0": self.skip, "OFFSET1": self.skip + self.J, "PARTS": self.parts, "NORM": self.norm, "EPS": EPS,
            **config, "PDL": pdl,
        }  # fmt: skip
        hooks = {"LOAD_X": "load_x", "EPILOGUE": self.epilogue}
        if self.norm:
            hooks["LOAD_G"] = "load_g"
        else:
            constants["LOAD_G"] = None
        launch = {key: constants.pop(key) for key in ("num_warps", "num_stages")}
        return Kernel(
            f"{template}:{template}", tuple(types), tuple(constants.items()), tuple(hooks.items()),
            HOOKS.format(stride=self.K, J=self.J), pdl=pdl, **launch,
        )  # fmt: skip

    @property
    def epilogue(self) -> str:
        """The hook's name."""
        return "gated" if self.parts == 2 else "added" if self.added else "plain"


@dataclass(frozen=True)
class Data:
    """w, x [N, K], the norm's weight, residual [N, J] and bias [J]."""

    case: Case
    w: Tensor
    x: Tensor
    g: Tensor
    residual: Tensor
    bias: Tensor

    @classmethod
    def of(cls, case: Case, tokens: int) -> Data:
        """Random, some rows of x large and some small, so that a wrong norm shows."""
        make = torch.Generator().manual_seed(5)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=make)

        w = random(case.skip + case.parts * case.J, case.K) * case.K**-0.5
        x = random(tokens, case.K) * torch.logspace(-1, 1, tokens)[:, None]
        rest = random(case.K), random(tokens, case.J), random(case.J)
        return cls(case, *(t.to(case.dtype) for t in (w, x, *rest)))

    def plain(self, dtype: torch.dtype) -> Tensor:
        """The meaning in torch, computed in `dtype`."""
        case = self.case
        w, x, g, residual, bias = (t.to(dtype) for t in (self.w[case.skip :], self.x, self.g, self.residual, self.bias))
        y = F.linear(F.rms_norm(x, (case.K,), g, EPS) if case.norm else x, w)
        if case.parts == 2:
            gate, up = y.chunk(2, -1)
            return F.silu(gate) * up
        return y + bias + residual if case.added else y

    def error(self, y: Tensor) -> float:
        """Of y against fp64, in the norm."""
        want = self.plain(torch.float64)
        return float((y.double() - want).norm() / want.norm())

    def run(self, template: str, config: Mapping[str, Any], calls: int = 1) -> Tensor:
        """By Triton's interpreter; several calls share their tickets, as layers do."""
        from llmopt.codegen.interpret import launcher

        module = importlib.import_module(f"llmopt.codegen.templates.{template}")
        case, tokens = self.case, len(self.x)
        sizes = case.sizes(tokens)
        launch = launcher(case.kernel(template, config))
        grid = tuple(tokens if size == "N" else size for size in module.grid(sizes, config))
        scratch: list[Tensor] = []
        if config.get("SPLIT_K", 1) > 1:
            tickets, partial = module.scratch(sizes, config)
            scratch = [torch.zeros(tickets, dtype=torch.int32), torch.full((partial,), torch.nan)]
        args = [self.x, *[self.g] * case.norm, *[self.residual, self.bias] * case.added, tokens, *scratch]
        for _ in range(calls):
            y = torch.full((tokens, case.J), torch.nan, dtype=case.dtype)
            with rounding():
                launch(grid, [self.w, y, *args])
        assert not scratch or not scratch[0].any(), "tickets are not back at zero"
        return y
