"""How the kernels of `templates/lowbit.py` want low-bit weights in memory, made from canonical storage and back.

Rows go in stripes of 16, as a matrix product's operand has them: of a stripe and a block of columns, lane 4 g + t of a
warp holds rows g and g + 8, 16 bytes in one piece, each word weights of one row (`lowbit_bits`). Where a scale serves
16 or 32 weights, these all lie in one lane, which has therefore `own` neighbouring columns of every 4 * own; else a
lane has 8 of every 32. Scales lie beside in the order in which lanes read them:

- for a scale of one byte every 16 or 32 weights, which the kernel puts on the weights: int32 [stripe, block of
  8 * own columns, g, t], bytes (first or second half of the block, row g or g + 8). E4M3 becomes 5 bits of exponent
  and 3 of mantissa, without subnormals; E8M0 is counted from the tensor's largest, which becomes 254.
- for groups of 32 and more, whose sums are scaled: int32 [stripe, group, 8], the bfloat16 or float16 of row g in the
  lower half and of row g + 8 in the upper one; float32: its bits, [stripe, group, 16 rows]; with zero points [stripe,
  group, 16], the bfloat16 or float16 in the upper half and in the lower one the bfloat16 -(128 + zero point).
- for scales of a row or a tensor, and the tensor's global scale: float32 `factor` [rows] or [1], which also takes
  back what was added to exponents.

Rows are padded to 16 and columns to 256, with zeros.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from llmopt.codegen.templates.lowbit_bits import BITS
from llmopt.compiler.errors import BuildError
from llmopt.compiler.quant.packing import unpack
from llmopt.compiler.quant.schemes import Scheme, scheme_of

ROWS, COLUMNS = 16, 256  # what rows and columns are padded to
_ADDED = 8  # binary orders that the multiplier of NVFP4's scales is too small by, so that the largest is finite


@dataclass(frozen=True)
class Laid:
    """A matrix [rows, columns] as the kernels read it; padding is part of the tensors."""

    scheme: Scheme
    rows: int
    columns: int
    words: Tensor
    scales: Tensor | None
    factor: Tensor | None

    @property
    def nbytes(self) -> int:
        """Bytes that a product reads."""
        return sum(t.nbytes for t in (self.words, self.scales, self.factor) if t is not None)


def side(scheme: Scheme) -> str:
    """Where the kernel applies the scales: "weights", "sums" of a group, or "rows" of the result."""
    if not scheme.group:
        return "rows"
    return "weights" if scheme.scale in ("e4m3", "e8m0") else "sums"


def own(scheme: Scheme) -> int:
    """Neighbouring columns that a lane has."""
    return scheme.group if side(scheme) == "weights" else 8


def in_order(scheme: Scheme) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """How wgmma takes columns of x: in blocks of 4 * own that have this shape, their axes permuted like this."""
    return (4, own(scheme) // 8, 2, 2, 2), (1, 2, 3, 0, 4)


def constants(scheme: Scheme) -> dict[str, str | int]:
    """What the template `lowbit` is told of the scheme."""
    where = side(scheme)
    factors = 0 if where == "sums" and not scheme.has_global else 2 if where == "rows" and scheme.rows else 1
    scale = scheme.scale if scheme.symmetric else f"{scheme.scale} zeros"
    found: dict[str, str | int] = {"ELEMENT": scheme.element.name, "SIDE": where, "SCALE": scale}
    return {**found, "GROUP": scheme.group, "FACTORS": factors}


def lay(
    packed: Tensor,
    scales: Tensor,
    global_scale: Tensor | None,
    zero_points: Tensor | None,
    scheme: Scheme | str,
    columns: int,
) -> Laid:
    """Canonical storage (`compiler.quant`'s: packed uint8 [rows, .], scales, ...) as kernels read it, where it lies."""
    scheme = scheme_of(scheme) if isinstance(scheme, str) else scheme
    rows = packed.shape[0]
    held = packed.shape[1] * 8 // scheme.element.bits
    codes = unpack(packed, scheme.element.bits, held)[:, : scheme.padded(columns)]
    zero = 0 if _float(scheme) else 1 << (scheme.element.bits - 1)
    kind = side(scheme)
    factor = _factor(scheme, scales, global_scale, rows)
    if kind == "weights":
        codes, laid, correction = _byte_scales(scheme, codes, scales)
        factor = factor * correction
    elif kind == "sums":
        laid = _group_scales(scheme, scales, zero_points, rows)
    else:
        laid = None
    codes = F.pad(codes, (0, -codes.shape[1] % COLUMNS), value=zero)
    codes = F.pad(codes, (0, 0, 0, -rows % ROWS), value=zero)
    needed = kind != "sums" or global_scale is not None
    return Laid(scheme, rows, columns, words(codes, scheme), laid, factor if needed else None)


def words(codes: Tensor, scheme: Scheme) -> Tensor:
    """Codes uint8 [rows, columns], both padded, as int32 [stripe, block, plane, lane, 4]."""
    bits = BITS[scheme.element.name]
    tiles = _tiles(codes, own(scheme))  # [stripe, tile of 32, g, t, rr, 8]
    s, n = tiles.shape[:2]
    if bits.values == 8:
        held = tiles.unflatten(1, (n // 2, 2)).permute(0, 1, 3, 4, 2, 5, 6)  # .., g, t, tile of two, rr, 8
    else:  # sixteen values of one row: both tiles of 64 columns
        held = tiles.unflatten(1, (n // 4, 2, 2)).permute(0, 1, 4, 5, 2, 6, 3, 7).flatten(-2)  # .., g, t, half, rr, 16
    found = _gathered(held, scheme.element.name)  # [planes, stripe, block, g, t, 2, rr]
    return found.permute(1, 2, 0, 3, 4, 5, 6).reshape(s, -1, bits.planes, 32, 4).contiguous()


def codes_of(laid: Laid) -> Tensor:
    """The inverse of `words`: codes uint8 [rows, columns], without the padding."""
    bits = BITS[laid.scheme.element.name]
    s, blocks = laid.words.shape[:2]
    planes = laid.words.reshape(s, blocks, bits.planes, 8, 4, 2, 2).permute(2, 0, 1, 3, 4, 5, 6)
    held = _scattered(planes, laid.scheme.element.name)  # [stripe, block, g, t, 2, rr, values]
    if bits.values == 8:
        tiles = held.permute(0, 1, 4, 2, 3, 5, 6).flatten(1, 2)
    else:
        tiles = held.unflatten(-1, (2, 8)).permute(0, 1, 4, 6, 2, 3, 5, 7).flatten(1, 3)
    return _untiled(tiles, own(laid.scheme))[: laid.rows, : laid.columns]


def _tiles(codes: Tensor, own: int) -> Tensor:
    """[stripe, tile of 32 columns as the product takes them, g, t, rr, 8] of codes [rows, columns]."""
    rows, columns = codes.shape
    parts = codes.reshape(rows // 16, 2, 8, columns // (4 * own), 4, own // 8, 8)  # stripe, rr, g, span, t, q, 8
    return parts.permute(0, 3, 5, 2, 4, 1, 6).flatten(1, 2)


def _untiled(tiles: Tensor, own: int) -> Tensor:
    s, n = tiles.shape[:2]
    parts = tiles.unflatten(1, (n * 8 // own, own // 8)).permute(0, 5, 3, 1, 4, 2, 6)
    return parts.reshape(s * 16, n * 32)


def _gathered(codes: Tensor, element: str) -> Tensor:
    """Words int32 [planes, ...] of codes [..., values]."""
    bits = BITS[element]
    planes = [torch.zeros(codes.shape[:-1], dtype=torch.int64, device=codes.device) for _ in range(bits.planes)]
    for value, bit, plane, at in _sources(element):
        planes[plane] |= ((codes[..., value].long() >> bit) & 1) << at
    return torch.stack(planes).to(torch.int32)  # wraps: the highest bit is a sign there


def _scattered(planes: Tensor, element: str) -> Tensor:
    """Codes uint8 [..., values] of words int32 [planes, ...]."""
    bits = BITS[element]
    values = [torch.zeros(planes.shape[1:], dtype=torch.int32, device=planes.device) for _ in range(bits.values)]
    for value, bit, plane, at in _sources(element):
        values[value] |= ((planes[plane] >> at) & 1) << bit
    return torch.stack(values, -1).to(torch.uint8)


def _sources(element: str) -> list[tuple[int, int, int, int]]:
    """(value, bit of its code, plane, bit of the word) for every bit of the words."""
    bits = BITS[element]
    found = []
    for pair, terms in enumerate(bits.pairs):
        for part, some in enumerate((terms[:1], terms[1:]) if element == "int8" else (terms,)):
            for plane, shift, mask in some:
                for bit, place in enumerate(bits.places):
                    if mask >> place & 1:
                        for half in (0, 1):
                            found.append((2 * pair + half, bit + 4 * part, plane, place - shift + 16 * half))
    return found


def _float(scheme: Scheme) -> bool:
    return not scheme.element.name.startswith("int")


def _factor(scheme: Scheme, scales: Tensor, global_scale: Tensor | None, rows: int) -> Tensor:
    """float32 [1], or [rows padded] where every row has a scale of its own."""
    factor = torch.ones(1, device=scales.device) if global_scale is None else global_scale.reshape(1).float()
    if scheme.group:
        return factor
    own = scales.float().reshape(-1)
    if scheme.rows == 0:
        return factor * own
    return F.pad(factor * own.repeat_interleave(scheme.rows)[:rows], (0, -rows % ROWS))


def _byte_scales(scheme: Scheme, codes: Tensor, scales: Tensor) -> tuple[Tensor, Tensor, float]:
    """(codes, scales, what the factor makes up for): a block whose scale is 0 gets codes of 0."""
    if scheme.scale == "e4m3":
        raw = scales.view(torch.uint8)
        value = scales.float().abs()
        mantissa, exponent = torch.frexp(value)  # value = mantissa * 2^exponent, mantissa in [0.5, 1)
        found = torch.where(value > 0, ((exponent + 9) << 3) | ((mantissa * 16).int() - 8), 0)
        nought = (raw & 0x7F) == 0
        correction = 2.0**_ADDED
    else:
        largest = int(scales.max())
        found = (scales.int() + (254 - largest)).clamp(0, 254)
        nought = found == 0  # 2^-254 of the largest and less
        correction = 2.0 ** (largest - 127 - BITS[scheme.element.name].bias)
    codes = codes.masked_fill(nought.repeat_interleave(scheme.group, 1), 0)
    per = scheme.group
    found = F.pad(found.int(), (0, -found.shape[1] % (COLUMNS // per), 0, -found.shape[0] % ROWS))
    s, n = found.shape[0] // ROWS, found.shape[1]
    # stripe, rr, g, block of two, half, t
    parts = found.reshape(s, 2, 8, n // 8, 2, 4).permute(0, 3, 2, 5, 4, 1).reshape(s, n // 8, 8, 4, 4).long()
    word = sum((parts[..., byte] << (8 * byte) for byte in range(4)), torch.zeros_like(parts[..., 0]))
    return codes, word.to(torch.int32).contiguous(), correction


def _group_scales(scheme: Scheme, scales: Tensor, zero_points: Tensor | None, rows: int) -> Tensor:
    if scheme.rows != 1:
        scales = scales.repeat_interleave(scheme.rows, 0)[:rows]
    scales = _striped(scales, scheme)
    if scheme.scale == "float32":
        return scales.view(torch.int32)
    scales = scales.view(torch.int16).int()
    if scheme.symmetric:
        low, high = scales.chunk(2, -1)
        return (high << 16 | (low & 0xFFFF)).contiguous()
    if zero_points is None:
        raise BuildError(f"scheme {scheme.name} has zero points, and none were given")
    zero = _striped(zero_points, scheme).int() | 0xC300
    return (scales << 16 | zero).contiguous()


def _striped(values: Tensor, scheme: Scheme) -> Tensor:
    """[rows, groups] as [stripe, group, 16]."""
    values = F.pad(values, (0, -values.shape[1] % max(1, COLUMNS // scheme.group), 0, -values.shape[0] % ROWS))
    return values.reshape(values.shape[0] // ROWS, ROWS, -1).transpose(1, 2).contiguous()
