"""Quantising a matrix, and back: whole weights a few rows at a time, activations where they are."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from llmopt.compiler.errors import InputError
from llmopt.compiler.quant.packing import pack, unpack
from llmopt.compiler.quant.scales import (
    decoded_scales,
    global_scale_of,
    rounded_scales,
    wanted_scales,
    zero_points_of,
)
from llmopt.compiler.quant.schemes import Scheme, scheme_of

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class QuantizedTensor:
    """A matrix of `shape` (N, K) in low-bit codes: w = value(code - zero point) * scale * global scale.

    `codes` uint8 [N, Kp], one a byte, Kp = K padded up to the group with the code of 0. `scales` [N, Kp/group] (a row's:
    [N, 1]; fp8_block: [N/128, Kp/128] rounded up; a tensor's: [1, 1]) in the scheme's `scale_dtype`. `global_scale`
    float32 [], a multiplier. `zero_points` uint8 as `scales`, in codes. `squared_error` and `energy`: sums of (w - w')^2
    and w^2 over the tensor, in fp64.
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
        """[N, K]: the matrix that the codes stand for, computed in float32 and rounded to `dtype` at the end."""
        restored = _restored(self.codes, self.scales, self.global_scale, self.zero_points, self.scheme)
        return restored[:, : self.shape[1]].to(dtype)

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


def quantize(
    tensor: Tensor,
    scheme: str | Scheme,
    scale: str = "max",
    *,
    weight: Tensor | None = None,
    global_scale: Tensor | None = None,
    scale_max: float = 448.0,
    rows_at_once: int | None = None,
) -> QuantizedTensor:
    """Quantise a matrix [N, K] (float16, bfloat16, float32 or float64; arithmetic is float32) to the nearest codes."""
    scheme = scheme_of(scheme) if isinstance(scheme, str) else scheme
    rows, columns = tensor.shape
    low, high = _range(tensor, rows_at_once or rows)
    if scheme.has_global and global_scale is None:
        global_scale = global_scale_of(torch.maximum(high, -low), scheme, scale_max)
    shape, padded = scheme.scales_shape(rows, columns), scheme.padded(columns)
    device = tensor.device
    codes = torch.empty(rows, padded, dtype=torch.uint8, device=device)
    scales = torch.empty(shape, dtype=scheme.scale_dtype, device=device)
    zero_points = None if scheme.symmetric else torch.empty(shape, dtype=torch.uint8, device=device)
    lost = energy = 0.0
    for start, stop in _chunks(rows, columns, scheme, rows_at_once):
        part = F.pad(tensor[start:stop].float(), (0, padded - columns))
        blocks = to_blocks(part, scheme)
        if scheme.rows == 0:
            part_low, part_high = low, high
        else:
            part_low, part_high = blocks.amin(-1), blocks.amax(-1)
        wanted = wanted_scales(part_low, part_high, scheme, global_scale)
        found = rounded_scales(wanted, scheme)
        zeros = None if scheme.symmetric else zero_points_of(part_low, wanted, scheme)
        steps = decoded_scales(found, scheme, global_scale)
        part_codes = from_blocks(encode(blocks, steps, zeros, scheme), stop - start, scheme)
        first = start // scheme.rows if scheme.rows else 0
        if scheme.rows == 0:
            scales.fill_(found)
        else:
            scales[first : first + found.shape[0]] = found
        if zero_points is not None and zeros is not None:
            zero_points[first : first + found.shape[0]] = zeros
        codes[start:stop] = part_codes
        back = _restored(part_codes, found.view(-1, shape[1]), global_scale, zeros, scheme)
        lost += float((part.double() - back.double()).square().sum())
        energy += float(part.double().square().sum())
    return QuantizedTensor(scheme, (rows, columns), codes, scales, global_scale, zero_points, lost, energy)


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
    return _restored(codes, scales, global_scale, zero_points, scheme)[:, :columns].to(dtype)


def fake_quantize(x: Tensor, scheme: Scheme) -> Tensor:
    """`x` [..., K] quantised by the rule of the largest element and back, as activations are at run time; same dtype.

    Groups run along K of every row of K; a scheme without groups has one scale a row (fp8: one for the whole tensor),
    and a global scale is the whole tensor's. Computed in float32.
    """
    columns = x.shape[-1]
    wide = F.pad(x.float(), (0, scheme.padded(columns) - columns))
    blocks = wide.unflatten(-1, (-1, scheme.group)) if scheme.group else wide.unsqueeze(-2)
    if scheme.rows == 0:
        low, high = blocks.amin(), blocks.amax()
    else:
        low, high = blocks.amin(-1), blocks.amax(-1)
    scale = global_scale_of(x.abs().amax(), scheme) if scheme.has_global else None
    wanted = wanted_scales(low, high, scheme, scale)
    steps = decoded_scales(rounded_scales(wanted, scheme), scheme, scale).unsqueeze(-1)
    if scheme.symmetric:
        back = scheme.element.nearest(blocks / steps) * steps
    else:
        zeros = zero_points_of(low, wanted, scheme).unsqueeze(-1).float() - scheme.element.zero
        back = (scheme.element.nearest(blocks / steps + zeros) - zeros) * steps
    return back.flatten(-2)[..., :columns].to(x.dtype)


def encode(blocks: Tensor, steps: Tensor, zero_points: Tensor | None, scheme: Scheme) -> Tensor:
    """Codes (uint8 [.., n]) of `blocks` (float32 [.., n]) whose units are worth `steps` (float32 [..])."""
    units = blocks / steps.unsqueeze(-1)
    if zero_points is not None:
        units = units + (zero_points.float() - scheme.element.zero).unsqueeze(-1)
    return scheme.element.encode(units)


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
    codes: Tensor, scales: Tensor, global_scale: Tensor | None, zero_points: Tensor | None, scheme: Scheme
) -> Tensor:
    """Float32 [N, Kp]."""
    rows = codes.shape[0]
    steps = decoded_scales(scales, scheme, global_scale)
    if scheme.rows > 1:
        steps = steps.unsqueeze(1).expand(-1, scheme.rows, -1).flatten(0, 1)[:rows]
    values = scheme.element.decode(codes).unflatten(-1, (steps.shape[-1], -1))
    if zero_points is not None:
        values = values - (zero_points.float() - scheme.element.zero).unsqueeze(-1)
    return (values * steps.unsqueeze(-1)).flatten(1)


def _chunks(rows: int, columns: int, scheme: Scheme, at_once: int | None) -> Iterator[tuple[int, int]]:
    """(first, end) of rows to do together: a quarter million elements, whole tiles."""
    height = max(scheme.rows, 1)
    at_once = max(1, (at_once or 2**18 // columns) // height) * height
    for start in range(0, rows, at_once):
        yield start, min(start + at_once, rows)


def _range(tensor: Tensor, at_once: int) -> tuple[Tensor, Tensor]:
    """Smallest and largest element, float32 []."""
    low, high = torch.aminmax(tensor)
    return low.float(), high.float()
