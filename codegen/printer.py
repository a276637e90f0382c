"""The printer at work: straight-line statements of one function, each value once."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import fx

from llmopt.codegen.index import ZERO, Factors, Index, offset, sizes_of
from llmopt.compiler.emittable import op_name
from llmopt.compiler.errors import EmitError
from llmopt.compiler.graph import type_of, where

Kind = Literal["float", "int", "bool"]
TYPES = {
    torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int64: "*i64",
    torch.int32: "*i32", torch.int16: "*i16", torch.int8: "*i8", torch.uint8: "*u8", torch.bool: "*i1",
}  # fmt: skip


@dataclass(frozen=True)
class Value:
    """A name or a literal of the printed function; floats are fp32. `depends` are the variables it varies with."""

    text: str
    kind: Kind
    depends: frozenset[str] = frozenset()
    literal: bool = False


@dataclass(frozen=True)
class Variable:
    """A coordinate that the template hands in: a scalar (mask "") or a block.

    `mask` is what must hold for it to be inside the tensor; None when only the template knows, which then is `ok`.
    """

    index: Index
    mask: str | None = ""


@dataclass(frozen=True)
class Lane:
    """The variable that spans a reduced axis of `size` elements, along axis `axis` of the tile."""

    name: str
    size: int
    axis: int = 1


@dataclass
class Operands:
    """The tensors that a kernel's hooks read, as pointer parameters `e0`, `e1`, ... in order of first use.

    `nodes[i]` is the node behind `e{i}`: the caller passes that tensor, contiguous in its fx shape, as argument.
    """

    limit: int = 6
    nodes: list[fx.Node] = field(default_factory=list)

    def name(self, node: fx.Node) -> str:
        """The parameter for this node's tensor. Raises EmitError when there are more than `limit`."""
        if node not in self.nodes:
            if len(self.nodes) == self.limit:
                raise EmitError(f"{where(node)}: is the kernel's tensor {self.limit + 1}; wanted {self.limit} at most")
            if node.meta["val"].dtype not in TYPES:
                raise EmitError(f"{where(node)}: has dtype {node.meta['val'].dtype}; wanted one that a kernel loads")
            self.nodes.append(node)
        return f"e{self.nodes.index(node)}"

    def names(self) -> list[str]:
        """All parameters, in use or not."""
        return [f"e{i}" for i in range(self.limit)]

    def types(self) -> tuple[tuple[str, str], ...]:
        """(("e0", "*bf16"), ...): the parameters in use, for `Kernel.types`."""
        return tuple((f"e{i}", TYPES[n.meta["val"].dtype]) for i, n in enumerate(self.nodes))

    def absent(self) -> tuple[tuple[str, None], ...]:
        """(("e4", None), ("e5", None)): the parameters not in use, for `Kernel.constants`."""
        return tuple((name, None) for name in self.names()[len(self.nodes) :])


Given = Callable[[tuple[Index, ...]], Value]
Print = Callable[["Printer", fx.Node, tuple[Index, ...]], Value]


@dataclass
class Printer:
    """Prints values of nodes at coordinates as statements `v0 = ...`, in fp32.

    `table` says how each op is printed; `stored` nodes are loaded; `given` ones are handed in as functions of their
    coordinates; `lane` is what reductions run over, None where there can be none; `tokens` is the name of the number
    of tokens, if the function is told it.
    """

    table: Mapping[str, Print]
    operands: Operands
    variables: Mapping[str, Variable]
    stored: Collection[fx.Node] = ()
    given: Mapping[fx.Node, Given] = field(default_factory=dict)
    lane: Lane | None = None
    tokens: str | None = None
    lines: list[str] = field(default_factory=list)
    helpers: set[str] = field(default_factory=set)
    _values: dict[Any, Value] = field(default_factory=dict)
    _guards: tuple[Value, ...] = ()

    def value(self, node: fx.Node, coords: tuple[Index, ...]) -> Value:
        """The node's value at these coordinates. Raises EmitError."""
        key = (node, coords, self._guards)
        if key not in self._values:
            self._values[key] = self._print(node, coords)
        return self._values[key]

    def _print(self, node: fx.Node, coords: tuple[Index, ...]) -> Value:
        if node in self.given:
            return self.given[node](coords)
        if node in self.stored or node.op in ("placeholder", "get_attr"):
            return self.load(node, coords)
        name = op_name(node)
        if name not in self.table:
            raise EmitError(f"{where(node)}: {name} is none of the ops that can be printed")
        result = self.table[name](self, node, coords)
        self._comment(result, f"{name} {described(node)}")
        return result

    def _comment(self, value: Value, text: str) -> None:
        """Behind the last line, if that is the one that made the value and nothing was said of it before."""
        if self.lines and self.lines[-1].startswith(f"{value.text} = ") and "  # " not in self.lines[-1]:
            self.lines[-1] += f"  # {text}"

    def assign(self, text: str, kind: Kind, *sources: Value, depends: frozenset[str] = frozenset()) -> Value:
        """A statement for `text`, or the name of an earlier one with the same text."""
        if text not in self._values:
            name = f"v{len(self.lines)}"
            self.lines.append(f"{name} = {text}")
            self._values[text] = Value(name, kind, depends.union(*(s.depends for s in sources)))
        return self._values[text]

    def helper(self, name: str, *args: Value) -> Value:
        """A call of a function of `templates/functions.py`, which takes and returns fp32."""
        self.helpers.add(name)
        return self.assign(f"{name}({', '.join(a.text for a in args)})", "float", *args)

    def load(self, node: fx.Node, coords: tuple[Index, ...]) -> Value:
        """The element of a tensor in memory; 0 where a mask or a guard says that it lies outside."""
        shape = sizes_of(node.meta["val"])
        text, depends = offset(coords, shape, self.tokens)
        pointer = self.operands.name(node)
        mask = self.mask(depends)
        # where only the template's own `ok` is known, the address gets that mask's shape
        missing = [v for v in self._blocks() if v not in depends] if "ok" in mask.split(" & ") else []
        text = " + ".join([text, *(f"{name} * 0" for name in missing)])
        at = pointer if text == "0" else f"{pointer} + {closed(text)}"
        kind = kind_of(node)
        loaded = f"tl.load({at}, mask={mask}, other=0)" if mask else f"tl.load({at})"
        if kind == "float" and node.meta["val"].dtype != torch.float32:
            loaded += ".to(tl.float32)"
        result = self.assign(loaded, kind, depends=depends)
        self._comment(result, f"of {described(node)}")
        return result

    def mask(self, depends: frozenset[str]) -> str:
        """What must hold for an address that varies with these variables to be inside its tensor."""
        blocks = [name for name in self._blocks() if name in depends]
        parts = [self.variables[name].mask or "ok" for name in blocks]
        if blocks and (blocks == self._blocks() or "ok" in parts):
            parts = ["ok"]
        # a guard on a variable that the address does not vary with says nothing about the address
        parts += [guard.text for guard in self._guards if guard.depends & depends]
        return " & ".join(map(closed, dict.fromkeys(parts)))

    def _blocks(self) -> list[str]:
        """The variables that are no scalars, or may be none."""
        return [name for name, variable in self.variables.items() if variable.mask != ""]

    @contextmanager
    def guarded(self, condition: Value | None) -> Iterator[None]:
        """Inside: loads read nothing where the condition is false."""
        before = self._guards
        if condition is not None and condition not in before:
            self._guards = (*before, condition)
        try:
            yield
        finally:
            self._guards = before

    @contextmanager
    def anywhere(self, name: str) -> Iterator[None]:
        """Inside: a variable runs over all its values, whatever the guards say of its own value."""
        before = self._guards
        self._guards = tuple(guard for guard in before if name not in guard.depends)
        try:
            yield
        finally:
            self._guards = before

    def condition(self, index: Index, comparison: str) -> Value:
        """`index < 3` and the like as a value."""
        return self.assign(f"{index} {comparison}", "bool", depends=index.depends)

    def choose(self, condition: Value, yes: Value, no: Value) -> Value:
        """`yes` where the condition holds, else `no`."""
        return self.assign(f"tl.where({condition.text}, {yes.text}, {no.text})", yes.kind, condition, yes, no)

    def operand(self, arg: Any, node: fx.Node, coords: tuple[Index, ...]) -> Value:
        """An argument of a pointwise op at the coordinates of its result: a node (broadcast) or a number."""
        if not isinstance(arg, fx.Node):
            return literal(arg, node)
        if not isinstance(arg.meta.get("val"), torch.Tensor):
            raise EmitError(f"{where(node)}: computes with the size %{arg.name}; wanted tensors and numbers")
        return self.value(arg, broadcast(coords, sizes_of(arg.meta["val"])))

    def to_float(self, value: Value) -> Value:
        """The value in fp32."""
        if value.kind == "float":
            return value
        if value.literal:
            return Value(number(float(eval_literal(value.text))), "float", literal=True)
        return self.assign(f"{value.text}.to(tl.float32)", "float", value)

    def tensor(self, value: Value) -> Value:
        """The value as something that is no Python number, so that functions of tensors take it."""
        if not value.literal:
            return value
        dtype = {"float": "float32", "int": "int64", "bool": "int1"}[value.kind]
        return self.assign(f"tl.full([], {value.text}, tl.{dtype})", value.kind)


def closed(text: str) -> str:
    """The text in parentheses, unless it is one name."""
    return text if text.isidentifier() else f"({text})"


def kind_of(node: fx.Node) -> Kind:
    """What the node's elements are."""
    dtype: torch.dtype = node.meta["val"].dtype
    return "float" if dtype.is_floating_point else "bool" if dtype == torch.bool else "int"


def described(node: fx.Node) -> str:
    """The type of a node's value, `bf16[1, N, 64]`, in the kernels' own name of the number of tokens."""
    return re.sub(r"\b[su]\d+\b", "N", type_of(node.meta["val"]))


def literal(number_: Any, node: fx.Node) -> Value:
    """A Python number as a value."""
    if isinstance(number_, bool):
        return Value(str(number_), "bool", literal=True)
    if isinstance(number_, int):
        return Value(f"({number_})" if number_ < 0 else str(number_), "int", literal=True)
    if isinstance(number_, float):
        return Value(number(number_), "float", literal=True)
    raise EmitError(f"{where(node)}: has the argument {type_of(number_)}; wanted tensors and numbers")


def number(value: float) -> str:
    """The text of a float, exact in fp32."""
    rounded = torch.tensor(value, dtype=torch.float32).item()
    if math.isnan(rounded) or math.isinf(rounded):
        return f'float("{rounded}")'
    return f"({rounded!r})" if rounded < 0 else repr(rounded)


def eval_literal(text: str) -> bool | int | float:
    """The number behind a literal's text."""
    stripped = text.strip("()")
    if stripped in ("True", "False"):
        return stripped == "True"
    return float(stripped.removeprefix('float("').removesuffix('"'))


def broadcast(coords: tuple[Index, ...], shape: tuple[Factors, ...]) -> tuple[Index, ...]:
    """Coordinates of a broadcast operand: trailing axes, 0 along those of size 1."""
    kept = coords[len(coords) - len(shape) :]
    return tuple(ZERO if size == (1, ()) else at for at, size in zip(kept, shape, strict=True))
