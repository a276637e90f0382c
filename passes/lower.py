"""lower: choose who implements each op, write state in place, and cut the step into regions. Exact.

    x_1 = linear(x, w["..."])                              # provider cpp
    k_0 = kv_write(k_pages_0, k, slots)             =>     # in place: nothing else reads k_pages_0 afterwards
    return logits, k_0, v_0, ...                           return logits

Providers are tried in the recipe's order: `needs` against the target's facts, `supports` against the node's fake
arguments; `triton` takes what `fuse` has put into a kernel. An op without a provider is an error; the choice and the
reasons against the others are in the report.
"""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from llmopt.compiler import knobs
from llmopt.compiler.emittable import ATTENDS, argument
from llmopt.compiler.errors import ProviderError, VerifyError
from llmopt.compiler.graph import Graph, origin, target_name, where
from llmopt.compiler.op import Op, op_of
from llmopt.compiler.pipeline import Context, Pass, PassStats
from llmopt.compiler.program import Program
from llmopt.passes.fusible import reason_against
from llmopt.passes.outline import outline, outline_kernels

_log = logging.getLogger("llmopt")
_ATTENDS = tuple(f"{name} not by triton" for name in sorted(ATTENDS))


@dataclass(frozen=True)
class Lower(Pass):
    """Providers, in-place state, regions; see the module's docstring."""

    name: ClassVar[str] = "lower"
    requires: ClassVar[frozenset[str]] = frozenset({"cached"})
    ensures: ClassVar[frozenset[str]] = frozenset({"lowered"})

    def run(self, program: Program, context: Context) -> PassStats:
        """Lower `step`; `forward` stays as it is, for reference."""
        stats = PassStats()
        allowed = knobs.provider() or context.recipe.providers
        step = program.graph("step")
        reasons: Counter[str] = Counter()
        for node in step.calls():
            if op_of(node.target) is not None:
                node.meta["provider"] = choose(node, allowed, context, reasons)
                stats.record(node.meta["provider"], node.name, origin(node).source)
        write_in_place(step, program)
        program.choices = {"providers": chosen(step), "against": dict(reasons), "allowed": tuple(allowed)}
        fused = any("kernel" in node.meta for node in step.calls())
        if fused or ("inductor" in allowed and "cpp" in context.target.facts):
            names = {spec.name for spec in program.state}
            program.graphs.update(outline_kernels(step, context.target) if fused else outline(step, names))
            calls = Counter(str(n.target) for n in step.fx.nodes if n.op == "call_module")
            stats.notes.append("regions: " + ", ".join(f"{name} x{count}" for name, count in calls.items()))
        if not fused and context.target.kind == "cuda":
            note = f"no GPU kernels: {_why_no_kernels(allowed, context)}; torch runs the step node by node"
            stats.notes.append(note)
            program.choices["without_kernels"] = note
            if context.strict and "triton" in allowed:  # else somebody meant it, or it is not a whole model
                _log.warning("llmopt: %s", note)
        elif fused and (why := [text for text in reasons if text.startswith(_ATTENDS)]):
            _log.warning("llmopt: torch attends, and there are no decoding graphs: %s", "; ".join(why))
        if fused and (why := [text for text in reasons if text.startswith("quantized_linear not by triton")]):
            _log.warning("llmopt: torch multiplies with low-bit weights, op by op, which is slow: %s", "; ".join(why))
        return stats


def _why_no_kernels(allowed: tuple[str, ...], context: Context) -> str:
    if "triton" not in allowed:
        return f"triton is not among the providers allowed ({', '.join(allowed)})"
    if "triton" not in context.target.facts:
        return f"Triton is not installed for target {context.target.name}; pip install triton"
    if "fuse" not in {item.name for item in context.recipe.passes}:
        return "pass fuse, which makes them, is not in the recipe; add it before lower"
    return "pass fuse found nothing that they could compute"


def choose(node: fx.Node, allowed: tuple[str, ...], context: Context, reasons: Counter[str]) -> str:
    """The first allowed provider that fits. Raises ProviderError with the reasons when none does."""
    op = op_of(node.target)
    assert op is not None
    tried = []
    for name in allowed:
        why = _why_not(name, node, op, context)
        if why is None:
            return name
        if why:
            tried.append(f"{name}: {why}")
            reasons[f"{op.name} not by {name}: {why}"] += 1
    raise ProviderError(
        f"{where(node)}: no provider of {op.name} among {', '.join(allowed)} fits target {context.target.name} "
        f"({'; '.join(tried) or 'none is registered'}); add 'reference' to the recipe's providers"
    )


def _why_not(name: str, node: fx.Node, op: Op, context: Context) -> str | None:
    """None if the provider can take the node, else the reason, which is empty if there is no such provider."""
    facts = context.target.facts
    if name == "inductor" and "cpp" in facts and op.traceable:
        return None
    if name == "triton" and "triton" in facts and "kernel" in node.meta:
        return reason_against(node, context.target)
    provider = op.providers.get(name)
    if provider is None:
        return ""
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    missing = provider.needs - facts
    return f"target lacks {', '.join(sorted(missing))}" if missing else provider.supports(*args, **kwargs)


def chosen(step: Graph) -> dict[str, int]:
    """`{"linear=cpp": 9, "rms_norm=inductor": 5}`."""
    return dict(Counter(f"{target_name(n)}={n.meta['provider']}" for n in step.calls() if "provider" in n.meta))


def write_in_place(step: Graph, program: Program) -> None:
    """State results leave the outputs; each write may then reuse its operand, since nothing reads it afterwards."""
    names = {spec.name for spec in program.state}
    logits, *written = step.outputs()
    writes: list[fx.Node] = []
    for result, spec in zip(written, program.state, strict=True):
        node = result
        while target_name(node) == "near_write":
            _check_read_before(node)
            writes.append(node)
            node = node.args[0]
        if target_name(node) != "kv_write" or node.args[0].name != spec.name:
            raise VerifyError(
                f"{where(node)}: state {spec.name} is returned by {target_name(node)}; wanted a kv_write of that "
                "state; a pass that changes how state is written must keep the order of the step's results"
            )
        writes.append(node)
    for placeholder in step.inputs():
        readers = list(placeholder.users)
        if placeholder.name in names and len(readers) != 1:
            raise VerifyError(
                f"state {placeholder.name} is read by {[where(r) for r in readers]}; wanted only its kv_write, so that "
                "the write can be done in place; read the written pages instead"
            )
    for node in writes:
        node.meta["in_place"] = True
    step.fx.output_node().args = ((logits,),)


def _check_read_before(write: fx.Node) -> None:
    """Raise VerifyError if others may read the rows that a near_write writes over after it."""
    pages, attended = write.args[0], argument(write, "attended", None)
    late = [user for user in pages.users if user not in (write, attended)]  # type: ignore[union-attr]
    if late:
        raise VerifyError(
            f"{where(write)}: its pages are also read by {[where(user) for user in late]}, perhaps after it; wanted "
            f"{attended} alone, the result that it waits for, so that the write can be done in place"
        )
