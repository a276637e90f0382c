"""Low-bit weights as the template `scaled` multiplies them: codes in rows, scales as tensor memory wants them.

    codes    uint8 [rows padded to 128, bytes of the columns]     packed as in storage, columns padded to 128 bytes
    scales   uint8 [tile of 128 rows, 4 scales of a row, 32, 4, 4]
    factor   float32 [1]     the tensor's global scale, if it has one

Of a tile and 4 neighbouring scales, that of row 32 * b + a stands at [a, b]: the layout that `tcgen05.cp` copies from
shared memory (PTX ISA, "Scale Factor Layout" of tcgen05.mma's block scaling; cuBLAS documents the same one as the
"1D Block Scaling Factors Layout"). Padding is zeros, which no product with finite scales changes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from llmopt.compiler.emittable import SCALED as PAIRS
from llmopt.compiler.errors import BuildError
from llmopt.compiler.quant.schemes import Scheme, scheme_of

__all__ = ["PAIRS", "ROWS", "Scaled", "constants", "lay_scaled", "padded", "tiled"]

ROWS, BYTES = 128, 128  # what rows and the bytes of a row are padded to


@dataclass(frozen=True)
class Scaled:
    """A weight in this form: see the module's docstring."""

    codes: Tensor
    scales: Tensor
    factor: Tensor | None


def padded(scheme: Scheme, columns: int) -> int:
    """Columns that rows are padded to."""
    whole = BYTES * 8 // scheme.element.bits
    return -(-columns // whole) * whole


def constants(scheme: Scheme, columns: int) -> dict[str, str | int]:
    """What the templates `scaled` and `rounded` are told of a scheme."""
    found: dict[str, str | int] = {"ELEMENT": scheme.element.name, "GROUP": scheme.group}
    return {**found, "FACTORS": int(scheme.has_global), "KP": padded(scheme, columns)}


def lay_scaled(
    packed: Tensor,
    scales: Tensor,
    global_scale: Tensor | None,
    zero_points: Tensor | None,
    scheme: Scheme | str,
    columns: int,
) -> Scaled:
    """Canonical storage (`compiler.quant`'s: packed uint8 [rows, .], scales [rows, groups], ...) in this form, where it
    lies. Raises BuildError: the scheme is none that scaled products take."""
    scheme = scheme_of(scheme) if isinstance(scheme, str) else scheme
    if (scheme.name, scheme.name) not in PAIRS or zero_points is not None:
        raise BuildError(f"scaled products take no weights in {scheme.name}")
    whole, rows = padded(scheme, columns), -packed.shape[0] % ROWS
    codes = F.pad(packed, (0, whole * scheme.element.bits // 8 - packed.shape[1], 0, rows))
    held = F.pad(scales.view(packed.dtype), (0, whole // scheme.group - scales.shape[1], 0, rows))
    factor = None if global_scale is None else global_scale.reshape(1).float()
    return Scaled(codes.contiguous(), tiled(held), factor)


def tiled(scales: Tensor) -> Tensor:
    """[rows, groups], multiples of 128 and 4, as tensor memory wants them: [tile, four groups, 32, 4, 4]."""
    rows, groups = scales.shape
    return scales.reshape(rows // 128, 4, 32, groups // 4, 4).permute(0, 3, 2, 1, 4).contiguous()
