"""What `lowbit_gemm.py` compares with: torch's own products, and gemlite's where it is installed."""

from __future__ import annotations

import importlib
import importlib.resources
from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

COPIED = 400e6
FARTHEST = 0.02  # of a peer's result from its own weights' product, relative


class Sized(Protocol):
    """A product's size."""

    K: int
    J: int


class Int4(Protocol):
    """A peer that multiplies int4 weights with scales of groups."""

    copies: Sequence[Tensor]

    def run(self, x: Tensor, packed: Tensor) -> Tensor:
        """x [M, K] times the transposed weights."""

    def matrix(self) -> Tensor:
        """Fp32 [J, K]: the weights."""


class Bf16:
    """cuBLAS: rotating bf16 weights [J, K]."""

    def __init__(self, shape: Sized, device: str) -> None:
        count = max(2, -(-int(COPIED) // (2 * shape.J * shape.K)))
        first = torch.randn(shape.J, shape.K, device=device).mul_(shape.K**-0.5).bfloat16()
        self.copies = [first, *(first.clone() for _ in range(count - 1))]


class TinyGemm:
    """torch's int4 product with bf16 scales and zero points a group (tinygemm), in core as two operators."""

    def __init__(self, shape: Sized, group: int, device: str, inner: int = 8) -> None:
        self.group = group
        self.codes = torch.randint(0, 256, (shape.J, shape.K // 2), dtype=torch.uint8, device=device)
        first = torch.ops.aten._convert_weight_to_int4pack(self.codes, inner)
        self.scales = torch.randn(shape.K // group, shape.J, 2, device=device).mul_(0.01).bfloat16()
        self.copies = _rotating(first)

    def run(self, x: Tensor, packed: Tensor) -> Tensor:
        """x [M, K] times the transposed weights."""
        return torch.ops.aten._weight_int4pack_mm(x, packed, self.group, self.scales)

    def matrix(self) -> Tensor:
        """Fp32 [J, K]; the high half of a byte is the even column."""
        codes = torch.stack([self.codes >> 4, self.codes & 15], -1).flatten(1).float() - 8
        scale, zero = self.scales.float().repeat_interleave(self.group, 0).transpose(0, 1).unbind(-1)
        return codes * scale + zero


class GemLite:
    """gemlite's product of int4 weights with bf16 scales and zero points a group, tuned as it ships for an H100."""

    def __init__(self, shape: Sized, group: int, device: str) -> None:
        gemlite = importlib.import_module("gemlite")
        gemlite.load_config(str(importlib.resources.files("gemlite") / "configs" / "h100.json"))
        self.group = group
        self.codes = torch.randint(0, 16, (shape.J, shape.K), dtype=torch.uint8, device=device)
        self.scales = torch.rand(shape.J, shape.K // group, device=device).add_(1).mul_(0.01).bfloat16()
        linear = gemlite.helper.A16W4_HQQ_INT(device=device, dtype=torch.bfloat16).from_weights(
            self.codes, self.scales, torch.full_like(self.scales, 8)
        )
        first, *self.beside = linear.get_tensor_args()
        self.told = linear.get_meta_args()
        self.product = gemlite.forward_functional
        self.copies = _rotating(first.data)

    def run(self, x: Tensor, packed: Tensor) -> Tensor:
        """x [M, K] times the transposed weights."""
        return self.product(x, None, [packed, *self.beside], self.told)  # type: ignore[no-any-return]

    def matrix(self) -> Tensor:
        """Fp32 [J, K]."""
        return (self.codes.float() - 8) * self.scales.float().repeat_interleave(self.group, 1)


INT4: dict[str, type[TinyGemm] | type[GemLite]] = {"tinygemm": TinyGemm, "gemlite": GemLite}


def checked(peer: Int4, x: Tensor) -> Int4:
    """The peer, if its product of x [M, K] is right. Raises RuntimeError."""
    want = F.linear(x.double(), peer.matrix().double())
    far = float((peer.run(x, peer.copies[0]).double() - want).norm() / want.norm())
    if not far <= FARTHEST:
        raise RuntimeError(f"its result is {far:.2e} off; wanted {FARTHEST} at most")
    return peer


def _rotating(first: Tensor) -> list[Tensor]:
    """The weights, and copies of them elsewhere in memory."""
    count = max(6, -(-int(COPIED) // (first.numel() * first.element_size())))
    return [first, *(first.clone() for _ in range(count - 1))]
