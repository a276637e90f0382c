"""Torch's own ops as a region's code calls them: those that no template of ours beats, or takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor


def linear(x: Tensor, weight: Tensor, out: Tensor) -> None:
    """out [..., J] = x [..., K] @ weight [J, K].T"""
    torch.mm(x.reshape(-1, x.shape[-1]), weight.t(), out=out.view(-1, out.shape[-1]))


TORCH_CALLS: Mapping[str, Callable[..., Any]] = {"linear": linear}
