"""Prints the nodes around an anchor as the hooks of a kernel template.

Every tensor is a function of its coordinates: views change coordinates only, pointwise ops recurse, and what lies in
memory (`stored`) is loaded. All arithmetic on floats is in fp32, and a value is rounded where it is stored; so there
are fewer roundings than when torch runs the nodes one by one.

    operands = Operands(6)                                   # e0, e1, ... in order of first use, shared by the hooks
    load_x = load_x_hook(operands, x, stored)
    epilogue, offsets = epilogue_hook(operands, result, linear, stored)
    Kernel(
        "gemv:gemv",
        types=(("w", ...), ("y", ...), *operands.types(), ("N", "i32")),
        constants=(*operands.absent(), ("PARTS", len(offsets)), ...),
        hooks=(("LOAD_X", load_x.name), ("EPILOGUE", epilogue.name)),
        source=source_of(load_x, epilogue),
    )

Whole kernels without an anchor are made by `codegen/rows.py`. What cannot be printed raises EmitError;
`compiler/emittable.py` says beforehand, node by node, what can.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import fx

from llmopt.codegen import pointwise, reductions, views
from llmopt.codegen.index import ZERO, Factors, Index, sizes_of, split, variable
from llmopt.codegen.printer import Given, Lane, Operands, Print, Printer, Value, Variable
from llmopt.compiler.emittable import bias_of
from llmopt.compiler.errors import EmitError
from llmopt.compiler.graph import where

__all__ = [
    "Hook",
    "Operands",
    "epilogue_hook",
    "key_hook",
    "load_g_hook",
    "load_x_hook",
    "query_hook",
    "source_of",
]

PRINTERS: dict[str, Print] = {**views.PRINTERS, **pointwise.PRINTERS, **reductions.PRINTERS}
_FUNCTIONS = Path(__file__).parent / "templates" / "functions.py"


@dataclass(frozen=True)
class Hook:
    """A `@triton.jit` function: its name (unique by content), its source, and the helper functions it calls."""

    name: str
    source: str
    helpers: frozenset[str] = frozenset()


def source_of(*hooks: Hook) -> str:
    """A module with these hooks, each once, and what they need: what `Kernel.source` holds."""
    wanted = frozenset[str]().union(*(h.helpers for h in hooks))
    helpers = [text for name, (text, _) in _functions().items() if name in _closed(wanted)]
    parts = ["import triton\nimport triton.language as tl\n", *helpers, *dict.fromkeys(h.source for h in hooks)]
    return "\n\n".join(parts)


@functools.cache
def _functions() -> dict[str, tuple[str, frozenset[str]]]:
    """The helper functions in the order of their file: name -> (source, names it uses)."""
    text = _FUNCTIONS.read_text(encoding="utf-8")
    found: dict[str, tuple[str, frozenset[str]]] = {}
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef):
            used = frozenset(n.id for n in ast.walk(node) if isinstance(n, ast.Name))
            source = "\n".join(text.splitlines()[node.decorator_list[0].lineno - 1 : node.end_lineno])
            found[node.name] = (source + "\n", used)
    return found


def _closed(names: frozenset[str]) -> frozenset[str]:
    functions = _functions()
    every = names.union(*(functions[n][1] & functions.keys() for n in names))
    return every if every == names else _closed(every)


def hook_of(label: str, parameters: Sequence[str], lines: Sequence[str], helpers: Collection[str]) -> Hook:
    """The function `label_digest(parameters)` with these statements."""
    body = "".join(f"    {line}\n" for line in lines)
    head = f"({', '.join(parameters)}):\n"
    name = f"{label}_{hashlib.sha256((head + body).encode()).hexdigest()[:10]}"
    return Hook(name, f"@triton.jit\ndef {name}{head}{body}", frozenset(helpers))


def token_axis(node: fx.Node) -> int:
    """The one symbolic axis. Raises EmitError if there is none, or another number of them."""
    axes = [at for at, size in enumerate(sizes_of(node.meta["val"])) if size[1]]
    if len(axes) != 1 or sizes_of(node.meta["val"])[axes[0]][0] != 1:
        raise EmitError(f"{where(node)}: has shape {list(node.meta['val'].shape)}; wanted one symbolic axis, of tokens")
    return axes[0]


def per_token(node: fx.Node) -> int:
    """Elements of the node's value that belong to one token."""
    axis = token_axis(node)
    return int(functools.reduce(lambda n, s: n * s[0], _others(node, axis), 1))


def _others(node: fx.Node, axis: int) -> list[Factors]:
    return [size for at, size in enumerate(sizes_of(node.meta["val"])) if at != axis]


def token_coords(node: fx.Node, token: Index, element: Index) -> tuple[Index, ...]:
    """Where a token's element (its place in row-major order without the token axis) stands in the node's shape."""
    axis = token_axis(node)
    coords: list[Index] = []
    for size, _ in reversed(_others(node, axis)):
        element, at = split(element, size) if size > 1 else (element, ZERO)
        coords.insert(0, at)
    coords.insert(axis, token)
    return tuple(coords)


def load_x_hook(operands: Operands, x: fx.Node, stored: Collection[fx.Node]) -> Hook:
    """LOAD_X(m, k, ok, e0..e5) of the node x [1, N, K] (or any shape with the same elements a token): fp32, 0 where
    not ok.

    `stored` are the nodes that lie in memory and are loaded, not computed, besides the graph's inputs: temporaries
    that an earlier call wrote. With a norm in front of the linear, x is the norm's operand, not the norm.
    """
    size = per_token(x)
    m, k = variable("m", None), variable("k", size)
    printer = _printer(operands, {"m": Variable(m, None), "k": Variable(k, f"k < {size}")}, stored)
    value = printer.value(x, token_coords(x, m, k))
    return _masked(printer, "load_x", ("m", "k", "ok"), value)


def load_g_hook(operands: Operands, norm: fx.Node, stored: Collection[fx.Node]) -> Hook:
    """LOAD_G(k, ok, e0..e5) of an `rms_norm` node: its weight plus shift, fp32; ones if it has no weight."""
    size = per_token(norm)
    k = variable("k", size)
    printer = _printer(operands, {"k": Variable(k, "ok")}, stored)
    return _masked(printer, "load_g", ("k", "ok"), reductions.norm_weight(printer, norm, k))


def epilogue_hook(
    operands: Operands, result: fx.Node, anchor: fx.Node, stored: Collection[fx.Node]
) -> tuple[Hook, tuple[int, ...]]:
    """EPILOGUE(acc0, acc1, m, n, ok, e0..e5) of `result` as a function of the linear `anchor`, and the row offsets of
    the weight that acc0 and acc1 come from.

    (0,) for a plain result; (0, F) for `gated(split halves)`: PARTS is the length, OFFSET0 and OFFSET1 the values, J
    the elements of `result` a token. A bias is a node of its own. `result` may be the anchor
    itself. Raises EmitError if more than two parts, or another token's or column's product, are needed.
    """
    size = per_token(result)
    if any(s != (1, ()) for s in sizes_of(result.meta["val"])[: token_axis(result)]):
        raise EmitError(f"{where(result)}: has an axis ahead of the tokens; wanted a result [N, {size}] in memory")
    m, n = variable("m", None), variable("n", size)
    if bias_of(anchor) is not None:
        raise EmitError(f"{where(anchor)}: adds a bias itself; wanted it added by a node of its own")
    printer = _printer(operands, {"m": Variable(m, None), "n": Variable(n, f"n < {size}")}, stored)
    offsets: list[int] = []
    printer.given = {anchor: _product(anchor, m, n, offsets)}
    value = printer.tensor(printer.to_float(printer.value(result, token_coords(result, m, n))))
    lines = [*printer.lines, f"return {value.text}"]
    parameters = ("acc0", "acc1", "m", "n", "ok", *operands.names())
    return hook_of("epilogue", parameters, lines, printer.helpers), tuple(offsets) or (0,)


def _product(anchor: fx.Node, m: Index, n: Index, offsets: list[int]) -> Given:
    """The anchor's value from the accumulators; `offsets` gathers which columns those must hold."""
    axis = token_axis(anchor)

    def product(coords: tuple[Index, ...]) -> Value:
        away = coords[-1] + n * -1
        if away.terms or coords[axis] != m:
            raise EmitError(f"{where(anchor)}: column {coords[-1]} of token {coords[axis]} is wanted for column n of m")
        if away.constant not in offsets:
            offsets.append(away.constant)
        if len(offsets) > 2:
            raise EmitError(f"{where(anchor)}: is wanted at columns n + {offsets}; wanted two parts at most")
        return Value(f"acc{offsets.index(away.constant)}", "float", frozenset({"m", "n"}))

    return product


def query_hook(operands: Operands, q: fx.Node, stored: Collection[fx.Node]) -> Hook:
    """LOAD_Q(n, h, d, ok, e0..e5) of q [1, Hq, N, D]: fp32 [H, D], n scalar, h [H, 1], d [1, D], 0 where not ok.

    Norms over the heads' channels are computed inside, over d.
    """
    heads = sizes_of(q.meta["val"])[1][0]
    return _head_hook("load_q", operands, q, stored, f"h < {heads}")


def key_hook(operands: Operands, k: fx.Node, stored: Collection[fx.Node]) -> Hook:
    """LOAD_K or LOAD_V(n, h, d, ok, e0..e5) of k or v [1, Hkv, N, D]: fp32 [1, D], n and h scalars, d [1, D]."""
    return _head_hook("load_k", operands, k, stored, "")


def _head_hook(label: str, operands: Operands, node: fx.Node, stored: Collection[fx.Node], heads: str) -> Hook:
    shape = sizes_of(node.meta["val"])
    if len(shape) != 4 or token_axis(node) != 2:
        raise EmitError(f"{where(node)}: has shape {list(node.meta['val'].shape)}; wanted [1, heads, tokens, channels]")
    size = shape[3][0]
    n, h, d = variable("n", None), variable("h", shape[1][0]), variable("d", size)
    is_whole = size >= 16 and size & (size - 1) == 0  # then the tile is as wide as a head
    variables = {
        "n": Variable(n),
        "h": Variable(h, heads),
        "d": Variable(d, "" if heads and is_whole else f"d < {size}"),
    }
    printer = _printer(operands, variables, stored, Lane("d", size))
    value = printer.value(node, (ZERO, h if shape[1][0] > 1 else ZERO, n, d))
    return _masked(printer, label, ("n", "h", "d", "ok"), value)


def _printer(
    operands: Operands, variables: dict[str, Variable], stored: Collection[fx.Node], lane: Lane | None = None
) -> Printer:
    return Printer(PRINTERS, operands, variables, stored, lane=lane)


def _masked(printer: Printer, label: str, parameters: tuple[str, ...], value: Value) -> Hook:
    """The function that returns the value, 0 where not `ok`."""
    value = printer.to_float(value)
    last = printer.lines[-1] if printer.lines else ""
    is_load = re.match(rf"{value.text} = tl\.load\([^#]*mask=ok, other=0\)", last) is not None
    text = value.text if is_load else f"tl.where(ok, {value.text}, 0.0)"
    return hook_of(label, (*parameters, *printer.operands.names()), [*printer.lines, f"return {text}"], printer.helpers)
