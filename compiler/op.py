"""IR ops, each declared once: the Python signature is the schema, the body is the meaning.

The body is the CPU path, the oracle of every provider, and (unless `fake` says otherwise) the shape rule. Beside it
stand the cost, the samples of the conformance test, and the ONNX slot. Implementations for a target are *providers*;
which providers may be used is the recipe's policy, never an op's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from llmopt.compiler._torch import OpOverload
from llmopt.compiler.errors import ProviderError

NAMESPACE = "llmopt"


@dataclass(frozen=True)
class Cost:
    """What one call moves and computes; sympy expressions or ints, in flops and bytes."""

    flops: Any
    bytes: Any


@dataclass(frozen=True)
class Provider:
    """One implementation of an op.

    `needs` are facts of the target ("cpp", "cuda", ...); `supports(*args)` are facts of the (fake) arguments and
    returns None or the reason why not; `fn` takes the op's arguments and returns its result.
    """

    name: str
    fn: Callable[..., Any]
    needs: frozenset[str] = frozenset()
    supports: Callable[..., str | None] = lambda *args, **kwargs: None


@dataclass
class Op:
    """A declared op. Calling it calls the dispatcher, so it can be traced."""

    name: str
    fn: Callable[..., Any]
    overload: OpOverload
    providers: dict[str, Provider] = field(default_factory=dict)
    cost_fn: Callable[..., Cost] | None = None
    samples_fn: Callable[[], Iterable[tuple[Any, ...]]] | None = None
    onnx_fn: Callable[..., Any] | None = None
    in_place_fn: Callable[..., Any] | None = None
    traceable: bool = True  # can the body be traced with fake tensors (no loop over values)?

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.overload(*args, **kwargs)

    def cost(self, fn: Callable[..., Cost]) -> Callable[..., Cost]:
        """Declare the cost: takes the op's arguments (tensors real or fake)."""
        self.cost_fn = fn
        return fn

    def samples(self, fn: Callable[[], Iterable[tuple[Any, ...]]]) -> Callable[[], Iterable[tuple[Any, ...]]]:
        """Declare argument tuples for the conformance test."""
        self.samples_fn = fn
        return fn

    def onnx(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """Declare the translation to ONNX."""
        self.onnx_fn = fn
        return fn

    def in_place(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """Declare the form that overwrites its first operand, for when nothing else reads that any more."""
        self.in_place_fn = fn
        return fn

    def fake(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """Declare the shape rule where the body cannot serve."""
        torch.library.register_fake(f"{NAMESPACE}::{self.name}", fn, allow_override=True)
        return fn

    def provider(
        self, name: str, needs: Iterable[str] = (), supports: Callable[..., str | None] | None = None
    ) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Register an implementation; registering a name twice is an error."""

        def register(fn: Callable[..., Any]) -> Callable[..., Any]:
            if name in self.providers:
                raise ProviderError(
                    f"op {self.name}: provider {name!r} is registered twice "
                    f"(first by {self.providers[name].fn.__module__}); give the second another name"
                )
            extra = {} if supports is None else {"supports": supports}
            self.providers[name] = Provider(name, fn, frozenset(needs), **extra)
            return fn

        return register


OPS: dict[str, Op] = {}


def op(fn: Callable[..., Any]) -> Op:
    """Declare an IR op from a function over tensors and plain values (`torch.library` schema types)."""
    name = fn.__name__
    custom = torch.library.custom_op(f"{NAMESPACE}::{name}", fn, mutates_args=())
    custom.register_fake(fn)
    overload = getattr(torch.ops.llmopt, name).default
    declared = Op(name, fn, overload)
    declared.providers["reference"] = Provider("reference", fn)
    OPS[name] = declared
    return declared


def op_of(target: Any) -> Op | None:
    """The declared op behind a node's target, or None."""
    if isinstance(target, OpOverload) and target.namespace == NAMESPACE:
        return OPS.get(target._schema.name.split("::")[1])
    return None


def nbytes(*values: Any) -> Any:
    """Bytes of the tensors among `values` (symbolic for fake tensors with symbolic sizes)."""
    return sum(v.numel() * v.element_size() for v in values if isinstance(v, Tensor))
