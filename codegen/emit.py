"""Prints the nodes around an anchor as the hooks of a kernel template.

Every tensor is a function of its coordinates: views change coordinates only, pointwise ops recurse, and what lies in
memory (`stored`) is loaded. All arithmetic on floats is in fp32, and a value is rounded where it is stored; so there
are fewer roundings than when torch runs the nodes one by one.

    operands = Operands(6)                                   # e0, e1, ... in order of first use, shared by the hooks
    load_x = load_x_hook(operands, x, stored)
    epilogue, offsets = epilogue_hook(operands, result, linear, stored)
    Kernel("gemv:gemv", types=(("w", ...), ("y", ...), *operands.types(), ("N", "i32")), source=source_of(load_x, epilogue),
           hooks=(("LOAD_X", load_x.name), ("EPILOGUE", epilogue.name)), constants=(*operands.absent(), ...))

Whole kernels without an anchor are made by `codegen/rows.py`. What cannot be printed raises EmitError;
`compiler/emittable.py` says beforehand, node by node, what can.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from torch import fx

_NOT_YET = "not written yet"


@dataclass(frozen=True)
class Hook:
    """A `@triton.jit` function: its name (unique by content), its source, and the helper functions it calls."""

    name: str
    source: str
    helpers: frozenset[str] = frozenset()


def source_of(*hooks: Hook) -> str:
    """A module with these hooks, each once, and what they need: what `Kernel.source` holds."""
    raise NotImplementedError(_NOT_YET)


@dataclass
class Operands:
    """The tensors that a kernel's hooks read, as pointer parameters `e0`, `e1`, ... in order of first use.

    `nodes[i]` is the node behind `e{i}`: the caller passes that tensor, contiguous in its fx shape, as argument.
    """

    limit: int = 6
    nodes: list[fx.Node] = field(default_factory=list)

    def name(self, node: fx.Node) -> str:
        """The parameter for this node's tensor. Raises EmitError when there are more than `limit`."""
        raise NotImplementedError(_NOT_YET)

    def types(self) -> tuple[tuple[str, str], ...]:
        """(("e0", "*bf16"), ...): the parameters in use, for `Kernel.types`."""
        raise NotImplementedError(_NOT_YET)

    def absent(self) -> tuple[tuple[str, None], ...]:
        """(("e4", None), ("e5", None)): the parameters not in use, for `Kernel.constants`."""
        raise NotImplementedError(_NOT_YET)


def load_x_hook(operands: Operands, x: fx.Node, stored: Collection[fx.Node]) -> Hook:
    """LOAD_X(m, k, ok, e0..e5) of the node x [1, N, K] (or any shape with the same elements a token): fp32, 0 where
    not ok.

    `stored` are the nodes that lie in memory and are loaded, not computed: the region's inputs, and temporaries that
    an earlier call wrote. With a norm in front of the linear, x is the norm's operand, not the norm.
    """
    raise NotImplementedError(_NOT_YET)


def load_g_hook(operands: Operands, norm: fx.Node, stored: Collection[fx.Node]) -> Hook:
    """LOAD_G(k, ok, e0..e5) of an `rms_norm` node: its weight plus shift, fp32; ones if it has no weight."""
    raise NotImplementedError(_NOT_YET)


def epilogue_hook(
    operands: Operands, result: fx.Node, anchor: fx.Node, stored: Collection[fx.Node]
) -> tuple[Hook, tuple[int, ...]]:
    """EPILOGUE(acc0, acc1, m, n, ok, e0..e5) of `result` as a function of the linear `anchor`, and the row offsets of
    the weight that acc0 and acc1 come from.

    (0,) for a plain result; (0, F) for `gated(split halves)`: PARTS is the length, OFFSET0 and OFFSET1 the values, J
    the elements of `result` a token. The anchor's own bias (args[2]) is added here. `result` may be the anchor
    itself. Raises EmitError if more than two parts, or another token's or column's product, are needed.
    """
    raise NotImplementedError(_NOT_YET)


def query_hook(operands: Operands, q: fx.Node, stored: Collection[fx.Node]) -> Hook:
    """LOAD_Q(n, h, d, ok, e0..e5) of q [1, Hq, N, D]: fp32 [H, D], n scalar, h [H, 1], d [1, D], 0 where not ok.

    Norms over the heads' channels are computed inside, over d.
    """
    raise NotImplementedError(_NOT_YET)


def key_hook(operands: Operands, k: fx.Node, stored: Collection[fx.Node]) -> Hook:
    """LOAD_K or LOAD_V(n, h, d, ok, e0..e5) of k or v [1, Hkv, N, D]: fp32 [1, D], n and h scalars, d [1, D]."""
    raise NotImplementedError(_NOT_YET)
