"""Torch's own ops as a region's code calls them: those that no template of ours beats, or takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from llmopt.compiler.ops import near
from llmopt.compiler.ops.attention import write_packed
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


def attend_near(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    tables: Tensor,
    seq_ids: Tensor,
    positions: Tensor,
    slots: Tensor,
    sinks: Tensor | None,
    out: Tensor,
    *,
    k_packing: str,
    v_packing: str,
    first: int,
    recent: int,
    **settings: Any,
) -> None:
    """`ops.attend_near` of q, k, v [N, heads, channels] with its writes before and behind, into out [1, N, ...]."""
    x, y = k.transpose(0, 1)[None], v.transpose(0, 1)[None]
    write_packed(k_pages, x, slots, k_packing)
    write_packed(v_pages, y, slots, v_packing)
    where = tables, seq_ids, positions
    made = near.attend_near.fn(
        q.transpose(0, 1)[None], k_pages, v_pages, *where, sinks, **settings, k_packing=k_packing, v_packing=v_packing,
        k=x, v=y, first=first, recent=recent,
    )  # fmt: skip
    near.write_near(k_pages, x, *where, made, first, recent)
    near.write_near(v_pages, y, *where, made, first, recent)
    out.view(*q.shape[:2], -1).copy_(made[0].transpose(0, 1))


TORCH_CALLS: Mapping[str, Callable[..., Any]] = {
    "linear": linear, "linear_add": linear_add, "attend": attend, "attend_near": attend_near,
}  # fmt: skip
