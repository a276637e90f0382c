"""Which nodes of a step share a kernel: a partition of its dataflow under a cost model.

Products, attentions and rotations are anchors, each the middle of a kernel of its own; norms and pointwise nodes join
the anchor behind or before them, and what is left forms kernels over rows. Views are no kernel's work: an edge leads
from the op that makes a tensor to the op that reads it through whatever views.

Kernels must not wait for each other in a circle. Whatever a kernel reads of others is made, in the order of the graph,
before all that others read of it (`_is_interval`). So a kernel has a place in that order, between the two, and the
place grows along every edge between kernels: joining two takes no search for a circle.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import networkx as nx
import torch
from torch import Tensor, fx

from llmopt.compiler.emittable import (
    ATTENDS,
    CASTS,
    OPERANDS,
    OUTPUTS,
    POINTWISE,
    PRODUCTS,
    REDUCTIONS,
    argument,
    is_product,
    op_name,
    weight_of,
)
from llmopt.compiler.graph import Graph
from llmopt.compiler.target import Target
from llmopt.passes.fusible import ANCHORS, base, is_given, near_writes, reason_against
from llmopt.passes.kernel_cost import Costs

HORIZON = 24  # nodes tried behind a product


@dataclass
class Kernel:
    """Nodes computed by one kernel, in graph order; `kind` is gemm, attention, rotation, rows, or torch for a node
    alone."""

    kind: str
    nodes: list[fx.Node]


def partition(graph: Graph, target: Target) -> list[Kernel]:
    """The kernels of a step, in an order they can run in."""
    return _Partition(graph, target).kernels()


class _Partition:
    """The dataflow between units (what is neither view nor size), and the kernels made of them so far."""

    def __init__(self, graph: Graph, target: Target) -> None:
        self.costs = Costs(graph.symbols.sizes, target)
        calls = (n for n in graph.calls() if not isinstance(n.meta.get("val"), (int, torch.SymInt)))
        self.units = [n for n in calls if base(n) is n]
        self.at = {n: i for i, n in enumerate(self.units)}
        self.flow = nx.DiGraph()
        self.flow.add_nodes_from(self.units)
        self.flow.add_edges_from((base(s), n) for n in self.units for s in n.all_input_nodes if base(s) in self.at)
        self.final = {base(n) for n in graph.fx.output_node().all_input_nodes}
        words = [n for n in self.units if any(s.name == "input_ids" for s in n.all_input_nodes)]
        self.hidden = set(words).union(*(nx.descendants(self.flow, n) for n in words))
        self.against = {n: reason_against(n, target) for n in self.units}
        self.free = {n for n in self.units if self.against[n] is None and op_name(n) not in (*PRODUCTS, *ANCHORS)}
        self.turned: set[fx.Node] = set()  # rotations in the kernel that rounds what they make
        self.made: list[Kernel] = []

    def kernels(self) -> list[Kernel]:
        """Attention first, then products, their results before their operands, then rotations and rows."""
        anchors = [n for n in self.units if op_name(n) in (*ATTENDS, "rotate", *PRODUCTS) and self.against[n] is None]
        for node in anchors:
            if op_name(node) in ATTENDS:
                self._add("attention", self._attention(node))
        products = [n for n in anchors if op_name(n) in PRODUCTS]
        rounded = {base(n.args[0]) for n in products if argument(n, "activations", "")}  # type: ignore[arg-type]
        rotations = [n for n in anchors if op_name(n) == "rotate"]
        alone = rounded & {n for n in rotations if self.flow.out_degree(n) == 1}
        self.turned.update(alone.difference(self.final))
        joined = {n: self._behind(n) for n in reversed(products)}
        for node in products:
            self._add("gemm", [*self._before(node, joined[node]), *self._turn(joined[node], rotations)])
        taken = {n for kernel in self.made for n in kernel.nodes}
        for node in rotations:
            if node not in taken:
                self._add("rotation", self._grown([node], [node], node.args[0]))  # type: ignore[arg-type]
        for nodes in list(self._rows()):
            self._add("rows", nodes)
        taken = {n for kernel in self.made for n in kernel.nodes}
        self.made += [Kernel("torch", [n]) for n in self.units if n not in taken]
        return self._ordered()

    def _add(self, kind: str, nodes: Iterable[fx.Node]) -> None:
        self.made.append(Kernel(kind, sorted(nodes, key=self.at.__getitem__)))
        self.free.difference_update(self.made[-1].nodes)

    def _ordered(self) -> list[Kernel]:
        number = {n: i for i, kernel in enumerate(self.made) for n in kernel.nodes}
        quotient = nx.DiGraph()
        quotient.add_nodes_from(range(len(self.made)))
        quotient.add_edges_from((number[a], number[b]) for a, b in self.flow.edges if number[a] != number[b])
        # raises if there is a circle
        order = nx.lexicographical_topological_sort(quotient, key=lambda i: self.at[self.made[i].nodes[0]])
        return [self.made[i] for i in order]

    # --- what a set of nodes reads and writes

    def _reads(self, nodes: Collection[fx.Node]) -> list[fx.Node]:
        sources = (base(s) for n in nodes for s in n.all_input_nodes)
        return [s for s in dict.fromkeys(sources) if s not in nodes and isinstance(s.meta.get("val"), Tensor)]

    def _results(self, nodes: Collection[fx.Node]) -> list[fx.Node]:
        return [n for n in nodes if n in self.final or any(u not in nodes for u in self.flow.successors(n))]

    def _is_interval(self, nodes: Collection[fx.Node]) -> bool:
        sources = [self.at[s] for n in nodes for s in self.flow.predecessors(n) if s not in nodes]
        read = [self.at[n] for n in nodes if any(u not in nodes for u in self.flow.successors(n))]
        return max(sources, default=-1) < min(read, default=len(self.units))

    def _seconds(self, nodes: Collection[fx.Node]) -> float:
        ordered = sorted(nodes, key=self.at.__getitem__)
        return self.costs.seconds(ordered, self._reads(nodes), self._results(nodes))

    def _pays(self, nodes: Sequence[fx.Node], more: Sequence[fx.Node]) -> bool:
        """Is one kernel faster than two? Each is counted whole, with what it hands to the other."""
        return self._seconds([*nodes, *more]) < self._seconds(nodes) + self._seconds(more)

    def _joins(self, node: fx.Node, nodes: Collection[fx.Node]) -> bool:
        """May the node be computed where `nodes` are, because nothing else reads it?"""
        return node in self.free and node not in self.final and all(u in nodes for u in self.flow.successors(node))

    # --- attention

    def _attention(self, attend: fx.Node) -> list[fx.Node]:
        """An attend, the writes it reads, those behind it, and what turns a product's result into q, k and v."""
        writes = [n for n in self.flow.predecessors(attend) if op_name(n) == "kv_write"]
        inside = dict.fromkeys([attend, *writes, *near_writes(attend)])
        channels = {int(n.meta["val"].shape[-1]) for n in (attend.args[0], *writes)}  # type: ignore[union-attr]
        pending = {s for n in inside for s in self.flow.predecessors(n)} - set(inside)
        while pending:
            node = max(pending, key=self.at.__getitem__)
            pending.remove(node)
            if node in self.hidden and self._joins(node, inside) and _is_of_heads(node, channels):
                inside[node] = None
                pending |= set(self.flow.predecessors(node))
        return list(inside)

    # --- products

    def _behind(self, product: fx.Node) -> list[fx.Node]:
        """The product and the pointwise nodes behind it, as far as one value comes out."""
        inside, best, seen = [product], 1, {product}
        while len(inside) < HORIZON:
            users = {u for n in inside for u in self.flow.successors(n)} - seen
            if not users:
                break
            node = min(users, key=self.at.__getitem__)
            seen.add(node)
            if node in self.free and _is_pointwise(node) and _rows(node) == _rows(product):
                inside.append(node)
                best = len(inside) if self._is_epilogue(inside, best) else best
        self.free.difference_update(inside[:best])
        return inside[:best]

    def _is_epilogue(self, inside: Sequence[fx.Node], best: int) -> bool:
        product, last = inside[0], inside[-1]
        parts = {s for n in inside[1:] for s in n.all_input_nodes if base(s) is product}
        # x and the norm's weight come on top
        few = len(self._operands(inside)) - 1 <= OPERANDS["gemm"] - 2
        one = self._results(inside) == [last] and len(parts) <= 2
        return one and few and self._is_interval(inside) and self._pays(inside[:best], inside[best:])

    def _turn(self, behind: list[fx.Node], rotations: Collection[fx.Node]) -> list[fx.Node]:
        """The rotation that alone reads what a product makes: who computes what is between them differs by class."""
        last = behind[-1]
        found = [] if last in self.final else list(self.flow.successors(last))
        alone = len(found) == 1 and found[0] in rotations and found[0] not in self.turned
        return found if alone and base(found[0].args[0]) is last else []  # type: ignore[arg-type]

    def _operands(self, inside: Collection[fx.Node]) -> list[fx.Node]:
        """What the kernel's hooks read."""
        held = {base(n) for anchor in inside for n in _matrices(anchor)}
        return [n for n in self._reads(inside) if n not in held]

    def _before(self, product: fx.Node, behind: list[fx.Node]) -> list[fx.Node]:
        """The kernel with what makes the product's operand: one norm, casts of its result, pointwise nodes before."""
        start: fx.Node = product.args[0]  # type: ignore[assignment]
        shape, node = _rows_and_width(start), base(start)
        if node in self.turned:
            return self._grown([product, node], behind, node.args[0])  # type: ignore[arg-type]
        front = [product]
        while op_name(node) in CASTS and self._joins(node, front):
            front.append(node)
            node = base(node.args[0])  # type: ignore[arg-type]
        norm = op_name(node) == "rms_norm" and self._joins(node, front) and _rows_and_width(node) == shape
        # a product reads the norm's weight ahead
        given = all(is_given(n) for n in node.args[1:2] if isinstance(n, fx.Node))
        if norm and given and self._pays(behind, [*front[1:], node]):
            front.append(node)
            start = node.args[0]  # type: ignore[assignment]
        else:
            front = [product]
        return self._grown(front, behind, start, shape)

    def _grown(
        self, front: list[fx.Node], behind: list[fx.Node], start: fx.Node, shape: tuple[str, str] | None = None
    ) -> list[fx.Node]:
        """A kernel, its anchor first in `front`, with the pointwise nodes that make `start`, which it reads."""
        shape = shape or _rows_and_width(start)
        pending = {base(start)} & set(self.units)
        while pending:
            node = max(pending, key=self.at.__getitem__)
            pending.remove(node)
            inside = [*behind, *front[1:]]
            fits = self._joins(node, front) and op_name(node) in POINTWISE and _rows_and_width(node) == shape
            few = len(self._operands([*inside, node])) <= OPERANDS["gemm"]
            if fits and few and self._pays(inside, [node]):
                front.append(node)
                pending |= set(self.flow.predecessors(node))
        return [*behind, *front[1:]]

    # --- the rest

    def _rows(self) -> Iterator[list[fx.Node]]:
        """Neighbours over the same rows, and readers of one tensor, in one kernel where its results look alike."""
        near = nx.Graph()
        near.add_nodes_from(n for n in self.units if n in self.free)
        near.add_edges_from((a, b) for a, b in self.flow.edges if a in near and b in near and _rows(a) == _rows(b))
        for node in self.units:
            readers = [u for u in self.flow.successors(node) if u in near] if node not in near else []
            near.add_edges_from((a, b) for a in readers for b in readers if a is not b and _alike([a, b]))
        for found in nx.connected_components(near):
            nodes = sorted(found, key=self.at.__getitem__)
            yield from [nodes] if self._is_rows_kernel([nodes]) else self._greedily(nodes)

    def _greedily(self, nodes: Sequence[fx.Node]) -> list[list[fx.Node]]:
        groups: list[list[fx.Node]] = []
        for node in nodes:
            sources = set(self.flow.predecessors(node))
            near = [g for g in groups if sources & set(g) and self._is_rows_kernel([g, [node]])]
            if near:
                near[0].append(node)
            else:
                groups.append([node])
        return groups

    def _is_rows_kernel(self, parts: Sequence[Sequence[fx.Node]]) -> bool:
        nodes = [n for part in parts for n in part]
        results = self._results(nodes)
        few = len(results) <= OUTPUTS and len(self._reads(nodes)) <= OPERANDS["rows"]
        return few and _alike(results) and self._is_interval(nodes) and (len(parts) == 1 or self._pays(*parts))


def _matrices(anchor: fx.Node) -> list[fx.Node]:
    """What a kernel reads by itself, by no hook."""
    if op_name(anchor) == "rotate":
        return [n for n in anchor.args[1:3] if isinstance(n, fx.Node)]
    return weight_of(anchor) if is_product(anchor) else []


def _is_pointwise(node: fx.Node) -> bool:
    return op_name(node) in POINTWISE - {"rope"}


def _is_of_heads(node: fx.Node, channels: Collection[int]) -> bool:
    """Norms and means are taken per head inside attention; words are looked up elsewhere."""
    source = node.args[0]
    width = source.meta["val"].shape[-1] if isinstance(source, fx.Node) else None
    return op_name(node) != "embedding" and (op_name(node) not in REDUCTIONS or width in channels)


def _rows_and_width(node: fx.Node) -> tuple[str, str]:
    """Rows and their length, as text since they may be symbolic; a reduction's are those of its operand.

    The last axis of [1, N] runs over tokens: rows of one element.
    """
    source = node.args[0] if op_name(node) in REDUCTIONS else node
    sizes = [*source.meta["val"].shape]  # type: ignore[union-attr]
    width = sizes.pop() if sizes and isinstance(sizes[-1], int) else 1
    rows: Any = 1
    for size in sizes:
        rows = rows * size
    return str(rows), str(width)


def _rows(node: fx.Node) -> str:
    return _rows_and_width(node)[0]


def _alike(nodes: Sequence[fx.Node]) -> bool:
    return len({_rows_and_width(n) for n in nodes}) == 1
