"""Kernels of the templates `rotated` and `rotated_codes` with hand-written hooks, and their data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llmopt.codegen.kernel import Kernel, evaluate
from llmopt.codegen.rotation_layout import lay_signs, sides
from llmopt.codegen.scaled_layout import constants, padded
from llmopt.codegen.templates import rotated, rotated_codes
from llmopt.compiler.hadamard import Rotation
from llmopt.compiler.quant.schemes import SCHEMES

HOOKS = """
import triton
import triton.language as tl

@triton.jit
def plain(m, k, ok, e0, e1, e2, e3, e4, e5):
    return tl.load(e0 + m * {K} + k, mask=ok, other=0.0).to(tl.float32)

@triton.jit
def gated(m, k, ok, e0, e1, e2, e3, e4, e5):
    a = tl.load(e0 + m * {K2} + k, mask=ok, other=0.0).to(tl.float32)
    return a * tl.sigmoid(a) * tl.load(e0 + m * {K2} + {K} + k, mask=ok, other=0.0).to(tl.float32)
"""
NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


@dataclass(frozen=True)
class Case:
    """Tokens of `blocks` blocks of `order` elements; `gated`: made of twice as many by SwiGLU."""

    order: int
    blocks: int = 1
    dtype: torch.dtype = torch.bfloat16
    gated: bool = False

    @property
    def K(self) -> int:
        return self.order * self.blocks

    @property
    def rotation(self) -> Rotation:
        return Rotation(self.order)

    def sizes(self, tokens: int) -> dict[str, int]:
        """What `rotated` is asked about."""
        a, b = sides(*map(len, self.rotation.factors))
        return {"A": a, "B": b, "BLOCKS": self.K // (a * b), "N": tokens}

    def signs(self) -> dict[str, Tensor]:
        """The tensors of the matrices that there are."""
        laid = lay_signs(*(factor.float() for factor in self.rotation.factors))
        return {name: t for name, t in (("left", laid.left), ("right", laid.right)) if t is not None}

    def rotated(self, config: Mapping[str, Any], order: int = 0, pdl: bool = False) -> Kernel:
        """The kernel that writes what it turns, its columns in `order`."""
        x = f"*{NAMES[self.dtype]}"
        told = {"INNER": self.K, "ORDER": order, "PDL": pdl}
        return self._kernel("rotated:rotated", {"y": x, "e0": x, "N": "i32"}, told, config)

    def codes_sizes(self, scheme: str, tokens: int) -> dict[str, int]:
        """What `rotated_codes` is asked about."""
        kind = SCHEMES[scheme]
        more = {"K": self.K, "KP": padded(kind, self.K), "GROUP": kind.group, "FACTORS": int(kind.has_global)}
        return {**self.sizes(tokens), **more}

    def rotated_codes(self, scheme: str, config: Mapping[str, Any], tiled: bool = False, pdl: bool = False) -> Kernel:
        """The kernel that rounds it to codes."""
        kind = SCHEMES[scheme]
        types = {"codes": "*u8", "scales": "*u8", **({"factor": "*fp32"} if kind.has_global else {}), "e0": "*bf16"}
        told = {**constants(kind, self.K), "K": self.K, "TILED": int(tiled), "PDL": pdl}
        return self._kernel("rotated_codes:rotated_codes", types, told, config)

    def _kernel(
        self, template: str, types: Mapping[str, str], told: Mapping[str, Any], config: Mapping[str, Any]
    ) -> Kernel:
        types = {**dict.fromkeys(self.signs(), "*i8"), **types}
        none = ("left", "factor", "e1", "e2", "e3", "e4", "e5")
        absent = {n: None for n in none if n not in types and (n != "factor" or "codes" in types)}
        size = {name: value for name, value in self.sizes(1).items() if name != "N"}
        tuned = {name: value for name, value in config.items() if not name.startswith("num_")}
        return Kernel(
            template, tuple(types.items()), tuple({**absent, **size, **told, **tuned}.items()),
            (("LOAD_X", "gated" if self.gated else "plain"),), HOOKS.format(K=self.K, K2=2 * self.K),
            config["num_warps"], config["num_stages"], bool(told["PDL"]),
        )  # fmt: skip

    def run(self, x: Tensor, config: Mapping[str, Any], order: int = 0) -> Tensor:
        """By Triton's interpreter."""
        from llmopt.codegen.interpret import launcher

        y = torch.full((len(x), self.K), 77, dtype=self.dtype)
        grid = tuple(evaluate(g, {"N": len(x)}) for g in rotated.grid(self.sizes(len(x)), config))
        launcher(self.rotated(config, order))(grid, [*self.signs().values(), y, x, len(x)])
        return y

    def run_codes(self, scheme: str, x: Tensor, config: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor | None]:
        """Codes, scales and global scales by Triton's interpreter."""
        from llmopt.codegen.interpret import launcher

        kind, tokens = SCHEMES[scheme], len(x)
        codes = torch.full((tokens, self.K * kind.element.bits // 8), 0xA5, dtype=torch.uint8)
        scales = torch.full((tokens, self.K // kind.group), 0xA5, dtype=torch.uint8)
        factor = torch.full((tokens,), torch.nan) if kind.has_global else None
        outputs = [codes, scales, *([] if factor is None else [factor])]
        grid = rotated_codes.grid(self.codes_sizes(scheme, tokens), config)
        launcher(self.rotated_codes(scheme, config))((tokens, *grid[1:]), [*self.signs().values(), *outputs, x])
        return codes, scales, factor
