"""How reductions over the last axis are printed: over the tile's lane variable."""

from __future__ import annotations

from typing import Any

from torch import fx

from llmopt.codegen.index import Index, sizes_of, variable
from llmopt.codegen.printer import Print, Printer, Value, kind_of, number
from llmopt.compiler.emittable import argument, op_name
from llmopt.compiler.errors import EmitError
from llmopt.compiler.graph import where

Coords = tuple[Index, ...]


class _Row:
    """The reduced axis of one operand, and the reductions over it."""

    def __init__(self, p: Printer, node: fx.Node, row: Coords) -> None:
        source = node.args[0]
        assert isinstance(source, fx.Node)
        size, lane = sizes_of(source.meta["val"])[-1][0], p.lane
        if lane is None or lane.size != size or any(lane.name in index.depends for index in row):
            raise EmitError(
                f"{where(node)}: reduces an axis of {size} elements; wanted one that lies along the tile "
                f"({'which has none' if lane is None else f'{lane.size} elements'})"
            )
        self.p, self.lane, self.size, self.source = p, lane, size, source
        self.row = row

    def at(self, index: Index) -> Value:
        """The operand in fp32 (ints stay ints)."""
        value = self.p.value(self.source, (*self.row, index))
        return value if value.kind == "int" else self.p.to_float(value)

    def along(self) -> Value:
        """The operand along the lane."""
        with self.p.anywhere(self.lane.name):
            return self.at(variable(self.lane.name, self.size))

    def reduce(self, value: Value, function: str, neutral: str) -> Value:
        """tl.sum and the like over the lane; masked lanes count as `neutral`."""
        mask = self.p.variables[self.lane.name].mask
        if mask or self.lane.name not in value.depends:
            inside = mask or f"{self.lane.name} >= 0"
            value = self.p.assign(f"tl.where({inside}, {value.text}, {neutral})", value.kind, value)
        text = f"tl.{function}({value.text}, axis={self.lane.axis}, keep_dims=True)"
        result = self.p.assign(text, value.kind, value)
        return Value(result.text, result.kind, result.depends - {self.lane.name})

    def sum(self, value: Value) -> Value:
        return self.reduce(value, "sum", "0" if value.kind == "int" else "0.0")

    def mean(self, value: Value) -> Value:
        return self.p.assign(f"{self.sum(value).text} / {self.size}.0", "float", self._row_wise(value))

    def _row_wise(self, value: Value) -> Value:
        return Value(value.text, value.kind, value.depends - {self.lane.name})

    def squares(self, centre: Value | None = None) -> Value:
        """Sum of squares (of distances from the centre)."""
        x = self.along()
        if centre is not None:
            x = self.p.assign(f"{x.text} - {centre.text}", "float", x, centre)
        return self.sum(self.p.assign(f"{x.text} * {x.text}", "float", x))


def _rms_norm(p: Printer, node: fx.Node, coords: Coords) -> Value:
    weight: Any = node.args[1]
    row = _Row(p, node, coords[:-1])
    squares = row.squares()
    scale = p.assign(
        f"tl.rsqrt({squares.text} / {row.size}.0 + {number(argument(node, 'eps', 0.0))})", "float", squares
    )
    x = row.at(coords[-1])
    normed = p.assign(f"{x.text} * {scale.text}", "float", x, scale)
    if weight is None:
        return normed
    w = norm_weight(p, node, coords[-1])
    return p.assign(f"{normed.text} * {w.text}", "float", normed, w)


def norm_weight(p: Printer, node: fx.Node, channel: Index) -> Value:
    """Weight plus shift of an rms_norm at one channel; 1.0 if it has none."""
    weight: Any = node.args[1]
    if weight is None:
        return Value("1.0", "float", literal=True)
    w = p.to_float(p.value(weight, (channel,)))
    shift = argument(node, "shift", 0.0)
    return p.assign(f"{w.text} + {number(shift)}", "float", w) if shift else w


def _layer_norm(p: Printer, node: fx.Node, coords: Coords) -> Value:
    row = _Row(p, node, coords[:-1])
    mean = row.mean(row.along())
    squares = row.squares(mean)
    eps = number(argument(node, "eps", 1e-5))
    scale = p.assign(f"tl.rsqrt({squares.text} / {row.size}.0 + {eps})", "float", squares)
    x = row.at(coords[-1])
    result = p.assign(f"({x.text} - {mean.text}) * {scale.text}", "float", x, mean, scale)
    for name, sign in (("weight", "*"), ("bias", "+")):
        tensor = argument(node, name, None)
        if tensor is not None:
            w = p.to_float(p.value(tensor, (coords[-1],)))
            result = p.assign(f"{result.text} {sign} {w.text}", "float", result, w)
    return result


def _softmax(p: Printer, node: fx.Node, coords: Coords) -> Value:
    row = _Row(p, node, coords[:-1])
    along = p.to_float(row.along())
    top = row.reduce(along, "max", 'float("-inf")')
    total = row.sum(p.assign(f"tl.exp({along.text} - {top.text})", "float", along, top))
    x = p.to_float(row.at(coords[-1]))
    if op_name(node) in ("log_softmax", "_log_softmax"):
        return p.assign(f"{x.text} - {top.text} - tl.log({total.text})", "float", x, top, total)
    return p.assign(f"tl.exp({x.text} - {top.text}) / {total.text}", "float", x, top, total)


def _row(p: Printer, node: fx.Node, coords: Coords) -> _Row:
    return _Row(p, node, coords[:-1] if argument(node, "keepdim", False) else coords)


def _mean(p: Printer, node: fx.Node, coords: Coords) -> Value:
    row = _row(p, node, coords)
    return row.mean(p.to_float(row.along()))


def _sum(p: Printer, node: fx.Node, coords: Coords) -> Value:
    row = _row(p, node, coords)
    value = row.sum(row.along() if kind_of(node) == "int" else p.to_float(row.along()))
    return value if value.kind == kind_of(node) else p.assign(f"{value.text}.to(tl.int64)", "int", value)


def _extreme(p: Printer, node: fx.Node, coords: Coords) -> Value:
    row = _row(p, node, coords)
    largest = op_name(node) == "amax"
    value = p.to_float(row.along())
    return row.reduce(value, "max" if largest else "min", f'float("{"-" if largest else ""}inf")')


def _var(p: Printer, node: fx.Node, coords: Coords) -> Value:
    row = _row(p, node, coords)
    squares = row.squares(row.mean(row.along()))
    unbiased = 1 if argument(node, "unbiased", True) else 0
    correction = argument(node, "correction", None)
    count = row.size - (unbiased if correction is None else correction)
    value = p.assign(f"{squares.text} / {number(float(count))}", "float", squares)
    return value if op_name(node) == "var" else p.assign(f"tl.sqrt({value.text})", "float", value)


def _norm(p: Printer, node: fx.Node, coords: Coords) -> Value:
    squares = _row(p, node, coords).squares()
    return p.assign(f"tl.sqrt({squares.text})", "float", squares)


PRINTERS: dict[str, Print] = {
    "rms_norm": _rms_norm,
    "layer_norm": _layer_norm,
    **dict.fromkeys(("softmax", "_softmax", "log_softmax", "_log_softmax"), _softmax),
    "mean": _mean,
    "sum": _sum,
    **dict.fromkeys(("amax", "amin"), _extreme),
    **dict.fromkeys(("var", "std"), _var),
    "linalg_vector_norm": _norm,
}
