"""The order in which `lowbit` takes the columns of what it multiplies, where another kernel writes them."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def place(n, OWN: tl.constexpr):
    """Where column n stands in the order of `lowbit_layout.in_order` for weights of which a lane has OWN neighbours;
    n itself for an OWN of 0."""
    if OWN == 0:
        return n
    else:
        return n // (4 * OWN) * (4 * OWN) + n % OWN // 8 * 32 + n % 8 // 2 * 8 + n % (4 * OWN) // OWN * 2 + n % 2
