"""How a quantised weight W [N, K] is kept in a program: which tensors, of what shapes and dtypes.

W.packed         uint8 [N, bytes of a row]     codes, several a byte (`packing`)
W.scales         as `Scheme.scales_shape` says, in the scheme's dtype
W.global_scale   float32 [], NVFP4's alone
W.zero_points    uint8, as the scales, of asymmetric schemes
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmopt.compiler.quant.quantize import QuantizedTensor
from llmopt.compiler.quant.schemes import Scheme

PARTS = ("packed", "scales", "global_scale", "zero_points")


def types_of(scheme: Scheme, rows: int, columns: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of those of PARTS that a weight [rows, columns] has in this scheme."""
    scales = scheme.scales_shape(rows, columns)
    found: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        "packed": ((rows, scheme.padded(columns) * scheme.element.bits // 8), torch.uint8),
        "scales": (scales, scheme.scale_dtype),
    }
    if scheme.has_global:
        found["global_scale"] = (), torch.float32
    if not scheme.symmetric:
        found["zero_points"] = scales, torch.uint8
    return found


def parts_of(tensor: QuantizedTensor) -> dict[str, Tensor]:
    """What a program keeps of a quantised weight, by name."""
    found = {
        "packed": tensor.packed(), "scales": tensor.scales, "global_scale": tensor.global_scale,
        "zero_points": tensor.zero_points,
    }  # fmt: skip
    return {name: part.contiguous() for name, part in found.items() if part is not None}
