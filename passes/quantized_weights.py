"""How the pass `quantize` makes its weights: lazily, one at a time, with calibration data or without."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from llmopt.compiler import ops
from llmopt.compiler.calibration_statistics import Statistics
from llmopt.compiler.errors import InputError
from llmopt.compiler.graph import Graph, origin
from llmopt.compiler.program import Program, Weight
from llmopt.compiler.quant import QuantizedTensor, quantize, scheme_of
from llmopt.compiler.quant.allocate import allocate, check_budget
from llmopt.compiler.quant.gptq import gptq, output_error
from llmopt.compiler.quant.storage import PARTS, parts_of, types_of
from llmopt.passes.quantize_options import rule_for

PLAIN = "unquantised"
Figures = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Maker:
    """Quantises weights by name; `statistics` are of the values they multiply, None if no rule asks for them.

    `scale` is the rule of the schemes that can have it (`rule_for`). `say` is told what a reader of the report should
    know.
    """

    method: str
    scale: str
    weighted: bool
    statistics: Statistics | None
    say: Callable[[str], None]

    def __call__(self, weight: Tensor, name: str, scheme: str, figures: dict[str, Any]) -> QuantizedTensor:
        """The weight [N, K] in `scheme`; what that cost goes into `figures`. Raises InputError, which names it."""
        diagonal = self.statistics.diagonal(name) if self.weighted and self.statistics else None
        rule = rule_for(self.scale, scheme)
        if self.method != "gptq":
            with _naming(name):
                made = quantize(weight, scheme, rule, weight=diagonal)
        else:
            assert self.statistics is not None
            hessian, tokens = self.statistics.second_moment(name), self.statistics.entry(name).tokens
            with _naming(name):
                made = gptq(
                    weight, hessian, scheme, rule, tokens=tokens, weight=diagonal,
                    say=lambda text: self.say(f"{name}: {text}"),
                )  # fmt: skip
            figures["output_error"] = output_error(weight, made.dequantize(), hessian)
        if made.error():
            figures["sqnr_db"] = round(made.sqnr(), 3)
        else:  # infinite, which JSON does not know
            figures["lossless"] = True
        return made

    def cost(self, weight: Tensor, name: str, scheme: str) -> float:
        """The relative squared error of the products with the calibration tokens if the weight were made in `scheme`;
        their channels are taken as independent unless there are second moments."""
        assert self.statistics is not None
        figures: dict[str, Any] = {}
        made = replace(self, say=lambda text: None)(weight, name, scheme, figures)
        if "output_error" in figures:
            return float(figures["output_error"])
        importance = self.statistics.diagonal(name).double()
        lost = weight.double() - made.dequantize().double()
        energy = float((weight.double().square() * importance).sum())
        return float((lost.square() * importance).sum()) / (energy or 1.0)


@contextlib.contextmanager
def _naming(name: str) -> Iterator[None]:
    try:
        yield
    except InputError as error:
        raise InputError(
            f"weight {name!r}: {error}; mend the checkpoint, or leave this weight out (option `exclude`)"
        ) from error


class _Kept:
    """A weight quantised when one of its parts is read; the others are kept until they are read, too."""

    def __init__(self, source: Weight, make: Callable[[Tensor], QuantizedTensor]) -> None:
        self.source, self.make = source, make
        self.parts: dict[str, Tensor] = {}

    def take(self, part: str) -> Tensor:
        """One of `storage.PARTS`."""
        if part not in self.parts:
            self.parts = parts_of(self.make(self.source.load()))
        return self.parts.pop(part)


def store(program: Program, name: str, scheme: str, maker: Maker, figures: dict[str, Any]) -> None:
    """Add the parts of the weight `name` in `scheme` to the program; `figures` get bytes now, accuracy later."""
    source = program.weights[name]
    kept = _Kept(source, lambda weight: maker(weight, name, scheme, figures))
    found = types_of(scheme_of(scheme), *source.shape)
    for part, (shape, dtype) in found.items():
        made = Weight(shape, dtype, partial(kept.take, part), f"{scheme} {part} of {name}", (name,))
        program.weights[f"{name}.{part}"] = made
    now = sum(program.weights[f"{name}.{part}"].nbytes for part in found)
    figures.update(scheme=scheme, bytes=now, bytes_before=source.nbytes)


def to_quantized(
    graph: Graph, program: Program, node: fx.Node, name: str, schemes: tuple[str, str], rule: str
) -> fx.Node:
    """Put a product with the parts of the weight `name`, which the program has, in the place of a linear; the product.

    `schemes` are the weight's and that of activations.
    """
    x, weight, bias = (*node.args, None)[:3]
    assert isinstance(weight, fx.Node)
    with graph.fx.inserting_before(node):
        parts = [_read(graph, program, node, f"{name}.{part}", rule) for part in PARTS]
        made = graph.call(ops.quantized_linear.overload, (x, *parts, bias, *schemes), node, rule)
    made.meta["val"] = node.meta["val"]
    node.replace_all_uses_with(made)
    graph.fx.erase_node(node)
    if not weight.users:
        graph.fx.erase_node(weight)
    return made


def _read(graph: Graph, program: Program, before: fx.Node, name: str, rule: str) -> fx.Node | None:
    """A read of the weight `name`, None if the program has none of that name."""
    weight = program.weights.get(name)
    if weight is None:
        return None
    assert graph.symbols is not None
    node = graph.fx.create_node("get_attr", name)
    with graph.symbols.mode:
        node.meta["val"] = torch.empty(weight.shape, dtype=weight.dtype)
    node.meta["origin"] = origin(before).touched(rule)
    return node


def stored_bits(scheme: str, shape: tuple[int, ...]) -> int:
    """Bits of a weight of `shape` (N, K) in `scheme`, with scales and zero points; PLAIN is not one."""
    parts = types_of(scheme_of(scheme), *shape)
    parts.pop("global_scale", None)  # one number a matrix is no bits a weight
    return sum(8 * math.prod(size) * dtype.itemsize for size, dtype in parts.values())


@dataclass(frozen=True)
class Budget:
    """What the weights of `sizes` may take together, `bits` a weight; sizes[name][scheme] in bits, PLAIN among them."""

    bits: float
    sizes: dict[str, dict[str, int]]
    count: int

    @classmethod
    def of(cls, program: Program, names: Collection[str], choices: tuple[str, ...], bits: float) -> Budget:
        """For the weights `names`, each in one of `choices` or as it is. Raises InputError: it is too small."""
        weights = {name: program.weights[name] for name in names}
        sizes = {
            name: {PLAIN: 8 * weight.nbytes, **{scheme: stored_bits(scheme, weight.shape) for scheme in choices}}
            for name, weight in weights.items()
        }
        made = cls(bits, sizes, sum(math.prod(weight.shape) for weight in weights.values()))
        if not made.is_plenty:
            check_budget(sizes, made.most, made.count)
        return made

    @property
    def is_plenty(self) -> bool:
        """Is it enough to leave all weights as they are?"""
        return sum(options[PLAIN] for options in self.sizes.values()) <= self.bits * self.count

    @property
    def most(self) -> int:
        """Bits of all together."""
        return int(self.bits * self.count)


def mixed(program: Program, budget: Budget, maker: Maker) -> tuple[dict[str, str], dict[str, dict[str, float]]]:
    """Schemes for the weights of a budget (PLAIN: left as it is), and the costs they were chosen by, `Maker.cost`, of
    which the sum is least. Each weight is made once in each scheme, as it will be in the end, unless all may stay as
    they are. Raises InputError: a weight is not finite.
    """
    if budget.sizes and budget.is_plenty:
        maker.say(
            f"all {len(budget.sizes)} weights fit into {budget.bits:g} bits a weight unquantised, and stay as they are"
        )
        return dict.fromkeys(budget.sizes, PLAIN), {name: {PLAIN: 0.0} for name in budget.sizes}
    costs: dict[str, dict[str, float]] = {}
    for name, options in budget.sizes.items():
        weight = program.weights[name].load()
        costs[name] = {s: 0.0 if s == PLAIN else maker.cost(weight, name, s) for s in options}
    return allocate(costs, budget.sizes, budget.most), costs


def told_averages(
    program: Program, bits: float, covered: Collection[str], everything: Collection[str], figures: Figures
) -> str:
    """One line: what the weights `covered` by `bits` take on average, each in the scheme that `figures` tell, if they
    do, and what all of `everything` take."""

    def average(names: Collection[str]) -> float:
        taken = count = 0
        for name in names:
            weight, scheme = program.weights[name], figures.get(name, {}).get("scheme")
            taken += stored_bits(scheme, weight.shape) if scheme else 8 * weight.nbytes
            count += math.prod(weight.shape)
        return taken / count

    return (
        f"{bits:g} bits a weight asked for: the {len(covered)} weights that this covers take {average(covered):.3f}, "
        f"all {len(everything)} of products (with those left out and the logits' own) {average(everything):.3f}"
    )


def told_few(statistics: Statistics) -> list[str]:
    """One line about the values that were seen in fewer tokens than they have channels, none where there are none."""
    warned = [text for name in statistics.entries if (text := statistics.rank_warning(name))]
    return [f"{warned[0]} (and {len(warned) - 1} more values)" if len(warned) > 1 else warned[0]] if warned else []
