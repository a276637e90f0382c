"""Weights in the forms that kernels read them in: made once of the program's own, and kept as long as these live.

All classes of steps, and all sessions over the same weights, share them. They lie beside the weights they were made
of, which other classes of steps read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils.weak import WeakTensorKeyDictionary

from llmopt.codegen.kernel import Prepared
from llmopt.codegen.lowbit_layout import lay
from llmopt.runtime.executor import no_room
from llmopt.runtime.gpu_code import DECODE_SHAPES, GpuCode

# what makes a form: called with tensors, then constants by name; its results are attributes
FORMS: Mapping[str, Callable[..., Any]] = {"lowbit": lay}

# by the first tensor that a form is made of: the others are parts of the same weight
_MADE: MutableMapping[Tensor, dict[tuple[Any, ...], list[Tensor | None]]] = WeakTensorKeyDictionary()


def prepared(item: Prepared, inputs: Sequence[Any]) -> list[Tensor | None]:
    """The results of `item` for a region's inputs, in order; made if this weight is seen for the first time."""
    sources = [None if arg is None else inputs[int(arg.removeprefix("in"))] for arg in item.args]
    of_weight = _MADE.setdefault(sources[0], {})
    key = item.form, item.constants, item.results
    if key not in of_weight:
        made = FORMS[item.form](*sources, **dict(item.constants))
        of_weight[key] = [getattr(made, name) for name in item.results]
    return of_weight[key]


@torch.inference_mode()
def prepare_weights(code: GpuCode, weights: Mapping[str, Tensor]) -> None:
    """Make what decoding steps will want of low-bit weights: before a graph is captured, and while memory is counted.

    Raises DeviceMemoryError.
    """
    called = [n for n in code.program.graph("step").fx.nodes if n.op == "call_module"] if code.decodes else []
    for node in called:
        if not any(code.program.graph(str(node.target)).calls("quantized_linear")):
            continue
        inputs = [weights.get(str(n.target)) if isinstance(n, fx.Node) else None for n in node.args]
        for item in code.code(str(node.target), DECODE_SHAPES[0]).prepared:
            try:
                prepared(item, inputs)
            except torch.OutOfMemoryError as error:
                raise no_room(f"the weights of {node.target} as kernels read them", error) from error
