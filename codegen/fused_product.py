"""Products: one kernel in decoding, elsewhere torch's product between kernels over rows.

Where the region ends in a rotation, a kernel of its own follows; in class many it computes, too, what is between both.
"""

from __future__ import annotations

from dataclasses import replace

from torch import fx

from llmopt.codegen.emit import epilogue_hook, load_g_hook, load_x_hook, per_token
from llmopt.codegen.fused_lowbit import check_parts, columns, decoded_weight, laid_weight, ordered_operand, scheme
from llmopt.codegen.fused_region import (
    Argument,
    FusedRegion,
    call_of,
    calls_any,
    config_of,
    dtype_of,
    operand,
    passed,
    scratch_of,
    template_of,
    type_of,
)
from llmopt.codegen.fused_rotation import MANY_TOKENS, rotation
from llmopt.codegen.kernel import Call, Scalar
from llmopt.codegen.printer import Operands
from llmopt.compiler.emittable import keeps_order, op_name, weight_of
from llmopt.compiler.errors import EmitError
from llmopt.passes.fusible import base


def product(region: FusedRegion, tokens: int) -> None:
    """One kernel; where no template takes it, torch's product between two kernels over rows, and a note of it."""
    (linear,) = region.products()
    turn = _rotation(region)
    result, place = (region.result(), "out0") if turn is None else _ahead_of(region, turn)
    try:
        region.calls.append(_kernel(region, linear, result, place, tokens))
    except EmitError as error:
        if region.ordered:  # its neighbours count on it
            raise
        region.notes.append(f"torch multiplies, between kernels over rows: {error}")
        del region.calls[:], region.temporaries[:], region.prepared[:]
        many_product(region)
        return
    if turn is not None:
        region.stored[result] = place
        rotation(region, turn, "out0", tokens)


def _rotation(region: FusedRegion) -> fx.Node | None:
    result = region.result()
    return result if calls_any(result, {"rotate"}) else None


def _ahead_of(region: FusedRegion, turn: fx.Node) -> tuple[fx.Node, str]:
    """What a rotation turns, through views, and a temporary for it."""
    made = base(turn.args[0])  # type: ignore[arg-type]
    return made, region.temporary(region.buffer(made))


def _kernel(region: FusedRegion, linear: fx.Node, result: fx.Node, place: str, tokens: int) -> Call:
    x, norm = operand(linear)
    sizes = {"K": columns(linear), "N": tokens, "NORM": int(norm is not None)}
    if op_name(linear) == "quantized_linear":
        given = norm is None and region.place(x) in region.ordered
        ordered = given or template_of("lowbit").ordered(sizes, scheme(linear), region.target)
        sizes["ORDERED"] = int(ordered)
        if ordered and not given:
            sizes["NORM"], x, norm = 0, ordered_operand(region, linear), None
    operands = Operands()
    load_x = load_x_hook(operands, x, region.stored)
    load_g = load_g_hook(operands, norm, region.stored) if norm is not None else None
    epilogue, offsets = epilogue_hook(operands, result, linear, region.stored)
    sizes.update(J=per_token(result), PARTS=len(offsets))
    template, kind, weight, told = _weight(region, linear, tokens, offsets)
    config = config_of(region, template, sizes, kind)
    arguments: list[Argument] = [
        *weight,
        ("y", type_of(result), place),
        *passed(region, operands),
        ("N", "i32", region.tokens(linear)),
    ]
    if hasattr(template_of(template), "scratch"):
        arguments += scratch_of(region, template, sizes, config)
    constants: dict[str, Scalar] = {
        **told,
        **{k: size for k, size in sizes.items() if k != "N"},
        "OFFSET0": offsets[0],
        "OFFSET1": offsets[-1],
        "EPS": 0.0 if norm is None else float(norm.args[2]),  # type: ignore[arg-type]
        "PDL": region.pdl,
    }
    if template == "lowbit:lowbit":
        constants["ORDER"] = region.ordered.get(place, 0)
    hooks = {"LOAD_X": load_x, "LOAD_G": load_g, "EPILOGUE": epilogue}
    return call_of(template, sizes, config, arguments, constants, hooks)


def _weight(
    region: FusedRegion, linear: fx.Node, tokens: int, offsets: tuple[int, ...]
) -> tuple[str, str, list[Argument], dict[str, Scalar]]:
    """(template, the dtype or scheme it is tuned for, its first arguments, constants of the scheme)."""
    if op_name(linear) == "quantized_linear":
        check_parts(linear, offsets)
        return "lowbit:lowbit", scheme(linear), *laid_weight(region, linear)
    (weight,) = weight_of(linear)
    given: list[Argument] = [("w", type_of(weight), region.argument(weight))]
    return "gemv:gemv" if tokens == 1 else "gemm:gemm", dtype_of(weight), given, {}


def many_product(region: FusedRegion) -> None:
    """The operand made, torch's product, the result made; the first and last only where there is something to do."""
    (linear,) = region.products()
    x = linear.args[0]
    result, tokens = region.result(), region.tokens(linear)
    place = region.place(x)  # type: ignore[arg-type]
    if place is None:
        place = region.temporary(region.buffer(x))  # type: ignore[arg-type]
        region.rows({x: place}, tokens)  # type: ignore[dict-item]
    if op_name(linear) == "quantized_linear":
        taken = place, decoded_weight(region, linear)
    else:
        taken = place, region.argument(*weight_of(linear))
    turn = _rotation(region)
    if turn is not None:
        _product_and_turn(region, linear, taken, turn)
        return
    added = _added(region, linear)
    if added is not None:
        _product_and_sum(region, taken, added)
        return
    region.stored[linear] = "out0"
    alone = region.place(result) is not None
    if not alone:
        region.stored[linear] = region.temporary(region.buffer(linear))
    region.calls.append(Call((*taken, region.stored[linear]), op="linear"))
    if not alone:
        region.rows({result: "out0"}, tokens)


def _product_and_turn(region: FusedRegion, linear: fx.Node, taken: tuple[str, str], turn: fx.Node) -> None:
    place = region.temporary(region.buffer(linear))
    region.calls.append(Call((*taken, place), op="linear"))
    region.stored[linear] = place
    try:
        rotation(region, turn, "out0", MANY_TOKENS)
    except EmitError as error:
        region.notes.append(f"a kernel over rows makes what is turned: {error}")
        made, place = _ahead_of(region, turn)
        region.rows({made: place}, region.tokens(made))
        region.stored[made] = place
        rotation(region, turn, "out0", MANY_TOKENS)


def _product_and_sum(region: FusedRegion, taken: tuple[str, str], added: fx.Node) -> None:
    place = region.argument(added)
    region.calls.append(Call((*taken, place, "out0"), op="linear_add"))
    if added.meta["val"].dim() > 1 and place not in taken:
        first, *rest = region.outputs
        region.outputs = (replace(first, over=place), *rest)  # type: ignore[type-var, arg-type]


def _added(region: FusedRegion, linear: fx.Node) -> fx.Node | None:
    """What torch adds while it multiplies, if the result is linear + a residual or a bias; it is rounded once then."""
    total = _through_views(region.result())
    if not calls_any(total, {"add"}) or total.kwargs or len(total.args) != 2:
        return None
    terms = [n for n in total.args if isinstance(n, fx.Node)]
    others = [n for n in terms if _through_views(n) is not linear]
    if len(terms) != 2 or len(others) != 1 or region.place(others[0]) is None:
        return None
    value, wanted = others[0].meta["val"], linear.meta["val"]
    shape, product = [str(s) for s in value.shape], [str(s) for s in wanted.shape]
    fits = shape in (product, product[-1:]) and [str(s) for s in total.meta["val"].shape] == product
    return others[0] if fits and value.dtype == wanted.dtype == total.meta["val"].dtype else None


def _through_views(node: fx.Node) -> fx.Node:
    while keeps_order(node):
        node = node.args[0]  # type: ignore[assignment]
    return node
