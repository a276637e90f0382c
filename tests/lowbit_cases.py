"""Kernels of the `lowbit` template with hand-written hooks, their data and their meaning in fp64."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from gemm_cases import EPS, HOOKS
from interpreted import rounding
from torch import Tensor

from llmopt.codegen.kernel import Kernel
from llmopt.codegen.lowbit_layout import Laid, constants, in_order, lay
from llmopt.compiler.quant.quantize import quantize
from llmopt.compiler.quant.schemes import SCHEMES


@dataclass(frozen=True)
class Case:
    """A product of weights in a scheme: rows `skip` and on of w [skip + parts * J, K]; `added`: bias and residual."""

    scheme: str
    K: int
    J: int
    parts: int = 1
    norm: int = 0
    added: bool = False
    skip: int = 0
    ordered: int = 0
    order: int = 0

    def sizes(self, tokens: int) -> dict[str, int]:
        """What the template's `configs` reads."""
        return {"K": self.K, "J": self.J, "PARTS": self.parts, "NORM": self.norm, "ORDERED": self.ordered, "N": tokens}

    def kernel(self, config: Mapping[str, Any], pdl: bool = False) -> Kernel:
        """Parameters without a tensor are constants of None."""
        of_scheme = constants(SCHEMES[self.scheme])
        types = [("w", "*i32")]
        types += [("scales", "*i32")] * (of_scheme["SIDE"] != "rows")
        types += [("factor", "*fp32")] * (of_scheme["FACTORS"] > 0)
        types += [("y", "*bf16"), ("e0", "*bf16")]
        types += [("e1", "*bf16")] * self.norm + [("e2", "*bf16"), ("e3", "*bf16")] * self.added + [("N", "i32")]
        types += [("tickets", "*i32"), ("partial", "*fp32")] * (config["SPLIT_K"] > 1)
        absent = ["scales", "factor", "e1", "e2", "e3", "e4", "e5", "tickets", "partial"]
        fixed = {
            **{name: None for name in absent if name not in dict(types)}, **of_scheme, "K": self.K, "J": self.J,
            "OFFSET0": self.skip, "OFFSET1": self.skip + self.J, "PARTS": self.parts, "NORM": self.norm,
            "ORDERED": self.ordered, "EPS": EPS,
            "ORDER": self.order, **config, "PDL": pdl,
        }  # fmt: skip
        hooks = {"LOAD_X": "load_x", "EPILOGUE": "gated" if self.parts == 2 else "added" if self.added else "plain"}
        if self.norm:
            hooks["LOAD_G"] = "load_g"
        else:
            fixed["LOAD_G"] = None
        launch = {key: fixed.pop(key) for key in ("num_warps", "num_stages")}
        return Kernel(
            "lowbit:lowbit", tuple(types), tuple(fixed.items()), tuple(hooks.items()),
            HOOKS.format(stride=self.K, J=self.J), pdl=pdl, **launch,
        )  # fmt: skip


@dataclass(frozen=True)
class Data:
    """Weights, x [N, K], the norm's weight, residual [N, J] and bias [J]."""

    case: Case
    laid: Laid
    exact: Tensor
    x: Tensor
    g: Tensor
    residual: Tensor
    bias: Tensor

    @classmethod
    def of(cls, case: Case, tokens: int) -> Data:
        """Random, some rows of x large and some small, so that a wrong norm shows; weights of very different sizes."""
        make = torch.Generator().manual_seed(5)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=make)

        rows = case.skip + case.parts * case.J
        sizes = torch.rand(rows, 1, generator=make) + 0.5, torch.rand(1, case.K, generator=make) + 0.5
        w = random(rows, case.K) * sizes[0] * sizes[1] * case.K**-0.5
        q = quantize(w, case.scheme)
        laid = lay(q.packed(), q.scales, q.global_scale, q.zero_points, q.scheme, case.K)
        x = random(tokens, case.K) * torch.logspace(-1, 1, tokens)[:, None]
        rest = (t.bfloat16() for t in (x, random(case.K), random(tokens, case.J), random(case.J)))
        return cls(case, laid, q.dequantize(torch.float64), *rest)

    def plain(self, dtype: torch.dtype) -> Tensor:
        """The meaning in torch, computed in `dtype`."""
        case = self.case
        w = self.exact[case.skip :].to(dtype)
        x, g, residual, bias = (t.to(dtype) for t in (self.x, self.g, self.residual, self.bias))
        y = F.linear(F.rms_norm(x, (case.K,), g, EPS) if case.norm else x, w)
        if case.parts == 2:
            gate, up = y.chunk(2, -1)
            return F.silu(gate) * up
        return y + bias + residual if case.added else y

    @cached_property
    def want(self) -> Tensor:
        """In fp64."""
        return self.plain(torch.float64)

    def error(self, y: Tensor) -> float:
        """Of y against fp64, in the norm."""
        return float((y.double() - self.want).norm() / self.want.norm())

    def run(self, config: Mapping[str, Any], calls: int = 1) -> Tensor:
        """By Triton's interpreter; several calls share their tickets, as layers do."""
        from llmopt.codegen.interpret import launcher
        from llmopt.codegen.templates import lowbit

        case, tokens = self.case, len(self.x)
        sizes = case.sizes(tokens)
        launch = launcher(case.kernel(config))
        scratch: list[Tensor] = []
        if config["SPLIT_K"] > 1:
            tickets, partial = lowbit.scratch(sizes, config)
            scratch = [torch.zeros(tickets, dtype=torch.int32), torch.full((partial,), torch.nan)]
        weights = [t for t in (self.laid.words, self.laid.scales, self.laid.factor) if t is not None]
        x = self.x
        if case.ordered:
            parts, axes = in_order(SCHEMES[case.scheme])
            x = x.unflatten(-1, (-1, *parts)).permute(0, 1, *(2 + axis for axis in axes)).flatten(1).contiguous()
        args = [x, *[self.g] * case.norm, *[self.residual, self.bias] * case.added, tokens, *scratch]
        grid = tuple(int(size) for size in lowbit.grid(sizes, config))
        for _ in range(calls):
            y = torch.full((tokens, case.J), torch.nan, dtype=torch.bfloat16)
            with rounding():
                launch(grid, [*weights, y, *args])
        assert not scratch or not scratch[0].any(), "tickets are not back at zero"
        return y
