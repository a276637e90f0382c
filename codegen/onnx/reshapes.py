"""Reshapes that undo one another: a product gives [B, T, H D], the graph splits heads off, attention takes [B, T, H D].

A runtime copies nothing for them, but each is a call, and a decoding step of a small model is made of calls.
"""

from __future__ import annotations

import onnx_ir as ir


def drop_reshapes(graph: ir.Graph) -> None:
    """Let readers of a value that has been reshaped and back have the value itself. Unread nodes stay behind."""
    for node in graph:
        if node.op_type != "Reshape" or node.domain:
            continue
        made, source = node.outputs[0], node.inputs[0]
        while source is not None and not _same(source.shape, made.shape):
            before = source.producer()
            source = before.inputs[0] if before is not None and before.op_type == "Reshape" else None
        if source is not None and not made.is_graph_output():
            made.replace_all_uses_with(source)


def _same(left: ir.Shape | None, right: ir.Shape | None) -> bool:
    """Are both known, by numbers or names, and equal? Two sizes without a name may differ."""
    if left is None or right is None or left != right:
        return False
    return all(isinstance(size, int) or size.value is not None for size in left)
