"""Who shares memory with whom in a traced graph: read off the storages of its fake values."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, fx

from llmopt.compiler._torch import OpOverload


def storages(value: Any) -> Iterator[int]:
    """Identities of the storages of a tensor, or of the tensors in a list (valid while these are alive)."""
    if isinstance(value, Tensor):
        yield value.untyped_storage()._cdata
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from storages(item)


def storages_of(nodes: Iterable[fx.Node]) -> set[int]:
    """Identities of the storages of these nodes' values."""
    return {s for node in nodes for s in storages(node.meta.get("val"))}


def written(node: fx.Node) -> set[int]:
    """Identities of the storages that this node's call writes to."""
    if not isinstance(node.target, OpOverload) or not node.target._schema.is_mutable:
        return set()
    if node.target is torch.ops.aten.detach_.default:  # writes nothing but autograd's notes
        return set()
    found: set[int] = set()
    for at, declared in enumerate(node.target._schema.arguments):
        if declared.alias_info is not None and declared.alias_info.is_write:
            given = node.args[at] if at < len(node.args) else node.kwargs.get(declared.name)
            found |= storages_of(n for n in node.all_input_nodes if _holds(given, n))
    return found


def _holds(argument: Any, node: fx.Node) -> bool:
    return argument is node or (isinstance(argument, (list, tuple)) and node in argument)


def sharing(values: Iterable[Any]) -> tuple[int, ...]:
    """For each value the position of the first one that shares its memory (its own if none does)."""
    first: dict[int, int] = {}
    return tuple(min((first.setdefault(s, at) for s in storages(value)), default=at) for at, value in enumerate(values))
