"""Products of low-bit weights with activations in the same format: one kernel rounds x, with its norm or its
rotation, one multiplies.

They serve decoding and prompts alike, where the target has instructions for such products; see `emittable.SCALED`. What
the kernels' hooks do not take is made by kernels over rows before or behind them, and noted.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from llmopt.codegen.emit import epilogue_hook, load_g_hook, load_x_hook, per_token
from llmopt.codegen.fused_lowbit import columns, scheme
from llmopt.codegen.fused_region import (
    Argument,
    FusedRegion,
    call_of,
    calls_any,
    config_of,
    for_tokens,
    operand,
    passed,
    scratch_of,
    template_of,
    type_of,
)
from llmopt.codegen.fused_rotation import rotation, signs_of, sizes_of
from llmopt.codegen.kernel import Buffer, Call, Prepared, Scalar
from llmopt.codegen.printer import Operands
from llmopt.codegen.scaled_layout import ROWS, constants, padded
from llmopt.compiler.emittable import argument
from llmopt.compiler.errors import EmitError
from llmopt.compiler.quant.schemes import Scheme, scheme_of


def is_scaled(product: fx.Node) -> bool:
    """Does this product round its activations, too? Fuse leaves only such ones to kernels as these take."""
    return calls_any(product, {"quantized_linear"}) and bool(argument(product, "activations", ""))


def scaled_product(region: FusedRegion, tokens: int) -> None:
    """The calls of a region with such a product, for steps of so many tokens at most."""
    (linear,) = region.products()
    result = region.result()
    try:
        x = _rounded(region, linear, *operand(linear), tokens)
    except EmitError as error:
        region.notes.append(f"a kernel over rows makes what is rounded: {error}")
        made: Any = linear.args[0]
        place = region.temporary(region.buffer(made))
        region.rows({made: place}, region.tokens(made))
        region.stored[made] = place  # from here on: a kernel does not make what is there already
        x = _rounded(region, linear, made, None, tokens)
    try:
        region.calls.append(_product(region, linear, result, x, "out0", tokens))
    except EmitError as error:
        region.notes.append(f"a kernel over rows makes the result: {error}")
        place = region.temporary(region.buffer(linear))
        region.calls.append(_product(region, linear, linear, x, place, tokens))
        region.stored[linear] = place
        region.rows({result: "out0"}, region.tokens(linear))


def _rounded(
    region: FusedRegion, linear: fx.Node, x: fx.Node, norm: fx.Node | None, tokens: int
) -> dict[str, str | None]:
    """Add the kernel that rounds x; where codes, scales and global scales are, by their names in the next kernel."""
    kind, count = _scheme(linear), region.tokens(linear)
    if calls_any(x, {"rotate"}) and x not in region.stored:
        return _turned(region, linear, x, tokens)
    sizes = {"K": columns(linear), "KP": padded(kind, columns(linear)), "NORM": int(norm is not None), "N": tokens}
    config = config_of(region, "rounded:rounded", sizes, kind.name)
    operands = Operands()
    hooks = {
        "LOAD_X": load_x_hook(operands, x, region.stored),
        "LOAD_G": None if norm is None else load_g_hook(operands, norm, region.stored),
    }
    made, arguments, told = _codes(region, linear, tokens)
    told |= {
        "NORM": sizes["NORM"],
        "TWICE": int(norm is not None and _rounds_twice(norm)),
        "EPS": 0.0 if norm is None else float(norm.args[2]),  # type: ignore[arg-type]
    }
    call = call_of("rounded:rounded", sizes, config, [*arguments, *passed(region, operands)], told, hooks)
    region.calls.append(for_tokens(count, call))
    return made


def _turned(region: FusedRegion, linear: fx.Node, x: fx.Node, tokens: int) -> dict[str, str | None]:
    """As `_rounded` for a `rotate`, which the same kernel computes; where it cannot, one ahead of it does."""
    kind, count = _scheme(linear), region.tokens(linear)
    own = sizes_of(x)
    more = {"K": columns(linear), "KP": padded(kind, columns(linear)), "GROUP": kind.group, "N": tokens}
    sizes = {**own, **more, "FACTORS": int(kind.has_global)}
    try:
        config = config_of(region, "rotated_codes:rotated_codes", sizes, kind.name)
    except EmitError as error:
        region.notes.append(f"rotated by a kernel ahead of the one that rounds: {error}")
        place = region.temporary(region.buffer(x))
        rotation(region, x, place, tokens)
        region.stored[x] = place
        return _rounded(region, linear, x, None, tokens)
    operands = Operands()
    hooks = {"LOAD_X": load_x_hook(operands, x.args[0], region.stored)}  # type: ignore[arg-type]
    made, arguments, told = _codes(region, linear, tokens)
    arguments = [*signs_of(region, x), *arguments, *passed(region, operands)]
    call = call_of("rotated_codes:rotated_codes", sizes, config, arguments, {**told, **own}, hooks)
    region.calls.append(for_tokens(count, call))
    return made


def _codes(
    region: FusedRegion, linear: fx.Node, tokens: int
) -> tuple[dict[str, str | None], list[Argument], dict[str, Scalar]]:
    """Temporaries for what a kernel rounds, by their names in the next kernel; they as arguments; what it is told."""
    kind, count = _scheme(linear), region.tokens(linear)
    width = padded(kind, columns(linear))
    tiled = template_of("scaled:scaled").tiled(tokens, region.target)
    rows = f"cdiv({count}, {ROWS}) * {ROWS}" if tiled else count
    made = {
        "x": region.temporary(Buffer((count, width * kind.element.bits // 8), "uint8")),
        "x_scales": region.temporary(Buffer((rows, width // kind.group), "uint8")),
        "x_factor": region.temporary(Buffer((count,), "float32")) if kind.has_global else None,
    }
    places = zip(("codes", "scales", "factor"), ("*u8", "*u8", "*fp32"), made.values(), strict=True)
    arguments: list[Argument] = [(name, None if at is None else type_, at) for name, type_, at in places]
    told: dict[str, Scalar] = {"K": columns(linear), "TILED": int(tiled), "PDL": region.pdl}
    told |= constants(kind, columns(linear))
    return made, arguments, told


def _rounds_twice(norm: fx.Node) -> bool:
    """Does this `rms_norm` round to bf16 before the product with its weight?"""
    dtype = norm.args[0].meta["val"].dtype  # type: ignore[union-attr]
    return dtype == torch.bfloat16 and norm.args[1] is not None and not argument(norm, "late_cast", False)


def _product(
    region: FusedRegion, linear: fx.Node, result: fx.Node, x: Mapping[str, str | None], place: str, tokens: int
) -> Call:
    kind, count = _scheme(linear), region.tokens(linear)
    operands = Operands()
    epilogue, offsets = epilogue_hook(operands, result, linear, region.stored)
    for offset in offsets:
        if offset % ROWS:
            raise EmitError(f"{linear.name}: its row {offset} begins a part; wanted a multiple of {ROWS}")
    sizes = {"K": columns(linear), "J": per_token(result), "PARTS": len(offsets), "N": tokens}
    config = config_of(region, "scaled:scaled", sizes, kind.name)
    types = {"x": _codes_type(kind), "x_scales": _scales_type(kind), "x_factor": "*fp32"}
    arguments: list[Argument] = [
        *_weight(region, linear),
        *((name, None if at is None else types[name], at) for name, at in x.items()),
        ("y", type_of(result), place),
        *passed(region, operands),
        ("N", "i32", count),
        *scratch_of(region, "scaled:scaled", sizes, config),
    ]
    told: dict[str, Scalar] = {
        **constants(kind, columns(linear)),
        "J": sizes["J"],
        "OFFSET0": offsets[0],
        "OFFSET1": offsets[-1],
        "PARTS": sizes["PARTS"],
        "TILED": int(template_of("scaled:scaled").tiled(tokens, region.target)),
        "PDL": region.pdl,
    }
    return for_tokens(count, call_of("scaled:scaled", sizes, config, arguments, told, {"EPILOGUE": epilogue}))


def _weight(region: FusedRegion, linear: fx.Node) -> list[Argument]:
    """The kernel's first arguments: a weight that is laid out once."""
    kind = _scheme(linear)
    stored = tuple(region.argument(part) if isinstance(part, fx.Node) else None for part in linear.args[1:5])
    told: tuple[tuple[str, Scalar], ...] = ("scheme", kind.name), ("columns", columns(linear))
    item = Prepared("scaled", stored, told, ("codes", "scales", "factor"))
    if item not in region.prepared:
        region.prepared.append(item)
    at = f"prepared{region.prepared.index(item)}"
    factor: Argument = ("factor", "*fp32", f"{at}.factor") if kind.has_global else ("factor", None, None)
    return [("w", _codes_type(kind), f"{at}.codes"), ("scales", _scales_type(kind), f"{at}.scales"), factor]


def _scheme(linear: fx.Node) -> Scheme:
    return scheme_of(scheme(linear))


def _codes_type(kind: Scheme) -> str:
    return "*u8" if kind.element.bits == 4 else "*fp8e4nv"


def _scales_type(kind: Scheme) -> str:
    return "*fp8e4nv" if kind.scale == "e4m3" else "*u8"
