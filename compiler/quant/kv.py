"""Keys and values in few bits: how a head's vector of one token is rotated, rounded and laid out in the KV cache.

    x [D] --signs, Hadamard blocks--> y --one scale (and offset) for the vector--> codes --> bytes of a row

Rotations are block-diagonal Sylvester-Hadamard matrices behind fixed random signs ("BDR"; Zhou et al., 2026: SAW-INT4,
arXiv 2604.19157, and Ashkboos et al., 2024: QuaRot). The signs keep a vector of nearly equal numbers from becoming one
large one. Queries get the same rotation, so scores stay what they were; results of rotated values are turned back.
The powers of two that normalise are shared out so that none is rounded: 2^-floor(log2(h)/2) here, the rest there.

Everything is elementwise fp32 arithmetic in a fixed order, divisions and roundings to nearest: kernels do the same and
get the same bits. That order is part of the format, which products with `compiler.hadamard`'s matrices do not have.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from math import log2

import torch
from torch import Tensor
from torch.nn import functional

from llmopt.compiler.errors import InputError
from llmopt.compiler.quant.elements import ELEMENTS

KINDS = {"int4": 4, "int8": 8, "fp8": 8, "nvfp4": 4}  # bits of a code
WORD = 4  # bytes behind a row's codes: its scale and offset, both bfloat16; and what all parts of a row are whole of
GROUP = 16  # channels that share one of nvfp4's scales
TINY = 2.0**-100  # the least scale: a constant vector's
NONE = "none"
_TEXT = re.compile(rf"({'|'.join(KINDS)})(?:-h([0-9]+))?")


@dataclass(frozen=True)
class Packing:
    """A format of keys or values: `kind`, and the order of the Hadamard blocks that precede it (1: none).

    int4, int8: code * scale + offset, from the vector's least and largest element (token-wise, asymmetric). fp8 (E4M3):
    code * scale, the largest element becoming 448. nvfp4: E2M1 codes, an E4M3 scale for 16 channels, times the scale of
    the vector (rows are filled up to whole words of 32 bits). Written `int4-h128`.
    """

    kind: str
    order: int = 1

    def __post_init__(self) -> None:
        if self.kind not in KINDS or self.order < 1 or self.order & (self.order - 1):
            raise InputError(
                f"no packing of keys and values is {self.kind!r} with blocks of {self.order}; wanted one of "
                f"{', '.join(KINDS)} and a power of two"
            )

    @classmethod
    def parse(cls, text: str) -> Packing:
        """From `int4` or `int4-h128`; raises InputError."""
        found = _TEXT.fullmatch(text)
        if found is None:
            raise InputError(f"no packing of keys and values is called {text!r}; wanted such as int4, int4-h128 or fp8")
        return cls(found[1], int(found[2] or 1))

    def __str__(self) -> str:
        return self.kind if self.order == 1 else f"{self.kind}-h{self.order}"

    @property
    def bits(self) -> int:
        """Of a code."""
        return KINDS[self.kind]

    def code_bytes(self, channels: int) -> int:
        """Bytes of a row's codes."""
        return channels * self.bits // 8

    def step_bytes(self, channels: int) -> int:
        """Bytes of nvfp4's scales, filled up to whole words; 0 of other packings."""
        return -(-channels // (GROUP * WORD)) * WORD if self.kind == "nvfp4" else 0

    def row_bytes(self, channels: int) -> int:
        """Bytes that a head's vector of `channels` elements takes. Raises InputError where it cannot be cut so."""
        least = GROUP if self.kind == "nvfp4" else 8
        if channels % least or channels % self.order:
            raise InputError(
                f"heads of {channels} channels cannot be packed as {self}: wanted a multiple of {least} and of "
                f"{self.order}, the order of the rotation"
            )
        return self.code_bytes(channels) + WORD + self.step_bytes(channels)

    def channels(self, row_bytes: int) -> int:
        """The inverse of `row_bytes`."""
        if self.kind == "nvfp4":  # four groups take nine words; one of them alone three, two five, three seven
            wholes, rest = divmod((row_bytes - WORD) // WORD, 9)
            return GROUP * (4 * wholes + rest // 2)
        return (row_bytes - WORD) * 8 // self.bits

    def rotated(self, x: Tensor) -> Tensor:
        """x [..., D] as it is rounded: fp32, signs and Hadamard blocks, scaled by a power of two."""
        return self._turned(x.float() * self._signs(x), int(log2(self.order)) // 2)

    def asked(self, q: Tensor) -> Tensor:
        """Queries [..., D] against rotated keys: fp32, so that products are those of q and the keys as they were."""
        return self._turned(q.float() * self._signs(q), (int(log2(self.order)) + 1) // 2)

    def turned_back(self, y: Tensor) -> Tensor:
        """The inverse of `rotated`, fp32."""
        return self._turned(y.float(), (int(log2(self.order)) + 1) // 2) * self._signs(y)

    def _turned(self, x: Tensor, halvings: int) -> Tensor:
        return hadamard_blocks(x, self.order) * 0.5**halvings

    def _signs(self, like: Tensor) -> Tensor:
        signs = signs_of(like.shape[-1]) if self.order > 1 else (1,)
        return torch.tensor(signs, dtype=torch.float32, device=like.device)

    def pack(self, x: Tensor) -> Tensor:
        """Rows uint8 [..., row_bytes] of x [..., D], which is rotated first. A vector that is not finite gets a scale
        or an offset that is none either."""
        return self._packed(self.rotated(x))

    def unpack(self, rows: Tensor) -> Tensor:
        """The vectors (fp32 [..., D], still rotated) of rows uint8 [..., row_bytes]."""
        channels = self.channels(rows.shape[-1])
        codes, word, steps = rows.split([self.code_bytes(channels), WORD, self.step_bytes(channels)], -1)
        # `contiguous` keeps a single row's odd stride, which `view` refuses
        word = word.clone(memory_format=torch.contiguous_format)
        scale, offset = word.view(torch.bfloat16).float().unbind(-1)
        code = _spread(codes, self.bits)
        if self.kind in ("int4", "int8"):
            return code.float() * scale[..., None] + offset[..., None]
        if self.kind == "fp8":
            return ELEMENTS["e4m3"].decode(code) * scale[..., None]
        unit = ELEMENTS["e4m3"].decode(steps[..., : channels // GROUP]) * scale[..., None]
        return (ELEMENTS["e2m1"].decode(code).unflatten(-1, (-1, GROUP)) * unit[..., None]).flatten(-2)

    def _packed(self, y: Tensor) -> Tensor:
        least, most = y.amin(-1, keepdim=True), y.amax(-1, keepdim=True)
        offset, steps = torch.zeros_like(least), None
        if self.kind in ("int4", "int8"):
            levels = 2.0**self.bits - 1
            offset = _bf16(least) + 0.0  # of two zeros it is open which is the least
            scale = _floored(_divided(most - offset, levels))
            code = ((y - offset) / scale).clamp(0, levels).round()
        elif self.kind == "fp8":
            scale = _floored(_divided(torch.maximum(most, -least), 448.0))
            code = ELEMENTS["e4m3"].encode(y / scale)
        else:
            scale = _floored(_divided(torch.maximum(most, -least), 448.0 * 6.0))
            grouped = y.unflatten(-1, (-1, GROUP))
            wanted = (_divided(grouped.abs().amax(-1), 6.0) / scale).clamp(min=2.0**-9)
            steps = ELEMENTS["e4m3"].encode(wanted)
            code = ELEMENTS["e2m1"].encode(grouped / (ELEMENTS["e4m3"].decode(steps) * scale)[..., None]).flatten(-2)
        word = torch.cat((scale, offset), -1).bfloat16().view(torch.uint8)
        parts = [_joined(code.to(torch.uint8), self.bits), word]
        if steps is not None:
            parts.append(functional.pad(steps.to(torch.uint8), (0, self.step_bytes(y.shape[-1]) - steps.shape[-1])))
        return torch.cat(parts, -1)


def why_no_choice(keys: str, values: str, order: int, rotate: str) -> str | None:
    """What is wrong with options of a cache (`passes.quantize_kv.QuantizeKV` says what they mean), or None."""
    for option, seen in (("keys", keys), ("values", values)):
        if seen not in (*KINDS, NONE):
            return f"{option} is {seen!r}; wanted one of {', '.join((*KINDS, NONE))}"
    if keys == values == NONE:
        return f"keys and values are both none, so nothing is packed; wanted one of {', '.join(KINDS)} for one of them"
    if rotate not in ("k", "v", "kv", NONE):
        return f"rotate is {rotate!r}; wanted k, v, kv or none"
    if type(order) is not int or order < 0 or order & (order - 1):
        return f"order is {order!r}; wanted 0 (the largest there is) or a power of two"
    if rotate == NONE and order > 1:
        return f"order is {order} and rotate is none, so nothing is rotated; wanted rotate k, v or kv, or no order"
    return None


def packing_for(letter: str, kind: str, order: int, rotate: str, channels: int) -> Packing | None:
    """How "k" or "v" of heads of so many channels is packed by such options; None: it stays as it is."""
    if kind == NONE:
        return None
    turned = rotate != NONE and letter in rotate
    return Packing(kind, (order or channels & -channels) if turned else 1)


def hadamard_blocks(x: Tensor, order: int) -> Tensor:
    """x [..., D] times Sylvester's matrix, not normalised, over blocks of `order` elements: sums and differences of
    neighbours, then of those two apart, and so on, in that order."""
    apart = 1
    while apart < order:
        a, b = x.unflatten(-1, (-1, 2, apart)).unbind(-2)
        x = torch.stack((a + b, a - b), -2).flatten(-3)
        apart *= 2
    return x


def pages_of(pages: Tensor, packing: Packing) -> tuple[Tensor, ...]:
    """(codes, words of scale and offset, nvfp4's scales) [P, H, page, their bytes], views of pages uint8 [P, H, page,
    row bytes].

    Inside a page the codes of all its tokens stand first, so that they are aligned, then all words, then all scales.
    """
    channels = packing.channels(pages.shape[3])
    bytes_ = [packing.code_bytes(channels), WORD, packing.step_bytes(channels)]
    parts = pages.view(*pages.shape[:2], -1).split([pages.shape[2] * n for n in bytes_], 2)
    return tuple(part.unflatten(2, (pages.shape[2], n)) for part, n in zip(parts, bytes_, strict=True) if n)


@functools.cache
def signs_of(channels: int) -> tuple[int, ...]:
    """1 or -1 for each channel: the highest bit of a hash of its number, which kernels compute as well."""
    found = []
    for channel in range(channels):
        bits = (channel + 1) * 0x9E3779B1 & 0xFFFFFFFF
        bits = (bits ^ bits >> 15) * 0x85EBCA77 & 0xFFFFFFFF
        found.append(1 - 2 * (bits >> 31))
    return tuple(found)


def _bf16(x: Tensor) -> Tensor:
    return x.bfloat16().float()


def _divided(x: Tensor, by: float) -> Tensor:
    # by a tensor of x's device: by a number torch on a GPU multiplies with its inverse, which is not the same
    return x / x.new_full((), by)


def _floored(scale: Tensor) -> Tensor:
    # by comparison, which leaves NaN what it is
    rounded = _bf16(scale)
    return torch.where(rounded < TINY, TINY, rounded)


def _joined(codes: Tensor, bits: int) -> Tensor:
    """Bytes of codes: neighbours stand 16 bits apart in a word of 32, so that kernels take two out by one mask."""
    if bits == 8:
        return codes.unflatten(-1, (-1, 2, 2)).transpose(-1, -2).flatten(-3)
    low, high = codes.unflatten(-1, (-1, 2, 2, 2)).unbind(-2)  # word, half of its channels, pair, which of it
    return (low | high << 4).transpose(-1, -2).flatten(-3)


def _spread(bytes_: Tensor, bits: int) -> Tensor:
    """The inverse of `_joined`."""
    halves = bytes_.unflatten(-1, (-1, 2, 2)).transpose(-1, -2)
    return halves.flatten(-3) if bits == 8 else torch.stack((halves & 15, halves >> 4), -2).flatten(-4)
