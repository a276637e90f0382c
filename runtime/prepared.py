"""Weights in the forms that kernels read them in, made once and kept as long as what they were made of lives.

All classes of steps, and all sessions over the same weights, share them. Of such a weight nothing else is read on the
device, so its own tensors stay on the host, where an artifact's are mapped from its file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils.weak import WeakTensorKeyDictionary

from llmopt.codegen.kernel import Prepared
from llmopt.codegen.lowbit_layout import lay
from llmopt.codegen.rotation_layout import lay_signs
from llmopt.codegen.scaled_layout import lay_scaled
from llmopt.compiler.emittable import is_product, weight_of
from llmopt.compiler.graph import target_name
from llmopt.compiler.program import Program
from llmopt.runtime.executor import no_room
from llmopt.runtime.gpu_code import MANY, GpuCode

# what makes a form: called with tensors, then constants by name; its results are attributes
FORMS: Mapping[str, Callable[..., Any]] = {"lowbit": lay, "rotation": lay_signs, "scaled": lay_scaled}

# by the first tensor that a form is made of; the others, which the key names by identity, live as long
_Made = dict[tuple[Any, ...], tuple[list[Any], list[Tensor | None]]]
_MADE: MutableMapping[Tensor, _Made] = WeakTensorKeyDictionary()


def prepared(item: Prepared, inputs: Sequence[Any], device: torch.device) -> list[Tensor | None]:
    """The results of `item` for a region's inputs, in order; made if this weight is seen for the first time."""
    sources = [None if arg is None else inputs[int(arg.removeprefix("in"))] for arg in item.args]
    assert sources[0] is not None
    of_weight, others = _MADE.setdefault(sources[0], {}), sources[1:]
    key = item.form, item.constants, item.results, device, *map(id, others)
    if key not in of_weight:
        there = (None if source is None else source.to(device) for source in sources)
        made = FORMS[item.form](*there, **dict(item.constants))
        of_weight[key] = others, [getattr(made, name) for name in item.results]
    return of_weight[key][1]


def only_prepared(program: Program) -> set[str]:
    """The weights that nothing but regions reads, and these in another form alone."""
    readers: dict[str, list[bool]] = {}
    for node in program.graph("step").fx.nodes:
        if node.op == "get_attr":
            readers.setdefault(str(node.target), []).extend(_only_prepared(node, user, program) for user in node.users)
    return {name for name, found in readers.items() if found and all(found)}


def _only_prepared(weight: fx.Node, user: fx.Node, program: Program) -> bool:
    if user.op != "call_module":
        return False
    inputs = program.graph(str(user.target)).inputs()
    places = [inner for arg, inner in zip(user.args, inputs, strict=True) if arg is weight]
    return all(_is_low_bit(reader, inner) for inner in places for reader in inner.users)


def _is_low_bit(product: fx.Node, part: fx.Node) -> bool:
    """Is `part` the weight's in this product, and nothing else of it?"""
    found = is_product(product) and target_name(product) == "quantized_linear"
    return found and part in weight_of(product) and part not in (product.args[0], *product.args[5:])


def _is_prepared_for(node: fx.Node) -> bool:
    return target_name(node) in ("quantized_linear", "rotate")


@torch.inference_mode()
def prepare_weights(code: GpuCode, weights: Mapping[str, Tensor], device: torch.device) -> None:
    """Make all forms there are: before a graph is captured, and before the cache is given what memory is left.

    Raises DeviceMemoryError.
    """
    for node in code.program.graph("step").fx.nodes:
        if node.op != "call_module" or not any(map(_is_prepared_for, code.program.graph(str(node.target)).calls())):
            continue
        inputs = [weights.get(str(n.target)) if isinstance(n, fx.Node) else None for n in node.args]
        for item in code.code(str(node.target), MANY).prepared:
            try:
                prepared(item, inputs, device)
            except torch.OutOfMemoryError as error:
                raise no_room(f"the weights of {node.target} as kernels read them", error) from error
