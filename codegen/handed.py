"""Values that one region of a step writes in the order in which the low-bit product of the next one reads them.

A product of more than eight tokens reads x in wgmma's order of columns (`lowbit_layout.in_order`). Where all that reads
a region's output is such products, the region may as well write it so, which spares a kernel. A region is the code of
many layers, so this must hold wherever it is called. A step's outputs, and what it computes for any other class of
shapes, stand as they are.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

from torch import fx

from llmopt.codegen.fused_lowbit import columns, scheme
from llmopt.codegen.fused_region import template_of
from llmopt.codegen.kernel import RegionCode
from llmopt.codegen.lowbit_layout import own
from llmopt.compiler.emittable import is_product, keeps_order, op_name
from llmopt.compiler.graph import Graph
from llmopt.compiler.quant.schemes import scheme_of
from llmopt.compiler.target import Target

Spot = tuple[str, str]  # a region and one of its arguments: `in0`, `out0`
WRITERS = ("lowbit:lowbit", "decode_attention:decode_attention", "rotated:rotated")


def handed_over(
    step: Graph, graph: Callable[[str], Graph], code: Callable[[str], RegionCode], tokens: int, target: Target
) -> dict[Spot, int]:
    """For each output that is written in order, and each input that is read so, a lane's neighbouring columns (OWN).

    `graph` and `code` give a region's graph and its code as it would be otherwise, for steps of at most `tokens`.
    """
    found = _wanted(step, graph, code, tokens, target)
    givers: dict[Spot, set[Spot]] = defaultdict(set)
    for call in _calls(step):
        for at, argument in enumerate(call.args):
            if isinstance(argument, fx.Node):
                givers[str(call.target), f"in{at}"].add(_source(argument))
    takers: dict[Spot, set[Spot]] = defaultdict(set)
    for taker, sources in givers.items():
        for giver in sources:
            takers[giver].add(taker)
    for giver in {_source(n) for n in step.outputs() if isinstance(n, fx.Node)} | _elsewhere(step):
        takers[giver].add(("", ""))  # read by what wants it as it is
    while True:
        kept = {
            taker: width
            for taker, width in found.items()
            if all(
                _writes(giver, graph, code) and {found.get(t) for t in takers[giver]} == {width}
                for giver in givers[taker]
            )
        }
        if kept == found:
            break
        found = kept
    return {**found, **{giver: width for taker, width in found.items() for giver in givers[taker]}}


def _wanted(
    step: Graph, graph: Callable[[str], Graph], code: Callable[[str], RegionCode], tokens: int, target: Target
) -> dict[Spot, int]:
    """The inputs that are nothing but a low-bit product's x."""
    found = {}
    for name in dict.fromkeys(str(call.target) for call in _calls(step)):
        region = graph(name)
        for product in filter(is_product, region.calls()):
            node: Any = product.args[0]
            while keeps_order(node) and len(node.users) == 1:
                node = node.args[0]
            alone = node.op == "placeholder" and len(node.users) == 1 and op_name(product) == "quantized_linear"
            if not alone or not _kernel_of(code(name), "out0", ("lowbit:lowbit",)):
                continue
            shape = {"K": columns(product), "N": tokens}
            if template_of("lowbit").takes_order(shape, scheme(product), target):
                found[name, f"in{region.inputs().index(node)}"] = own(scheme_of(scheme(product)))
    return found


def _writes(giver: Spot, graph: Callable[[str], Graph], code: Callable[[str], RegionCode]) -> bool:
    """Can this output be written in any order of columns?"""
    name, place = giver
    return bool(name) and _kernel_of(code(name), place, WRITERS)


def _kernel_of(code: RegionCode, place: str, templates: tuple[str, ...]) -> bool:
    """Is what fills this argument a kernel of one of the templates?"""
    writers = [call for call in code.calls if place in call.args]
    return bool(writers) and all(c.kernel is not None and c.kernel.template in templates for c in writers)


def _calls(step: Graph) -> list[fx.Node]:
    return [n for n in step.fx.nodes if n.op == "call_module"]


def _source(node: fx.Node) -> Spot:
    """The region's output that a value of the step is; no region's where it is none."""
    if node.op == "call_function" and node.target is operator.getitem and node.args[0].op == "call_module":  # type: ignore[union-attr]
        return str(node.args[0].target), f"out{node.args[1]}"  # type: ignore[union-attr]
    return "", node.name


def _elsewhere(step: Graph) -> set[Spot]:
    """What is read by something that is no region."""
    readers = [n for n in step.fx.nodes if n.op == "call_function" and n.target is not operator.getitem]
    return {_source(n) for reader in readers for n in reader.all_input_nodes}


def of_region(spots: Mapping[Spot, int], name: str) -> dict[str, int]:
    """The arguments of one region that stand in order."""
    return {place: width for (region, place), width in spots.items() if region == name}
