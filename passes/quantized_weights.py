"""How the pass `quantize` makes its weights: lazily, one at a time, with calibration data or without."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from llmopt.compiler.calibration_statistics import Statistics
from llmopt.compiler.program import Program, Weight
from llmopt.compiler.quant import QuantizedTensor, quantize, scheme_of
from llmopt.compiler.quant.allocate import allocate
from llmopt.compiler.quant.gptq import gptq, output_error
from llmopt.compiler.quant.storage import parts_of, types_of

PLAIN = "unquantised"


@dataclass(frozen=True)
class Maker:
    """Quantises weights by name; `statistics` are of the values they multiply, None if no rule asks for them."""

    method: str
    scale: str
    weighted: bool
    statistics: Statistics | None
    say: Callable[[str], None]

    def __call__(self, weight: Tensor, name: str, scheme: str, figures: dict[str, Any]) -> QuantizedTensor:
        """The weight [N, K] in `scheme`; what that cost goes into `figures`."""
        diagonal = self.statistics.diagonal(name) if self.weighted and self.statistics else None
        if self.method != "gptq":
            made = quantize(weight, scheme, self.scale, weight=diagonal)
        else:
            assert self.statistics is not None
            hessian = self.statistics.second_moment(name)
            made = gptq(
                weight, hessian, scheme, self.scale, weight=diagonal, say=lambda text: self.say(f"{name}: {text}")
            )
            figures["output_error"] = output_error(weight, made.dequantize(), hessian)
        figures["sqnr_db"] = round(made.sqnr(), 3)
        return made


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


def mixed(
    program: Program, names: Collection[str], choices: tuple[str, ...], bits: float, maker: Maker
) -> tuple[dict[str, str], dict[str, dict[str, float]]]:
    """Schemes for the weights `names` (PLAIN: left as it is) of at most `bits` bits a weight on average, and the costs
    they were chosen by: the relative error of a product with the calibration tokens, its channels taken as independent,
    summed over the weights. Each weight is quantised once in each scheme.
    """
    assert maker.statistics is not None
    costs: dict[str, dict[str, float]] = {}
    sizes: dict[str, dict[str, int]] = {}
    for name in names:
        source = program.weights[name]
        weight, importance = source.load().float(), maker.statistics.diagonal(name).double()
        energy = float((weight.double().square() * importance).sum()) or 1.0
        costs[name], sizes[name] = {PLAIN: 0.0}, {PLAIN: 8 * source.nbytes}
        for scheme in choices:
            lost = weight - quantize(weight, scheme, maker.scale).dequantize()
            costs[name][scheme] = float((lost.double().square() * importance).sum()) / energy
            parts = types_of(scheme_of(scheme), *source.shape)
            parts.pop("global_scale", None)  # one number a matrix is no bits a weight
            sizes[name][scheme] = sum(8 * math.prod(shape) * dtype.itemsize for shape, dtype in parts.values())
    count = sum(program.weights[name].shape[0] * program.weights[name].shape[1] for name in names)
    return allocate(costs, sizes, int(bits * count)), costs
