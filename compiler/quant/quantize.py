"""Quantising a matrix, and back: whole weights a few rows at a time, activations where they are."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from llmopt.compiler.errors import InputError
from llmopt.compiler.quant.checks import (
    check_matrix,
    check_options,
    check_reach,
    checked_global_scale,
    checked_weight,
)
from llmopt.compiler.quant.packing import pack, unpack
from llmopt.compiler.quant.scales import (
    E4M3_MAX,
    block_losses,
    block_scales,
    check_rule,
    decoded_scales,
    global_scale_of,
    rounded_scales,
    scales_from,
    wanted_scales,
    zero_points_of,
)
from llmopt.compiler.quant.schemes import Scheme, scheme_of

# no code stands for more, so that neither float32 nor bfloat16 turns it into infinity
_MOST = torch.finfo(torch.bfloat16).max


@dataclass(frozen=True)
class QuantizedTensor:
    """A matrix of `shape` (N, K) in low-bit codes: w = value(code - zero point) * scale * global scale.

    `codes` uint8 [N, Kp], one a byte, Kp = K padded up to the group with codes that stand for 0. `scales`
    [N, Kp/group] (one a row: [N, 1]; fp8_block: [N/128, Kp/128] rounded up; one a tensor: [1, 1]) in the scheme's
    `scale_dtype`. `global_scale` float32 [], a multiplier. `zero_points` uint8 as `scales`, in codes. `squared_error`
    and `energy`: sums of (w - w')^2 and w^2 over the tensor, in fp64.
    """

    scheme: Scheme
    shape: tuple[int, int]
    codes: Tensor
    scales: Tensor
    global_scale: Tensor | None
    zero_points: Tensor | None
    squared_error: float
    energy: float

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """[N, K]: the matrix that the codes stand for, computed in float32 and rounded to `dtype` at the end.

        What lies beyond the range of `dtype` becomes its largest number, never infinite. Raises `InputError` for a
        `dtype` that is not of floats.
        """
        if not dtype.is_floating_point:
            raise InputError(f"dequantize: dtype is {dtype}; wanted one of floats, such as torch.bfloat16")
        restored = _restored(self.codes, self.scales, self.global_scale, self.zero_points, self.scheme, dtype)
        return restored[:, : self.shape[1]]

    def packed(self) -> Tensor:
        """uint8 [N, Kp * bits / 8]: the codes without the room between them."""
        return pack(self.codes, self.scheme.element.bits)

    def error(self) -> float:
        """Relative mean squared error: `squared_error` / `energy` (0 for a matrix of zeros)."""
        return self.squared_error / self.energy if self.energy else 0.0

    def sqnr(self) -> float:
        """Signal to quantisation noise, dB (infinite where nothing was lost)."""
        return -10 * math.log10(self.error()) if self.error() else math.inf

    @property
    def nbytes(self) -> int:
        """Bytes of the packed codes, scales and zero points."""
        codes = self.codes.numel() * self.scheme.element.bits // 8
        others = (self.scales, self.global_scale, self.zero_points)
        return codes + sum(tensor.nbytes for tensor in others if tensor is not None)


@torch.no_grad()
def quantize(
    tensor: Tensor,
    scheme: str | Scheme,
    scale: str = "max",
    *,
    weight: Tensor | None = None,
    global_scale: float | Tensor | None = None,
    scale_max: float = E4M3_MAX,
    rows_at_once: int | None = None,
) -> QuantizedTensor:
    """Quantise a matrix [N, K] (float16, bfloat16, float32 or float64; arithmetic is float32), each element to nearest.

    `scale` is the rule of scales: "max" by the largest element; "search" tries neighbours and keeps the one with the
    least squared error of each block; for nvfp4 also "optimal", "fast", "four-six" and "all" (see `scales`). `weight`
    [K] counts squared errors of columns in a search (a Hessian's diagonal; not negative; only its proportions count).
    nvfp4 alone: `global_scale`, a positive number (float or []) instead of the tensor's own (layers that run as one
    need a common one), and `scale_max`, what the largest block scale becomes: 448 leaves it no room to grow in a
    search, 256 does. `rows_at_once` bounds memory; the result does not depend on it.

    Raises `InputError`: no matrix, empty, sparse, without numbers (meta), not floating, not finite; unknown scheme,
    rule or option that it cannot have; `weight` beside "max"; a `global_scale` beyond the reach of block scales.
    """
    scheme = scheme_of(scheme)
    check_rule(scale, scheme)
    check_matrix(tensor)
    check_options(scheme, global_scale, scale_max, rows_at_once)
    shares = None if weight is None else checked_weight(weight, scale, tensor.shape[1])
    own = None
    if global_scale is not None:
        own = checked_global_scale(global_scale, tensor.device)
        low, high = _range(tensor)
        check_reach(own, torch.maximum(high, -low), scheme)
    return quantized(tensor, scheme, scale, shares, own, scale_max, rows_at_once)


@torch.no_grad()
def quantized(
    tensor: Tensor,
    scheme: Scheme,
    scale: str,
    weight: Tensor | None,
    global_scale: Tensor | None,
    scale_max: float = E4M3_MAX,
    rows_at_once: int | None = None,
) -> QuantizedTensor:
    """`quantize` with what it checks for true already; a float32 `global_scale` may be too small, which cuts blocks."""
    low, high = _range(tensor)
    if global_scale is None and scheme.has_global:
        global_scale = global_scale_of(torch.maximum(high, -low), scheme, scale_max)
    shared = None
    if scheme.rows == 0:
        shared = _tensor_scales(low, high, scheme, scale, lambda: _blocks(tensor, scheme, rows_at_once, weight))
    shape = scheme.scales_shape(*tensor.shape)
    codes = tensor.new_empty((tensor.shape[0], scheme.padded(tensor.shape[1])), dtype=torch.uint8)
    scales = tensor.new_empty(shape, dtype=scheme.scale_dtype)
    zero_points = None if scheme.symmetric else tensor.new_empty(shape, dtype=torch.uint8)
    squared_error = energy = 0.0
    for start, stop, blocks, importance in _blocks(tensor, scheme, rows_at_once, weight):
        found, zeros = shared or block_scales(blocks, scheme, scale, global_scale, importance)
        codes[start:stop] = from_blocks(encode(blocks, found, global_scale, zeros, scheme), stop - start, scheme)
        first = start // scheme.rows if scheme.rows else 0
        scales[first : first + found.shape[0]] = found
        if zero_points is not None and zeros is not None:
            zero_points[first : first + found.shape[0]] = zeros
        restored = _restored(codes[start:stop], found, global_scale, zeros, scheme)[:, : tensor.shape[1]].double()
        original = tensor[start:stop].double()
        energy += float(original.square().sum())
        squared_error += float((restored - original).square().sum())
    return QuantizedTensor(
        scheme, (tensor.shape[0], tensor.shape[1]), codes, scales, global_scale, zero_points, squared_error, energy
    )


def dequantize(
    packed: Tensor,
    scales: Tensor,
    global_scale: Tensor | None,
    zero_points: Tensor | None,
    scheme: Scheme,
    columns: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """[N, columns]: `QuantizedTensor.dequantize` of its parts as they are stored, `packed` codes among them."""
    codes = unpack(packed, scheme.element.bits, scheme.padded(columns))
    return _restored(codes, scales, global_scale, zero_points, scheme, dtype)[:, :columns]


def fake_quantize(x: Tensor, scheme: Scheme) -> Tensor:
    """`x` [..., K] quantised by the rule of the largest element and back, as activations are at run time; same dtype.

    Groups run along K of every row [K], which has a global scale of its own, too; a scheme without groups has one scale
    a row. So what a row becomes does not depend on the others, and a token's result not on who else is in its batch.
    Computed in float32. Finite numbers stay finite; a group with one that is not becomes NaN.
    """
    columns = x.shape[-1]
    wide = F.pad(x.float(), (0, scheme.padded(columns) - columns))
    blocks = wide.unflatten(-1, (-1, scheme.group)) if scheme.group else wide.unsqueeze(-2)
    low, high = blocks.amin(-1), blocks.amax(-1)
    scale = global_scale_of(x.abs().amax(-1, keepdim=True), scheme) if scheme.has_global else None
    wanted = wanted_scales(low, high, scheme, scale)
    steps = decoded_scales(rounded_scales(wanted, scheme), scheme, scale).unsqueeze(-1)
    if scheme.symmetric:
        back = scheme.element.nearest(blocks / steps) * steps
    else:
        zeros = zero_points_of(low, wanted, scheme).unsqueeze(-1).float() - scheme.element.zero
        back = (scheme.element.nearest(blocks / steps + zeros) - zeros) * steps
    return _clamped(back, x.dtype).flatten(-2).to(x.dtype)[..., :columns]


def encode(
    blocks: Tensor, scales: Tensor, global_scale: Tensor | None, zero_points: Tensor | None, scheme: Scheme
) -> Tensor:
    """Codes (uint8 [.., n]) of `blocks` (float32 [.., n]) with `scales` and `zero_points` [..] as they are stored.

    The nearest, but none for what bfloat16 cannot hold: from 2.5e38 on the nearest may stand for more than 3.39e38.
    """
    steps = decoded_scales(scales, scheme, global_scale).unsqueeze(-1)
    units = _held(blocks / steps, steps, scheme)
    if zero_points is not None:
        units = units + (zero_points.float() - scheme.element.zero).unsqueeze(-1)
    return scheme.element.encode(units)


def _held(units: Tensor, steps: Tensor, scheme: Scheme) -> Tensor:
    """`units` within the numbers that stand for no more than `_MOST` with these steps."""
    element = scheme.element
    reach = element.max if element.is_float else float(element.zero if scheme.symmetric else 2 * element.zero)
    if not bool((steps > _MOST / reach).any()):
        return units
    most = _MOST / steps
    most = element.nearest(most) if element.is_float else most.floor()
    over = most * steps > _MOST
    lower = element.decode(element.encode(most) - over.to(torch.uint8)) if element.is_float else most - 1
    most = torch.where(over, lower, most)
    return units.clamp(-most, most)


def to_blocks(matrix: Tensor, scheme: Scheme) -> Tensor:
    """[N, Kp] as what shares a scale along the last axis: [rows of scales, scales a row, n]."""
    rows, columns = matrix.shape
    if scheme.rows == 0:
        return matrix.reshape(1, 1, -1)
    if scheme.rows == 1:
        return matrix.reshape(rows, -1, scheme.group or columns)
    matrix = F.pad(matrix, (0, 0, 0, -rows % scheme.rows))
    tiles = matrix.reshape(-1, scheme.rows, columns // scheme.group, scheme.group)
    return tiles.transpose(1, 2).flatten(2)


def from_blocks(blocks: Tensor, rows: int, scheme: Scheme) -> Tensor:
    """[N, Kp] of N `rows` again, after `to_blocks`."""
    if scheme.rows < 2:
        return blocks.reshape(rows, -1)
    tiles = blocks.unflatten(-1, (scheme.rows, scheme.group)).transpose(1, 2)
    return tiles.reshape(-1, blocks.shape[1] * scheme.group)[:rows]


def _restored(
    codes: Tensor,
    scales: Tensor,
    global_scale: Tensor | None,
    zero_points: Tensor | None,
    scheme: Scheme,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """What codes stand for, in `dtype` [N, Kp].

    Whole groups, to be sliced afterwards: Inductor's C++ backend loses the end of a row where it computes fewer columns
    than whole groups in one loop (see `_torch`), and keeps it where slicing comes last.
    """
    rows = codes.shape[0]
    steps = decoded_scales(scales, scheme, global_scale)
    if scheme.rows > 1:
        steps = steps.unsqueeze(1).expand(-1, scheme.rows, -1).flatten(0, 1)[:rows]
    values = scheme.element.decode(codes).unflatten(-1, (steps.shape[-1], -1))
    if zero_points is not None:
        values = values - (zero_points.float() - scheme.element.zero).unsqueeze(-1)
    restored = (values * steps.unsqueeze(-1)).flatten(1)
    # codes stand for nothing that wider dtypes cannot hold, and to look again would take a sixth of the time
    restored = restored if torch.finfo(dtype).max >= _MOST else _clamped(restored, dtype)
    return restored.to(dtype)


def _clamped(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Float32 `values`, those beyond the range of `dtype` as its largest number; NaN stays NaN."""
    largest = min(torch.finfo(dtype).max, torch.finfo(torch.float32).max)
    return values.clamp(-largest, largest)


def _blocks(
    tensor: Tensor, scheme: Scheme, rows_at_once: int | None, weight: Tensor | None
) -> Iterator[tuple[int, int, Tensor, Tensor | None]]:
    """(first row, end, blocks, their weights) of a few rows after the other, whole tiles each."""
    rows, columns = tensor.shape
    height = max(scheme.rows, 1)
    # what stays in a processor's cache; a GPU wants more to do at once
    at_once = rows_at_once or (2**18 if tensor.device.type == "cpu" else 2**24) // columns
    at_once = max(at_once // height, 1) * height
    padding = (0, scheme.padded(columns) - columns)
    if weight is not None:
        weight = F.pad(weight.to(tensor.device, torch.float32), padding)
    for start in range(0, rows, at_once):
        stop = min(start + at_once, rows)
        importance = None if weight is None else to_blocks(weight.expand(stop - start, -1), scheme)
        yield start, stop, to_blocks(F.pad(tensor[start:stop].float(), padding), scheme), importance


def _tensor_scales(
    low: Tensor,
    high: Tensor,
    scheme: Scheme,
    rule: str,
    source: Callable[[], Iterator[tuple[int, int, Tensor, Tensor | None]]],
) -> tuple[Tensor, Tensor | None]:
    """The one scale [1, 1] of a tensor, whose losses are sums over all of its parts."""

    def losses(steps: Tensor, zero_points: Tensor | None) -> Tensor:
        parts = (block_losses(blocks, steps, zero_points, scheme, weight) for _, _, blocks, weight in source())
        return sum((part.double() for part in parts), torch.zeros_like(steps, dtype=torch.float64))

    return scales_from(low.reshape(1, 1), high.reshape(1, 1), scheme, rule, None, losses)


def _range(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Smallest and largest element, float32 []; raises `InputError` where one is not finite."""
    low, high = (end.float() for end in torch.aminmax(tensor))
    if not bool(torch.isfinite(low) & torch.isfinite(high)):
        bad = ~torch.isfinite(tensor.float())
        row = int(bad.any(1).nonzero()[0])
        column = int(bad[row].nonzero()[0])
        raise InputError(
            f"quantize: {int(bad.sum())} of {tensor.numel()} elements are not finite in float32, the first at "
            f"[{row}, {column}] ({tensor[row, column].item()}); only finite numbers can be quantised"
        )
    return low, high
