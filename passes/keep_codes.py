"""keep-codes: products with weights that the checkpoint holds in codes multiply by those codes. Exact.

    y = linear(x, w["q|k|v"])        =>        y = quantized_linear(x, w["q|k|v.packed"], w["q|k|v.scales"],
                                                                    w["q|k|v.global_scale"], None, None, "nvfp4")

A weight in codes stands for the same numbers before this pass, decoded; behind it they are not decoded beforehand. So
it is put into the recipe of a model with such weights (`runtime.build`), behind the structural passes: `canonicalize`
joins only weights whose codes can be joined (`Program.same_codes`). Activations that the checkpoint wants rounded are
rounded from here on, which is why the pass says that it is not exact where there are such.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from llmopt.compiler.errors import InputError
from llmopt.compiler.graph import origin
from llmopt.compiler.pipeline import Approx, Context, Pass, PassStats
from llmopt.compiler.program import Coded, Program, Weight
from llmopt.compiler.quant.schemes import SCHEMES
from llmopt.compiler.quant.storage import types_of
from llmopt.passes.products import operand
from llmopt.passes.quantized_weights import to_quantized


@dataclass(frozen=True)
class KeepCodes(Pass):
    """Codes of the checkpoint instead of what they stand for; see the module's docstring."""

    name: ClassVar[str] = "keep-codes"
    requires: ClassVar[frozenset[str]] = frozenset({"canonical"})
    ensures: ClassVar[frozenset[str]] = frozenset()
    meaning: ClassVar[Approx] = Approx("activations are rounded where the checkpoint says so")
    must_match: ClassVar[bool] = False

    def run(self, program: Program, context: Context) -> PassStats:
        """Rewrite the products of every graph. Raises InputError: a pass before this one changed such weights."""
        stats = PassStats()
        for coded in program.coded.values():
            stats.notes += [note for note in coded.notes if note not in stats.notes]
        if tied := sorted(set(program.coded) - set(program.weights)):
            stats.notes.append(f"codes of {', '.join(tied)} are not read: config.json ties the weight to another")
        for graph in program.graphs.values():
            for node in [n for n in graph.calls("linear") if operand(n).op == "get_attr"]:
                name = str(operand(node).target)
                found = [program.coded[leaf] for leaf in program.origins(name) if leaf in program.coded]
                if not found or not found[0].scheme or context.rewrites_left == 0:
                    continue
                if not program.is_joined(name):
                    raise InputError(
                        f"weight {name!r} is {program.weights[name].note}, of weights that the checkpoint holds in "
                        "codes, which would be lost; leave out what changes weights (`rotate`), or use the checkpoint "
                        "it was made from"
                    )
                scheme = _store(program, name, found)
                made = to_quantized(graph, program, node, name, (scheme, found[0].activations), self.name)
                stats.record(self.name, made.name, origin(made).source)
                context.spend(1)
        return stats


def _store(program: Program, name: str, coded: list[Coded]) -> str:
    """Add the parts of a weight, joined of those of `coded`, to the program; the scheme they are in."""
    scheme = SCHEMES[coded[0].scheme]
    rows = [program.weights[leaf].shape[0] for leaf in program.origins(name)]
    if scheme.rows == 0 and len(rows) > 1:  # a scale for each weight becomes one for each row
        scheme = SCHEMES["fp8_channel"]
    for part, (shape, dtype) in types_of(scheme, *program.weights[name].shape).items():
        read = _Joined(tuple(c.parts[part] for c in coded), part, tuple(rows), scheme.rows == 1)
        program.weights[f"{name}.{part}"] = Weight(shape, dtype, read, f"{scheme.name} {part} of {name}", (name,))
    return scheme.name


@dataclass(frozen=True)
class _Joined:
    """Reads a part of weights one below another; scales of whole weights are repeated if each row is to have one."""

    parts: tuple[Weight, ...]
    part: str
    rows: tuple[int, ...]
    by_row: bool

    def __call__(self) -> Tensor:
        read = [part.load() for part in self.parts]
        if self.part == "global_scale" or len(read) == 1:
            return read[0]
        if self.part == "scales" and self.by_row:
            read = [
                scales.expand(count, -1) if len(scales) == 1 else scales
                for scales, count in zip(read, self.rows, strict=True)
            ]
        return torch.cat(read)
