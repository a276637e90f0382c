"""Fake values of new nodes, computed by running the op on fake operands, once per distinct kind of operands.

Results are shared between nodes whose operands look alike (dtype, sizes, strides, device): in a decoder of
identical layers each op is run once. A shared value says what a node's result looks like, never which storage
it lives in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import fx

from llmopt.compiler._torch import FakeTensor, FakeTensorMode, faking, free_unbacked_symbols, statically_known_true

SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool)


def _dim(size: Any) -> Any:
    return size.node.expr if isinstance(size, SYMBOLIC) else size


class Look:
    """What a fake value looks like; equal looks are the same object within one `Fakes`."""

    __slots__ = ()


class Fakes:
    """Computes and remembers fake values for one graph."""

    def __init__(self, graph: fx.Graph) -> None:
        self._graph = graph
        self._mode: FakeTensorMode | None = None
        self._mode_known = False
        self._looks: dict[Any, Look] = {}
        self._seen: dict[int, tuple[Any, Look]] = {}  # id of a value -> (the value, kept alive; its look)
        self._memo: dict[Any, Any] = {}

    def run(self, target: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The fake result of `target(*args, **kwargs)`; None if an operand node has no fake value."""
        try:
            key = (
                target,
                self._key(args),
                tuple([(k, self._key(v)) for k, v in kwargs.items()]) if kwargs else None,
            )
        except KeyError:
            return None
        try:
            return self._memo[key]
        except KeyError:
            pass
        except TypeError:  # an unhashable literal
            return self._compute(target, args, kwargs)
        result = self._compute(target, args, kwargs)
        if not _has_unbacked(result):
            self._memo[key] = result
        return result

    def look(self, value: Any) -> Look:
        """The interned look of a tensor or symbolic value."""
        known = self._seen.get(id(value))
        if known is not None:
            return known[1]
        described: Any = (type(value), id(value))
        if isinstance(value, torch.Tensor) and value.layout == torch.strided:
            sizes, strides = tuple(map(_dim, value.shape)), tuple(map(_dim, value.stride()))
            described = (value.dtype, sizes, strides, value.device)
        elif isinstance(value, SYMBOLIC):
            described = (type(value), value.node.expr)
        elif isinstance(value, (list, tuple)):
            described = tuple([self._value_key(v) for v in value])
        look = self._looks.setdefault(described, Look())
        self._seen[id(value)] = (value, look)
        return look

    def _value_key(self, value: Any) -> Any:
        if isinstance(value, (torch.Tensor, list, tuple, *SYMBOLIC)):
            return self.look(value)
        return type(value), value

    def _key(self, arg: Any) -> Any:
        if isinstance(arg, fx.Node):
            return self._value_key(arg.meta["val"])
        if isinstance(arg, (list, tuple)):
            return tuple([self._key(a) for a in arg])
        return arg.__class__, arg

    def _compute(self, target: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        values = fx.map_arg((args, kwargs), lambda n: n.meta["val"])
        mode = self._find_mode()
        with torch.no_grad() if mode is None else faking(mode):
            return target(*values[0], **values[1])

    def _find_mode(self) -> FakeTensorMode | None:
        if not self._mode_known:
            self._mode_known = True
            self._mode = find_mode(n.meta.get("val") for n in self._graph.nodes)
        return self._mode


def find_mode(values: Iterable[Any]) -> FakeTensorMode | None:
    """The mode of the first fake tensor among the values."""
    for value in values:
        for item in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(item, FakeTensor):
                return item.fake_mode
    return None


def is_alike(a: Any, b: Any) -> bool:
    """Equal shape and dtype (tensors), equal expression (symbolic scalars), element by element (tuples).

    Symbolic sizes are compared without adding guards.
    """
    if a is b:
        return True
    if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor):
        if not (isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor)):
            return False
        return a.dtype == b.dtype and a.dim() == b.dim() and all(map(_same_size, a.shape, b.shape))
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(is_alike, a, b))
    return _same_size(a, b)


def _same_size(a: Any, b: Any) -> bool:
    if not isinstance(a, SYMBOLIC) and not isinstance(b, SYMBOLIC):
        return bool(a == b)
    return _dim(a) == _dim(b) or (isinstance(a, (int, torch.SymInt)) and statically_known_true(a == b))


def _has_unbacked(value: Any) -> bool:
    items = value if isinstance(value, (list, tuple)) else (value,)
    return any(isinstance(v, (torch.Tensor, *SYMBOLIC)) and bool(free_unbacked_symbols(v)) for v in items)
