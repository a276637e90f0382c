"""Patterns over graphs: what a rule looks for, written as if calling the ops.

`aten.mul.Tensor(aten.silu.default(gate), up)` and `ir.rms_norm(x, w, eps)` build pattern nodes; `call` does
it for any target. Arguments are brought into the order of the op's schema with its defaults filled in, so a
default given or omitted, positional or by keyword, matches equally. Commutative ops match both operand
orders.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import fx

from llmopt.compiler._torch import OpOverload
from llmopt.compiler.errors import RewriteError, did_you_mean
from llmopt.compiler.op import OPS

MISSING = type("Missing", (), {"__repr__": lambda self: "<missing>"})()

# ops whose first two arguments may be swapped; IR ops are added by `commutes`
_COMMUTATIVE: set[Any] = {torch.ops.aten.add.Tensor, torch.ops.aten.mul.Tensor}


def commutes(overload: OpOverload) -> OpOverload:
    """Declare that an op's first two arguments may be swapped; returns the overload."""
    _COMMUTATIVE.add(overload)
    return overload


@dataclass(frozen=True, eq=False)
class Var:
    """Matches any node, literal or list, and binds it.

    The same name twice must bind the same node or an equal literal.
    `where(value)` narrows what it accepts (it gets the node or literal).
    """

    name: str
    where: Callable[[Any], bool] | None = None

    def accepts(self, value: Any) -> bool:
        """May this variable be bound to the value?"""
        return self.where is None or bool(self.where(value))


class Const(Var):
    """A variable that binds only a literal of a type; `float` takes ints too, but neither takes a bool."""

    kind: type

    def __init__(self, name: str, kind: type, where: Callable[[Any], bool] | None = None) -> None:
        super().__init__(name, where)
        object.__setattr__(self, "kind", kind)

    def is_literal(self, value: Any) -> bool:
        """Is the value a literal of this type?"""
        if isinstance(value, bool):
            return self.kind is bool
        return isinstance(value, (int, float) if self.kind is float else self.kind)

    def accepts(self, value: Any) -> bool:
        """May this variable be bound to the value?"""
        return self.is_literal(value) and super().accepts(value)


@dataclass(frozen=True, eq=False)
class Rest:
    """Inside a list pattern: binds (as a tuple) the elements that the other list elements leave over."""

    name: str


@dataclass(frozen=True, eq=False)
class Form:
    """One spelling of a call: the target and all its arguments in schema order."""

    target: Any
    args: tuple[Any, ...]


@dataclass(frozen=True, eq=False)
class Call:
    """Matches a call node in any of its forms (several targets, both operand orders)."""

    forms: tuple[Form, ...]


@dataclass(frozen=True, eq=False)
class ListOf:
    """Matches a list or tuple argument element by element, with at most one `Rest`."""

    items: tuple[Any, ...]
    rest: int | None = None

    def split(self, values: Any) -> list[tuple[Any, Any]] | None:
        """(pattern, value) pairs, or None if the value is no list of a fitting length."""
        if not isinstance(values, (list, tuple)):
            return None
        if self.rest is None:
            return list(zip(self.items, values, strict=True)) if len(values) == len(self.items) else None
        head, tail = self.items[: self.rest], self.items[self.rest + 1 :]
        if len(values) < len(head) + len(tail):
            return None
        end = len(values) - len(tail)
        middle = (Var(self.items[self.rest].name), tuple(values[len(head) : end]))
        return [*zip(head, values, strict=False), middle, *zip(tail, values[end:], strict=True)]


class AnyOf:
    """Matches what any of the options matches; the first that fits is preferred."""

    def __init__(self, *options: Any) -> None:
        self.options = tuple(as_pattern(o) for o in options)


def Maybe(target: Any, x: Any, *args: Any, **kwargs: Any) -> AnyOf:
    """The op around x, or x itself."""
    return AnyOf(call(target, x, *args, **kwargs), x)


def as_pattern(value: Any) -> Any:
    """Lists become list patterns; everything else stays (literals match by equality)."""
    if not isinstance(value, (list, tuple)):
        return value
    items = tuple(as_pattern(v) for v in value)
    rests = [i for i, v in enumerate(items) if isinstance(v, Rest)]
    if len(rests) > 1:
        raise RewriteError(f"pattern list {value!r} has {len(rests)} Rest elements; wanted at most one")
    return ListOf(items, rests[0] if rests else None)


@cache
def _schema(target: Any) -> tuple[tuple[str, Any], ...] | None:
    """(name, default or MISSING) per argument of an overload; None for plain functions."""
    if not isinstance(target, OpOverload):
        return None
    return tuple((a.name, a.default_value if a.has_default_value() else MISSING) for a in target._schema.arguments)


@cache
def _defaults_after(target: Any, count: int) -> tuple[Any, ...]:
    schema = _schema(target)
    return () if schema is None else tuple(default for _, default in schema[count:])


def flat_args(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """All arguments in schema order, defaults filled in (MISSING where there is none)."""
    if not kwargs:
        return args + _defaults_after(target, len(args))
    schema = _schema(target)
    if schema is None:
        return args + tuple(kwargs[k] for k in sorted(kwargs))
    return args + tuple(kwargs.get(name, default) for name, default in schema[len(args) :])


def node_args(node: fx.Node) -> tuple[Any, ...]:
    """`flat_args` of a graph node."""
    return flat_args(node.target, node.args, node.kwargs)


@cache
def name_of(target: Any) -> str:
    """`aten.mul`, `linear` (IR ops), or a function's name."""
    if isinstance(target, OpOverload):
        space, name = target._schema.name.split("::")
        return name if space == "llmopt" else f"{space}.{name}"
    return getattr(target, "__name__", str(target))


def _check_call(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], flat: tuple[Any, ...]) -> None:
    schema = _schema(target)
    if schema is None:
        return
    names = [name for name, _ in schema]
    unknown = [k for k in kwargs if k not in names]
    if unknown:
        raise RewriteError(f"pattern {name_of(target)}: no argument {unknown[0]!r}; {did_you_mean(unknown[0], names)}")
    if len(args) > len(names):
        raise RewriteError(f"pattern {name_of(target)}: {len(args)} arguments given, wanted at most {len(names)}")
    if any(v is MISSING for v in flat):
        short = [n for n, v in zip(names, flat, strict=True) if v is MISSING]
        raise RewriteError(f"pattern {name_of(target)}: argument {short[0]!r} is missing; name it or give a Var")


def _forms(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Form]:
    flat = tuple(as_pattern(v) for v in flat_args(target, args, kwargs))
    _check_call(target, args, kwargs, flat)
    forms = [Form(target, flat)]
    # a + alpha * b commutes for alpha = 1 only
    scaled = name_of(target) == "aten.add" and not (isinstance(flat[2], int) and flat[2] == 1)
    if target in _COMMUTATIVE and flat[0] is not flat[1] and not scaled:
        forms.append(Form(target, (flat[1], flat[0], *flat[2:])))
    return forms


def call(target: Any, *args: Any, **kwargs: Any) -> Call:
    """A pattern node; `target` is an overload, `aten.x.y`, `ir.x`, a function, or a tuple of them."""
    targets = target if isinstance(target, tuple) else (target,)
    return Call(tuple(f for t in targets for f in _forms(overload_of(t), args, kwargs)))


@dataclass(frozen=True)
class OpRef:
    """An op named through a namespace; calling it hands the overload and arguments to `make`."""

    overload: Any
    make: Callable[..., Any] = field(compare=False)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.make(self.overload, *args, **kwargs)


def overload_of(target: Any) -> Any:
    """The overload behind `aten.x.y` or `ir.x`; anything else is returned as it is."""
    return target.overload if isinstance(target, OpRef) else target


@cache
def _aten(name: str, overload: str) -> OpOverload:
    if not hasattr(torch.ops.aten, name):
        raise RewriteError(f"there is no op aten.{name}; check the spelling in torch.ops.aten")
    packet = getattr(torch.ops.aten, name)
    if overload not in packet.overloads():
        known = did_you_mean(overload, packet.overloads())
        raise RewriteError(f"aten.{name} has no overload {overload!r}; {known}")
    found: OpOverload = getattr(packet, overload)
    return found


class _Packet:
    def __init__(self, name: str, make: Callable[..., Any]) -> None:
        self._name, self._make = name, make

    def __getattr__(self, overload: str) -> OpRef:
        if overload.startswith("__"):
            raise AttributeError(overload)
        return OpRef(_aten(self._name, overload), self._make)


class AtenOps:
    """`ops.mul.Tensor` names an aten overload."""

    def __init__(self, make: Callable[..., Any]) -> None:
        self._make = make

    def __getattr__(self, name: str) -> _Packet:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Packet(name, self._make)


class IrOps:
    """`ops.rms_norm` names an IR op."""

    def __init__(self, make: Callable[..., Any]) -> None:
        self._make = make

    def __getattr__(self, name: str) -> OpRef:
        if name.startswith("__"):
            raise AttributeError(name)
        if name not in OPS:
            raise RewriteError(f"there is no IR op {name!r}; {did_you_mean(name, OPS)}")
        return OpRef(OPS[name].overload, self._make)


aten = AtenOps(call)
ir = IrOps(call)
