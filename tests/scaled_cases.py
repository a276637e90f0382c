"""Kernels of the templates `rounded` and `scaled` with hand-written hooks, their data and their meaning."""

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
from llmopt.codegen.scaled_layout import ROWS, constants, lay_scaled, padded, tiled
from llmopt.compiler.quant.quantize import QuantizedTensor, fake_quantize, quantize
from llmopt.compiler.quant.schemes import SCHEMES, Scheme

CODES = {"e2m1": "*u8", "e4m3": "*fp8e4nv"}
SCALES = {"e4m3": "*fp8e4nv", "e8m0": "*u8"}


@dataclass(frozen=True)
class Case:
    """A product of x and rows `skip` and on of w [skip + parts * J, K], both in a scheme; `added`: bias and residual;
    `norm` in front; `many`: scales of x lie in tiles."""

    scheme: str
    K: int
    J: int
    parts: int = 1
    norm: int = 0
    added: bool = False
    skip: int = 0
    many: bool = False

    @property
    def kind(self) -> Scheme:
        return SCHEMES[self.scheme]

    def sizes(self, tokens: int) -> dict[str, int]:
        """What `scaled` is asked about."""
        return {"K": self.K, "J": self.J, "PARTS": self.parts, "N": tokens}

    def rows_sizes(self, tokens: int) -> dict[str, int]:
        """What `rounded` is asked about."""
        return {"K": self.K, "KP": padded(self.kind, self.K), "NORM": self.norm, "N": tokens}

    def rounded(self, config: Mapping[str, Any], pdl: bool = False) -> Kernel:
        """The kernel that rounds x; parameters without a tensor are constants of None."""
        types = [("codes", "*u8"), ("scales", "*u8")] + [("factor", "*fp32")] * self.kind.has_global
        types += [("e0", "*bf16")] + [("e1", "*bf16")] * self.norm
        told = {"K": self.K, "NORM": self.norm, "TWICE": 0, "EPS": EPS, "TILED": int(self.many)}
        absent = ["factor", "e1", "e2", "e3", "e4", "e5", *["LOAD_G"] * (not self.norm)]
        hooks = {"LOAD_X": "load_x", **({"LOAD_G": "load_g"} if self.norm else {})}
        return self._kernel("rounded:rounded", types, told, absent, hooks, config, pdl)

    def scaled(self, config: Mapping[str, Any], pdl: bool = False) -> Kernel:
        """The kernel that multiplies."""
        codes, scales = CODES[self.kind.element.name], SCALES[self.kind.scale]
        types = [("w", codes), ("scales", scales)] + [("factor", "*fp32")] * self.kind.has_global
        types += [("x", codes), ("x_scales", scales)] + [("x_factor", "*fp32")] * self.kind.has_global
        types += [("y", "*bf16")] + [("e2", "*bf16"), ("e3", "*bf16")] * self.added + [("N", "i32")]
        types += [("tickets", "*i32"), ("partial", "*fp32")] * (config["SPLIT_K"] > 1)
        offsets = {"OFFSET0": self.skip, "OFFSET1": self.skip + self.J}
        told = {"J": self.J, **offsets, "PARTS": self.parts, "TILED": int(self.many)}
        absent = ["factor", "x_factor", "e0", "e1", "e2", "e3", "e4", "e5", "tickets", "partial"]
        epilogue = "gated" if self.parts == 2 else "added" if self.added else "plain"
        return self._kernel("scaled:scaled", types, told, absent, {"EPILOGUE": epilogue}, config, pdl)

    def _kernel(
        self,
        template: str,
        types: list[tuple[str, str]],
        told: dict[str, Any],
        absent: list[str],
        hooks: dict[str, str],
        config: Mapping[str, Any],
        pdl: bool,
    ) -> Kernel:
        none = {name: None for name in absent if name not in dict(types)}
        fixed = {**none, **constants(self.kind, self.K), **told, **config, "PDL": pdl}
        launch = {key: fixed.pop(key) for key in ("num_warps", "num_stages")}
        source = HOOKS.format(stride=self.K, J=self.J)
        return Kernel(template, tuple(types), tuple(fixed.items()), tuple(hooks.items()), source, pdl=pdl, **launch)


@dataclass(frozen=True)
class Codes:
    """Of activations [N, K]: codes, scales (not in tiles) and global scales as kernels hold them."""

    codes: Tensor
    scales: Tensor
    factor: Tensor | None

    @classmethod
    def of(cls, x: Tensor, case: Case) -> Codes:
        """As quantize gives them for each token by itself, whose scales `fake_quantize` takes, too."""
        kind, whole = case.kind, padded(case.kind, case.K)
        found = [quantize(row[None], kind) for row in x]
        codes = torch.cat([q.packed() for q in found])
        scales = torch.cat([q.scales.view(torch.uint8) for q in found])
        factor = torch.stack([q.global_scale for q in found]) if kind.has_global else None
        codes = F.pad(codes, (0, whole * kind.element.bits // 8 - codes.shape[1]))
        return cls(codes, F.pad(scales, (0, whole // kind.group - scales.shape[1])), factor)


def run_rounded(case: Case, x: Tensor, g: Tensor, config: Mapping[str, Any]) -> Codes:
    """By Triton's interpreter; scales in tiles are those of `case.many`."""
    from llmopt.codegen.interpret import launcher

    kind, whole, tokens = case.kind, padded(case.kind, case.K), len(x)
    codes = torch.full((tokens, whole * kind.element.bits // 8), 0xA5, dtype=torch.uint8)
    rows = -(-tokens // ROWS) * ROWS if case.many else tokens
    scales = torch.zeros((rows, whole // kind.group), dtype=torch.uint8)
    factor = torch.full((tokens,), torch.nan) if kind.has_global else None
    outputs = [codes, scales, *([] if factor is None else [factor])]
    with rounding():
        launcher(case.rounded(config))((tokens, -(-whole // config["BLOCK"])), [*outputs, x, *[g] * case.norm])
    return Codes(codes, scales, factor)


@dataclass(frozen=True)
class Data:
    """Weights, x [N, K], the norm's weight, residual [N, J] and bias [J]."""

    case: Case
    weight: QuantizedTensor
    x: Tensor
    g: Tensor
    residual: Tensor
    bias: Tensor

    @classmethod
    def of(cls, case: Case, tokens: int) -> Data:
        """Random, tokens of very different sizes, an outlier in each, and groups of zeros."""
        make = torch.Generator().manual_seed(5)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=make)

        rows = case.skip + case.parts * case.J
        w = random(rows, case.K) * (torch.rand(rows, 1, generator=make) + 0.5) * case.K**-0.5
        x = random(tokens, case.K) * torch.logspace(-1, 1, tokens)[:, None]
        x[torch.arange(tokens), torch.randint(case.K, (tokens,), generator=make)] *= 30
        x[:, : case.kind.group] = 0
        rest = (t.bfloat16() for t in (x, random(case.K), random(tokens, case.J), random(case.J)))
        return cls(case, quantize(w, case.scheme), *rest)

    def plain(self, dtype: torch.dtype) -> Tensor:
        """The meaning in torch from the rounded operands on, computed in `dtype`; those are exact in fp32."""
        case = self.case
        seen = F.rms_norm(self.x.float(), (case.K,), self.g.float(), EPS).bfloat16() if case.norm else self.x
        x = fake_quantize(seen.float(), case.kind).to(dtype)
        w = self.weight.dequantize(torch.float32)[case.skip :].to(dtype)
        residual, bias = (t.to(dtype) for t in (self.residual, self.bias))
        y = F.linear(x, w)
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

    def run(self, config: Mapping[str, Any], block: int = 256, calls: int = 1) -> Tensor:
        """Both kernels by Triton's interpreter; several calls share their tickets, as layers do."""
        from llmopt.codegen.interpret import launcher
        from llmopt.codegen.templates import scaled

        case, tokens = self.case, len(self.x)
        q = self.weight
        laid = lay_scaled(q.packed(), q.scales, q.global_scale, q.zero_points, q.scheme, case.K)
        rows = {"BLOCK": block, "num_warps": 4, "num_stages": 1}
        x = run_rounded(case, self.x, self.g, rows)
        sizes = case.sizes(tokens)
        scratch: list[Tensor] = []
        if config["SPLIT_K"] > 1:
            tickets, partial = scaled.scratch(sizes, config)
            scratch = [torch.zeros(tickets, dtype=torch.int32), torch.full((partial,), torch.nan)]
        given = [laid.codes, laid.scales, laid.factor, x.codes, x.scales, x.factor]
        tensors = [t for t in given if t is not None]
        args = [*[self.residual, self.bias] * case.added, tokens, *scratch]
        columns, split, _ = scaled.grid(sizes, config)
        grid = int(columns), int(split), -(-tokens // config["BLOCK_M"])
        launch = launcher(case.scaled(config))
        for _ in range(calls):
            y = torch.full((tokens, case.J), torch.nan, dtype=torch.bfloat16)
            with rounding():
                launch(grid, [*tensors, y, *args])
        assert not scratch or not scratch[0].any(), "tickets are not back at zero"
        return y


__all__ = ["Case", "Codes", "Data", "run_rounded", "tiled"]
