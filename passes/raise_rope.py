"""Raising rotary embeddings: the half-split spellings become one `rope`; interleaved pairs stay in aten.

low, high = x[..., :R/2], x[..., R/2:R]
x * cos + cat(-high, low) * sin                                            =>    rope(x, cos, sin)
cat(low * cos - high * sin, high * cos + low * sin)  # cos of half width =>  rope(x, cat(cos, cos), cat(sin, sin))
cat(rope(x[..., :R]), x[..., R:])                                          =>    rope(x, cos, sin)
"""

from __future__ import annotations

import operator
from typing import Any

import torch

from llmopt.compiler.pattern import AnyOf, Const, aten, call
from llmopt.compiler.rewrite import Builder, Match, Rule


class Rope(Rule):
    """x * cos + rotate_half(x) * sin, cos and sin [B, T, R] spread over heads."""

    name = "rope"

    def pattern(self, x: Any, cos: Any, sin: Any) -> Any:
        """rotate_half(x) = cat(-x[R/2:], x[:R/2])."""
        low = aten.slice.Tensor(x, -1, 0, Const("half", int))
        low3 = aten.slice.Tensor(x, 3, 0, Const("half", int))
        high = aten.slice.Tensor(x, -1, Const("half", int), Const("end", int))
        high3 = aten.slice.Tensor(x, 3, Const("half", int), Const("end", int))
        turned = aten.cat.default([aten.neg.default(AnyOf(high, high3)), AnyOf(low, low3)], -1)
        c, s = aten.unsqueeze.default(cos, 1), aten.unsqueeze.default(sin, 1)
        return aten.add.Tensor(aten.mul.Tensor(x, c), aten.mul.Tensor(turned, s))

    def check(self, m: Match) -> Any:
        """[B, H, T, R] with halves of equal size."""
        x, cos = m.val("x"), m.val("cos")
        if x.dim() != 4 or cos.dim() != 3 or cos.shape[-1] != x.shape[-1] or 2 * m["half"] != x.shape[-1]:
            return m.fail(f"x {tuple(x.shape)} and cos {tuple(cos.shape)} are not [B, H, T, R] and [B, T, R]", m.root)
        return None if m.root.meta["val"].dtype == x.dtype else m.fail("cos has a wider dtype than x", m.root)

    def rewrite(self, b: Builder, m: Match) -> Any:
        """One rope."""
        return b.ir.rope(m["x"], m["cos"], m["sin"])


class PartialRope(Rule):
    """cat(rope(x[:R]), x[R:]): rotary over the first channels only (GPT-NeoX, Phi)."""

    name = "partial-rope"

    def pattern(self, x: Any, cos: Any, sin: Any) -> Any:
        """The slice may spell the last axis as -1 or 3."""
        turn = AnyOf(*(aten.slice.Tensor(x, d, 0, Const("r", int)) for d in (-1, 3)))
        keep = AnyOf(*(aten.slice.Tensor(x, d, Const("r", int), Const("end", int)) for d in (-1, 3)))
        return aten.cat.default([call(torch.ops.llmopt.rope.default, turn, cos, sin), keep], -1)

    def check(self, m: Match) -> Any:
        """All channels that are not turned are kept."""
        whole = m["end"] >= m.val("x").shape[-1]
        return None if whole else m.fail(f"the channels kept end at {m['end']}", m.root)

    def rewrite(self, b: Builder, m: Match) -> Any:
        """rope leaves channels beyond cos's width alone."""
        return b.ir.rope(m["x"], m["cos"], m["sin"])


class HalvesRope(Rule):
    """cat(low * cos - high * sin, high * cos + low * sin), cos and sin [B, T, R/2]: GPT-OSS's spelling."""

    name = "halves-rope"

    def pattern(self, x: Any, cos: Any, sin: Any) -> Any:
        """The halves by chunk or split."""
        halves = AnyOf(aten.chunk.default(x, 2, -1), aten.split.Tensor(x, Const("half", int), -1))
        low, high = call(operator.getitem, halves, 0), call(operator.getitem, halves, 1)
        c, s = aten.unsqueeze.default(cos, 1), aten.unsqueeze.default(sin, 1)
        first = aten.sub.Tensor(aten.mul.Tensor(low, c), aten.mul.Tensor(high, s))
        second = aten.add.Tensor(aten.mul.Tensor(high, c), aten.mul.Tensor(low, s))
        return aten.cat.default([first, second], -1)

    def check(self, m: Match) -> Any:
        """[B, H, T, R] in two equal halves."""
        x, cos = m.val("x"), m.val("cos")
        if x.dim() != 4 or cos.dim() != 3 or 2 * cos.shape[-1] != x.shape[-1]:
            return m.fail(f"x {tuple(x.shape)} and cos {tuple(cos.shape)} are not [B, H, T, R] and [B, T, R/2]", m.root)
        if m.env.get("half", cos.shape[-1]) != cos.shape[-1]:
            return m.fail("the parts are no halves", m.root)
        return None if m.root.meta["val"].dtype == x.dtype else m.fail("cos has a wider dtype than x", m.root)

    def rewrite(self, b: Builder, m: Match) -> Any:
        """One rope, with cos and sin for both halves."""
        cos, sin = (b.aten.cat.default([m[n], m[n]], -1) for n in ("cos", "sin"))
        return b.ir.rope(m["x"], cos, sin)


ROPE_RULES = (Rope(), PartialRope(), HalvesRope())
