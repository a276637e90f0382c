"""What `lowbit_gemm.py` compares with: torch's own products."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

COPIED = 400e6


class Sized(Protocol):
    """A product's size."""

    K: int
    J: int


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
        codes = torch.randint(0, 256, (shape.J, shape.K // 2), dtype=torch.uint8, device=device)
        first = torch.ops.aten._convert_weight_to_int4pack(codes, inner)
        self.scales = torch.randn(shape.K // group, shape.J, 2, device=device).mul_(0.01).bfloat16()
        count = max(6, -(-int(COPIED) // (first.numel() * first.element_size())))
        self.copies = [first, *(first.clone() for _ in range(count - 1))]

    def run(self, x: Tensor, packed: Tensor) -> Tensor:
        """x [M, K] times the transposed weights."""
        return torch.ops.aten._weight_int4pack_mm(x, packed, self.group, self.scales)
