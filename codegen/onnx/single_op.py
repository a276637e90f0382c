"""Any other aten op, as torch's own exporter writes it: a model of that one op, put in the op's place."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import onnx_ir as ir
import torch
from torch import Tensor, fx, nn

from llmopt.compiler.errors import InputError
from llmopt.compiler.graph import target_name, where

if TYPE_CHECKING:
    from llmopt.codegen.onnx.emitter import Emitter


class _Call(nn.Module):
    """The op with all but its tensors filled in."""

    def __init__(self, node: fx.Node, tensors: list[fx.Node]) -> None:
        super().__init__()
        self.node, self.tensors = node, tensors

    def forward(self, *given: Tensor) -> Any:
        values = dict(zip(self.tensors, given, strict=True))
        args, kwargs = fx.node.map_arg((self.node.args, self.node.kwargs), lambda n: values[n])
        return self.node.target(*args, **kwargs)  # type: ignore[operator]


def single_op(e: Emitter, node: fx.Node) -> Any:
    """The values of a call of an op that this exporter has no lowering of its own for.

    Raises InputError: torch's exporter has none either, or the op takes sizes that are not fixed.
    """
    tensors = node.all_input_nodes
    if not all(isinstance(n.meta["val"], Tensor) for n in tensors):
        raise InputError(_told(node, "it takes a size that is not fixed"))
    if not tensors:  # the same in every call
        made = node.target(*node.args, **node.kwargs)  # type: ignore[operator]
        return e.builder.initializer(ir.tensor(made, name=node.name), qualify=False)
    named: dict[str, tuple[int, Any]] = {}  # by a size that is not fixed: one for the example, and torch's name of it
    examples, dynamic = [], []
    for n in tensors:
        value = n.meta["val"]
        free = {at: str(size) for at, size in enumerate(value.shape) if not isinstance(size, int)}
        for text in free.values():
            named.setdefault(text, (3 + len(named), torch.export.Dim(f"d{len(named)}")))
        examples.append(
            torch.ones([named[free[at]][0] if at in free else s for at, s in enumerate(value.shape)], dtype=value.dtype)
        )
        dynamic.append({at: named[text][1] for at, text in free.items()})
    try:
        with _quiet():
            made = torch.onnx.export(
                _Call(node, tensors).eval(), tuple(examples), dynamo=True, verbose=False,
                opset_version=e.options.opset, dynamic_shapes=(tuple(dynamic),),
            )  # fmt: skip
    except Exception as error:
        cause = error.__cause__ or error
        raise InputError(_told(node, f"{type(cause).__name__}: {str(cause).strip().splitlines()[0]}")) from error
    assert made is not None
    found = _inlined(e, made.model, [e(n) for n in tensors], node)
    return found if isinstance(node.meta["val"], (tuple, list)) else found[0]


def _inlined(e: Emitter, model: ir.Model, given: list[ir.Value], node: fx.Node) -> list[ir.Value]:
    """What the graph of another model computes of `given`, its operators added to this one."""
    values: dict[ir.Value | None, ir.Value | None] = {None: None, **dict(zip(model.graph.inputs, given, strict=True))}
    for name, value in model.graph.initializers.items():
        assert value.const_value is not None
        values[value] = e.builder.initializer(value.const_value, name=f"{node.name}.{name}", qualify=False)
    for theirs in model.graph:
        if any(attr.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for attr in theirs.attributes.values()):
            raise InputError(_told(node, f"torch's exporter makes an operator {theirs.op_type} with a graph of it"))
        made = ir.Node(
            theirs.domain, theirs.op_type, [values[value] for value in theirs.inputs],
            attributes=theirs.attributes.values(), num_outputs=len(theirs.outputs), name=f"{node.name}/{theirs.name}",
        )  # fmt: skip
        for value, old in zip(made.outputs, theirs.outputs, strict=True):
            value.name = f"{node.name}.{old.name}"
        e.builder.add_node(made)
        values.update(zip(theirs.outputs, made.outputs, strict=True))
    e.builder.functions.update(model.functions)
    return [values[value] for value in model.graph.outputs]  # type: ignore[misc]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's own account of the small model."""
    logger = logging.getLogger("torch.onnx")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)


def _told(node: fx.Node, why: str) -> str:
    return (
        f"op {target_name(node)} at {where(node)} has no form in ONNX ({why}); wanted ops that torch.onnx knows; "
        "rewrite that line of the model, or export a compressed-tensors checkpoint, which needs no graph"
    )
