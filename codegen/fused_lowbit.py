"""Low-bit weights of products, laid out once: as the template `lowbit` multiplies them, or decoded for torch."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import fx

from llmopt.codegen.fused_region import Argument, FusedRegion, call_of, config_of, dtype_of, type_of
from llmopt.codegen.kernel import Buffer, Prepared, Scalar
from llmopt.codegen.lowbit_layout import ROWS, constants, in_order, lay
from llmopt.codegen.printer import TYPES
from llmopt.compiler.emittable import argument, weight_of
from llmopt.compiler.errors import EmitError
from llmopt.compiler.quant.schemes import Scheme, scheme_of
from llmopt.compiler.quant.storage import types_of

aten = torch.ops.aten
_RESULTS = {"w": "words", "scales": "scales", "factor": "factor"}  # of `lay`, by the kernels' names of them


def scheme(product: fx.Node) -> str:
    """What a quantized_linear's weights are kept in."""
    return str(argument(product, "scheme", ""))


def laid_weight(region: FusedRegion, product: fx.Node) -> tuple[list[Argument], dict[str, Scalar]]:
    """A kernel's first arguments, a weight that is laid out once, and what it is told of the scheme."""
    kind = scheme_of(scheme(product))
    stored = tuple(region.argument(part) if isinstance(part, fx.Node) else None for part in product.args[1:5])
    told: tuple[tuple[str, Scalar], ...] = ("scheme", kind.name), ("columns", columns(product))
    region.prepared.append(Prepared("lowbit", stored, told, tuple(_RESULTS.values())))
    types, place = types_of_laid(kind), f"prepared{len(region.prepared) - 1}"
    given: list[Argument] = [
        (name, types[of], None if types[of] is None else f"{place}.{of}") for name, of in _RESULTS.items()
    ]
    return given, {**constants(kind)}


def ordered_operand(region: FusedRegion, product: fx.Node) -> fx.Node:
    """The product's operand in the order that wgmma wants, made by a kernel added here."""
    x: Any = product.args[0]
    parts, order = in_order(scheme_of(scheme(product)))
    value, last = x.meta["val"], x.meta["val"].dim() - 1
    axes = [*range(last + 1), *(last + 1 + axis for axis in order)]
    steps = (
        (aten.unflatten.int, (last, [columns(product) // math.prod(parts), *parts])),
        (aten.permute.default, (axes,)),
        (aten.flatten.using_ints, (last,)),
    )
    with region.graph.fx.inserting_before(product):
        for op, arguments in steps:
            x, value = region.graph.fx.call_function(op, (x, *arguments)), op(value, *arguments)
            x.meta["val"] = value
    place = region.temporary(region.buffer(x))
    region.rows({x: place}, region.tokens(product), early=True)
    region.stored[x] = place
    return x  # type: ignore[no-any-return]


def check_parts(product: fx.Node, offsets: tuple[int, ...]) -> None:
    """Raises EmitError: a part of the result does not begin with a stripe of rows."""
    for offset in offsets:
        if offset % ROWS:
            raise EmitError(f"{product.name}: its row {offset} begins a part; wanted a multiple of {ROWS}")


def decoded_weight(region: FusedRegion, product: fx.Node) -> str:
    """Where the weight lies in the dtype of what it multiplies: a temporary, which a kernel added here fills."""
    x: Any = product.args[0]
    packed = weight_of(product)[0]
    sizes = {"K": columns(product), "J": int(packed.meta["val"].shape[0])}
    place = region.temporary(Buffer((sizes["J"], sizes["K"]), dtype_of(x)))
    weight, told = laid_weight(region, product)
    config = config_of(region, "decoded:decoded", sizes, scheme(product))
    arguments: list[Argument] = [*weight, ("y", type_of(x), place)]
    region.calls.append(call_of("decoded:decoded", sizes, config, arguments, {**told, **sizes, "PDL": region.pdl}, {}))
    return place


def columns(product: fx.Node) -> int:
    """What a product sums over."""
    return int(product.args[0].meta["val"].shape[-1])  # type: ignore[union-attr]


@functools.cache
def types_of_laid(kind: Scheme) -> dict[str, str | None]:
    """The types of pointers to what `lay` makes, as a small weight shows."""
    width = kind.group or 1
    parts: dict[str, Any] = {
        name: torch.zeros(shape, dtype=torch.uint8).to(dtype)
        for name, (shape, dtype) in types_of(kind, kind.rows or 1, width).items()
    }
    more = parts.get("global_scale"), parts.get("zero_points")
    laid = lay(parts["packed"], parts["scales"], *more, kind, width)
    found = {name: getattr(laid, name) for name in _RESULTS.values()}
    return {name: None if tensor is None else TYPES[tensor.dtype] for name, tensor in found.items()}
