"""insert_kv_cache: from the plain forward to a step over a paged KV cache. Exact.

    def forward(input_ids [B, T], position_ids [B, T])       def step(input_ids [1, N], position_ids [1, N], slots [N],
        ...                                                           seq_ids [N], block_tables [S, M], rows [R], pages...)
        o = attention(q, k, v, ...)                   =>         ...
        ...                                                      k_0 = kv_write(k_pages_0, k, slots)
        return linear(h, head)                                   v_0 = kv_write(v_pages_0, v, slots)
                                                                 o = attend(q, k_0, v_0, block_tables, seq_ids, ...)
                                                                 ...
                                                                 return linear(index_select(h, 1, rows), head), k_0, v_0, ...

The N tokens of a step stand side by side and may belong to any sequences. That is sound because, attention apart, the
graph treats tokens one by one (`verify.check_rowwise` proves it node by node), so B = 1 and T = N change nothing for a
token, and keys and values are all that later tokens need of earlier ones. A model that numbers its tokens itself
(`arange(T)`, `table[:T]`) instead of using position_ids is given the positions there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from llmopt.compiler import ops
from llmopt.compiler.errors import RaiseError
from llmopt.compiler.graph import Graph, origin, target_name, where
from llmopt.compiler.pipeline import Context, Pass, PassStats
from llmopt.compiler.program import Program, StateSpec
from llmopt.compiler.propagate import propagate, symbolic_inputs
from llmopt.compiler.simplify import simplify
from llmopt.compiler.verify import check_rowwise

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
        """Build `step`. Raises VerifyError or RaiseError naming the node that cannot be cached."""
        stats = PassStats()
        step = program.graph("forward").copy()
        step.name = "step"
        _use_positions(step)
        check_rowwise(step)
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


def _use_positions(step: Graph) -> None:
    """Where the model numbers its tokens itself, read position_ids: in the plain forward they are the same numbers."""
    tokens = step.symbols.sizes["T"]
    positions = step.inputs()[1]
    row: fx.Node | None = None
    for node in list(step.calls()):
        table = _counts_tokens(node, str(tokens))
        if table is None:
            continue
        if row is None:
            with step.fx.inserting_after(positions):
                row = step.call(torch.ops.aten.select.int, (positions, 0, 0), node, InsertKVCache.name)
            row.meta["val"] = step.symbols.tensor(("T",), torch.int64)
        with step.fx.inserting_before(node):
            made = _rows_of(step, table, node, row) if isinstance(table, fx.Node) else row
            cast = step.call(torch.ops.aten.to.dtype, (made, node.meta["val"].dtype), node, InsertKVCache.name)
        cast.meta["val"] = node.meta["val"]
        node.replace_all_uses_with(cast)
        step.fx.erase_node(node)


def _counts_tokens(node: fx.Node, tokens: str) -> Any:
    """True for arange(T); the table for table[:T] along any axis; None otherwise."""
    value = node.meta.get("val")
    name = target_name(node)
    if name == "aten.arange" and str(value.shape[0]) == tokens:  # type: ignore[union-attr]
        start = node.args[0] if len(node.args) > 1 else 0
        return True if start == 0 and (len(node.args) < 3 or node.args[2] == 1) else None
    if name != "aten.slice" or not isinstance(node.args[0], fx.Node):
        return None
    source = node.args[0].meta["val"]
    dim = int(node.args[1]) if len(node.args) > 1 else 0  # type: ignore[arg-type]
    from_start = (node.args[2] if len(node.args) > 2 else 0) in (0, None)
    grows = str(value.shape[dim]) == tokens and isinstance(source.shape[dim], int)  # type: ignore[union-attr]
    return node.args[0] if from_start and grows else None


def _rows_of(step: Graph, table: fx.Node, node: fx.Node, row: fx.Node) -> fx.Node:
    dim = int(node.args[1]) if len(node.args) > 1 else 0  # type: ignore[arg-type]
    made = step.call(torch.ops.aten.index_select.default, (table, dim, row), node, InsertKVCache.name)
    made.meta["val"] = node.meta["val"]
    return made


def _select_rows(step: Graph, rows: fx.Node, rule: str) -> None:
    """Put `rows` at the input of the last linear, and drop the batch axis: logits [R, V]."""
    (logits,) = (o for o in step.outputs() if isinstance(o, fx.Node))
    head = logits
    while target_name(head) != "linear":
        sources = [n for n in head.all_input_nodes if isinstance(n.meta.get("val"), Tensor) and n.op == "call_function"]
        if len(sources) != 1 or head.op != "call_function":
            raise RaiseError(
                f"{where(head)}: {target_name(head)} stands between the logits and the model's last linear; wanted logits = "
                "linear(hidden, weight), then at most elementwise ops; make the output projection an nn.Linear"
            )
        head = sources[0]
    user: Any = head
    hidden: Any = head.args[0]
    while (earlier := _rowwise_source(hidden)) is not None:  # a final norm need not see the other rows either
        user, hidden = hidden, earlier
    with step.fx.inserting_before(user):
        picked = step.call(torch.ops.aten.index_select.default, (hidden, 1, rows), head, rule)
    user.update_arg(0, picked)
    with step.fx.inserting_after(logits):
        flat = step.call(torch.ops.aten.select.int, (logits, 0, 0), head, rule)
    step.fx.output_node().replace_input_with(logits, flat)


def _rowwise_source(node: Any) -> fx.Node | None:
    """x for norm(x, ...) that only one node reads; None for anything else."""
    known = target_name(node) in ("rms_norm", "aten.layer_norm") and len(node.users) == 1
    return node.args[0] if known else None
