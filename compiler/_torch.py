"""The only file that imports torch's private modules: what llmopt leans on, and where it moves between versions."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing
from torch.fx.experimental.symbolic_shapes import (
    DimDynamic,
    ShapeEnv,
    StatelessSymbolicContext,
    free_unbacked_symbols,
    statically_known_true,
)

__all__ = [
    "FakeTensor",
    "FakeTensorMode",
    "OpOverload",
    "concrete_values",
    "fake_mode",
    "fake_tensor",
    "free_unbacked_symbols",
    "statically_known_true",
]


def fake_mode() -> FakeTensorMode:
    """A fresh mode with its own shape environment."""
    return FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)


def fake_tensor(
    mode: FakeTensorMode, shape: Sequence[int | str], dtype: torch.dtype, symbols: dict[str, Any]
) -> FakeTensor:
    """A fake tensor whose string sizes are symbols: the same name is the same symbol, kept in `symbols`.

    A symbol is created with an example size of its own (a distinct one, so that two never unify) and is assumed to
    be at least 2; a graph for size 1 is another specialisation.
    """
    assert mode.shape_env is not None
    for name in (s for s in shape if isinstance(s, str) and s not in symbols):
        example = torch.empty(_EXAMPLES[len(symbols) % len(_EXAMPLES)] + 100 * (len(symbols) // len(_EXAMPLES)))
        context = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC], constraint_sizes=[None])
        faked = mode.from_tensor(example, symbolic_context=context)
        symbols[name] = faked.shape[0]
    sizes = [symbols[s] if isinstance(s, str) else s for s in shape]
    with mode:
        made = torch.empty(sizes, dtype=dtype)
    assert isinstance(made, FakeTensor)
    return made


_EXAMPLES = (5, 7, 11, 13, 17, 19, 23, 29)


@contextlib.contextmanager
def concrete_values() -> Iterator[None]:
    """Inside a trace: compute on real tensors, unseen by the tracer."""
    with unset_fake_temporarily(), disable_proxy_modes_tracing():
        yield


def inductor_matcher() -> Any:
    """Inductor's pattern matcher module: the peer that `benchmarks/rewrite_cost.py` compares with."""
    from torch._inductor import pattern_matcher

    return pattern_matcher


def lazy_module(graph: torch.fx.Graph) -> torch.fx.GraphModule:
    """A GraphModule around the graph that generates no code until it is called."""
    from torch.fx._lazy_graph_module import _LazyGraphModule

    root = torch.nn.Module()
    for node in graph.find_nodes(op="get_attr"):
        setattr(root, str(node.target), None)
    return _LazyGraphModule(root, graph)
