"""Gated activations and logit soft-capping."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import gelu, silu

from llmopt.compiler.op import Cost, nbytes, op


@op
def gated(gate: Tensor, up: Tensor, act: str) -> Tensor:
    """act(gate) * up, both [..., F]; act is `silu`, `gelu` or `gelu_tanh` (Shazeer, 2020: GLU variants)."""
    if act == "silu":
        return silu(gate) * up
    return gelu(gate, approximate="tanh" if act == "gelu_tanh" else "none") * up


@gated.cost
def _gated_cost(gate: Tensor, up: Tensor, act: str) -> Cost:
    return Cost(5 * gate.numel(), nbytes(gate, up) + nbytes(gate))


@gated.samples
def _gated_samples() -> Iterable[tuple[Any, ...]]:
    for act in ("silu", "gelu", "gelu_tanh"):
        yield torch.randn(2, 3, 8), torch.randn(2, 3, 8), act


@op
def softcap(x: Tensor, cap: float) -> Tensor:
    """cap * tanh(x / cap), elementwise (Gemma 2, section 2)."""
    return torch.tanh(x / cap) * cap


@softcap.cost
def _softcap_cost(x: Tensor, cap: float) -> Cost:
    return Cost(3 * x.numel(), 2 * nbytes(x))


@softcap.samples
def _softcap_samples() -> Iterable[tuple[Any, ...]]:
    yield torch.randn(2, 3, 8) * 40, 30.0
