"""What a legal graph is: after `raise_aten` only IR ops and the listed aten subset stand in it."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from llmopt.compiler._torch import OpOverload
from llmopt.compiler.errors import VerifyError
from llmopt.compiler.graph import Graph, target_name, type_of, where
from llmopt.compiler.op import op_of
from llmopt.compiler.simplify import is_impure

VIEWS = {
    "view", "reshape", "_unsafe_view", "expand", "unsqueeze", "squeeze", "transpose", "permute", "t", "slice",
    "select", "cat", "stack", "split", "split_with_sizes", "chunk", "unbind", "flatten", "unflatten", "repeat",
    "repeat_interleave", "narrow", "expand_as", "view_as", "to", "clone", "contiguous", "slice_scatter",
    "select_scatter",
}  # fmt: skip
REDUCTIONS = {
    "mean", "sum", "amax", "amin", "max", "min", "var", "var_mean", "std", "softmax", "_softmax", "log_softmax", "norm",
    "linalg_vector_norm", "argmax", "cumsum", "prod", "logsumexp", "topk", "sort",
}  # fmt: skip
CONTRACTIONS = {"matmul", "mm", "bmm", "addmm", "baddbmm", "linear", "scaled_dot_product_attention", "einsum"}
NORMS = {"layer_norm", "native_layer_norm", "rms_norm", "group_norm"}
CREATION = {
    "arange", "full", "zeros", "ones", "full_like", "zeros_like", "ones_like", "scalar_tensor", "new_ones", "new_zeros",
    "new_full", "empty", "tril", "triu", "eye",
}  # fmt: skip
INDEXING = {"embedding", "index_select", "index", "gather", "one_hot"}
SIZES = {"sym_size", "sym_numel"}
ACTIVATIONS = {"silu", "gelu", "relu", "tanh", "sigmoid", "softplus", "mish", "hardtanh", "type_as", "copy"}

ATEN_SUBSET = VIEWS | REDUCTIONS | CONTRACTIONS | NORMS | CREATION | INDEXING | SIZES | ACTIVATIONS


def is_pointwise(target: Any) -> bool:
    """Does torch itself call this overload elementwise?"""
    return isinstance(target, OpOverload) and torch.Tag.pointwise in target.tags


def in_dialect(target: Any) -> bool:
    """Is this overload an IR op, pointwise, or in ATEN_SUBSET?"""
    if not isinstance(target, OpOverload):
        return False
    name = target._schema.name.split("::")[1]
    return op_of(target) is not None or is_pointwise(target) or name in ATEN_SUBSET


def check_dialect(graph: Graph) -> None:
    """Raise VerifyError for the first node that is not pure, or neither an IR op, nor pointwise, nor in ATEN_SUBSET."""
    for node in graph.calls():
        if is_impure(node):
            raise VerifyError(
                f"{where(node)}: {target_name(node)} draws random numbers or writes in place; wanted a function of its "
                f"arguments; export the model in eval mode and without this line\n{context(graph, node)}"
            )
        # what is no overload is getitem, or arithmetic on sizes
        if isinstance(node.target, OpOverload) and not in_dialect(node.target):
            raise VerifyError(
                f"{where(node)}: {target_name(node)} -> {result_type(graph, node)} is outside the dialect; wanted "
                "an llmopt op, a pointwise aten op or one of the listed aten views, reductions and products; "
                f"add a rule to raise_aten or write the line with other ops\n{context(graph, node)}"
            )


def result_type(graph: Graph, node: fx.Node) -> str:
    """`f32[B, T, 512]`: the type of a node's result, its sizes by name."""
    return graph.named_sizes(type_of(node.meta.get("val")))


def context(graph: Graph, node: fx.Node, radius: int = 5) -> str:
    """The lines of the printed graph around `node`, it marked with `>`."""
    nodes = list(graph.fx.nodes)
    at = nodes.index(node)
    lines = []
    for other in nodes[max(0, at - radius) : at + radius + 1]:
        if other.op == "call_function":
            lines.append(("  > " if other is node else "    ") + graph.line(other))
    return graph.named_sizes("\n".join(lines))
