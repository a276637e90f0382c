"""Online rotations: one kernel in every class, with the pointwise nodes that make what it turns."""

from __future__ import annotations

import math

from torch import fx

from llmopt.codegen.emit import load_x_hook, per_token, token_axis
from llmopt.codegen.fused_region import (
    Argument,
    FusedRegion,
    call_of,
    config_of,
    dtype_of,
    for_tokens,
    passed,
    type_of,
)
from llmopt.codegen.kernel import Prepared, Scalar
from llmopt.codegen.printer import Operands
from llmopt.codegen.rotation_layout import sides

MANY_TOKENS = 1024  # what constants for class many are chosen for


def rotation(region: FusedRegion, node: fx.Node, place: str, tokens: int) -> None:
    """Add the kernel that computes `rotate` nodes such as this one, into `place`, for so many tokens at most."""
    x, count = node.args[0], region.tokens(node)
    assert isinstance(x, fx.Node)
    sizes = {**sizes_of(node), "N": tokens}
    config = config_of(region, "rotated:rotated", sizes, dtype_of(node))
    operands = Operands()
    load_x = load_x_hook(operands, x, region.stored)
    arguments: list[Argument] = [
        *signs_of(region, node),
        ("y", type_of(node), place),
        *passed(region, operands),
        ("N", "i32", count),
    ]
    inner = math.prod(size for size in node.meta["val"].shape[token_axis(node) + 1 :])
    told: dict[str, Scalar] = {
        **sizes_of(node),
        "INNER": inner,
        "ORDER": region.ordered.get(place, 0),
        "PDL": region.pdl,
    }
    call = call_of("rotated:rotated", sizes, config, arguments, told, {"LOAD_X": load_x})
    region.calls.append(for_tokens(count, call))


def sizes_of(node: fx.Node) -> dict[str, int]:
    """A, B and BLOCKS a token of a `rotate` node."""
    a, b = sides(*(len(factor.meta["val"]) for factor in node.args[1:3]))  # type: ignore[union-attr]
    return {"A": a, "B": b, "BLOCKS": per_token(node) // (a * b)}


def signs_of(region: FusedRegion, node: fx.Node) -> list[Argument]:
    """A kernel's first arguments: the factors as signs, made once."""
    item = Prepared("rotation", tuple(region.argument(n) for n in node.args[1:3]), (), ("left", "right"))  # type: ignore[arg-type]
    if item not in region.prepared:
        region.prepared.append(item)
    at = f"prepared{region.prepared.index(item)}"
    alone = sizes_of(node)["A"] == 1
    return [("left", None, None) if alone else ("left", "*i8", f"{at}.left"), ("right", "*i8", f"{at}.right")]
