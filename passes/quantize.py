"""quantize: weights of products kept in a low-bit format, and their activations rounded to one. Approximate.

    y = linear(x, w["q|k|v"])        =>        y = quantized_linear(x, w["q|k|v.packed"], w["q|k|v.scales"],
                                                                    w["q|k|v.global_scale"], None, None, "nvfp4")

Weights that `canonicalize` has joined are one matrix here, so q, k and v, or gate and up, share a global scale, as
every runtime that fuses them wants it. A weight is quantised when it is read, on its own, so a model is never held
twice; what that cost in accuracy is then in the report. The last product, which makes the logits, keeps its weights
unless `lm_head` names a scheme, as other quantisers leave it by default too.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from llmopt.compiler import ops
from llmopt.compiler.calibration_statistics import Statistics
from llmopt.compiler.errors import InputError, RecipeError, did_you_mean
from llmopt.compiler.graph import Graph, origin, target_name
from llmopt.compiler.pipeline import Approx, Context, Pass, PassStats
from llmopt.compiler.program import Program
from llmopt.compiler.quant import PRESETS, SCHEMES, scheme_of
from llmopt.compiler.quant.scales import check_rule
from llmopt.compiler.quant.storage import PARTS
from llmopt.passes.quantized_weights import PLAIN, Maker, mixed, store

METHODS = ("rtn", "gptq")


@dataclass(frozen=True)
class Quantize(Pass):
    """Low-bit weights, and activations; see the module's docstring.

    `weights` and `activations` are schemes (`compiler.quant.SCHEMES`); `scheme` names both by one of
    compressed-tensors' presets ("NVFP4", "W4A16", ...). `scale` is the rule that chooses scales, with `weighted` each
    column's error counts by the calibration data's Hessian diagonal; `method` is rtn (round to nearest) or gptq.
    `bits` instead of a scheme: each weight gets one of `choices`, or none, so that all take at most so many bits a
    weight. `include` and `exclude` are patterns of weight names (`*.layers.0.*`); a joined weight counts by the names
    of its parts, too.
    """

    name: ClassVar[str] = "quantize"
    requires: ClassVar[frozenset[str]] = frozenset({"canonical"})
    ensures: ClassVar[frozenset[str]] = frozenset({"quantized"})
    meaning: ClassVar[Approx] = Approx("weights, and activations if asked for, are rounded to a low-bit format")

    scheme: str = ""
    weights: str = ""
    activations: str = ""
    scale: str = "search"
    method: str = "rtn"
    weighted: bool = False
    bits: float = 0.0
    choices: tuple[str, ...] = ("int4_g128", "mxfp4", "nvfp4", "mxfp6_e2m3", "fp8_channel")
    lm_head: str = ""
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()

    def run(self, program: Program, context: Context) -> PassStats:
        """Rewrite the products of every graph. Raises RecipeError (options) and InputError (calibration data)."""
        stats = PassStats()
        weights, activations = self.chosen()
        maker = self._maker(program, context, stats)
        schemes = self._mixed(program, maker, stats) if self.bits else {}
        for graph in program.graphs.values():
            head = _head(graph)
            for node in list(graph.calls("linear")):
                scheme = self.lm_head if node is head else schemes.get(_weight_name(node), weights)
                why = self._against(node, program, scheme, node is head)
                if why is None and stats.figures.get(_weight_name(node), {}).get("scheme", scheme) != scheme:
                    why = "another product keeps its weight in another scheme"
                if why is not None:
                    stats.rejected["quantize", why] += 1
                elif context.rewrites_left != 0:
                    self._rewrite(
                        graph, node, program, (scheme, activations), maker if context.fold_weights else None, stats
                    )
                    context.spend(1)
        return stats

    def _maker(self, program: Program, context: Context, stats: PassStats) -> Maker:
        found: Statistics | None = None
        wanted = [what for what, on in (("method gptq", self.method == "gptq"), ("weighted", self.weighted),
                                        ("bits", bool(self.bits))) if on]  # fmt: skip
        if wanted and not context.fold_weights:
            raise InputError(
                f"pass 'quantize': {' and '.join(wanted)} needs the weights beforehand, which under torch.compile "
                "belong to the module; use llmopt.compile(model, recipe=..., calibration=...)"
            )
        if wanted:
            wanted_by = f"pass 'quantize' with {' and '.join(wanted)}"
            found = context.statistics(program, wanted_by, second_moments=self.method == "gptq")
            stats.notes += [*found.notes, *_few(found)]
        return Maker(self.method, self.scale, self.weighted, found, stats.notes.append)

    def _mixed(self, program: Program, maker: Maker, stats: PassStats) -> dict[str, str]:
        graph = program.graph("forward")
        head = _head(graph)
        able = [n for n in graph.calls("linear") if n is not head and self._against(n, program, PLAIN, False) is None]
        names = dict.fromkeys(map(_weight_name, able))  # once each, in order
        schemes, costs = mixed(program, names, self.choices, self.bits, maker)
        for name, scheme in schemes.items():
            stats.figures[name] = {"cost": costs[name][scheme]}
        return {name: "" if scheme == PLAIN else scheme for name, scheme in schemes.items()}

    def chosen(self) -> tuple[str, str]:
        """The schemes of weights and activations ("" for none)."""
        given = [name for name in ("scheme", "weights", "bits") if getattr(self, name)]
        if len(given) != 1:
            seen = " and ".join(f"{name} {getattr(self, name)!r}" for name in given) or "nothing"
            raise RecipeError(
                f"pass 'quantize' is told {seen} of what weights become; set one of `scheme` (such as NVFP4), "
                "`weights` (such as nvfp4) and `bits` (bits a weight, such as 4.5)"
            )
        if self.method not in METHODS:
            raise RecipeError(
                f"pass 'quantize': method {self.method!r} is unknown; {did_you_mean(self.method, METHODS)}"
            )
        found = preset(self.scheme) if self.scheme else (self.weights, "")
        names = [scheme_of(name).name if name else "" for name in (found[0], self.activations or found[1])]
        for name in filter(None, (names[0], self.lm_head, *(self.choices if self.bits else ()))):
            check_rule(self.scale, scheme_of(name))
        return names[0], names[1]

    def _against(self, node: fx.Node, program: Program, scheme: str, is_head: bool) -> str | None:
        weight = node.args[1]
        if not isinstance(weight, fx.Node) or weight.op != "get_attr":
            return "the right operand is not a weight"
        if not scheme:
            return "makes the logits, and lm_head is not set" if is_head else "no scheme"
        names = [str(weight.target), *program.origins(str(weight.target))]
        if not any(fnmatch.fnmatchcase(n, p) for n in names for p in self.include):
            return "its weight is not included"
        if any(fnmatch.fnmatchcase(n, p) for n in names for p in self.exclude):
            return "its weight is excluded"
        return None

    def _rewrite(
        self,
        graph: Graph,
        node: fx.Node,
        program: Program,
        schemes: tuple[str, str],
        maker: Maker | None,
        stats: PassStats,
    ) -> None:
        scheme, activations = schemes
        x, weight, bias = (*node.args, None)[:3]
        assert isinstance(weight, fx.Node)
        name = str(weight.target)
        if maker is not None and f"{name}.packed" not in program.weights:
            store(program, name, scheme, maker, stats.figures.setdefault(name, {}))
        with graph.fx.inserting_before(node):
            if maker is not None:
                parts = [_read(graph, program, node, f"{name}.{part}") for part in PARTS]
                args, op = (x, *parts, bias, scheme, activations), ops.quantized_linear
            else:  # the weight may change later
                args, op = (x, weight, bias, scheme, activations, self.scale), ops.rounded_linear
            made = graph.call(op.overload, args, node, self.name)
        made.meta["val"] = node.meta["val"]
        node.replace_all_uses_with(made)
        graph.fx.erase_node(node)
        if not weight.users:
            graph.fx.erase_node(weight)
        stats.record("quantize-linear", made.name, origin(made).source)


def _few(statistics: Statistics) -> list[str]:
    """One line about the values that were seen in fewer tokens than they have channels."""
    warned = [text for name in statistics.entries if (text := statistics.rank_warning(name))]
    return [f"{warned[0]} (and {len(warned) - 1} more values)" if len(warned) > 1 else warned[0]] if warned else []


def _weight_name(node: fx.Node) -> str:
    weight = node.args[1]
    return str(weight.target) if isinstance(weight, fx.Node) else ""


def preset(name: str) -> tuple[str, str]:
    """The schemes of weights and activations ("" for none) behind a preset's or a scheme's name. Raises InputError."""
    known: Mapping[str, tuple[str, str | None]] = {k.lower(): v for k, v in PRESETS.items()}
    if name.lower() not in known and name.lower() not in SCHEMES:
        raise InputError(f"no quantisation scheme is called {name!r}; {did_you_mean(name, [*PRESETS, *SCHEMES])}")
    weights, activations = known.get(name.lower(), (name.lower(), None))
    return weights, activations or ""


def _head(graph: Graph) -> fx.Node | None:
    """The last product whose result becomes a result of the graph through calls of one operand: the logits' own."""
    found = [head for result in graph.outputs() if isinstance(result, fx.Node) and (head := _product(result))]
    return max(found, key=list(graph.fx.nodes).index, default=None)


def _product(result: fx.Node) -> fx.Node | None:
    node: fx.Node | None = result
    while node is not None and target_name(node) != "linear":
        sources = [n for n in node.all_input_nodes if n.op == "call_function" and isinstance(n.meta["val"], Tensor)]
        node = sources[0] if len(sources) == 1 else None
    return node


def _read(graph: Graph, program: Program, before: fx.Node, name: str) -> fx.Node | None:
    """A read of the weight `name`, None if the program has none of that name."""
    weight = program.weights.get(name)
    if weight is None:
        return None
    assert graph.symbols is not None
    node = graph.fx.create_node("get_attr", name)
    with graph.symbols.mode:
        node.meta["val"] = torch.empty(weight.shape, dtype=weight.dtype)
    node.meta["origin"] = origin(before).touched(Quantize.name)
    return node
