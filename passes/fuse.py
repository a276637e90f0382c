"""fuse: mark which nodes of the step one kernel computes. Exact.

    n = rms_norm(h, w["norm"], 1e-5)                     # kernel 3
    gu = linear(n, w["gate|up"])                         # kernel 3
    s = split_with_sizes(gu, [F, F], -1)          =>     # kernel 3
    y = gated(s[0], s[1], "silu")                        # kernel 3
    o = linear(y, w["down"])                             # kernel 4
    return add(h, o)                                     # kernel 4

`meta["kernel"]` numbers kernels in an order they can run in; `lower` cuts there. What crosses a border is a whole
tensor, so each kernel gets views of its own; a norm that several products read is computed in each. What no template
takes is a kernel of one node, run by torch, and is listed in the notes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from llmopt.compiler import knobs
from llmopt.compiler.emittable import ATTENDS, CASTS, is_product, keeps_order, op_name, puts_tokens_first
from llmopt.compiler.graph import Graph, origin, target_name
from llmopt.compiler.pipeline import Context, Pass, PassStats
from llmopt.compiler.program import Program
from llmopt.compiler.target import Target
from llmopt.passes.fusible import base, is_row_choice, is_view, near_writes, reason_against
from llmopt.passes.partition import Kernel, partition


@dataclass(frozen=True)
class Fuse(Pass):
    """Kernels of the step, for targets with Triton; see the module's docstring."""

    name: ClassVar[str] = "fuse"
    requires: ClassVar[frozenset[str]] = frozenset({"cached"})
    ensures: ClassVar[frozenset[str]] = frozenset({"fused"})
    must_match: ClassVar[bool] = False  # nothing to do on a CPU

    def run(self, program: Program, context: Context) -> PassStats:
        """Mark the nodes of `step`."""
        stats = PassStats()
        if not uses_triton(context):
            return stats
        step = program.graph("step")
        plain_sizes(step)
        plain_casts(step)
        repeat_norms(step, context.target)
        put_tokens_first(step, context.target)
        step.fx.eliminate_dead_code()
        kernels = partition(step, context.target)
        before = {n: n.meta.get("kernel") for n in step.fx.nodes}
        number_nodes(step, kernels)
        for kernel in kernels:
            if any(before.get(n) != n.meta["kernel"] for n in kernel.nodes):
                stats.record(kernel.kind, kernel.nodes[-1].name, origin(kernel.nodes[-1]).source)
        stats.notes += notes(kernels, context.target)
        return stats


def uses_triton(context: Context) -> bool:
    """Does the target have Triton, and is it among the providers allowed?"""
    return "triton" in context.target.facts and "triton" in (knobs.provider() or context.recipe.providers)


def notes(kernels: Sequence[Kernel], target: Target) -> list[str]:
    """How many kernels of each kind there are, and what torch runs, with the reason."""
    kinds = Counter(k.kind for k in kernels)
    alone = [k.nodes[0] for k in kernels if k.kind == "torch" and not is_row_choice(k.nodes[0])]
    lone = Counter(f"{target_name(n)}: {reason_against(n, target)}" for n in alone)
    found = ["kernels: " + ", ".join(f"{kind} x{count}" for kind, count in sorted(kinds.items()))]
    if any(target_name(n) == "attend_near" for k in kernels if k.kind == "attention" for n in k.nodes):
        found.append(
            "by torch: attention of prompts, since kernels see tokens as they are in packed pages while decoding"
        )
    return found + [f"by torch: {what} (x{count})" for what, count in lone.items()]


def plain_sizes(step: Graph) -> None:
    """Reshapes to one unknown size and known ones say so with -1, instead of reading the number of tokens."""
    for node in step.calls("aten.reshape"):
        shape = node.meta["val"].shape
        if sum(not isinstance(s, int) for s in shape) == 1:
            node.update_arg(1, [s if isinstance(s, int) else -1 for s in shape])


def plain_casts(step: Graph) -> None:
    """`type_as(x, y)` is a cast to y's dtype, and no reader of y."""
    for node in list(step.calls("aten.type_as")):
        node.target = torch.ops.aten.to.dtype
        node.args = (node.args[0], node.meta["val"].dtype)


def repeat_norms(step: Graph, target: Target) -> None:
    """A norm that only products read is repeated for each: that costs less than a kernel and a tensor of its own."""
    for norm in list(step.calls("rms_norm")):
        last = norm
        while len(last.users) == 1 and op_name(next(iter(last.users))) in CASTS:
            last = next(iter(last.users))
        products = [u for u in last.users if is_product(u) and reason_against(u, target) is None and u.args[0] is last]
        if len(products) == len(last.users):
            for product in products[1:]:
                product.update_arg(0, _repeated(step, norm, last))


def _repeated(step: Graph, first: fx.Node, last: fx.Node) -> fx.Node:
    """A copy of the chain from `first` to `last`."""
    source = None if first is last else _repeated(step, first, last.args[0])  # type: ignore[arg-type]
    with step.fx.inserting_after(last):
        copy = step.fx.node_copy(last)
    if source is not None:
        copy.update_arg(0, source)
    return copy


def put_tokens_first(step: Graph, target: Target) -> None:
    """Attention's kernels write [1, N, H, D]; who reads [1, H, N, D] reads a view of that."""
    for attend in [node for node in step.calls() if target_name(node) in ATTENDS]:
        readers = _readers(attend)
        if reason_against(attend, target) is None and not (len(readers) == 1 and puts_tokens_first(readers[0])):
            with step.fx.inserting_after(attend):
                turned = step.call(torch.ops.aten.transpose.int, (attend, 1, 2), attend, "fuse")
            turned.meta["val"] = attend.meta["val"].transpose(1, 2)
            with step.fx.inserting_after(turned):
                back = step.call(torch.ops.aten.transpose.int, (turned, 1, 2), attend, "fuse")
            back.meta["val"] = attend.meta["val"]
            attend.replace_all_uses_with(back, delete_user_cb=readers.__contains__)


def number_nodes(step: Graph, kernels: Sequence[Kernel]) -> None:
    """Set `meta["kernel"]`: that of the partition, and views with what reads them, repeated where several do."""
    settled: set[fx.Node] = set()
    for number, kernel in enumerate(kernels):
        nodes = [*kernel.nodes, *(v for n in kernel.nodes if target_name(n) in ATTENDS for v in _tail(n))]
        settled.update(nodes)
        for node in nodes:
            node.meta["kernel"] = number
    for node in reversed(list(step.fx.nodes)):
        if node in settled or node.op != "call_function" or not isinstance(node.meta["val"], (Tensor, tuple, list)):
            continue
        if is_view(node):
            _number_view(step, node, len(kernels))
        else:  # one of several results
            node.meta["kernel"] = base(node).meta["kernel"]


def _tail(attend: fx.Node) -> list[fx.Node]:
    """The views that bring an attention's result into the order it is wanted in: tokens first, then in that order."""
    views: list[fx.Node] = []
    readers = _readers(attend)
    while len(readers) == 1 and (keeps_order if views else puts_tokens_first)(readers[0]):
        views.append(readers[0])
        readers = list(readers[0].users)
    return views


def _readers(attend: fx.Node) -> list[fx.Node]:
    """Who uses its result; writes that only wait for it do not."""
    return [user for user in attend.users if user not in near_writes(attend)]


def _number_view(step: Graph, view: fx.Node, unused: int) -> None:
    readers: dict[int, list[fx.Node]] = {}
    for user in view.users:
        number = base(view).meta.get("kernel", unused) if user.op == "output" else user.meta["kernel"]
        readers.setdefault(number, []).append(user)
    for at, (number, users) in enumerate(readers.items()):
        with step.fx.inserting_before(view):
            mine = step.fx.node_copy(view) if at else view
        mine.meta["kernel"] = number
        for user in users if at else ():
            user.replace_input_with(view, mine)
