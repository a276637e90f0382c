"""What a kernel of some nodes costs in a decode step: seconds from the ops' sympy costs and the target's figures."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from llmopt.compiler.emittable import PRODUCTS, op_name
from llmopt.compiler.graph import target_name
from llmopt.compiler.op import nbytes, op_of
from llmopt.compiler.target import Target

# sizes of the step that costs are taken for
SIZES = {"N": 8, "R": 8, "S": 8, "M": 64, "P": 1024}
LAUNCH = 3e-6  # seconds at a kernel's border: launch, ramp and drain
LANE_FLOPS = 128 * 2 * 1.5e9  # fp32 flops a second of one multiprocessor
SHARED_ROWS = 64  # rows of a weight whose products share one computation of the operand


class Costs:
    """Costs under fixed values of the symbolic sizes; `symbols` are a graph's, by name."""

    def __init__(self, symbols: Mapping[str, Any], target: Target) -> None:
        sizes = {name: size.node.expr for name, size in symbols.items() if isinstance(size, torch.SymInt)}
        self.values = {expr: SIZES[name] for name, expr in sizes.items() if name in SIZES}
        self.bandwidth, self.rate = target.bandwidth, target.cores * LANE_FLOPS
        self._known: dict[Any, float] = {}

    def number(self, size: Any) -> float:
        """The value of a size, symbolic or not."""
        if not isinstance(size, torch.SymInt):
            return float(size)
        expr = size.node.expr
        if expr not in self._known:
            self._known[expr] = float(expr.subs(self.values))
        return self._known[expr]

    def seconds(self, nodes: Sequence[fx.Node], read: Collection[fx.Node], written: Collection[fx.Node]) -> float:
        """One kernel of `nodes` (in graph order): a launch, and the longer of its traffic and its arithmetic.

        `read` and `written` are the tensors that cross its border. What stands in front of a product is computed again
        for every SHARED_ROWS rows of the weight. The product's own flops are the tensor cores', hidden behind its
        weights at so few tokens.
        """
        tables = {n.args[0] for n in nodes if target_name(n) == "aten.embedding"}
        moved = sum(self.number(nbytes(n.meta["val"])) for n in (*read, *written) if n not in tables)
        flops, copies = 0.0, 1.0
        for node in reversed(nodes):
            if op_name(node) in PRODUCTS:
                copies = max(1.0, self.number(node.meta["val"].shape[-1]) / SHARED_ROWS)
            else:
                flops += copies * self.number(_flops(node))
        return LAUNCH + max(moved / self.bandwidth, flops / self.rate)


def _flops(node: fx.Node) -> Any:
    op = op_of(node.target)
    if op is None or op.cost_fn is None:
        return node.meta["val"].numel()
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    return op.cost_fn(*args, **kwargs).flops
