"""Templates small enough to see through, for the tests of what compiles and launches kernels."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def toy(x, z, y, N, C, S, HOOK: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """y[i] = HOOK(x[i], z) * S + C for i < N, all fp32; z may be null where the hook leaves it alone."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if PDL:
        tl.extra.cuda.gdc_wait()
    value = HOOK(tl.load(x + i, mask=i < N, other=0.0), z) * S + C.to(tl.float32)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    tl.store(y + i, value, mask=i < N)


@triton.jit
def product(a, b, c, K: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr):
    """c = a b for a [BLOCK, K], b [K, BLOCK], both fp16, and c fp32 [BLOCK, BLOCK]; in shared memory STEP at a time."""
    i, k = tl.arange(0, BLOCK), tl.arange(0, STEP)
    total = tl.zeros([BLOCK, BLOCK], tl.float32)
    for first in range(0, K, STEP):
        left = tl.load(a + i[:, None] * K + first + k[None, :])
        right = tl.load(b + (first + k[:, None]) * BLOCK + i[None, :])
        total = tl.dot(left, right, total)
    tl.store(c + i[:, None] * BLOCK + i[None, :], total)
