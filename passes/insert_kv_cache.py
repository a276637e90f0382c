"""insert_kv_cache: from the plain forward to a step over a paged KV cache. Exact.

    def forward(input_ids [B, T], position_ids [B, T])       def step(input_ids [1, N], position_ids [1, N], slots [N],
        ...                                                       seq_ids [N], block_tables [S, M], rows [R], pages...)
        o = attention(q, k, v, ...)                   =>         ...
        ...                                                      k_0 = kv_write(k_pages_0, k, slots)
        return linear(h, head)                                   v_0 = kv_write(v_pages_0, v, slots)
                                                                 o = attend(q, k_0, v_0, block_tables, seq_ids, ...)
                                                                 ...
                                                                 return linear(index_select(h, 1, rows), head), k_0, ...

The N tokens of a step stand side by side and may belong to any sequences. That is sound because, attention apart, the
graph treats tokens one by one (`rowwise.check_rowwise` proves it node by node), so B = 1 and T = N change nothing for a
token, and keys and values are all that later tokens need of earlier ones. A model that numbers its tokens itself
(`arange(T)`, `table[:T]`) instead of using position_ids is given the positions there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from llmopt.compiler import ops
from llmopt.compiler.graph import Graph, origin, target_name
from llmopt.compiler.pipeline import Context, Pass, PassStats
from llmopt.compiler.program import Program, StateSpec
from llmopt.compiler.propagate import propagate, symbolic_inputs
from llmopt.compiler.rowwise import check_rowwise
from llmopt.compiler.simplify import simplify

STEP_INPUTS: dict[str, tuple[int | str, ...]] = {
    "input_ids": (1, "N"),
    "position_ids": (1, "N"),
    "slots": ("N",),
    "seq_ids": ("N",),
    "block_tables": ("S", "M"),
    "rows": ("R",),
}


@dataclass(frozen=True)
class InsertKVCache(Pass):
    """Adds the graph `step` beside `forward`; see the module's docstring."""

    name: ClassVar[str] = "insert-kv-cache"
    requires: ClassVar[frozenset[str]] = frozenset({"raised"})
    ensures: ClassVar[frozenset[str]] = frozenset({"cached"})

    def run(self, program: Program, context: Context) -> PassStats:
        """Build `step`. Raises VerifyError naming the node that cannot be cached."""
        stats = PassStats()
        step = program.graph("forward").copy()
        step.name = "step"
        check_rowwise(step, use_positions(step))
        caches = _Caches(step, context.recipe.page_size)
        for index, node in enumerate(list(step.calls("attention"))):
            caches.insert(index, node)
            stats.record(self.name, node.name, origin(node).source)
        _select_rows(step, caches.rows, self.name)
        step.fx.output_node().args = ((step.outputs()[0], *caches.written),)
        program.state = tuple(caches.specs)
        symbols = symbolic_inputs(STEP_INPUTS)
        for spec in caches.specs:
            symbols.inputs[spec.name] = symbols.tensor(("P", *spec.shape), spec.dtype)
        propagate(step, symbols, program.weights)
        simplify(step)
        program.graphs["step"] = step
        return stats


class _Caches:
    """The inputs a step has beside tokens and positions, and the caches put in so far."""

    def __init__(self, step: Graph, page_size: int) -> None:
        self.step, self.page_size = step, page_size
        self.specs: list[StateSpec] = []
        self.written: list[fx.Node] = []
        self.last_input = step.inputs()[-1]
        self.positions = step.inputs()[1]
        self.slots, self.seq_ids, self.tables, self.rows = (
            self._input(n) for n in ("slots", "seq_ids", "block_tables", "rows")
        )

    def _input(self, name: str) -> fx.Node:
        with self.step.fx.inserting_after(self.last_input):
            self.last_input = self.step.fx.placeholder(name)
        return self.last_input

    def insert(self, index: int, node: fx.Node) -> None:
        """Replace one attention by two writes and an attend."""
        q, k, v, sinks, scale, window, softcap = node.args
        pages = []
        for letter, source in (("k", k), ("v", v)):
            value = source.meta["val"]  # type: ignore[union-attr]
            spec = StateSpec(
                f"{letter}_pages_{index}", (int(value.shape[1]), self.page_size, int(value.shape[3])), value.dtype
            )
            self.specs.append(spec)
            state = self._input(spec.name)
            pages.append(self._call(node, ops.kv_write.overload, (state, source, self.slots)))
        self.written += pages
        attended = (q, *pages, self.tables, self.seq_ids, self.positions, sinks, scale, window, softcap)
        node.replace_all_uses_with(self._call(node, ops.attend.overload, attended))
        self.step.fx.erase_node(node)

    def _call(self, before: fx.Node, target: Any, args: tuple[Any, ...]) -> fx.Node:
        with self.step.fx.inserting_before(before):
            return self.step.call(target, args, before, InsertKVCache.name)


def use_positions(step: Graph) -> tuple[fx.Node, ...]:
    """Where the model numbers its tokens itself, read position_ids: in the plain forward they are the same numbers.

    Returns the node that holds them, if there is need of it.
    """
    positions = step.inputs()[1]
    row: fx.Node | None = None
    for node in list(step.calls()):
        table = _counts_tokens(node, str(step.symbols.sizes["T"]))
        if table is None:
            continue
        if row is None:
            with step.fx.inserting_after(positions):
                row = step.call(torch.ops.aten.select.int, (positions, 0, 0), node, InsertKVCache.name)
            row.meta["val"] = step.symbols.tensor(("T",), torch.int64)
        with step.fx.inserting_before(node):
            made = _rows_of(step, table, node, row) if isinstance(table, fx.Node) else _shifted(step, table, node, row)
        node.replace_all_uses_with(made)
        step.fx.erase_node(node)
    return () if row is None else (row,)


def _counts_tokens(node: fx.Node, tokens: str) -> fx.Node | int | None:
    """The first number of `arange(first, first + T)`; the table of `table[:T]` along any axis; None otherwise."""
    value: Any = node.meta.get("val")
    name = target_name(node)
    if name == "aten.arange" and str(value.shape[0]) == tokens:
        first, step = (node.args[0] if len(node.args) > 1 else 0), (node.args[2] if len(node.args) > 2 else 1)
        return first if isinstance(first, int) and step == 1 else None
    if name != "aten.slice" or not isinstance(node.args[0], fx.Node):
        return None
    source = node.args[0].meta["val"]
    given: tuple[Any, ...] = (*node.args, *(None, 0, None, None, 1)[len(node.args) :])
    _, dim, first, _, step = given
    whole = str(value.shape[dim]) == tokens and isinstance(source.shape[dim], int)
    return node.args[0] if first in (0, None) and step == 1 and whole else None


def _shifted(step: Graph, first: int, node: fx.Node, row: fx.Node) -> fx.Node:
    """The positions plus a constant, in the type of `node`."""
    made = row
    if first:
        made = step.call(torch.ops.aten.add.Tensor, (row, first), node, InsertKVCache.name)
        made.meta["val"] = row.meta["val"]
    cast = step.call(torch.ops.aten.to.dtype, (made, node.meta["val"].dtype), node, InsertKVCache.name)
    cast.meta["val"] = node.meta["val"]
    return cast


def _rows_of(step: Graph, table: fx.Node, node: fx.Node, row: fx.Node) -> fx.Node:
    dim = int(node.args[1]) if len(node.args) > 1 else 0  # type: ignore[arg-type]
    made = step.call(torch.ops.aten.index_select.default, (table, dim, row), node, InsertKVCache.name)
    made.meta["val"] = node.meta["val"]
    return made


def _select_rows(step: Graph, rows: fx.Node, rule: str) -> None:
    """Compute logits [R, V] of the wanted rows only, from the last linear's input on where that is possible."""
    (logits,) = (o for o in step.outputs() if isinstance(o, fx.Node))
    head = _last_linear(logits)
    if head is None:
        with step.fx.inserting_after(logits):
            picked = step.call(torch.ops.aten.index_select.default, (logits, 1, rows), logits, rule)
        last = picked
    else:
        user: Any = head
        hidden: Any = head.args[0]
        while (earlier := _rowwise_source(hidden)) is not None:  # a final norm need not see the other rows either
            user, hidden = hidden, earlier
        with step.fx.inserting_before(user):
            picked = step.call(torch.ops.aten.index_select.default, (hidden, 1, rows), head, rule)
        user.update_arg(0, picked)
        last = logits
    with step.fx.inserting_after(last):
        flat = step.call(torch.ops.aten.select.int, (last, 0, 0), last, rule)
    step.fx.output_node().args = ((flat,),)


def _last_linear(logits: fx.Node) -> fx.Node | None:
    """The linear whose result becomes the logits through ops of one operand that know nothing of T."""
    node = logits
    while target_name(node) != "linear":
        sources = [n for n in node.all_input_nodes if n.op != "get_attr"]
        if len(sources) != 1 or sources[0].op != "call_function" or len(sources[0].users) != 1:
            return None
        node = sources[0]
    value, whole = node.args[0].meta["val"], logits.meta["val"]  # type: ignore[union-attr]
    return node if value.dim() == 3 and str(value.shape[:2]) == str(whole.shape[:2]) else None


def _rowwise_source(node: Any) -> fx.Node | None:
    """x for norm(x, ...) that only one node reads; None for anything else."""
    known = target_name(node) in ("rms_norm", "aten.layer_norm") and len(node.users) == 1
    return node.args[0] if known else None
