"""How pointwise ops, constants and outer products are printed."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from llmopt.codegen.index import Index, opaque, sizes_of
from llmopt.codegen.printer import Kind, Print, Printer, Value, eval_literal, kind_of, literal
from llmopt.compiler.emittable import argument, op_name
from llmopt.compiler.errors import EmitError
from llmopt.compiler.graph import where

Coords = tuple[Index, ...]

# {0} is the operand, in fp32
_UNARY = {
    "exp": "tl.exp({0})", "exp2": "tl.exp2({0})", "log": "tl.log({0})", "log2": "tl.log2({0})",
    "sqrt": "tl.sqrt({0})", "rsqrt": "tl.rsqrt({0})", "reciprocal": "1.0 / {0}", "erf": "tl.erf({0})",
    "sigmoid": "1.0 / (1.0 + tl.exp(-{0}))", "floor": "tl.floor({0})", "ceil": "tl.ceil({0})",
}  # fmt: skip
_HELPERS = {"sin": "sine", "cos": "cosine", "tanh": "tanh", "silu": "silu"}  # in templates/functions.py
_COMPARE = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
_LOGICAL = {
    "logical_and": "&", "logical_or": "|", "logical_xor": "^", "bitwise_and": "&", "bitwise_or": "|", "bitwise_xor": "^"
}  # fmt: skip


def _float_unary(p: Printer, node: fx.Node, coords: Coords) -> Value:
    x = p.tensor(p.to_float(p.operand(node.args[0], node, coords)))
    name = op_name(node)
    return p.helper(_HELPERS[name], x) if name in _HELPERS else p.assign(_UNARY[name].format(x.text), "float", x)


def _joint(p: Printer, values: list[Value]) -> list[Value]:
    """The values in the kind that torch would compute with."""
    if any(v.kind == "float" for v in values):
        return [p.to_float(v) for v in values]
    if any(v.kind == "int" for v in values):
        return [_to_int(p, v) if v.kind == "bool" else v for v in values]
    return values


def _to_int(p: Printer, value: Value, dtype: str = "int64") -> Value:
    if value.literal:
        return Value(str(int(eval_literal(value.text))), "int", literal=True)
    return p.assign(f"{value.text}.to(tl.{dtype})", "int", value)


def _as_kind(p: Printer, value: Value, kind: Kind) -> Value:
    if value.kind == kind:
        return value
    if kind == "float":
        return p.to_float(value)
    return _to_int(p, value) if kind == "int" else p.assign(f"{p.tensor(value).text} != 0", "bool", value)


def _operands(p: Printer, node: fx.Node, coords: Coords, *args: Any) -> list[Value]:
    return [_as_kind(p, p.operand(a, node, coords), kind_of(node)) for a in args]


def _infix(p: Printer, a: Value, sign: str, b: Value, kind: Kind) -> Value:
    a = p.tensor(a) if b.literal else a
    return p.assign(f"{a.text} {sign} {b.text}", kind, a, b)


def _add(p: Printer, node: fx.Node, coords: Coords) -> Value:
    """Also sub and rsub, with their alpha."""
    name = op_name(node)
    a, b = _operands(p, node, coords, *(node.args[1::-1] if name == "rsub" else node.args[:2]))
    alpha = argument(node, "alpha", 1)
    scaled = a if name == "rsub" else b
    if alpha != 1:
        factor = _as_kind(p, literal(alpha, node), kind_of(node))
        scaled = _infix(p, scaled, "*", factor, kind_of(node))
    a, b = (scaled, b) if name == "rsub" else (a, scaled)
    return _infix(p, a, "+" if name == "add" else "-", b, kind_of(node))


def _mul(p: Printer, node: fx.Node, coords: Coords) -> Value:
    a, b = _operands(p, node, coords, *node.args[:2])
    return _infix(p, a, "&" if kind_of(node) == "bool" else "*", b, kind_of(node))


def _div(p: Printer, node: fx.Node, coords: Coords) -> Value:
    a, b = (p.to_float(v) for v in _operands(p, node, coords, *node.args[:2]))
    return _infix(p, a, "/", b, "float")


def _pow(p: Printer, node: fx.Node, coords: Coords) -> Value:
    (x,) = _operands(p, node, coords, node.args[0])
    exponent: Any = node.args[1]
    if exponent in (0.5, -0.5):
        return p.assign(f"tl.{'sqrt' if exponent > 0 else 'rsqrt'}({p.tensor(x).text})", "float", x)
    result = x = p.tensor(x)
    for _ in range(abs(int(exponent)) - 1):
        result = _infix(p, result, "*", x, x.kind)
    return result if exponent > 0 else p.assign(f"1.0 / {result.text}", "float", result)


def _neg(p: Printer, node: fx.Node, coords: Coords) -> Value:
    (x,) = _operands(p, node, coords, node.args[0])
    return p.assign(f"-{p.tensor(x).text}", x.kind, x)


def _abs(p: Printer, node: fx.Node, coords: Coords) -> Value:
    (x,) = _operands(p, node, coords, node.args[0])
    return p.assign(f"tl.abs({p.tensor(x).text})", x.kind, x)


def _compare(p: Printer, node: fx.Node, coords: Coords) -> Value:
    a, b = _joint(p, [p.operand(arg, node, coords) for arg in node.args[:2]])
    return _infix(p, a, _COMPARE[op_name(node)], b, "bool")


def _logical(p: Printer, node: fx.Node, coords: Coords) -> Value:
    a, b = (_as_kind(p, p.operand(arg, node, coords), kind_of(node)) for arg in node.args[:2])
    return _infix(p, a, _LOGICAL[op_name(node)], b, kind_of(node))


def _not(p: Printer, node: fx.Node, coords: Coords) -> Value:
    x = p.tensor(p.operand(node.args[0], node, coords))
    if kind_of(node) == "bool":
        return p.assign(f"{x.text} == 0", "bool", x)
    return p.assign(f"~{x.text}", "int", x)


def _where(p: Printer, node: fx.Node, coords: Coords) -> Value:
    condition = p.operand(node.args[0], node, coords)
    yes, no = _operands(p, node, coords, *node.args[1:3])
    return p.choose(condition, yes, no)


def _masked_fill(p: Printer, node: fx.Node, coords: Coords) -> Value:
    condition = p.operand(node.args[1], node, coords)
    no, yes = _operands(p, node, coords, node.args[0], node.args[2])
    return p.choose(condition, yes, no)


def _extreme(p: Printer, a: Value, sign: str, b: Value) -> Value:
    """The larger (`>`) or smaller (`<`) one; NaN if one is, as in torch."""
    a = p.tensor(a)
    return p.assign(f"tl.where(({a.text} {sign} {b.text}) | ({a.text} != {a.text}), {a.text}, {b.text})", a.kind, a, b)


def _maximum(p: Printer, node: fx.Node, coords: Coords) -> Value:
    a, b = _operands(p, node, coords, *node.args[:2])
    return _extreme(p, a, ">" if op_name(node) == "maximum" else "<", b)


def _clamp(p: Printer, node: fx.Node, coords: Coords) -> Value:
    (x,) = _operands(p, node, coords, node.args[0])
    name = op_name(node)
    low = 0 if name == "relu" else argument(node, "min", None)
    high = argument(node, "max", None)
    for bound, sign in ((low, ">"), (high, "<")):
        if bound is not None:
            x = _extreme(p, x, sign, *_operands(p, node, coords, bound))
    return x


def _gelu(p: Printer, node: fx.Node, coords: Coords) -> Value:
    x = p.tensor(p.to_float(p.operand(node.args[0], node, coords)))
    return p.helper("gelu_tanh" if argument(node, "approximate", "none") == "tanh" else "gelu", x)


def _gated(p: Printer, node: fx.Node, coords: Coords) -> Value:
    gate, up = _operands(p, node, coords, *node.args[:2])
    return _infix(p, p.helper(str(node.args[2]), p.tensor(gate)), "*", up, "float")


def _softcap(p: Printer, node: fx.Node, coords: Coords) -> Value:
    x, cap = _operands(p, node, coords, *node.args[:2])
    return _infix(p, p.helper("tanh", _infix(p, x, "/", cap, "float")), "*", cap, "float")


def _cast(p: Printer, node: fx.Node, coords: Coords) -> Value:
    """To another dtype: floats stay fp32, since only a store rounds."""
    x = p.operand(node.args[0], node, coords)
    kind = kind_of(node)
    if kind != "int":
        return _as_kind(p, x, kind)
    if isinstance(node.args[0], fx.Node) and node.args[0].meta["val"].dtype == node.meta["val"].dtype:
        return x
    return _to_int(p, x, str(node.meta["val"].dtype).removeprefix("torch."))


def _rope(p: Printer, node: fx.Node, coords: Coords) -> Value:
    """x [B, H, T, D] turned by cos, sin [B, T, R]: channel d pairs with d + R/2 below R/2, with d - R/2 up to R."""
    x, cos, sin = node.args
    assert isinstance(cos, fx.Node)
    *lead, channel = coords
    turned = sizes_of(cos.meta["val"])[-1][0]
    half = turned // 2
    channels = sizes_of(node.meta["val"])[-1][0]
    inside = None if channels == turned else p.condition(channel, f"< {turned}")
    plain = p.operand(x, node, coords)
    first = p.condition(channel, f"< {half}")
    partner = p.assign(f"tl.where({first.text}, {channel + half}, {channel + -half})", "int", depends=channel.depends)
    other = p.operand(x, node, (*lead, opaque(partner.text, channels, channel.depends)))
    other = p.choose(first, p.assign(f"-{other.text}", "float", other), other)
    with p.guarded(inside):
        c, s = (p.operand(n, node, (coords[0], coords[2], channel)) for n in (cos, sin))
    result = p.assign(f"{plain.text} * {c.text} + {other.text} * {s.text}", "float", plain, other, c, s)
    return result if inside is None else p.choose(inside, result, plain)


def _constant(p: Printer, node: fx.Node, coords: Coords) -> Value:
    name = op_name(node)
    if name in _FILLED:
        fill: Any = _FILLED[name]
    else:
        fill = argument(node, "s" if name == "scalar_tensor" else "fill_value", None)
    if not isinstance(fill, (bool, int, float)):
        raise EmitError(f"{where(node)}: is filled with {fill}; wanted a number")
    dtype: torch.dtype = node.meta["val"].dtype
    return literal(torch.tensor(fill).to(dtype).item(), node)


_FILLED = {"zeros": 0, "zeros_like": 0, "new_zeros": 0, "ones": 1, "ones_like": 1, "new_ones": 1}


def _arange(p: Printer, node: fx.Node, coords: Coords) -> Value:
    start, step = argument(node, "start", 0), argument(node, "step", 1)
    index = coords[0] * int(step) + int(start)
    if not index.terms:
        return _as_kind(p, literal(index.constant, node), kind_of(node))
    value = Value(f"({index})", "int", index.depends)
    return _as_kind(p, value, kind_of(node))


_CASTS = ("to", "_to_copy", "type_as", "clone", "contiguous", "alias", "detach", "lift_fresh_copy")

PRINTERS: dict[str, Print] = {
    **dict.fromkeys((*_UNARY, *_HELPERS), _float_unary),
    **dict.fromkeys(("add", "sub", "rsub"), _add),
    "mul": _mul,
    "div": _div,
    "pow": _pow,
    "neg": _neg,
    "abs": _abs,
    **dict.fromkeys(_COMPARE, _compare),
    **dict.fromkeys(_LOGICAL, _logical),
    **dict.fromkeys(("logical_not", "bitwise_not"), _not),
    "where": _where,
    "masked_fill": _masked_fill,
    **dict.fromkeys(("maximum", "minimum"), _maximum),
    **dict.fromkeys(("clamp", "clamp_min", "clamp_max", "relu"), _clamp),
    "gelu": _gelu,
    "gated": _gated,
    "softcap": _softcap,
    "rope": _rope,
    **dict.fromkeys(_CASTS, _cast),
    **dict.fromkeys((*_FILLED, "full", "full_like", "new_full", "scalar_tensor"), _constant),
    "arange": _arange,
}
