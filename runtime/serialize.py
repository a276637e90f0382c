"""Graphs as plain JSON data and back: nodes, arguments, types with named sizes, origins, choices of provider.

Reading a graph runs nothing that the data names: targets come from the dialect's own ops and a short list of builtins,
and whatever later becomes part of generated source (names of nodes, regions and keywords) has to be an identifier. A
graph read back prints as the one written and can be run; its nodes have a `TensorType` in the place of a fake tensor.
"""

from __future__ import annotations

import keyword
import operator
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

import llmopt.compiler.ops  # noqa: F401 - declares the ops that graphs may call
from llmopt.compiler import plain
from llmopt.compiler._torch import OpOverload
from llmopt.compiler.errors import ArtifactError, did_you_mean
from llmopt.compiler.graph import Graph, Origin, SizeType, TensorType, origin, where
from llmopt.compiler.op import NAMESPACE, OPS, op_of
from llmopt.compiler.verify import in_dialect

Data = dict[str, Any]

# what a node may call besides overloads: picking from tuples, and arithmetic on sizes
BUILTINS: dict[str, Callable[..., Any]] = {
    **{f"operator.{f.__name__}": f for f in (operator.getitem, operator.add, operator.sub, operator.mul)},
    **{f"operator.{f.__name__}": f for f in (operator.floordiv, operator.truediv, operator.mod, operator.neg)},
    **{f"operator.{f.__name__}": f for f in (operator.eq, operator.ne, operator.lt, operator.le, operator.gt)},
    "operator.ge": operator.ge,
    "operator.pow": operator.pow,
    "torch.sym_max": torch.sym_max,
    "torch.sym_min": torch.sym_min,
    "torch.sym_int": torch.sym_int,
    "torch.sym_float": torch.sym_float,
}
_BUILTIN_NAMES = {f: name for name, f in BUILTINS.items()}
_CALLS = ("call_function", "call_module")
_MALFORMED = (KeyError, TypeError, ValueError, IndexError, AttributeError, RuntimeError)


@dataclass(frozen=True)
class Sizes:
    """What a graph read back has for symbols: the names of its sizes, each standing for itself."""

    sizes: dict[str, str]


def graph_to_data(graph: Graph) -> Data:
    """The JSON data of a graph. Raises ArtifactError for what has no such form."""
    return _Writer(graph).data()


def graph_from_data(name: str, data: Data, regions: Collection[str] = (), place: str = "") -> Graph:
    """The graph of `graph_to_data`'s form; it may call `regions`, and `place` says in messages where it stands."""
    try:
        return _Reader(_identifier(name), frozenset(regions), place or name).graph(data)
    except _MALFORMED as error:
        raise ArtifactError(
            f"{place or name}: malformed graph ({type(error).__name__}: {' '.join(str(error).split())}); wanted the "
            "form `save` writes: save the artifact again"
        ) from error


def target_to_text(target: Any) -> str | None:
    """`llmopt::linear.default`, `operator.getitem`; None for what an artifact may not call."""
    if isinstance(target, OpOverload):
        legal = target.namespace in ("aten", NAMESPACE) and in_dialect(target) and not target._schema.is_mutable
        return f"{target._schema.name}.{target._schema.overload_name or 'default'}" if legal else None
    return _BUILTIN_NAMES.get(target)


def target_from_text(text: str, place: str) -> Callable[..., Any]:
    """The op or builtin of this name. ArtifactError: it is outside the dialect, or of a newer llmopt."""
    if text in BUILTINS:
        return BUILTINS[text]
    match = re.fullmatch(r"(\w+)::([A-Za-z_]\w*)\.(\w+)", text)
    space, name, overload = match.groups() if match else ("", "", "")
    if space == NAMESPACE and name not in OPS:
        raise ArtifactError(
            f"{place} calls {text!r}, an op this llmopt does not know; {did_you_mean(name, OPS)} Upgrade llmopt, or "
            "save the artifact again with this version"
        )
    packet = getattr(torch.ops.aten if space == "aten" else torch.ops.llmopt, name, None) if match else None
    found: Any = getattr(packet, overload, None)
    if target_to_text(found) != text:
        raise ArtifactError(
            f"{place} calls {text!r}; wanted an llmopt op, an aten op of the dialect, or one of {', '.join(BUILTINS)}; "
            "nothing else is run from an artifact: save it again"
        )
    return found  # type: ignore[no-any-return]


class _Writer:
    """Turns one graph into data; equal types are written once."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.names = {} if graph.symbols is None else {str(v): k for k, v in graph.symbols.sizes.items()}
        self.types: dict[str, int] = {}
        self.listed: list[Any] = []
        self.node: fx.Node | None = None

    def data(self) -> Data:
        nodes = [self._node(n) for n in self.graph.fx.nodes]
        sizes = None if self.graph.symbols is None else list(self.graph.symbols.sizes)
        return {"sizes": sizes, "types": self.listed, "nodes": nodes}

    def fail(self, what: str) -> ArtifactError:
        at = where(self.node) if self.node is not None else ""
        return ArtifactError(
            f"graph {self.graph.name}, {at}: {what} cannot be stored in an artifact; wanted plain values, ops of the "
            "dialect and sizes made of named ones: take the pass that makes it out of the recipe"
        )

    def _node(self, node: fx.Node) -> Data:
        self.node = node
        target = str(node.target)
        if node.op == "call_function":
            text = target_to_text(node.target)
            if text is None:
                raise self.fail(f"a call of {node.target}")
            target = text
        made: Data = {"op": node.op, "name": node.name, "target": target, "args": [self._value(a) for a in node.args]}
        if node.kwargs:
            made["kwargs"] = {k: self._value(v) for k, v in node.kwargs.items()}
        if "val" in node.meta:
            made["type"] = self._type(node.meta["val"])
        if "origin" in node.meta:
            o = origin(node)
            made["origin"] = [o.source, o.module, list(o.rules)]
        meta = {k: v for k, v in node.meta.items() if k not in ("val", "origin")}
        if not all(map(plain.is_plain, meta.values())):
            raise self.fail(f"meta {meta}")
        return made | ({"meta": meta} if meta else {})

    def _value(self, value: Any) -> Any:
        if isinstance(value, fx.Node):
            return {"node": value.name}
        if isinstance(value, float) and not abs(value) < float("inf"):
            return {"float": repr(value)}
        if isinstance(value, (bool, int, float, str, type(None))):
            return value
        if isinstance(value, (list, tuple)):
            items = [self._value(v) for v in value]
            return {"tuple": items} if isinstance(value, tuple) else items
        for kind in _CONSTANTS:
            if isinstance(value, kind):
                return {kind.__name__: str(value).removeprefix("torch.")}
        raise self.fail(f"argument {value!r} of type {type(value).__name__}")

    def _type(self, value: Any) -> int:
        """The number of the type in the graph's list."""
        described = self._described(value)
        key = repr(described)
        if key not in self.types:
            self.types[key] = len(self.listed)
            self.listed.append(described)
        return self.types[key]

    def _described(self, value: Any) -> Data:
        if isinstance(value, (Tensor, TensorType)):
            shape = [size if isinstance(size, int) else self._size(size) for size in value.shape]
            return {"dtype": str(value.dtype).removeprefix("torch."), "shape": shape}
        if isinstance(value, (torch.SymInt, SizeType)):
            return {"size": self._size(value)}
        if isinstance(value, (list, tuple)):
            kind = "tuple" if isinstance(value, tuple) else "list"
            return {kind: [self._described(v) for v in value]}
        if not plain.is_plain(value):
            raise self.fail(f"a value of type {type(value).__name__}")
        return {"value": value}

    def _size(self, size: Any) -> str:
        text = re.sub(r"\bs\d+\b", lambda m: self.names.get(m.group(), m.group()), str(size))
        if re.search(r"\b[a-z]+\d+\b", text):
            raise self.fail(f"size {size}, which has no name,")
        return text


_CONSTANTS = (torch.dtype, torch.device, torch.layout, torch.memory_format)


class _Reader:
    """Builds one graph from data."""

    def __init__(self, name: str, regions: frozenset[str], place: str) -> None:
        self.name, self.regions, self.place = name, regions, place
        self.fx = fx.Graph()
        self.env: dict[str, fx.Node] = {}

    def graph(self, data: Data) -> Graph:
        types = [self._type(t) for t in data["types"]]
        for entry in data["nodes"]:
            self._node(entry, types)
        if [n.op for n in reversed(self.fx.nodes)].index("output") != 0:
            raise ValueError("the output is not the last node")
        sizes = data["sizes"]
        return Graph(self.name, self.fx, None if sizes is None else Sizes(dict(zip(sizes, sizes, strict=True))))

    def _type(self, data: Data) -> Any:
        if "dtype" in data:
            return TensorType(_constant(torch.dtype, data["dtype"]), tuple(data["shape"]))
        if "size" in data:
            return SizeType(data["size"])
        for kind in (list, tuple):
            if kind.__name__ in data:
                return kind(self._type(d) for d in data[kind.__name__])
        return data["value"]

    def _node(self, entry: Data, types: list[Any]) -> None:
        kind, name, target = entry["op"], _identifier(entry["name"]), entry["target"]
        if kind not in ("placeholder", "get_attr", "output", *_CALLS) or not isinstance(target, str):
            raise ValueError(f"node {name} is a {kind!r} of {target!r}")
        if kind == "call_module" and target not in self.regions:
            raise ValueError(f"node {name} calls region {target!r}, which is not in the artifact")
        called: Any = target_from_text(target, f"{self.place}: node %{name}") if kind == "call_function" else target
        args = tuple(self._argument(a) for a in entry["args"])
        kwargs = {_identifier(k): self._argument(v) for k, v in entry.get("kwargs", {}).items()}
        node = self.fx.create_node(kind, called, args, kwargs, name=name)
        if node.name != name:
            raise ValueError(f"node name {name!r} stands twice or is reserved")
        self.env[name] = node
        if "type" in entry:
            node.meta["val"] = types[entry["type"]]
        if "origin" in entry:
            source, module, rules = entry["origin"]
            node.meta["origin"] = Origin(source, module, tuple(rules))
        node.meta.update(entry.get("meta", {}))
        self._check_provider(node)

    def _check_provider(self, node: fx.Node) -> None:
        provider, op = node.meta.get("provider"), op_of(node.target)
        # inductor and triton compile whole regions
        if provider is None or op is None or provider in {"inductor", "triton"} | op.providers.keys():
            return
        raise ArtifactError(
            f"{self.place}: node %{node.name} wants provider {provider!r} of {op.name}, which this llmopt lacks; "
            f"{did_you_mean(str(provider), op.providers)} Upgrade llmopt, or save the artifact again with this version"
        )

    def _argument(self, data: Any) -> Any:
        if isinstance(data, list):
            return [self._argument(d) for d in data]
        if not isinstance(data, dict):
            return data
        ((kind, inner),) = data.items()
        if kind == "node":
            return self.env[inner]
        if kind == "tuple":
            return tuple(self._argument(d) for d in inner)
        if kind == "float":
            return float(inner)
        return _constant({c.__name__: c for c in _CONSTANTS}[kind], inner)


def _constant(kind: type, text: str) -> Any:
    """`torch.float32` from its name, `torch.device` from its text."""
    found = torch.device(text) if kind is torch.device else getattr(torch, text)
    if not isinstance(found, kind):
        raise ValueError(f"{text!r} is no {kind.__name__}")
    return found


def _identifier(name: str) -> str:
    if not name.isidentifier() or keyword.iskeyword(name):
        raise ValueError(f"the name {name!r} is no identifier")
    return name
