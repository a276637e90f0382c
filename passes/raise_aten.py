"""raise_aten: the only pass that knows how models spell things in aten; afterwards patterns meet IR ops alone.

    pow_1 = aten.pow(x, 2)                              rms_norm = rms_norm(x, w, 1e-05)
    mean = aten.mean(pow_1, [-1], True)
    add = aten.add(mean, 1e-05)                  =>
    rsqrt = aten.rsqrt(add)
    mul = aten.mul(x, rsqrt)
    mul_1 = aten.mul(w, mul)

Norms in both operand orders and with casts at either place, rotary embedding by rotate_half, gated activations,
soft-caps, linears (also `addmm` of a transposed weight, as GPT-2 has), attention in its fused and its written-out
form (see `raise_attention`). What must be raised and cannot be is an error that names the node and its source line.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from llmopt.compiler.errors import RaiseError
from llmopt.compiler.graph import Graph, target_name, where
from llmopt.compiler.pattern import AnyOf, Const, Maybe, aten
from llmopt.compiler.pipeline import Context, Pass, PassStats
from llmopt.compiler.program import Program
from llmopt.compiler.rewrite import Builder, Match, Rule, apply_rules
from llmopt.compiler.simplify import simplify
from llmopt.compiler.verify import check_dialect
from llmopt.compiler.verify import context as graph_context
from llmopt.passes.raise_attention import attention_rules
from llmopt.passes.raise_linear import linear_rules
from llmopt.passes.raise_rope import ROPE_RULES

_HALF = (torch.float16, torch.bfloat16)


def _cast(x: Any, dtype: str) -> Any:
    return Maybe(aten.to.dtype, x, Const(dtype, torch.dtype))


def _normed(x: Any, eps: Any) -> Any:
    """x * rsqrt(mean(x^2) + eps), with x already widened."""
    square = AnyOf(aten.pow.Tensor_Scalar(x, 2), aten.mul.Tensor(x, x))
    variance = aten.add.Tensor(aten.mean.dim(square, [-1], True), eps)
    return aten.mul.Tensor(x, aten.rsqrt.default(variance))


def _widened_exactly(m: Match, x: str = "x") -> Any:
    """rms_norm computes half types in fp32 and others in their own type; the source must do the same."""
    if m.val(x).dtype in _HALF and m.env.get("wide") != torch.float32:
        return m.fail("a half-precision input is normalised without a cast to fp32", m.root)
    if m.val(x).dtype == torch.float64 and m.env.get("wide") not in (None, torch.float64):
        return m.fail("an fp64 input is rounded to fp32 inside the norm", m.root)
    return None


class RmsNorm(Rule):
    """w * to(x32 * rsqrt(mean(x32^2) + eps), x.dtype): Llama's spelling."""

    name = "rms-norm"

    def pattern(self, x: Any, w: Any) -> Any:
        """The weight joins after the cast back."""
        wide = _cast(x, "wide")
        return aten.mul.Tensor(w, _cast(_normed(wide, Const("eps", float)), "narrow"))

    def check(self, m: Match) -> Any:
        """A vector weight over the last axis, and the same precision inside."""
        if not _is_vector(m, "w", "x"):
            return m.fail("the factor is not a vector over the last axis", m.root)
        if m.root.meta["val"].dtype != m.val("x").dtype:
            return m.fail("the result has another dtype than the input", m.root)
        return _widened_exactly(m)

    def rewrite(self, b: Builder, m: Match) -> Any:
        """One rms_norm."""
        return b.ir.rms_norm(m["x"], m["w"], m["eps"])


class ShiftedRmsNorm(Rule):
    """to(x32 * rsqrt(...) * (shift + w32), x.dtype): Gemma's spelling."""

    name = "shifted-rms-norm"

    def pattern(self, x: Any, w: Any) -> Any:
        """The weight joins before the cast back, with a constant added."""
        wide = _cast(x, "wide")
        scale = aten.add.Tensor(_cast(w, "wide_w"), Const("shift", float))
        return _cast(aten.mul.Tensor(_normed(wide, Const("eps", float)), scale), "narrow")

    check = RmsNorm.check

    def rewrite(self, b: Builder, m: Match) -> Any:
        """One rms_norm with a shift and the late cast."""
        return b.ir.rms_norm(m["x"], m["w"], m["eps"], m["shift"], True)


class LateRmsNorm(Rule):
    """to(w * (x32 * rsqrt(...)), x.dtype), w in fp32 or cast to it: GPT-OSS's spelling."""

    name = "late-rms-norm"

    def pattern(self, x: Any, w: Any) -> Any:
        """The weight joins before the cast back."""
        wide = aten.to.dtype(x, Const("wide", torch.dtype))
        scaled = aten.mul.Tensor(_cast(w, "wide_w"), _normed(wide, Const("eps", float)))
        return aten.to.dtype(scaled, Const("narrow", torch.dtype))

    check = RmsNorm.check

    def rewrite(self, b: Builder, m: Match) -> Any:
        """One rms_norm with the late cast."""
        return b.ir.rms_norm(m["x"], m["w"], m["eps"], 0.0, True)


class FusedRmsNorm(Rule):
    """aten.rms_norm, as torch.nn.RMSNorm calls it."""

    name = "fused-rms-norm"

    def pattern(self, x: Any, shape: Any, w: Any, eps: Any) -> Any:
        """torch's own fused norm."""
        return aten.rms_norm.default(x, shape, w, eps)

    def check(self, m: Match) -> Any:
        """Over the last axis only; half types keep torch's own rounding."""
        if len(m["shape"]) != 1:
            return m.fail("normalises over more than the last axis", m.root)
        if m.val("x").dtype in _HALF:
            return m.fail("torch rounds half types once, after the weight", m.root)
        return None

    def rewrite(self, b: Builder, m: Match) -> Any:
        """One rms_norm; torch's default eps is the dtype's."""
        eps = m["eps"] if m["eps"] is not None else torch.finfo(m.val("x").dtype).eps
        return b.ir.rms_norm(m["x"], m["w"], eps)


def _is_vector(m: Match, weight: str, x: str) -> bool:
    w, value = m.val(weight), m.val(x)
    if not isinstance(w, Tensor) or not isinstance(m[weight], fx.Node) or m[weight].op != "get_attr":
        return False
    return w.dim() == 1 and w.shape[0] == value.shape[-1]


class Gated(Rule):
    """act(gate) * up for silu and both gelus."""

    name = "gated"

    def pattern(self, gate: Any, up: Any) -> Any:
        """One of the known activations times anything of the same shape."""
        tanh = aten.gelu.default(gate, approximate="tanh")
        return aten.mul.Tensor(AnyOf(aten.silu.default(gate), tanh, aten.gelu.default(gate)), up)

    def check(self, m: Match) -> Any:
        """Same shape and dtype, no broadcasting."""
        gate, up = m.val("gate"), m.val("up")
        if not isinstance(up, Tensor) or up.dtype != gate.dtype or str(up.shape) != str(gate.shape):
            return m.fail("the factor has another shape or dtype than the activation", m.root)
        return None

    def rewrite(self, b: Builder, m: Match) -> Any:
        """One gated, its activation read from the matched nodes."""
        source = next(n for n in m.nodes if target_name(n) in ("aten.silu", "aten.gelu"))
        tanh = source.kwargs.get("approximate", source.args[1] if len(source.args) > 1 else "none") == "tanh"
        act = "silu" if target_name(source) == "aten.silu" else "gelu_tanh" if tanh else "gelu"
        return b.ir.gated(m["gate"], m["up"], act)


class Softcap(Rule):
    """cap * tanh(x / cap)."""

    name = "softcap"

    def pattern(self, x: Any) -> Any:
        """Division and product by the same constant."""
        cap = Const("cap", float)
        return aten.mul.Tensor(aten.tanh.default(aten.div.Tensor(x, cap)), cap)

    def rewrite(self, b: Builder, m: Match) -> Any:
        """One softcap."""
        return b.ir.softcap(m["x"], float(m["cap"]))


def weight_rules(program: Program, fold: bool) -> list[Rule]:
    """What is raised only where its weight is one of the program's, and not computed in the step."""
    return [RmsNorm(), ShiftedRmsNorm(), LateRmsNorm(), FusedRmsNorm(), *linear_rules(program, fold)]


@dataclass(frozen=True)
class RaiseAten(Pass):
    """From aten spellings to IR ops; see the module's docstring."""

    name: ClassVar[str] = "raise-aten"
    ensures: ClassVar[frozenset[str]] = frozenset({"raised"})

    def run(self, program: Program, context: Context) -> PassStats:
        """Raise every graph; errors name what could not be raised."""
        total = PassStats()
        for graph in program.graphs.values():
            simplify(graph)
            rules = [*weight_rules(program, context.fold_weights), Gated(), Softcap(), *ROPE_RULES]
            if context.strict:  # masks are judged by what they allow in whole sequences, so by whole models
                rules += attention_rules(graph, program)
            stats = apply_rules(graph, rules, limit=context.rewrites_left)
            context.spend(stats.rewritten)
            total.add(stats)
            simplify(graph)
            if context.strict and context.rewrites_left is None:
                _check_attention(graph, total)
                check_dialect(graph)
        return total


def _check_attention(graph: Graph, stats: PassStats) -> None:
    """Attention that stayed in aten: say at which node, and what the rules missed there."""
    for node in graph.calls():
        if target_name(node) in ("aten.scaled_dot_product_attention", "aten.softmax", "aten._softmax"):
            reasons = [reason for (rule, reason), _ in stats.rejected.items() if "attention" in rule]
            raise RaiseError(
                f"{where(node)}: {target_name(node)} is not causal self-attention that llmopt knows "
                f"({'; '.join(reasons) or 'no rule came near'}); wanted scaled_dot_product_attention(is_causal=True or "
                "a causal mask), or softmax(q k^T * scale + causal mask) v, with q, k, v [B, H, T, D]; "
                f"rewrite the line in one of these forms\n{graph_context(graph, node)}"
            )
