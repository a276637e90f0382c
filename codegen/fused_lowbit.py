"""Low-bit weights of products: as the template `lowbit` reads them, or decoded for torch's product."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import fx

from llmopt.codegen.fused_region import Argument, FusedRegion, dtype_of
from llmopt.codegen.kernel import Buffer, Call, Prepared, Scalar
from llmopt.codegen.lowbit_layout import ROWS, constants, lay
from llmopt.codegen.printer import TYPES
from llmopt.compiler.emittable import argument
from llmopt.compiler.errors import EmitError
from llmopt.compiler.quant.schemes import Scheme, scheme_of
from llmopt.compiler.quant.storage import types_of

_RESULTS = ("words", "scales", "factor")


def scheme(product: fx.Node) -> str:
    """What a quantized_linear's weights are kept in."""
    return str(argument(product, "scheme", ""))


def laid_weight(
    region: FusedRegion, product: fx.Node, offsets: tuple[int, ...]
) -> tuple[list[Argument], dict[str, Scalar]]:
    """The kernel's first arguments, a weight that is laid out once, and what it is told of the scheme.

    Raises EmitError: a part of the result does not begin with a stripe of rows.
    """
    for offset in offsets:
        if offset % ROWS:
            raise EmitError(f"{product.name}: its row {offset} begins a part; wanted a multiple of {ROWS}")
    kind = scheme_of(scheme(product))
    told: tuple[tuple[str, Scalar], ...] = ("scheme", kind.name), ("columns", _columns(product))
    made = Prepared("lowbit", tuple(_stored(region, product)), told, _RESULTS)
    region.prepared.append(made)
    types = _types(kind)
    given: list[Argument] = [
        (name, types[of], None if types[of] is None else f"prepared{len(region.prepared) - 1}.{of}")
        for name, of in zip(("w", "scales", "factor"), _RESULTS, strict=True)
    ]
    return given, {**constants(kind)}


def decoded_weight(region: FusedRegion, product: fx.Node) -> str:
    """Where the weight lies in the dtype of what it multiplies: a temporary, which a call made so far fills."""
    packed, x = product.args[1:2], product.args[0]
    rows = packed[0].meta["val"].shape[0]  # type: ignore[union-attr]
    place = region.temporary(Buffer((rows, _columns(product)), dtype_of(x)))  # type: ignore[arg-type]
    args = (*_stored(region, product), place)
    region.calls.append(Call(args, op="dequantize", constants=(("scheme", scheme(product)),)))
    return place


def _columns(product: fx.Node) -> int:
    return int(product.args[0].meta["val"].shape[-1])  # type: ignore[union-attr]


def _stored(region: FusedRegion, product: fx.Node) -> list[str | None]:
    """Where codes, scales, global scale and zero points lie."""
    return [region.argument(part) if isinstance(part, fx.Node) else None for part in product.args[1:5]]


@functools.cache
def _types(kind: Scheme) -> dict[str, str | None]:
    """The types of pointers to what `lay` makes, as a small weight shows."""
    parts: dict[str, Any] = {
        name: torch.zeros(shape, dtype=torch.uint8).to(dtype)
        for name, (shape, dtype) in types_of(kind, kind.rows or 1, kind.group or 1).items()
    }
    laid = lay(
        parts["packed"], parts["scales"], parts.get("global_scale"), parts.get("zero_points"), kind, kind.group or 1
    )
    found = {name: getattr(laid, name) for name in _RESULTS}
    return {name: None if tensor is None else TYPES[tensor.dtype] for name, tensor in found.items()}
