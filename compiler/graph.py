"""Graph: an `fx.Graph` in llmopt's dialect, with names, provenance and a readable printed form.

Inputs are placeholders, weights are `get_attr` nodes (target = the weight's name in the Program), everything else is
`call_function` of an aten or llmopt overload. `node.meta["val"]` holds the fake value and `node.meta["origin"]` says
which source line and module a node came from and which rules touched it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Graph as FxGraph
from torch.fx import Node

from llmopt.compiler._torch import OpOverload
from llmopt.compiler.op import op_of

_DTYPES = {
    torch.float32: "f32", torch.float64: "f64", torch.bfloat16: "bf16", torch.float16: "f16",
    torch.int64: "i64", torch.int32: "i32", torch.int16: "i16", torch.int8: "i8", torch.uint8: "u8",
    torch.bool: "b1", torch.float8_e4m3fn: "f8",
}  # fmt: skip


@dataclass(frozen=True)
class Origin:
    """Where a node came from: `file.py:line`, the dotted module path, and the rules that made it (oldest first)."""

    source: str = ""
    module: str = ""
    rules: tuple[str, ...] = ()

    def touched(self, rule: str) -> Origin:
        """The same origin with one more rule."""
        return replace(self, rules=(*self.rules, rule))

    def __str__(self) -> str:
        parts = [self.module, self.source, "<- " + " <- ".join(reversed(self.rules)) if self.rules else ""]
        return " ".join(p for p in parts if p)


def origin(node: Node) -> Origin:
    """The node's origin (an empty one if it has none)."""
    found = node.meta.get("origin")
    return found if isinstance(found, Origin) else Origin()


def where(node: Node) -> str:
    """`%name (module file:line)`: how messages point at a node."""
    o = origin(node)
    text = " ".join(p for p in (o.module, o.source) if p)
    return f"%{node.name} ({text})" if text else f"%{node.name}"


@dataclass(frozen=True)
class TensorType:
    """Stands for a tensor in a graph read from an artifact, where making fake tensors would take seconds of imports.

    Symbolic sizes are their text, in the graph's own names.
    """

    dtype: torch.dtype
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class SizeType:
    """Stands for a symbolic size in such a graph."""

    text: str

    def __str__(self) -> str:
        return self.text


def type_of(value: Any) -> str:
    """`f32[B, T, 512]` for a tensor, `int`/`sym` for scalars, a tuple for several results."""
    if isinstance(value, (torch.Tensor, TensorType)):
        dims = ", ".join(str(d) for d in value.shape)
        return f"{_DTYPES.get(value.dtype, str(value.dtype).removeprefix('torch.'))}[{dims}]"
    if isinstance(value, (tuple, list)):
        return "(" + ", ".join(type_of(v) for v in value) + ")"
    if isinstance(value, (torch.SymInt, SizeType)):
        return f"int={value}"
    return type(value).__name__


def target_name(node: Node) -> str:
    """Short name of what a node calls: `linear`, `aten.view`, or the weight's name."""
    declared = op_of(node.target)
    if declared is not None:
        return declared.name
    if isinstance(node.target, OpOverload):
        return "aten." + node.target._schema.name.split("::")[1]
    return str(node.target) if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))


def _format_arg(arg: Any) -> str:
    if isinstance(arg, Node):
        return f'w["{arg.target}"]' if arg.op == "get_attr" else arg.name
    if isinstance(arg, (list, tuple)):
        inner = ", ".join(_format_arg(a) for a in arg)
        return f"[{inner}]"
    return str(arg).removeprefix("torch.") if isinstance(arg, torch.dtype) else repr(arg)


@dataclass
class Graph:
    """A named graph of the dialect. `fx` is the graph itself; passes edit it through `compiler.rewrite`."""

    name: str
    fx: FxGraph
    symbols: Any = None  # compiler.propagate.Symbols once values are propagated

    def __len__(self) -> int:
        return sum(n.op == "call_function" for n in self.fx.nodes)

    def inputs(self) -> list[Node]:
        """Placeholders in call order."""
        return [n for n in self.fx.nodes if n.op == "placeholder"]

    def outputs(self) -> tuple[Any, ...]:
        """What the graph returns, always as a flat tuple."""
        (result,) = self.fx.output_node().args
        return tuple(result) if isinstance(result, (list, tuple)) else (result,)

    def calls(self, name: str | None = None) -> Iterator[Node]:
        """Call nodes, all or those with this short target name (`attention`, `aten.view`)."""
        for node in self.fx.nodes:
            if node.op == "call_function" and (name is None or target_name(node) == name):
                yield node

    def weights(self) -> dict[str, Node]:
        """Weight nodes by weight name (the first of each)."""
        found: dict[str, Node] = {}
        for node in self.fx.nodes:
            if node.op == "get_attr":
                found.setdefault(str(node.target), node)
        return found

    def call(self, target: Any, args: tuple[Any, ...], made_from: Node, rule: str) -> Node:
        """Add a call at fx's insertion point, named after its op, with the origin of `made_from` and one more rule."""
        op = op_of(target)
        name = op.name if op is not None else getattr(target, "_opname", getattr(target, "__name__", None))
        node = self.fx.create_node("call_function", target, args, name=name)
        node.meta["origin"] = origin(made_from).touched(rule)
        return node

    def copy(self) -> Graph:
        """An independent copy (nodes are new, meta dictionaries are copied shallowly)."""
        new = FxGraph()
        env: dict[Node, Node] = {}
        for node in self.fx.nodes:
            env[node] = new.node_copy(node, lambda n: env[n])
        return Graph(self.name, new, self.symbols)

    def print(self, provenance: bool = True) -> str:
        """Readable typed code: one line a node, its type, and where it came from."""
        args = ", ".join(f"{n.name}: {type_of(n.meta.get('val'))}" for n in self.inputs())
        lines = [f"def {self.name}({args}):"]
        for node in self.fx.nodes:
            if node.op in ("call_function", "call_module"):
                lines.append(self.line(node, provenance))
            elif node.op == "output":
                lines.append("    return " + ", ".join(_format_arg(a) for a in self.outputs()))
        return self.named_sizes("\n".join(lines) + "\n")

    def named_sizes(self, text: str) -> str:
        """The text with the graph's names of symbolic sizes (B, T) in the place of torch's."""
        if self.symbols is None:
            return text
        names = {str(value): name for name, value in self.symbols.sizes.items()}
        return re.sub(r"\bs\d+\b", lambda m: names.get(m.group(), m.group()), text)

    def line(self, node: Node, provenance: bool = True) -> str:
        """One printed line of the graph."""
        args = [_format_arg(a) for a in node.args] + [f"{k}={_format_arg(v)}" for k, v in node.kwargs.items()]
        text = f"    {node.name}: {type_of(node.meta.get('val'))} = {target_name(node)}({', '.join(args)})"
        number = f"kernel {node.meta['kernel']}" if "kernel" in node.meta else ""
        note = " ".join(p for p in (number, str(origin(node)) if provenance else "") if p)
        return f"{text}  # {note}" if note else text
