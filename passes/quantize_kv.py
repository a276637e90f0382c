"""quantize-kv: keys and values in few bits in the paged cache, rotated on the way in. Approximate.

    k_0 = kv_write(k_pages_0, k, slots)                =>    k_0 = kv_write(k_pages_0, k, slots, "int4-h128")
    v_0 = kv_write(v_pages_0, v, slots)                      v_0 = kv_write(v_pages_0, v, slots, "int4")
    o = attend(q, k_0, v_0, ..., scale, 0, 0.0)              o = attend(q, k_0, v_0, ..., "int4-h128", "int4")

Keys are rotated behind RoPE, in blocks of `order` channels; queries with them, and results of rotated values are turned
back, all inside `attend`. `compiler.quant.kv` says how a vector becomes bytes. The state's shapes change, nothing else.

With `sinks` or `recent` the first and the last tokens are seen as they are (`compiler.ops.near`):

    o = attend_near(q, k_0, v_0, ..., "int4-h128", "int4", k, v, sinks, recent)
    k_1 = near_write(k_0, k, block_tables, seq_ids, position_ids, o, sinks, recent)

and the step returns k_1 instead of k_0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from llmopt.compiler import ops
from llmopt.compiler.errors import InputError, RecipeError
from llmopt.compiler.graph import Graph, origin, where
from llmopt.compiler.pipeline import Approx, Context, Pass, PassStats
from llmopt.compiler.program import Program, StateSpec
from llmopt.compiler.quant.kv import packing_for, why_no_choice
from llmopt.compiler.quant.near import Near, NearLayout, why_not_near


@dataclass(frozen=True)
class QuantizeKV(Pass):
    """Which packing keys and values have (`int4`, `int8`, `fp8`, `nvfp4`, or `none`: as they are), and who is rotated.

    `order`: of the Hadamard blocks, a power of two; 0: the largest that divides a head's channels, 1: no rotation.
    `rotate`: "k", "kv", "v" or "none". `skip`: numbers of attentions, from 0, whose cache stays as it is. A query sees
    the sequence's first `sinks` tokens and its last `recent` ones, its own included, as they are.
    """

    name: ClassVar[str] = "quantize-kv"
    requires: ClassVar[frozenset[str]] = frozenset({"cached"})
    ensures: ClassVar[frozenset[str]] = frozenset({"packed"})
    meaning: ClassVar[Approx] = Approx("keys and values are rounded to a low-bit format")

    keys: str = "int4"
    values: str = "int4"
    order: int = 0
    rotate: str = "k"
    skip: tuple[int, ...] = ()
    sinks: int = 0
    recent: int = 0

    def run(self, program: Program, context: Context) -> PassStats:
        """Rewrite the attentions of `step`. Raises RecipeError (options), InputError (heads that cannot be cut so)."""
        if why := why_no_choice(self.keys, self.values, self.order, self.rotate) or why_not_near(
            self.sinks, self.recent
        ):
            raise RecipeError(f"pass 'quantize-kv': {why}")
        stats, step = PassStats(), program.graph("step")
        attends = list(step.calls("attend"))
        if beyond := [n for n in self.skip if not 0 <= n < len(attends)]:
            raise RecipeError(
                f"pass 'quantize-kv': skip has {beyond[0]}; the model's attentions are numbered 0 to {len(attends) - 1}"
            )
        if attends and len(set(self.skip)) == len(attends):
            raise RecipeError(
                f"pass 'quantize-kv': skip names all {len(attends)} attentions, so nothing is left to pack; take some "
                "out, or the pass"
            )
        specs = {spec.name: spec for spec in program.state}
        before = sum(spec.bytes_per_page for spec in specs.values())
        near = Near(*(min(count, program.facts.context_length) for count in (self.sinks, self.recent)))
        for number, node in enumerate(attends):
            if number in self.skip:
                stats.rejected["quantize-kv", "skip names it"] += 1
            elif context.rewrites_left != 0:
                self._rewrite(node, specs)
                if near.rows:
                    program.near_pages = max(program.near_pages, self._see_as_they_are(step, node, near))
                stats.record(self.name, node.name, origin(node).source)
                context.spend(1)
        program.state = tuple(specs.values())
        page = context.recipe.page_size
        after = sum(spec.bytes_per_page for spec in specs.values())
        told = f"{before // page} -> {after // page} bytes a token, {before / after:.2f} times less"
        stats.notes.append(f"KV cache: {told}")
        if program.near_pages:
            more = f"{program.near_pages * after} bytes a sequence"
            stats.notes.append(f"KV cache: {more} for {near.first} first and {near.recent} last tokens as they are")
        return stats

    def _see_as_they_are(self, step: Graph, attend: fx.Node, near: Near) -> int:
        """Give the attention the near tokens, and write those of the step behind it; how many pages they take."""
        writes: tuple[fx.Node, fx.Node] = attend.args[1:3]  # type: ignore[assignment]
        xs: list[fx.Node] = [write.args[1] for write in writes]  # type: ignore[misc]
        with step.fx.inserting_before(attend):
            settings = (*attend.args, *xs, near.first, near.recent)
            seen = step.call(ops.attend_near.overload, settings, attend, self.name)
        seen.meta["val"] = attend.meta["val"]
        attend.replace_all_uses_with(seen)
        step.fx.erase_node(attend)
        pages, after = 0, seen
        for write, x in zip(writes, xs, strict=True):
            if len(write.args) > 3:  # packed
                with step.fx.inserting_after(after):
                    given = (write, x, *seen.args[3:6], seen, near.first, near.recent)
                    after = step.call(ops.near_write.overload, given, seen, self.name)
                after.meta["val"] = write.meta["val"]
                step.fx.output_node().replace_input_with(write, after)
                _, _, page, row = write.meta["val"].shape
                value = x.meta["val"]
                pages = max(pages, NearLayout(page * row, value.shape[3], value.dtype.itemsize).pages(near.rows))
        return pages

    def _rewrite(self, node: fx.Node, specs: dict[str, StateSpec]) -> None:
        packings = []
        for write, kind, letter in zip(node.args[1:3], (self.keys, self.values), "kv", strict=True):
            packings.append(self._packed(write, kind, letter, specs))  # type: ignore[arg-type]
        node.args = (*node.args[:10], *packings)

    def _packed(self, write: fx.Node, kind: str, letter: str, specs: dict[str, StateSpec]) -> str:
        pages: fx.Node = write.args[0]  # type: ignore[assignment]
        spec = specs[pages.name]
        heads, page, channels = spec.shape
        packing = packing_for(letter, kind, self.order, self.rotate, channels)
        if packing is None:
            return ""
        try:
            row = packing.row_bytes(channels)
        except InputError as error:
            smaller = "a smaller order, " if channels % packing.order else ""
            other = f"wanted {smaller}another packing, or skip to leave this attention as it is"
            raise InputError(f"{where(write)}: {error}; {other}") from None
        specs[spec.name] = StateSpec(spec.name, (heads, page, row), torch.uint8)
        was = pages.meta["val"]
        pages.meta["val"] = write.meta["val"] = was.new_empty((*was.shape[:3], row), dtype=torch.uint8)
        write.args = (*write.args[:3], str(packing))
        return str(packing)
