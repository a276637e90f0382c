"""Reading and nothing else: the denominators of a GPU's bandwidth. Needs Triton."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _read(source, target, count, BLOCK: tl.constexpr, STEPS: tl.constexpr):  # noqa: ANN001, ANN202
    start = tl.program_id(0).to(tl.int64) * (BLOCK * STEPS)
    lanes = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.int32)
    for step in range(STEPS):
        at = start + step * BLOCK + lanes
        total += tl.load(source + at, mask=at < count, other=0)
    tl.store(target + tl.program_id(0), tl.sum(total))


def read(source: Tensor, block: int, steps: int, warps: int) -> Tensor:
    """Sums of int32 [count], one for each program of `block * steps` numbers."""
    programs = triton.cdiv(source.numel(), block * steps)
    target = torch.empty(programs, dtype=torch.int32, device=source.device)
    _read[(programs,)](source, target, source.numel(), BLOCK=block, STEPS=steps, num_warps=warps)
    return target


READERS: dict[str, Callable[[Tensor], Tensor]] = {
    "torch sum": lambda source: source.view(torch.float32).sum(),
    "4096 x 4": functools.partial(read, block=4096, steps=4, warps=8),
    "4096 x 16": functools.partial(read, block=4096, steps=16, warps=4),
    "8192 x 8": functools.partial(read, block=8192, steps=8, warps=8),
    "2048 x 64": functools.partial(read, block=2048, steps=64, warps=4),
}
