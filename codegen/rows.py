"""Kernels of the template `rows`: pointwise nodes and reductions over the last axis, without an anchor.

A kernel's rows are tokens, or the runs of a token's elements that a reduction spans (heads). Outputs that have the
same rows share a kernel, and what they have in common is computed once.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from torch import fx

from llmopt.codegen.emit import PRINTERS, Hook, hook_of, per_token, source_of, token_coords
from llmopt.codegen.index import Index, offset, opaque, sizes_of, split, variable
from llmopt.codegen.kernel import Call, Kernel, Size
from llmopt.codegen.printer import TYPES, Lane, Operands, Printer, Variable, closed
from llmopt.compiler.emittable import LONGEST_ROW, OPERANDS, OUTPUTS, op_name, reduced, why_not
from llmopt.compiler.errors import EmitError
from llmopt.compiler.graph import where

TILE = 1024  # elements of a tile, if rows are shorter


@dataclass
class _Kernel:
    """Outputs with the same rows: `rows` a token, of `width` elements; `reduces` if one program must hold a row."""

    rows: int
    width: int
    reduces: bool
    outputs: list[fx.Node] = field(default_factory=list)

    @property
    def block(self) -> int:
        """Columns of a program."""
        whole = 1 << (self.width - 1).bit_length()
        return whole if self.reduces else min(whole, TILE)

    @property
    def tile_rows(self) -> int:
        return max(1, TILE // self.block)

    @property
    def warps(self) -> int:
        return min(16, max(1, self.block * self.tile_rows // 512))


def rows_calls(
    outputs: Mapping[fx.Node, str],
    stored: Mapping[fx.Node, str],
    tokens: Size = "N",
    pdl: bool = False,
    by_token: Collection[fx.Node] = (),
    early: bool = False,
) -> list[Call]:
    """The calls that compute `outputs` from `stored`: one kernel for all outputs that can share rows.

    `outputs`: node -> the argument it is written to (`out0`, `tmp1`), contiguous in its fx shape. A `kv_write` node
    may be an output: then its value is scattered into the pages, and the argument is that of the pages (`in5`).
    Those in `by_token` are written token by token: q [1, Hq, N, D] as [N, Hq, D].
    `stored`: node -> argument (`in0`, `tmp0`) of what lies in memory; the walk from the outputs stops there.
    `early`: the kernel behind them may start while they run.
    `tokens` is the size behind the one symbolic axis of the nodes ("N", or "R" behind the selection of rows).
    Raises EmitError with the reason if a node cannot be printed.
    """
    kernels: list[_Kernel] = []
    # outputs with reductions first, so that pointwise ones may join their rows
    for node in sorted(outputs, key=lambda n: not _lengths(written(n), stored)):
        shape = _shape_of(node, stored)
        fits = [k for k in kernels if len(k.outputs) < OUTPUTS and _joins(shape, k)]
        if fits:
            fits[0].outputs.append(node)
        else:
            kernels.append(shape)
            shape.outputs.append(node)
    return [_call(kernel, outputs, stored, tokens, pdl, by_token, early) for kernel in kernels]


def written(output: fx.Node) -> fx.Node:
    """The node whose value an output holds: of a kv_write, what is written."""
    node = output.args[1] if op_name(output) == "kv_write" else output
    assert isinstance(node, fx.Node)
    return node


def _lengths(node: fx.Node, stored: Collection[fx.Node]) -> set[int]:
    """The lengths of the axes that are reduced on the way to this node. Raises EmitError for what is not printed."""
    found: set[int] = set()
    seen: set[fx.Node] = set()
    waiting = [node]
    while waiting:
        node = waiting.pop()
        if node in seen or node in stored or node.op != "call_function" or _is_size(node):
            continue
        seen.add(node)
        reason = why_not(node)
        if reason is not None:
            raise EmitError(f"{where(node)}: {reason}")
        length = reduced(node)
        if length is not None:
            found.add(length)
        waiting += node.all_input_nodes
    return found


def _is_size(node: fx.Node) -> bool:
    return op_name(node) in ("sym_size", "sym_numel")


def _shape_of(output: fx.Node, stored: Collection[fx.Node]) -> _Kernel:
    """The rows that one output by itself would have."""
    node = written(output)
    lengths, size = _lengths(node, stored), per_token(node)
    if not lengths:
        return _Kernel(1, size, reduces=False)
    if len(lengths) > 1:
        raise EmitError(f"{where(output)}: needs reductions over axes of {sorted(lengths)} elements; wanted one length")
    (length,) = lengths
    if length > LONGEST_ROW:
        raise EmitError(f"{where(output)}: reduces {length} elements; wanted {LONGEST_ROW} at most")
    whole = _Kernel(size // length, length, reduces=True, outputs=[output])
    if size % length == 0 and _prints(whole, stored):
        return _Kernel(whole.rows, length, reduces=True)
    return _Kernel(size, length, reduces=True)  # a reduction's result: its rows have one element


def _prints(kernel: _Kernel, stored: Collection[fx.Node]) -> bool:
    try:
        _body(kernel, Operands(OPERANDS["rows"]), stored)
    except EmitError:
        return False
    return True


def _joins(shape: _Kernel, kernel: _Kernel) -> bool:
    if shape.reduces:
        return (shape.rows, shape.width, True) == (kernel.rows, kernel.width, kernel.reduces)
    return shape.width == kernel.rows * kernel.width


def _call(
    kernel: _Kernel,
    outputs: Mapping[fx.Node, str],
    stored: Mapping[fx.Node, str],
    tokens: Size,
    pdl: bool,
    by_token: Collection[fx.Node],
    early: bool,
) -> Call:
    operands = Operands(OPERANDS["rows"])
    body = _body(kernel, operands, stored, by_token)
    targets = [o.args[0] if op_name(o) == "kv_write" else o for o in kernel.outputs]
    types = [(f"o{i}", TYPES[t.meta["val"].dtype]) for i, t in enumerate(targets)]  # type: ignore[union-attr]
    rows, block = kernel.tile_rows, kernel.block
    made = Kernel(
        "rows:rows",
        types=(*operands.types(), *types, ("N", "i32")),
        constants=(
            *operands.absent(),
            *((f"o{i}", None) for i in range(len(types), OUTPUTS)),
            ("ROWS_PER_TOKEN", kernel.rows),
            ("ROWS", rows),
            ("BLOCK", block),
            ("EARLY", early),
            ("PDL", pdl),
        ),
        hooks=(("BODY", body.name),),
        source=source_of(body),
        num_warps=kernel.warps,
        pdl=pdl,
    )
    count: Size = f"({tokens}) * {kernel.rows}"
    grid: tuple[Size, ...] = (f"cdiv({count}, {rows})", -(-kernel.width // block))
    args = [_argument(n, stored) for n in operands.nodes]
    return Call((*args, *(outputs[o] for o in kernel.outputs), tokens), made, grid)


def _argument(node: fx.Node, stored: Mapping[fx.Node, str]) -> str:
    if node not in stored:
        raise EmitError(f"{where(node)}: is read by a kernel; wanted it among what lies in memory")
    return stored[node]


def _body(kernel: _Kernel, operands: Operands, stored: Collection[fx.Node], by_token: Collection[fx.Node] = ()) -> Hook:
    width = kernel.width
    r, c = variable("r", None), variable("c", width)
    masked = width % kernel.block != 0
    variables = {"r": Variable(r, "rows_ok"), "c": Variable(c, f"c < {width}" if masked else "")}
    lane = Lane("c", width) if kernel.reduces else None
    printer = Printer(PRINTERS, operands, variables, stored, lane=lane, tokens="N")
    printer.lines = [f"ok = rows_ok & (c < {width})" if masked else "ok = rows_ok"]
    token, row = split(r, kernel.rows)
    for at, output in enumerate(kernel.outputs):
        _store(printer, kernel, output, f"o{at}", token, row, output in by_token)
    parameters = ("r", "c", "rows_ok", "N", *operands.names(), *(f"o{i}" for i in range(OUTPUTS)))
    return hook_of("rows", parameters, printer.lines, printer.helpers)


def _store(
    printer: Printer, kernel: _Kernel, output: fx.Node, pointer: str, token: Index, row: Index, by_token: bool
) -> None:
    node = written(output)
    size = kernel.width
    single = kernel.reduces and per_token(node) != kernel.rows * size
    element = row if single else row * size + variable("c", size)
    coords = token_coords(node, token, element)
    value = printer.value(node, coords)
    if op_name(output) == "kv_write":
        text = _slot(printer, output, coords)
    elif by_token:
        text = str(token * per_token(node) + element)
    else:
        text, _ = offset(coords, sizes_of(node.meta["val"]), "N")
    # a store takes the shape of its address; one element a row is stored by one lane
    mask, text = ("ok & (c == 0)", f"{text} + c * 0") if single else ("ok", text)
    printer.lines.append(f"tl.store({pointer} + {closed(text)}, {value.text}, mask={mask})")


def _slot(printer: Printer, output: fx.Node, coords: tuple[Index, ...]) -> str:
    """Where an element of a kv_write lies in the pages [P, H, page, D]."""
    pages, _, slots = output.args
    assert isinstance(pages, fx.Node)
    assert isinstance(slots, fx.Node)
    size = sizes_of(pages.meta["val"])[2][0]
    _, head, token, channel = coords
    slot = printer.value(slots, (token,))
    page, place = split(opaque(slot.text, None, slot.depends), size)
    text, _ = offset((page, head, place, channel), sizes_of(pages.meta["val"]), None)
    return text
