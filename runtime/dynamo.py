"""From a Dynamo graph to something to call: the recipe's structural passes, its providers, then Inductor.

The model that torch.compile runs owns its cache and its weights, so only passes that rewrite the forward itself apply:
no paged cache is inserted, attention stays torch's own, and no weight is folded or merged, because a copy of a weight
would go stale without a sign.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from torch import Tensor, fx

from llmopt import codegen
from llmopt.compiler import knobs
from llmopt.compiler._torch import inductor_compile, is_dynamo_restart
from llmopt.compiler.capture_dynamo import Fragment, capture_fragment, rebuild
from llmopt.compiler.errors import InputError
from llmopt.compiler.graph import target_name
from llmopt.compiler.op import op_of
from llmopt.compiler.pipeline import Approx, Context, DumpHook, Hook, Pass, Pipeline, verify_hook
from llmopt.compiler.recipe import Recipe
from llmopt.compiler.target import Target
from llmopt.passes import PASSES
from llmopt.passes.lower import choose
from llmopt.passes.quantize import UNQUANTISED

STRUCTURAL = ("raise-aten", "canonicalize", "quantize")  # the last leaves weights where they are, too
NOT_HERE = ("insert-kv-cache", "fuse", "lower")  # of a whole model with a cache of llmopt's own
MANY_ROWS = 16  # from here on a product is bound by arithmetic, and is left to Inductor


@dataclass
class GraphReport:
    """What was done to one graph: plain data, so that keeping it keeps no graph alive.

    `rules` counts rewrites and `rejected` matches turned down, by rule; `providers` counts `op=provider`. `hidden`
    calls touch memory that is written in place, and were left alone. `nodes` are before and after the passes.
    `unquantised` are products that the recipe wants in a low-bit format and that could not be had in one, with the
    reason; `notes` is what else the passes have to say. `fallback` is why the graph runs as Dynamo made it.
    """

    inputs: list[str]
    recipe: str
    rules: dict[str, int] = field(default_factory=dict)
    rejected: dict[str, int] = field(default_factory=dict)
    providers: dict[str, int] = field(default_factory=dict)
    nodes: tuple[int, int] = (0, 0)
    hidden: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    unquantised: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    fallback: str | None = None

    @property
    def matched(self) -> int:
        """Rewrites done."""
        return sum(self.rules.values())

    def to_dict(self) -> dict[str, Any]:
        """JSON types."""
        return asdict(self)


def structural_passes(recipe: Recipe) -> list[Pass]:
    """The recipe's passes that make sense for a graph whose cache and weights belong to someone else.

    Raises RecipeError as `Recipe.build` does, and InputError if the recipe asks for what cannot be done here.
    """
    built = recipe.build(PASSES)
    for item in built:
        if item.name not in (*STRUCTURAL, *NOT_HERE):
            raise InputError(
                f"recipe {recipe.name!r}: pass {item.name!r} changes weights or the cache, which belong to the module "
                "that torch.compile runs; use llmopt.compile(model, recipe=...) for this recipe"
            )
    if recipe.dtype is not None:
        raise InputError(
            f"recipe {recipe.name!r} sets dtype {recipe.dtype}, but the module's own counts under torch.compile; "
            f"call model.to(torch.{recipe.dtype}) and leave dtype out of the recipe"
        )
    return [item for item in built if item.name in STRUCTURAL]


@dataclass(frozen=True)
class FragmentCompiler:
    """Compiles Dynamo graphs after one recipe for one target; `inductor` are settings for Inductor."""

    recipe: Recipe
    target: Target
    inductor: dict[str, Any]

    @property
    def providers(self) -> tuple[str, ...]:
        """The providers allowed, most wanted first."""
        return knobs.provider() or self.recipe.providers

    @property
    def uses_inductor(self) -> bool:
        """Does Inductor compile the graphs (or do they run call by call)?"""
        return "inductor" in self.providers and bool({"cpp", "triton"} & self.target.facts)

    def finish(self, graph: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        """A graph as a function of its arguments."""
        return inductor_compile(graph, inputs, self.inductor) if self.uses_inductor else graph.forward

    def rewritten(self, source: fx.GraphModule, inputs: Sequence[Any], report: GraphReport) -> fx.GraphModule:
        """The graph after the passes, its IR ops replaced by their providers' code. Raises what the passes raise."""
        began = time.perf_counter()
        fragment = capture_fragment(source, inputs)
        report.hidden = fragment.hidden
        captured = time.perf_counter()
        context = Context(self.target, self.recipe, knobs.bisect(), strict=False, fold_weights=False)
        pipeline = Pipeline(structural_passes(self.recipe), _hooks())
        program = pipeline.run(fragment.program, context)
        for entry in pipeline.reports:
            report.rules = dict(Counter(report.rules) + entry.stats.per_rule)
            report.rejected.update({f"{rule}: {why}": n for (rule, why), n in entry.stats.rejected.items()})
            report.unquantised += [why for rule, why in entry.stats.rejected if rule == UNQUANTISED]
            report.notes += entry.stats.notes
        after = replace(fragment, program=program)
        report.nodes = (len(fragment.graph), len(after.graph))
        self._choose(after, context, report)
        passed = time.perf_counter()
        rebuilt = rebuild(after, self._implementation)
        ended = time.perf_counter()
        report.seconds = {"capture": captured - began, "passes": passed - captured, "rebuild": ended - passed}
        return rebuilt

    def _choose(self, fragment: Fragment, context: Context, report: GraphReport) -> None:
        reasons: Counter[str] = Counter()
        for node in fragment.graph.calls():
            op = op_of(node.target)
            if op is None:
                continue
            if self.target.kind == "cuda" and self.uses_inductor and op.traceable:
                node.meta["provider"] = "inductor"  # llmopt's own GPU kernels are made for whole steps
            else:
                allowed = tuple(p for p in self.providers if p != "cpp" or not _has_many_rows(node))
                node.meta["provider"] = choose(node, allowed or self.providers, context, reasons)
            key = f"{target_name(node)}={node.meta['provider']}"
            report.providers[key] = report.providers.get(key, 0) + 1

    def _implementation(self, node: fx.Node) -> Callable[..., Any]:
        op = op_of(node.target)
        if op is None:
            return node.target  # type: ignore[return-value]
        if not op.traceable and node.meta["provider"] == "reference":
            return op.overload
        return op.fn if node.meta["provider"] == "inductor" else op.providers[node.meta["provider"]].fn

    @property
    def lossy(self) -> str:
        """What the recipe asks for that changes results, "" if nothing does."""
        found = [PASSES[spec.name].meaning for spec in self.recipe.passes]
        return "; ".join(meaning.what for meaning in found if isinstance(meaning, Approx))

    @staticmethod
    def said_unquantised(report: GraphReport) -> str:
        """`2 products of a graph cannot be quantised: a.weight: why`, of which the first is told."""
        count = len(report.unquantised)
        return f"{count} product{'s' * (count > 1)} of a graph cannot be quantised: {report.unquantised[0]}"

    def compile(
        self, source: fx.GraphModule, inputs: Sequence[Any], strict: bool, report: GraphReport
    ) -> Callable[..., Any]:
        """The graph rewritten and compiled; unless `strict`, as Dynamo made it if that fails (`report.fallback`).

        With `strict`, what the recipe wants in a low-bit format and cannot be had in one is an InputError, too.
        """
        if not any(isinstance(i, Tensor) for i in inputs):  # sizes only
            return self.finish(source, inputs)
        try:
            made = self.rewritten(source, inputs, report)
            if strict and report.unquantised:
                raise InputError(
                    f"recipe {self.recipe.name!r} asks for low-bit weights, and {self.said_unquantised(report)}; leave "
                    "out what is meant to stay (option `exclude` of pass 'quantize'), compile the whole model with "
                    "llmopt.compile, or leave out strict"
                )
            return self.finish(made, inputs)
        except Exception as error:
            if strict or is_dynamo_restart(error):
                raise
            report.fallback = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
            report.rules, report.providers, report.unquantised, report.notes = {}, {}, [], []
        return self.finish(source, inputs)


def make_compiler(recipe: Recipe, target: Target, inductor: dict[str, Any]) -> FragmentCompiler:
    """A compiler for what works on this machine. Raises InputError if the options contradict each other."""
    structural_passes(recipe)
    made = FragmentCompiler(recipe, codegen.usable(target, recipe.providers), inductor)
    if inductor and not made.uses_inductor:
        raise InputError(
            f"options['inductor'] is set, but recipe {recipe.name!r} on target {made.target.name} runs without "
            f"Inductor (providers {', '.join(made.providers)}); leave it out, or use recipe 'default'"
        )
    return made


def _has_many_rows(node: fx.Node) -> bool:
    """Is this a product of so many rows that its weight's size does not matter? (Unknown numbers count as few.)"""
    value = node.meta["val"]
    if target_name(node) != "linear" or not isinstance(value, Tensor):
        return False
    rows = 1
    for size in value.shape[:-1]:
        rows *= size if isinstance(size, int) else 1
    return rows > MANY_ROWS


def _hooks() -> list[Hook]:
    hooks: list[Hook] = [verify_hook] if knobs.verify() else []
    folder = knobs.dump()
    if folder:
        taken = sum(1 for _ in folder.glob("graph_*")) if folder.exists() else 0
        hooks.append(DumpHook(folder / f"graph_{taken}"))
    return hooks
