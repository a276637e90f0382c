"""rotate-hadamard: hidden vectors in a basis in which no element is far larger than the others. Exact.

    x = rms_norm(r, g);  y = linear(x, w)   =>   x = rms_norm(r', None);  y = linear(x, w["w.r1"])      r' = r Q
    out = linear(gated(a, b), w)            =>   out = linear(rotate(gated(a, b), L, R), w["w.r4"])

Low-bit formats lose most where one element of a group is far larger than the rest; Q (`compiler.hadamard`) spreads it
over all. The names are those of SpinQuant (arXiv 2405.16406); QuaRot (arXiv 2404.00456) has the same four:

    r1  the residual stream: embeddings, the rows of products that write to it and the columns of those that read it;
        weights of norms are folded into the latter
    r2  values, head by head: the rows of v and the columns of what reads attention's result
    r3  queries and keys behind RoPE, which does not commute with it: `rotate` in the graph, for a low-bit cache
    r4  what down projections read: `rotate` in the graph, its inverse in the weight

r1 and r2 cost nothing at run time. Edits of one weight are made in float64 and rounded once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from llmopt.compiler import ops
from llmopt.compiler._torch import faking
from llmopt.compiler.errors import InputError, PassMatchedNothing, RecipeError
from llmopt.compiler.graph import Graph, origin, target_name
from llmopt.compiler.hadamard import Rotation, largest
from llmopt.compiler.pipeline import Context, Pass, PassStats
from llmopt.compiler.program import Program
from llmopt.passes.residual import residual_stream
from llmopt.passes.value_path import value_path
from llmopt.passes.weight_edits import WeightEdits


@dataclass(frozen=True)
class RotateHadamard(Pass):
    """Which rotations, the largest order of their blocks (0: any), and what their random signs come from."""

    name: ClassVar[str] = "rotate-hadamard"
    requires: ClassVar[frozenset[str]] = frozenset({"canonical"})
    ensures: ClassVar[frozenset[str]] = frozenset({"rotated"})

    r1: bool = True
    r2: bool = True
    r3: bool = False
    r4: bool = False
    order: int = 0
    seed: int = 0

    def run(self, program: Program, context: Context) -> PassStats:
        """Rotate `forward`, before there is a step. Raises InputError (weights that may change later), RecipeError."""
        if not context.fold_weights:
            raise InputError(
                "pass 'rotate-hadamard' changes weights, which under torch.compile belong to the module; use "
                "llmopt.compile(model, recipe=...)"
            )
        if list(program.graphs) != ["forward"]:
            raise RecipeError("pass 'rotate-hadamard' stands behind 'insert-kv-cache'; move it before")
        if why := self._why_not():
            raise RecipeError(f"pass 'rotate-hadamard': {why}")
        stats, graph = PassStats(), program.graph("forward")
        edits = WeightEdits(program, graph, self.name)
        rotate: list[tuple[bool, Callable[..., None]]] = [
            (self.r1, self._residual), (self.r2, self._values), (self.r3, self._queries), (self.r4, self._down),
        ]  # fmt: skip
        for wanted, edit in rotate:
            if wanted:
                edit(graph, edits, context, stats)
        edits.commit()
        if context.rewrites_left is None:
            refused = {rule for rule, _ in stats.rejected}
            for rule in ("r1", "r2", "r3", "r4"):
                if getattr(self, rule) and not stats.per_rule[rule] and rule not in refused:
                    stats.rejected[rule, "there is nothing of the kind"] += 1
            stats.notes += [f"{rule} left out: {why}" for rule, why in stats.rejected]
            if stats.rewritten == 0:
                said = "; ".join(stats.notes) or "none of r1 to r4 is asked for"
                raise PassMatchedNothing(f"pass 'rotate-hadamard' rewrote nothing: {said}; take it out of the recipe")
        return stats

    def _why_not(self) -> str | None:
        if self.order < 0:
            return f"order is {self.order}; wanted 0 (the largest there is) or more"
        if not 0 <= self.seed < 2**63:
            return f"seed is {self.seed}; wanted a number from 0 up to 2**63 - 1"
        return None

    @property
    def _how(self) -> str:
        """What the names of weights say of options, so that weights of other rotations have other names."""
        return f"-{self.order}" * (self.order > 0) + f"-seed{self.seed}" * (self.seed != 0)

    def _rotation(self, rule: str, size: int, stats: PassStats) -> Rotation:
        wanted = min(self.order or size, size)
        order = largest(size, wanted)
        note = f"{rule} turns blocks of {order} of {size} channels, the largest that there are up to {wanted}"
        if order != wanted and note not in stats.notes:
            stats.notes.append(note)
        return Rotation(order, self.seed)

    def _residual(self, graph: Graph, edits: WeightEdits, context: Context, stats: PassStats) -> None:
        stream = residual_stream(graph)
        if isinstance(stream, str):
            stats.rejected["r1", stream] += 1
            return
        if context.rewrites_left == 0:
            return
        turn = self._rotation("r1", stream.size, stats)
        for table in stream.tables:
            edits.add(table, 0, f"r1{self._how}", turn.turned)
        for writer in stream.writers:
            edits.add(writer, 1, f"r1{self._how}", lambda w: turn.turned(w.T).T)
            edits.add(writer, 2, f"r1{self._how}", turn.turned)
        for product, norm in stream.readers:
            weight, shift = (norm.args[1], _shift(norm)) if norm is not None else (None, 0.0)
            if isinstance(weight, fx.Node):
                edits.add(product, 1, "norm", lambda w, g, s=shift: w * (g + s), str(weight.target))
            edits.add(product, 1, f"r1{self._how}", turn.turned)
        for norm in stream.norms:
            weight, shift = norm.args[1], _shift(norm)
            norm.args = (norm.args[0], None, norm.args[2])
            if isinstance(weight, fx.Node):
                edits.program.neutral[str(weight.target)] = 1.0 - shift
                if not weight.users:
                    graph.fx.erase_node(weight)
        self._done("r1", stream.tables[0], context, stats)

    def _values(self, graph: Graph, edits: WeightEdits, context: Context, stats: PassStats) -> None:
        for node in list(graph.calls("attention")):
            found = value_path(node)
            if isinstance(found, str):
                stats.rejected["r2", f"{node.name}: {found}"] += 1
            elif context.rewrites_left != 0:
                made, first, count, reader = found
                turn = self._rotation("r2", node.args[2].meta["val"].shape[-1], stats)  # type: ignore[union-attr]
                edits.add(made, 1, f"r2{self._how}", lambda w, t=turn, at=(first, count): _rows(w, t, *at))
                edits.add(made, 2, f"r2{self._how}", lambda b, t=turn, at=(first, count): _rows(b, t, *at))
                edits.add(reader, 1, f"r2{self._how}", turn.turned)
                self._done("r2", node, context, stats)

    def _queries(self, graph: Graph, edits: WeightEdits, context: Context, stats: PassStats) -> None:
        for node in list(graph.calls("attention")):
            if context.rewrites_left != 0:
                turn = self._rotation("r3", node.args[0].meta["val"].shape[-1], stats)  # type: ignore[union-attr]
                for at in (0, 1):
                    node.update_arg(at, self._online(graph, node, node.args[at], turn, edits))
                self._done("r3", node, context, stats)

    def _down(self, graph: Graph, edits: WeightEdits, context: Context, stats: PassStats) -> None:
        for node in list(graph.calls("linear")):
            x, weight = node.args[:2]
            if not (isinstance(x, fx.Node) and target_name(x) == "gated"):
                continue
            if weight.op != "get_attr":  # type: ignore[union-attr]
                stats.rejected["r4", f"{node.name}: its weight is computed"] += 1
            elif context.rewrites_left != 0:
                turn = self._rotation("r4", x.meta["val"].shape[-1], stats)
                node.update_arg(0, self._online(graph, node, x, turn, edits))
                edits.add(node, 1, f"r4{self._how}", turn.turned)
                self._done("r4", node, context, stats)

    def _online(self, graph: Graph, before: fx.Node, x: Any, turn: Rotation, edits: WeightEdits) -> fx.Node:
        dtype = torch.float64 if x.meta["val"].dtype == torch.float64 else torch.float32
        assert graph.symbols is not None
        with graph.fx.inserting_before(before):
            sides = [
                edits.constant(before, f"hadamard.{turn.order}.{turn.seed}.{side}", matrix.to(dtype))
                for side, matrix in zip(("left", "right"), turn.factors, strict=True)
            ]
            made = graph.call(ops.rotate.overload, (x, *sides), before, self.name)
        with faking(graph.symbols.mode):
            made.meta["val"] = x.meta["val"].new_empty(x.meta["val"].shape)
        return made

    def _done(self, rule: str, node: fx.Node, context: Context, stats: PassStats) -> None:
        stats.record(rule, node.name, origin(node).source)
        context.spend(1)


def _shift(norm: fx.Node) -> float:
    return float(norm.args[3]) if len(norm.args) > 3 else 0.0  # type: ignore[arg-type]


def _rows(weight: Tensor, turn: Rotation, first: int, count: int) -> Tensor:
    part = weight[first : first + count]
    return torch.cat((weight[:first], turn.turned(part.movedim(0, -1)).movedim(-1, 0), weight[first + count :]))
