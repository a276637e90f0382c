"""Codes of 4, 6 and 8 bits side by side in bytes, as compressed-tensors and ModelOpt lay them out."""

from __future__ import annotations

import torch
from torch import Tensor

from llmopt.compiler.errors import InputError


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes (uint8 [N, K], below 2**bits) in uint8 [N, K * bits / 8].

    4 bits: the even column is the low half of a byte. 6 bits: four codes in three bytes, the first one lowest. 8 bits:
    as they are. Raises `InputError` where K does not fill whole bytes (4 bits: even; 6 bits: a multiple of 4) and for
    other widths.
    """
    if bits == 8:
        return codes
    together = _together(bits)
    rows, columns = codes.shape
    if columns % together:
        raise InputError(
            f"{columns} columns of {bits}-bit codes fill no whole bytes; pad them to a multiple of {together}"
        )
    parts = codes.reshape(rows, columns // together, together).unbind(-1)
    if bits == 4:
        return parts[0] | (parts[1] << 4)
    a, b, c, d = parts
    three = (a | (b << 6), (b >> 2) | (c << 4), (c >> 4) | (d << 2))  # bits shifted out of a byte fall away
    return torch.stack(three, -1).reshape(rows, columns // 4 * 3)


def unpack(packed: Tensor, bits: int, columns: int) -> Tensor:
    """Codes (uint8 [N, columns]) of what `pack` made of at least as many columns; raises `InputError` as it does."""
    if bits == 8:
        return packed[:, :columns]
    together = _together(bits)
    rows = packed.shape[0]
    parts: tuple[Tensor, ...]
    if bits == 4:
        parts = (packed & 15, packed >> 4)
    else:
        a, b, c = packed.reshape(rows, packed.shape[1] // 3, 3).unbind(-1)
        parts = (a & 63, (a >> 6) | ((b & 15) << 2), (b >> 4) | ((c & 3) << 4), c >> 2)
    return torch.stack(parts, -1).reshape(rows, parts[0].shape[1] * together)[:, :columns]


def _together(bits: int) -> int:
    """How many codes fill whole bytes together."""
    wanted = {4: 2, 6: 4}
    if bits not in wanted:
        raise InputError(f"codes of {bits} bits cannot be packed; 4, 6 and 8 bits can")
    return wanted[bits]
