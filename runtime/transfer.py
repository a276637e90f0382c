"""From the host to a device without waiting for either."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

_ALIGNED = 2  # int64 elements in the 16 bytes that kernels load at a time


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """A tensor of the host on a device; on a GPU once all work queued before is done, which nothing here waits for."""
    place = torch.device(device)
    if place.type != "cuda":
        return tensor.to(place)
    return tensor.pin_memory().to(place, non_blocking=True)


def inputs_on(device: torch.device, inputs: Sequence[Tensor]) -> list[Tensor]:
    """int64 tensors, contiguous on the device, each at a multiple of 16 bytes; those of the host in a single copy."""
    far = [t for t in inputs if t.device.type != device.type]
    arrived = iter(_packed(far, device) if far else ())
    return [aligned(t) if t.device.type == device.type else next(arrived) for t in inputs]


def _packed(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    sizes = [t.numel() for t in tensors]
    starts = list(itertools.accumulate((n + n % _ALIGNED for n in sizes), initial=0))
    packed = torch.empty(starts[-1], dtype=torch.int64, pin_memory=device.type == "cuda")
    for tensor, start, size in zip(tensors, starts, sizes, strict=False):
        packed[start : start + size].view(tensor.shape).copy_(tensor)
    there = packed.to(device, non_blocking=True)
    return [there[s : s + n].view(t.shape) for t, s, n in zip(tensors, starts, sizes, strict=False)]


def aligned(tensor: Tensor) -> Tensor:
    """Contiguous and at a multiple of 16 bytes, as kernels rely on; a copy where it is not."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()
