"""From a program's `forward` to an ONNX graph, node by node.

`Emitter` walks the graph and asks for each node its lowering: an IR op's own (`Op.onnx`, registered in `ops`,
`products` and `attend`), one of `aten`'s table, or, for any other aten op, what torch's own exporter makes of that one
op (`single_op`). Weights become initializers that are read when the file is written, so no data is held here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.passes.common import RemoveUnusedNodesPass
from onnx_ir.tensor_adapters import TorchTensor, from_torch_dtype
from onnxscript import GraphBuilder
from torch import Tensor, fx

from llmopt.codegen.onnx import aten
from llmopt.codegen.onnx.options import CONTRIB, OnnxOptions
from llmopt.codegen.onnx.reshapes import drop_reshapes
from llmopt.codegen.onnx.single_op import single_op
from llmopt.compiler.emittable import op_name
from llmopt.compiler.errors import InputError
from llmopt.compiler.graph import Graph, origin, where
from llmopt.compiler.op import op_of
from llmopt.compiler.program import Program

IR_VERSION = {23: 11, 24: 12}  # of the opsets in `OnnxOptions`
NAMES = {"B": "batch", "T": "sequence"}


@dataclass
class Heads:
    """A value that the graph has as [B, H, T, D], held as [B, T, H, D], as products leave it and attention takes it."""

    value: ir.Value
    turned: ir.Value | None = None


@dataclass
class Emitter:
    """An ONNX graph in the making: lowerings call `emitter(node)` for values and `emitter.op` for operators."""

    program: Program
    graph: Graph
    options: OnnxOptions
    kv_steps: Sequence[tuple[Tensor, Tensor]] = ()  # of each attention, where the cache is in few bits
    values: dict[fx.Node, Any] = field(default_factory=dict)
    once: dict[Any, Any] = field(default_factory=dict)  # what several lowerings share, by a key of theirs

    def __post_init__(self) -> None:
        imports = {"": self.options.opset, CONTRIB: 1}
        made = ir.Graph((), (), nodes=(), opset_imports=imports, name=self.program.facts.name)
        self.builder = GraphBuilder(made)
        self.op = self.builder.op
        self.contrib = self.builder.opset(CONTRIB, 1)

    def __call__(self, arg: Any) -> Any:
        """The ONNX value of a node; other arguments as they are."""
        if isinstance(arg, (list, tuple)):
            return [self(item) for item in arg]
        if not isinstance(arg, fx.Node):
            return arg
        if arg.op == "get_attr" and arg not in self.values:
            self.values[arg] = self.stored(str(arg.target))
        found = self.values[arg]
        if not isinstance(found, Heads):
            return found
        if found.turned is None:
            found.turned = self.typed(self.op.Transpose(found.value, perm=[0, 2, 1, 3]), arg.meta["val"])
        return found.turned

    def apart(self, node: fx.Node) -> ir.Value:
        """The value [B, T, H, D] of a node [B, H, T, D]."""
        found = self.values.get(node)
        return found.value if isinstance(found, Heads) else self.op.Transpose(self(node), perm=[0, 2, 1, 3])

    def stored(
        self,
        name: str,
        edit: Callable[[Tensor], Tensor] = lambda tensor: tensor,
        label: str = "",
        dtype: torch.dtype | None = None,
    ) -> ir.Value:
        """The initializer of a weight, after `edit` (named by `label`), in `dtype` if it is given."""
        weight = self.program.weights[name]
        shown = edit(torch.empty(weight.shape, dtype=weight.dtype, device="meta"))
        wanted = dtype or shown.dtype

        def load() -> ir.TensorProtocol:
            return TorchTensor(edit(weight.load()).to(wanted).contiguous(), name=key)

        key = f"{name}.{label}" if label else name
        return self.initializer(key, tuple(shown.shape), from_torch_dtype(wanted), load)

    def initializer(
        self, name: str, shape: Sequence[int], dtype: ir.DataType, load: Callable[[], ir.TensorProtocol]
    ) -> ir.Value:
        """A tensor of the file, made by `load` when it is written; the same one for the same name."""
        key = "initializer", name
        if key not in self.once:
            lazy = ir.LazyTensor(load, dtype=dtype, shape=ir.Shape(shape), name=name)
            self.once[key] = self.builder.initializer(lazy, name=name, qualify=False)
        return self.once[key]  # type: ignore[no-any-return]

    def constant(self, value: Any, dtype: torch.dtype) -> ir.Value:
        """A number, or a list of them, as a tensor of the file."""
        key = "constant", str(value), dtype
        if key not in self.once:
            tensor = ir.tensor(torch.tensor(value, dtype=dtype), name=f"constant_{len(self.once)}")
            self.once[key] = self.builder.initializer(tensor, qualify=False)
        return self.once[key]  # type: ignore[no-any-return]

    def sizes(self, sizes: Sequence[Any]) -> ir.Value:
        """Sizes, numbers or nodes, as one int64 vector."""
        if all(isinstance(size, int) for size in sizes):
            return self.constant(list(sizes), torch.int64)
        parts = [self.constant([size], torch.int64) if isinstance(size, int) else self(size) for size in sizes]
        return parts[0] if len(parts) == 1 else self.op.Concat(*parts, axis=0)  # type: ignore[no-any-return]

    def heads(self, node: fx.Node) -> Any:
        """`node` [B, T, H, D] as [B, H, T, D], or the other way round; turned when something else than attention reads
        it."""
        found = self.values[node] if node in self.values else self(node)
        return found.value if isinstance(found, Heads) else Heads(found)

    def typed(self, value: ir.Value, fake: Any) -> ir.Value:
        """The value with the dtype and the shape of a fake tensor."""
        value.dtype = from_torch_dtype(fake.dtype)
        value.shape = ir.Shape([self.size(size) for size in fake.shape])
        return value

    def size(self, size: Any) -> int | str:
        """A size by its number or its name in the file."""
        text = self.graph.named_sizes(str(size))
        return int(size) if isinstance(size, int) else NAMES.get(text, text)

    def emit(self, node: fx.Node) -> None:
        """Add the operators of one call."""
        scopes = [name for name in origin(node).module.split(".") if name]
        self.builder.push_module(".".join(scopes))
        declared = op_of(node.target)
        if declared is not None:
            made = _lowering(declared.onnx_fn, node)(self, node)
        else:
            lower = aten.TABLE.get(op_name(node))
            made = lower(self, node) if lower is not None else single_op(self, node)
        self.builder.pop_module()
        self.values[node] = made
        if isinstance(made, ir.Value) and isinstance(node.meta["val"], Tensor):
            self.typed(made, node.meta["val"])


def _lowering(found: Callable[..., Any] | None, node: fx.Node) -> Callable[..., Any]:
    if found is None:
        raise InputError(
            f"op {op_name(node)} at {where(node)} has no form in ONNX; export the model without the pass that makes "
            "it, or as a compressed-tensors checkpoint"
        )
    return found


def onnx_model(
    program: Program, graph: Graph, options: OnnxOptions, kv_steps: Sequence[tuple[Tensor, Tensor]] = ()
) -> ir.Model:
    """The graph (a plain causal forward) as an ONNX model whose tensors are read when it is written.

    `kv_steps`: of each attention what one unit of keys and of values is worth, float32 [D], with `options.kv_cache`.
    Inputs and outputs are as `docs/export.md` says. Raises InputError: what ONNX, or this form of it, cannot say.
    """
    from llmopt.codegen.onnx import attend, ops, products  # noqa: F401  # which register lowerings

    emitter = Emitter(program, graph, options, kv_steps)
    with torch.no_grad():
        attend.inputs(emitter)
        for node in graph.calls():
            emitter.emit(node)
        (logits,) = graph.outputs()
        emitter.builder.add_output(emitter(logits), "logits")
        attend.outputs(emitter)
    made = emitter.builder.graph
    model = ir.Model(
        made,
        ir_version=IR_VERSION[options.opset],
        producer_name="llmopt",
        functions=list(emitter.builder.functions.values()),
    )
    drop_reshapes(made)
    RemoveUnusedNodesPass()(model)
    if CONTRIB not in {node.domain for node in ir.traversal.RecursiveGraphIterator(made)}:
        made.opset_imports.pop(CONTRIB, None)
    return model
