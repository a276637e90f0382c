"""Plain data (what JSON and YAML hold), checked on reading: what is wrong raises the caller's error."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from llmopt.compiler.errors import LlmoptError, did_you_mean

_ACCEPTS: dict[Any, Any] = {
    int: int, float: (int, float), str: str, bool: bool, tuple: tuple, None: NoneType, NoneType: NoneType,
}  # fmt: skip


def mapping(
    data: Any,
    where: str,
    error: type[LlmoptError],
    known: Iterable[str] | None = None,
    wanted: Iterable[str] = (),
) -> dict[str, Any]:
    """A copy of `data`, a mapping with string keys: all of `wanted`, and none outside `known` (None: any)."""
    if not isinstance(data, Mapping) or not all(isinstance(key, str) for key in data):
        raise error(f"{where} is {data!r}, wanted a mapping of names to values")
    if known is not None:
        names = set(known)
        for key in data:
            if key not in names:
                raise error(f"{where}: key {key!r} is unknown; {did_you_mean(key, names)}")
    for key in sorted(set(wanted) - set(data)):
        raise error(f"{where}: key {key!r} is missing")
    return dict(data)


def items(data: Any, where: str, error: type[LlmoptError]) -> list[Any]:
    """`data`, a list."""
    if not isinstance(data, list):
        raise error(f"{where} is {data!r}, wanted a list")
    return data


def text(data: Any, where: str, error: type[LlmoptError]) -> str:
    """`data`, a string that is not empty."""
    if not isinstance(data, str) or not data:
        raise error(f"{where} is {data!r}, wanted a name")
    return data


def is_int(value: Any) -> bool:
    """A whole number (True and False are none)."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_range(value: Any) -> bool:
    """Two whole numbers (lowest, highest), 1 <= lowest <= highest."""
    return isinstance(value, tuple) and len(value) == 2 and all(map(is_int, value)) and 1 <= value[0] <= value[1]


def is_plain(value: Any) -> bool:
    """A bool, number, string, None, or a list of such: what an option may hold."""
    if isinstance(value, (list, tuple)):
        return all(map(is_plain, value))
    return isinstance(value, (bool, int, float, str, NoneType))


def is_a(value: Any, hint: Any) -> bool:
    """Does a plain value fit an annotation made of int, float, str, bool, None, tuple, Literal and unions?

    An int fits float, a bool fits bool only; anything fits an annotation outside this list.
    """
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(is_a(value, arg) for arg in args)
    if origin is Literal:
        return any(type(value) is type(arg) and value == arg for arg in args)
    if origin is tuple:
        return isinstance(value, tuple) and _is_tuple_of(value, args)
    if isinstance(value, bool):
        return hint not in _ACCEPTS or hint is bool
    return isinstance(value, _ACCEPTS.get(hint, object))


def _is_tuple_of(value: tuple[Any, ...], args: tuple[Any, ...]) -> bool:
    inner = args[:1] * len(value) if args[1:] == (...,) else args
    return len(inner) == len(value) and all(map(is_a, value, inner))


def frozen(value: Any) -> Any:
    """Lists to tuples, all the way down, so that the value can be hashed."""
    return tuple(map(frozen, value)) if isinstance(value, (list, tuple)) else value


def thawed(value: Any) -> Any:
    """Tuples to lists, all the way down: JSON's form of a frozen value."""
    return list(map(thawed, value)) if isinstance(value, tuple) else value
