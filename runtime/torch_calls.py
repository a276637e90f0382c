"""Torch's own ops as a region's code calls them: those that no template of ours beats, or takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from llmopt.runtime.attend import attend


def linear(x: Tensor, weight: Tensor, out: Tensor) -> None:
    """out [..., J] = x [..., K] @ weight [J, K].T"""
    torch.mm(x.reshape(-1, x.shape[-1]), weight.t(), out=out.view(-1, out.shape[-1]))


def linear_add(x: Tensor, weight: Tensor, added: Tensor, out: Tensor) -> None:
    """out [..., J] = added + x [..., K] @ weight [J, K].T, rounded once; added [J] or as out, which it may be.

    A matrix is added without being copied only in place.
    """
    rows = out.view(-1, out.shape[-1])
    left = x.reshape(-1, x.shape[-1])
    if added is out:
        rows.addmm_(left, weight.t())
    else:
        torch.addmm(added if added.dim() == 1 else added.view_as(rows), left, weight.t(), out=rows)


TORCH_CALLS: Mapping[str, Callable[..., Any]] = {"linear": linear, "linear_add": linear_add, "attend": attend}
