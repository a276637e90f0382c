"""Outlining: cut a step into regions, one graph for each distinct one, so that equal layers are lowered once.

`outline_kernels` cuts where `fuse` says, one region a kernel. Without that, `outline` makes cuts where a single value
of the hidden state is alive (the residual stream between blocks), and pieces that always follow each other (attention
block, MLP block) are joined: a decoder becomes `positions, embed, layer, layer, ..., layer, index_select, head`. Equal
pieces are found by their structure, not by module names.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, fx

from llmopt.compiler.emittable import ATTENDS, PRODUCTS
from llmopt.compiler.graph import Graph, SizeType, target_name, type_of
from llmopt.compiler.target import Target
from llmopt.passes.fusible import is_row_choice, is_view, reason_against


@dataclass
class Region:
    """A run of nodes with what it reads from outside (in first-use order) and what others read of it."""

    nodes: list[fx.Node]
    inputs: list[fx.Node] = field(default_factory=list)
    outputs: list[fx.Node] = field(default_factory=list)

    def close(self) -> Region:
        """Work out inputs and outputs."""
        inside = set(self.nodes)
        self.inputs = list(dict.fromkeys(s for n in self.nodes for s in n.all_input_nodes if s not in inside))
        self.outputs = [n for n in self.nodes if any(u not in inside for u in n.users)]
        return self

    @cached_property
    def signature(self) -> Hashable:
        """Equal for regions that compute the same function of inputs of the same types."""
        number = {n: i for i, n in enumerate([*self.inputs, *self.nodes])}

        def key(arg: Any) -> Hashable:
            if isinstance(arg, fx.Node):
                return ("node", number[arg])
            if isinstance(arg, (list, tuple)):
                return tuple(key(a) for a in arg)
            return (type(arg).__name__, arg)

        def kwargs(node: fx.Node) -> Hashable:
            return tuple((k, key(v)) for k, v in sorted(node.kwargs.items()))

        return (
            tuple(_kind(n) for n in self.inputs),
            tuple((n.target, key(n.args), kwargs(n), n.meta.get("provider"), _type(n)) for n in self.nodes),
            tuple(number[n] for n in self.outputs),
        )


def _type(node: fx.Node) -> str:
    return type_of(node.meta.get("val"))


def _kind(node: fx.Node) -> Hashable:
    value = node.meta.get("val")
    strides = tuple(str(s) for s in value.stride()) if isinstance(value, Tensor) else ()
    return (node.op == "get_attr", _type(node), strides)


def outline(graph: Graph, state: Collection[str]) -> dict[str, Graph]:
    """Replace the graph's nodes by calls of regions, in place; returns the region graphs by name.

    `state` names the inputs that hold the paged cache.
    """
    fixed, pieces = _cut(graph, state)
    regions = _join(pieces)
    counts = Counter(r.signature for r in regions)
    labels = [_label(counts[r.signature], at, len(regions)) for at, r in enumerate(regions)]
    labelled = [(r, label) for r, label in zip(regions, labels, strict=True) if not is_row_choice(r.nodes[0])]
    if fixed.nodes:
        regions = [fixed, *regions]
        labelled.append((fixed, "positions"))
    return _put(graph, regions, labelled)


def outline_kernels(graph: Graph, target: Target) -> dict[str, Graph]:
    """As `outline`, along `meta["kernel"]`: `gemm`, `attention`, `rows`; what no kernel takes stays in the graph."""
    members: dict[int, list[fx.Node]] = {}
    for node in graph.calls():
        if "kernel" in node.meta:
            members.setdefault(node.meta["kernel"], []).append(node)
    regions = [Region(members[number]).close() for number in sorted(members)]
    return _put(graph, regions, [(r, label) for r in regions if (label := _kernel_label(r, target)) is not None])


def blocks(graph: Graph) -> list[Region]:
    """`forward` cut where one value of the hidden state alone is alive: the embedding, then each attention and each
    MLP, with that value as their only output. The last product, which makes the logits, and what follows are left out.
    """
    pieces = _cut(graph, ())[1]
    products = [at for at, piece in enumerate(pieces) if _calls_any(piece.nodes, PRODUCTS)]
    return pieces[: products[-1]] if products else []


def _kernel_label(region: Region, target: Target) -> str | None:
    names = {target_name(n) for n in region.nodes}
    if any(reason_against(n, target) is not None for n in region.nodes if not is_view(n)):
        return None
    if names & PRODUCTS.keys():
        return "gemm"
    return "attention" if names & ATTENDS else "rotation" if "rotate" in names else "rows"


def _put(graph: Graph, regions: Sequence[Region], labelled: Sequence[tuple[Region, str]]) -> dict[str, Graph]:
    """Replace the regions that have a label by calls, one name for those that compute the same."""
    names: dict[Hashable, str] = {}
    found: dict[str, Graph] = {}
    for region, label in labelled:
        if region.signature not in names:
            names[region.signature] = name = _unused(label, found)
            found[name] = _graph_of(region, name, graph)
    graph.fx = _calls(graph, regions, names)
    return found


def _label(count: int, at: int, total: int) -> str:
    if count > 1:
        return "layer"
    return "embed" if at == 0 else "head" if at == total - 1 else "part"


def _unused(label: str, taken: dict[str, Graph]) -> str:
    if label not in taken:
        return label
    return next(f"{label}_{i}" for i in range(1, len(taken) + 2) if f"{label}_{i}" not in taken)


def _cut(graph: Graph, state: Collection[str]) -> tuple[Region, list[Region]]:
    """(everything that depends on positions alone, the hidden state's pieces between cuts)."""
    hidden: dict[fx.Node, None] = {}
    fixed: list[fx.Node] = []
    for node in graph.fx.nodes:
        if node.op == "placeholder":
            if node.name == "input_ids" or node.name in state:
                hidden[node] = None
        elif node.op == "call_function" and not isinstance(node.meta.get("val"), (int, torch.SymInt, SizeType)):
            if any(s in hidden for s in node.all_input_nodes):
                hidden[node] = None
            else:
                fixed.append(node)
    order = [n for n in hidden if n.op == "call_function"]
    return Region(fixed).close(), [Region(p).close() for p in _pieces(order)]


def _pieces(order: list[fx.Node]) -> list[list[fx.Node]]:
    index = {n: i for i, n in enumerate(order)}
    last = {n: max((index.get(u, len(order)) for u in n.users), default=i) for n, i in index.items()}
    pieces: list[list[fx.Node]] = [[]]
    alive: set[fx.Node] = set()
    for i, node in enumerate(order):
        if is_row_choice(node) and pieces[-1]:  # behind it another number of rows counts
            pieces.append([])
        pieces[-1].append(node)
        alive = {n for n in (*alive, node) if last[n] > i}
        if len(alive) <= 1 and i + 1 < len(order):
            pieces.append([])
    return _without_slivers([p for p in pieces if p])


def _without_slivers(pieces: list[list[fx.Node]]) -> list[list[fx.Node]]:
    """A piece without a product or an attention (a lone norm or scale) joins the embedding before or what follows."""
    merged: list[list[fx.Node]] = []
    pending: list[fx.Node] = []
    for piece in pieces:
        if is_row_choice(piece[0]):
            merged += [pending, piece] if pending else [piece]
            pending = []
        elif _calls_any(piece, (*PRODUCTS, *ATTENDS, "attention", "aten.embedding")):
            merged.append([*pending, *piece])
            pending = []
        elif merged and not pending and _calls_any(merged[-1], ("aten.embedding",)):
            merged[-1] += piece
        else:
            pending += piece
    return [*merged, pending] if pending else merged


def _calls_any(piece: list[fx.Node], names: Collection[str]) -> bool:
    return any(target_name(n) in names for n in piece)


def _join(pieces: Sequence[Region]) -> list[Region]:
    """Join a repeated piece with the one that always follows it, and neighbours that occur once, until none is left."""
    regions = list(pieces)
    while True:
        names = [r.signature for r in regions]
        pair = _best_pair(regions, names)
        if pair is None:
            return regions
        joined: list[Region] = []
        i = 0
        while i < len(regions):
            if (names[i], names[i + 1] if i + 1 < len(regions) else None) == pair:
                joined.append(Region([*regions[i].nodes, *regions[i + 1].nodes]).close())
                i += 2
            else:
                joined.append(regions[i])
                i += 1
        regions = joined


def _best_pair(regions: Sequence[Region], names: Sequence[Hashable]) -> tuple[Hashable, Hashable] | None:
    counts = Counter(names)
    pairs = Counter(pairwise(names))
    barriers = {n for n, r in zip(names, regions, strict=True) if is_row_choice(r.nodes[0])}
    for (a, b), count in pairs.items():
        always = count == counts[a]  # a is never followed by anything else
        if a != b and not {a, b} & barriers and always and (count > 1 or counts[b] == 1):
            return a, b
    return None


def _graph_of(region: Region, name: str, parent: Graph) -> Graph:
    new = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    for i, source in enumerate(region.inputs):
        label = f"w{i}" if source.op == "get_attr" else source.name
        env[source] = new.placeholder(label)
        env[source].meta.update(val=source.meta["val"])
    for node in region.nodes:
        env[node] = new.node_copy(node, lambda n: env[n])
    output = new.output(tuple(env[n] for n in region.outputs))
    output.meta["val"] = tuple(n.meta["val"] for n in region.outputs)
    return Graph(name, new, parent.symbols)


def _calls(graph: Graph, regions: Sequence[Region], names: Mapping[Hashable, str]) -> fx.Graph:
    """The graph again, with each region one call; inputs, weights and sizes come first."""
    new = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    for node in graph.fx.nodes:
        sized = isinstance(node.meta.get("val"), (int, torch.SymInt)) and node.op == "call_function"
        if node.op in ("placeholder", "get_attr") or sized:
            env[node] = new.node_copy(node, lambda n: env[n])
    for region in regions:
        if region.signature not in names:
            env.update(_as_they_are(region, new, env))
            continue
        call = new.create_node("call_module", names[region.signature], tuple(env[n] for n in region.inputs))
        call.meta["val"] = tuple(n.meta["val"] for n in region.outputs)
        for i, node in enumerate(region.outputs):
            env[node] = new.call_function(operator.getitem, (call, i))
            env[node].meta.update(val=node.meta["val"], origin=node.meta.get("origin"))
    new.node_copy(graph.fx.output_node(), lambda n: env[n])
    return new


def _as_they_are(region: Region, new: fx.Graph, known: Mapping[fx.Node, fx.Node]) -> dict[fx.Node, fx.Node]:
    """Copies of a region's nodes; its results made contiguous, as regions take their inputs to be."""
    env = dict(known)
    for node in region.nodes:
        env[node] = new.node_copy(node, lambda n: env[n])
    for node in region.outputs:
        if isinstance(node.meta["val"], Tensor) and not node.meta["val"].is_contiguous():
            made = new.call_function(torch.ops.aten.contiguous.default, (env[node],))
            made.meta.update(val=node.meta["val"].contiguous(), origin=node.meta.get("origin"))
            env[node] = made
    return env
