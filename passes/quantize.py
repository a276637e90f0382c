"""quantize: weights of products kept in a low-bit format, and their activations rounded to one. Approximate.

    y = linear(x, w["q|k|v"])        =>        y = quantized_linear(x, w["q|k|v.packed"], w["q|k|v.scales"],
                                                                    w["q|k|v.global_scale"], None, None, "nvfp4")

Weights that `canonicalize` has joined are one matrix here, so q, k and v, or gate and up, share a global scale, as
every runtime that fuses them wants it. A weight is quantised when it is read, on its own, so a model is never held
twice; what that cost in accuracy is then in the report. The product that makes the logits (`products.head_of`) keeps
its weights unless `lm_head` names a format, as other quantisers leave it by default too.

Under torch.compile weights stay the module's, and a graph may be any part of a model. Products there that cannot be
quantised are told as rejected by the rule `UNQUANTISED`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from llmopt.compiler import ops
from llmopt.compiler.calibration_statistics import Statistics
from llmopt.compiler.errors import InputError, PassMatchedNothing
from llmopt.compiler.graph import Graph, origin, where
from llmopt.compiler.pipeline import Approx, Context, Pass, PassStats
from llmopt.compiler.program import Program
from llmopt.passes.products import check_patterns, head_of, known_names, missed, names_of, operand
from llmopt.passes.quantize_options import LEFT_OUT, Choice, Format, QuantizeOptions, rule_for
from llmopt.passes.quantized_weights import (
    PLAIN,
    Budget,
    Maker,
    mixed,
    store,
    to_quantized,
    told_averages,
    told_few,
)

UNQUANTISED = "unquantised"
HEAD = "makes the logits, and lm_head is not set"


@dataclass(frozen=True)
class Quantize(QuantizeOptions, Pass):
    """Low-bit weights, and activations; see the module's docstring, and `QuantizeOptions` for the options."""

    name: ClassVar[str] = "quantize"
    requires: ClassVar[frozenset[str]] = frozenset({"canonical"})
    ensures: ClassVar[frozenset[str]] = frozenset({"quantized"})
    meaning: ClassVar[Approx] = Approx("weights, and activations if asked for, are rounded to a low-bit format")
    must_match: ClassVar[bool] = False  # it says so itself: where `bits` leave every weight as it is, nothing is wrong

    def run(self, program: Program, context: Context) -> PassStats:
        """Rewrite the products of every graph.

        Raises RecipeError (options, names that no weight has), InputError (calibration data, a budget too small, an
        option that torch.compile cannot have) and PassMatchedNothing.
        """
        stats = PassStats()
        choice = self.chosen()
        stats.notes += choice.notes
        heads = {name: head_of(graph, context.fold_weights) for name, graph in program.graphs.items()}
        if context.fold_weights or any(heads.values()):  # else it is a part, and names may be those of other parts
            names = known_names(program)
            check_patterns("include", self.include, names)
            check_patterns("exclude", self.exclude, names)
        # before anything is learned, which may take long
        budget = self._budget(program, heads["forward"], choice) if choice.schemes and context.fold_weights else None
        maker = self._maker(program, context, stats)
        formats: dict[str, Format] = {}
        if budget is not None:
            schemes, costs = mixed(program, budget, maker)
            stats.figures |= {weight: {"cost": costs[weight][scheme]} for weight, scheme in schemes.items()}
            formats = {w: Format() if s == PLAIN else Format(s, choice.body.activations) for w, s in schemes.items()}
        for name, graph in program.graphs.items():
            self._products(graph, heads[name], program, context, (choice, formats, maker), stats)
        if budget is not None and formats:
            left = (str(operand(n).target) for n in program.graph("forward").calls("linear"))
            everything = dict.fromkeys([*left, *stats.figures])
            stats.notes.append(told_averages(program, budget.bits, formats, everything, stats.figures))
        elif stats.rewritten == 0:
            _nothing(context, stats)
        return stats

    def _products(
        self,
        graph: Graph,
        head: fx.Node | None,
        program: Program,
        context: Context,
        means: tuple[Choice, Mapping[str, Format], Maker],
        stats: PassStats,
    ) -> None:
        choice, formats, maker = means
        for node in [n for n in graph.calls("linear") if operand(n).op == "get_attr"]:
            name = str(operand(node).target)
            wanted = choice.head if node is head else formats.get(name, choice.body)
            why = self._against(node, program, wanted, node is head)
            if why is None and stats.figures.get(name, {}).get("scheme", wanted.weights) != wanted.weights:
                why = "another product keeps its weight in another scheme"
            if why is not None:
                stats.rejected["quantize", why] += 1
            elif context.rewrites_left != 0:
                self._rewrite(graph, node, program, wanted, maker if context.fold_weights else None, stats)
                context.spend(1)
        for node, weight, why in () if context.fold_weights else missed(graph):
            names = names_of(node, weight, program) or [where(node)]
            meant = HEAD if node is head and not choice.head.weights else self.left_out(names)
            stats.rejected[("quantize", meant) if meant else (UNQUANTISED, f"{names[-1]}: {why}")] += 1

    def _maker(self, program: Program, context: Context, stats: PassStats) -> Maker:
        found: Statistics | None = None
        wanted = [what for what, on in (("method gptq", self.method == "gptq"), ("weighted", self.weighted),
                                        ("bits", self.bits is not None)) if on]  # fmt: skip
        if wanted and not context.fold_weights:
            raise InputError(
                f"pass 'quantize': {' and '.join(wanted)} needs the weights beforehand, which under torch.compile "
                "belong to the module; use llmopt.compile(model, recipe=..., calibration=...)"
            )
        if wanted:
            wanted_by = f"pass 'quantize' with {' and '.join(wanted)}"
            found = context.statistics(program, wanted_by, second_moments=self.method == "gptq")
            stats.notes += [*found.notes, *told_few(found)]
        return Maker(self.method, self.scale, self.weighted, found, stats.notes.append)

    def _budget(self, program: Program, head: fx.Node | None, choice: Choice) -> Budget:
        """Of the weights that `bits` cover: those of the body's products that are included."""
        assert self.bits is not None
        nodes = [n for n in program.graph("forward").calls("linear") if operand(n).op == "get_attr" and n is not head]
        able = [n for n in nodes if self.left_out(names_of(n, operand(n), program)) is None]
        names = dict.fromkeys(str(operand(n).target) for n in able)  # once each, in order
        return Budget.of(program, names, choice.schemes, self.bits)

    def _against(self, node: fx.Node, program: Program, wanted: Format, is_head: bool) -> str | None:
        if is_head and not wanted.weights:
            return HEAD
        left_out = self.left_out(names_of(node, operand(node), program))
        return left_out or (None if wanted.weights else "stays as it is, as the bits allow")

    def _rewrite(
        self, graph: Graph, node: fx.Node, program: Program, wanted: Format, maker: Maker | None, stats: PassStats
    ) -> None:
        name = str(operand(node).target)
        if maker is not None:
            if f"{name}.packed" not in program.weights:
                store(program, name, wanted.weights, maker, stats.figures.setdefault(name, {}))
            made = to_quantized(graph, program, node, name, (wanted.weights, wanted.activations), self.name)
        else:  # the weight may change later
            x, weight, bias = (*node.args, None)[:3]
            args = (x, weight, bias, wanted.weights, wanted.activations, rule_for(self.scale, wanted.weights))
            with graph.fx.inserting_before(node):
                made = graph.call(ops.rounded_linear.overload, args, node, self.name)
            made.meta["val"] = node.meta["val"]
            node.replace_all_uses_with(made)
            graph.fx.erase_node(node)
        stats.record("quantize-linear", made.name, origin(made).source)


def _nothing(context: Context, stats: PassStats) -> None:
    """An error for a whole model in which nothing was quantised, a note for a part of one that has what could be."""
    reasons = {why: n for (rule, why), n in stats.rejected.items() if rule == "quantize"}
    said = "; ".join(f"{why} ({n}x)" for why, n in reasons.items()) or "there is no product with a weight"
    if context.strict and context.rewrites_left is None:
        raise PassMatchedNothing(
            f"pass 'quantize' rewrote nothing: {said}; change `include`, `exclude` or `lm_head`, or take the pass out "
            "of the recipe"
        )
    missed_some = any(rule == UNQUANTISED for rule, _ in stats.rejected)  # which tell of themselves
    if not context.fold_weights and not missed_some and set(reasons) - set(LEFT_OUT):
        stats.notes.append(f"pass 'quantize' rewrote nothing: {said}")
