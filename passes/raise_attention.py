"""Raising attention: scaled_dot_product_attention and the written-out softmax(q k^T) v become one `attention`.

Whether a mask is causal is not guessed from its spelling: the nodes that make it are evaluated at a concrete length
and compared with the causal mask and with causal sliding windows. Heads repeated for grouped queries are un-repeated.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from llmopt.compiler.evaluate import evaluate
from llmopt.compiler.graph import Graph, target_name
from llmopt.compiler.pattern import AnyOf, aten
from llmopt.compiler.program import Program
from llmopt.compiler.rewrite import Builder, Match, Rule

CHECKED_MASK = 4096  # tokens up to which any mask is evaluated
LONGEST_MASK = 8192  # and up to which one is that could change beyond


class MaskOracle:
    """What a mask node allows: the window of a causal mask (0: all of the past), or the reason why it is not one."""

    def __init__(self, graph: Graph, program: Program) -> None:
        self.graph, self.program = graph, program
        self.seen: dict[tuple[fx.Node, bool | None], int | str] = {}

    def window(self, node: fx.Node, blocked_where: bool | None = None) -> int | str:
        """Evaluate `node`; with `blocked_where`, a boolean mask blocks where it equals that value."""
        key = (node, blocked_where)
        if key not in self.seen:
            self.seen[key] = self._window(node, blocked_where)
        return self.seen[key]

    def constant(self, node: Any) -> float | None:
        """The value of a number or of a one-element tensor made of weights; None for anything else."""
        if isinstance(node, (int, float)) and not isinstance(node, bool):
            return float(node)
        if not isinstance(node, fx.Node) or self._reads(node, lambda n: n.op == "placeholder"):
            return None
        (value,) = evaluate(self.graph, {}, self.program.weights, [node])
        return float(value) if isinstance(value, Tensor) and value.numel() == 1 and not value.is_meta else None

    def _window(self, node: fx.Node, blocked_where: bool | None) -> int | str:
        if self._reads(node, self._reads_tokens):
            return "the mask depends on the tokens"
        limit = self.program.facts.context_length
        length = min(limit, CHECKED_MASK)
        if limit > length and self._reads(node, _could_change_late):
            if limit > LONGEST_MASK:
                return f"the mask holds a weight or a number, so it may change beyond the {LONGEST_MASK} tokens checked"
            length = limit
        found: int | str = 0
        # the same rule at three lengths, and the same for each sequence: a window must not depend on either
        for batch, size in ((1, length), (1, length // 2 + 1), (3, min(5, length))):
            allowed = self._evaluated(node, batch, size, blocked_where)
            if isinstance(allowed, str):
                return allowed
            window = _as_window(allowed)
            if size == length:
                found = window
            if isinstance(window, str) or isinstance(found, str) or window != (found if found < size else 0):
                return window if isinstance(window, str) else "the window of the mask depends on the number of tokens"
        return found

    def _evaluated(self, node: fx.Node, batch: int, length: int, blocked_where: bool | None) -> Tensor | str:
        """bool [T, T]: what the mask allows, the same for all sequences and heads."""
        at = torch.arange(length).expand(batch, length)
        (mask,) = evaluate(self.graph, {"input_ids": at, "position_ids": at}, self.program.weights, [node])
        if not isinstance(mask, Tensor) or tuple(mask.shape[-2:]) != (length, length):
            return f"the mask has shape {tuple(getattr(mask, 'shape', ()))}, wanted [..., T, T]"
        allowed = _allowed(mask, blocked_where)
        if isinstance(allowed, str):
            return allowed
        rows = allowed.reshape(-1, length, length)
        return rows[0] if bool((rows == rows[0]).all()) else "the mask differs between heads or sequences"

    def _reads_tokens(self, node: fx.Node) -> bool:
        return target_name(node) != "aten.sym_size" and any(n.target == "input_ids" for n in node.all_input_nodes)

    def _reads(self, node: fx.Node, holds: Callable[[fx.Node], bool]) -> bool:
        """Is this so of the node or of one it is made from?"""
        stack, seen = [node], {node}
        while stack:
            current = stack.pop()
            if holds(current):
                return True
            for source in current.all_input_nodes:
                if source not in seen:
                    seen.add(source)
                    stack.append(source)
        return False


def _could_change_late(node: fx.Node) -> bool:
    """A mask made of positions, comparisons, small axes and fill values alone has nothing to tell far from near by."""
    numbers = [a for a in (*node.args, *node.kwargs.values()) if isinstance(a, (int, float))]
    return node.op == "get_attr" or any(n != int(n) or not -4 <= n <= 4 for n in numbers if -1e4 < n < 2**31)


def _allowed(mask: Tensor, blocked_where: bool | None) -> Tensor | str:
    if mask.dtype == torch.bool:
        return mask != blocked_where if blocked_where is not None else mask
    if blocked_where is not None:
        return "a condition that is not boolean"
    open_, shut = mask == 0, mask <= -1e4
    return open_ if bool((open_ | shut).all()) else "the mask adds values other than 0 and -inf: a position bias"


def _as_window(allowed: Tensor) -> int | str:
    length = allowed.shape[0]
    at = torch.arange(length)
    distance = at[:, None] - at[None, :]
    window = int(allowed[-1].sum())
    window = 0 if window == length else window
    wanted = (distance >= 0) & ((distance < window) if window else torch.ones_like(allowed))
    return window if torch.equal(allowed, wanted) else "the mask is neither causal nor a causal sliding window"


def strip_repeat(node: Any) -> Any:
    """k or v before it was repeated for grouped queries (repeat_interleave, or unsqueeze-expand-reshape over heads)."""
    if not isinstance(node, fx.Node):
        return node
    name = target_name(node)
    if name == "aten.repeat_interleave":
        even = len(node.args) > 2 and isinstance(node.args[1], int) and node.args[2] in (1, -3)
        return node.args[0] if even else node
    if name not in ("aten.reshape", "aten.view") or target_name(spread := _first(node)) != "aten.expand":
        return node
    single = _first(spread)
    if target_name(single) != "aten.unsqueeze" or single.args[1] != 2:
        return node
    kept, source = node.meta["val"].shape, _first(single).meta["val"].shape
    return single.args[0] if str(kept[2:]) == str(source[2:]) else node  # it was the heads that were repeated


def _first(node: fx.Node) -> fx.Node:
    found = node.args[0]
    assert isinstance(found, fx.Node)
    return found


def grouped(q: Any, k: Any, v: Any, turned: bool = False) -> tuple[Any, Any] | str:
    """k and v as `attention` takes them, un-repeated where both were; or why q, k and v do not fit together.

    `turned`: k is [B, H, D, T].
    """
    if any(not isinstance(n, fx.Node) or n.meta["val"].dim() != 4 for n in (q, k, v)):
        return "q, k and v are not [B, H, T, D]"
    batch, heads, length, _ = q.meta["val"].shape
    reason = ""
    for a, b in ((strip_repeat(k), strip_repeat(v)), (k, v)):
        ka, vb = a.meta["val"].shape, b.meta["val"].shape
        sizes = [str((s[0], s[1], s[n])) for s, n in ((ka, 3 if turned else 2), (vb, 2))]
        fits = str(ka[0]) == str(batch) and str(vb[2]) == str(length) and heads % ka[1] == 0
        if sizes[0] == sizes[1] and fits:
            return a, b
        shapes = f"{tuple(q.meta['val'].shape)}, {tuple(ka)}, {tuple(vb)}"
        reason = f"q, k and v do not fit together as heads over one length: {shapes}"
    return reason


class FusedAttention(Rule):
    """aten.scaled_dot_product_attention that is causal."""

    name = "fused-attention"

    def __init__(self, oracle: MaskOracle) -> None:
        self.oracle = oracle

    def pattern(self, q: Any, k: Any, v: Any, mask: Any, dropout: Any, causal: Any, scale: Any, gqa: Any) -> Any:
        """Every argument is looked at by check."""
        return aten.scaled_dot_product_attention.default(q, k, v, mask, dropout, causal, scale=scale, enable_gqa=gqa)

    def check(self, m: Match) -> Any:
        """No dropout; causal by flag or by mask."""
        if m["dropout"]:
            return m.fail(f"dropout {m['dropout']} is on", m.root)
        if m["mask"] is None and not m["causal"]:
            return m.fail("neither is_causal nor a mask is given, so every token sees every other", m.root)
        if m["mask"] is not None:
            window = self.oracle.window(m["mask"])
            if isinstance(window, str):
                return m.fail(window, m["mask"])
        fitting = grouped(m["q"], m["k"], m["v"])
        return m.fail(fitting, m.root) if isinstance(fitting, str) else None

    def rewrite(self, b: Builder, m: Match) -> Any:
        """One attention."""
        window = self.oracle.window(m["mask"]) if m["mask"] is not None else 0
        scale = m["scale"] if m["scale"] is not None else m.val("q").shape[-1] ** -0.5
        fitting = grouped(m["q"], m["k"], m["v"])
        assert not isinstance(fitting, str)
        k, v = fitting
        return b.ir.attention(m["q"], k, v, None, float(scale), window, 0.0)


class WrittenAttention(Rule):
    """softmax(scores, -1) @ v, where scores are q k^T scaled, soft-capped and masked in any order that makes sense."""

    name = "written-attention"

    def __init__(self, oracle: MaskOracle) -> None:
        self.oracle = oracle

    def pattern(self, scores: Any, v: Any, dtype: Any) -> Any:
        """The scores are walked by check."""
        last = (aten.softmax.int(scores, -1, dtype), aten.softmax.int(scores, 3, dtype))
        soft = AnyOf(*last, aten._softmax.default(scores, -1, False))
        probs = AnyOf(soft, aten.to.dtype(soft, dtype))
        return AnyOf(aten.matmul.default(probs, v), aten.bmm.default(probs, v))

    def check(self, m: Match) -> Any:
        """Walk the scores back to q and k."""
        found = _Scores(self.oracle).walk(m["scores"])
        if isinstance(found, str):
            return m.fail(found, m["scores"])
        if found.window is None:
            return m.fail("no causal mask between the scores and the softmax", m["scores"])
        fitting = grouped(found.q, found.k, m["v"], found.turned)
        return m.fail(fitting, m.root) if isinstance(fitting, str) else None

    def rewrite(self, b: Builder, m: Match) -> Any:
        """One attention."""
        found = _Scores(self.oracle).walk(m["scores"])
        assert not isinstance(found, str)
        fitting = grouped(found.q, found.k, m["v"], found.turned)
        assert not isinstance(fitting, str)
        k, v = fitting
        k = b.aten.transpose.int(k, -2, -1) if found.turned else k
        return b.ir.attention(found.q, k, v, None, found.scale, found.window, found.softcap)


class _Scores:
    """Reads masked, scaled, capped scores from the softmax back to the product of q and k."""

    def __init__(self, oracle: MaskOracle) -> None:
        self.oracle = oracle
        self.scale, self.softcap = 1.0, 0.0
        self.window: int | None = None
        self.q: Any = None
        self.k: Any = None
        self.turned = False  # k is [B, H, D, T]

    def walk(self, node: Any) -> _Scores | str:
        """Self once q and k are found, or the reason why not."""
        while isinstance(node, fx.Node):
            name = target_name(node)
            if name in ("aten.matmul", "aten.bmm"):
                return self._product(node)
            step = self.steps.get(name.removeprefix("aten."))
            if step is None or (node.kwargs and name != "aten.to"):
                return f"the scores pass through {name}{' with options' if step else ''}"
            node = step(self, node)
        return node if isinstance(node, str) else "the scores are not made by a product of q and k"

    def _to(self, node: fx.Node) -> Any:
        return node.args[0] if node.meta["val"].is_floating_point() else "the scores are rounded to integers"

    def _mul(self, node: fx.Node) -> Any:
        return self._scaled(node, 1)

    def _div(self, node: fx.Node) -> Any:
        return self._scaled(node, -1)

    def _scaled(self, node: fx.Node, power: int) -> Any:
        factor = self.oracle.constant(node.args[1])
        if factor is None or not factor > 0:
            return "the scores are scaled by a tensor, or not by a positive number"
        self.scale *= factor**power
        return node.args[0]

    def _softcap(self, node: fx.Node) -> Any:
        if self.softcap or self.scale != 1.0:
            return "the scores are scaled after the soft-cap"
        self.softcap = float(node.args[1])  # type: ignore[arg-type]
        return node.args[0]

    def _add(self, node: fx.Node) -> Any:
        return self._masked(node, node.args[1], None)

    def _masked_fill(self, node: fx.Node) -> Any:
        return self._masked(node, node.args[1], True) if _is_blocking(node.args[2]) else "masked with a finite value"

    def _where(self, node: fx.Node) -> Any:
        condition, kept, filled = node.args
        inner = self._masked(node, condition, False) if _is_blocking(filled) else "masked with a finite value"
        return inner if isinstance(inner, str) else kept

    def _masked(self, node: fx.Node, mask: Any, blocked_where: bool | None) -> Any:
        if self.window is not None or not isinstance(mask, fx.Node):
            return "the scores are masked twice or shifted by a constant"
        if self.scale != 1.0:
            return "the scores are scaled after the mask, which may lift what was masked"
        if self.softcap:
            return "the scores are masked before the soft-cap, which lifts what was masked"
        window = self.oracle.window(mask, blocked_where)
        if isinstance(window, str):
            return window
        self.window = window
        return node.args[0]

    steps: ClassVar = {
        "to": _to, "mul": _mul, "div": _div, "softcap": _softcap, "add": _add, "masked_fill": _masked_fill,
        "where": _where,
    }  # fmt: skip

    def _product(self, node: fx.Node) -> Any:
        self.q, turned = node.args[:2]
        while isinstance(self.q, fx.Node) and target_name(self.q) in ("aten.mul", "aten.div") and not self.q.kwargs:
            factor = self.oracle.constant(self.q.args[1])
            if factor is None or factor == 0:
                break
            self.scale *= factor ** (1 if target_name(self.q) == "aten.mul" else -1)
            self.q = self.q.args[0]
        self.k, self.turned = turned, True
        if isinstance(turned, fx.Node) and target_name(turned) == "aten.transpose":
            _, *axes = turned.args
            if {axis % 4 for axis in axes if isinstance(axis, int)} == {2, 3}:
                self.k, self.turned = turned.args[0], False
        return self


def _is_blocking(value: Any) -> bool:
    """-inf or a value as good as it, literal or made by a node."""
    if isinstance(value, fx.Node):
        value = value.args[0] if value.op == "call_function" and value.args else None
        value = value if isinstance(value, (int, float)) else None
    return isinstance(value, (int, float)) and value <= -1e4


def attention_rules(graph: Graph, program: Program) -> list[Rule]:
    """Both spellings, sharing what they learn of masks."""
    oracle = MaskOracle(graph, program)
    return [FusedAttention(oracle), WrittenAttention(oracle)]
