"""Functions that printed hooks call, copied into their source: fp32 in and out, the same compiled and interpreted.

Triton's own sin and cos are only good near 0 when compiled, and it has no tanh; libdevice is not interpreted.
"""

import triton
import triton.language as tl


@triton.jit
def quarter_turns(x):
    """(r, n) with x = r + n * pi / 2 and |r| <= pi / 4; reduced in fp64: positions of millions keep theirs."""
    wide = x.to(tl.float64)
    n = tl.floor(wide * 0.6366197723675814 + 0.5)
    r = (wide - n * 1.5707963267948966).to(tl.float32)
    return r, n.to(tl.int32) & 3


@triton.jit
def sine_near(r):
    """sin r for |r| <= pi / 4: Taylor, error below 2^-29."""
    s = r * r
    return r + r * s * (-1.0 / 6 + s * (1.0 / 120 + s * (-1.0 / 5040 + s * (1.0 / 362880))))


@triton.jit
def cosine_near(r):
    """cos r for |r| <= pi / 4: Taylor, error below 2^-32."""
    s = r * r
    return 1.0 + s * (-0.5 + s * (1.0 / 24 + s * (-1.0 / 720 + s * (1.0 / 40320 - s * (1.0 / 3628800)))))


@triton.jit
def sine(x):
    """sin x."""
    r, n = quarter_turns(x)
    y = tl.where((n & 1) == 0, sine_near(r), cosine_near(r))
    return tl.where((n & 2) == 0, y, -y)


@triton.jit
def cosine(x):
    """cos x."""
    r, n = quarter_turns(x)
    y = tl.where((n & 1) == 0, cosine_near(r), sine_near(r))
    return tl.where(((n + 1) & 2) == 0, y, -y)


@triton.jit
def tanh(x):
    """tanh x: Taylor near 0, where 1 - exp(-2 |x|) cancels."""
    s = x * x
    near = x + x * s * (-1.0 / 3 + s * (2.0 / 15 + s * (-17.0 / 315 + s * (62.0 / 2835))))
    e = tl.exp(-2.0 * tl.abs(x))
    y = (1.0 - e) / (1.0 + e)
    return tl.where(s < 0.0625, near, tl.where(x < 0.0, -y, y))


@triton.jit
def silu(x):
    """x * sigmoid(x)."""
    return x / (1.0 + tl.exp(-x))


@triton.jit
def gelu(x):
    """x times the normal distribution function (Hendrycks and Gimpel, 2016)."""
    return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def gelu_tanh(x):
    """gelu by its tanh approximation."""
    return 0.5 * x * (1.0 + tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))
