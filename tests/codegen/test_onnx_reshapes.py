"""Reshapes that undo one another leave the graph, and no others."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
import pytest

import llmopt
from llmopt.codegen.onnx.reshapes import drop_reshapes

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "models" / "pico-llama-4m"
NAMED, SPLIT = ["batch", "sequence", 6], ["batch", "sequence", 2, 3]


@pytest.mark.parametrize(
    ("first", "between", "last", "by", "gone"),
    [
        (NAMED, SPLIT, NAMED, "Reshape", True),
        (["batch", 4, 6], [None, 24], ["batch", 4, 6], "Reshape", True),
        (NAMED, SPLIT, NAMED, "Transpose", False),  # elements are elsewhere
        (NAMED, SPLIT, ["batch", "others", 6], "Reshape", False),
        ([None, None, 6], SPLIT, [None, None, 6], "Reshape", False),  # [4, 1, 6] may have become [2, 2, 6]
    ],
)
def test_back_and_forth(first: list, between: list, last: list, by: str, gone: bool) -> None:
    sizes = ir.Value(name="sizes")
    x, y, z = (ir.Value(shape=ir.Shape(shape)) for shape in (first, between, last))
    nodes = [
        ir.Node("", by, [x, sizes], outputs=[y]),
        ir.Node("", "Reshape", [y, sizes], outputs=[z]),
        ir.Node("", "Neg", [z], outputs=[out := ir.Value(name="out")]),
    ]
    graph = ir.Graph([x, sizes], [out], nodes=nodes)
    drop_reshapes(graph)
    assert nodes[2].inputs[0] is (x if gone else z)


def test_an_output_keeps_its_name() -> None:
    x, sizes, y, z = (ir.Value(shape=ir.Shape(shape)) for shape in ([2, 6], [1], [12], [2, 6]))
    nodes = [ir.Node("", "Reshape", [x, sizes], outputs=[y]), ir.Node("", "Reshape", [y, sizes], outputs=[z])]
    graph = ir.Graph([x, sizes], [z], nodes=nodes)
    drop_reshapes(graph)
    assert graph.outputs[0] is z
    assert z.producer() is nodes[1]


@pytest.mark.parametrize("attention", ["standard", "gqa"])
def test_a_llama_has_none(attention: str, tmp_path: Path) -> None:
    out = llmopt.compile(str(EXAMPLE), dtype="float32", target="cpu:generic").export(
        tmp_path / "out", "onnx", attention=attention
    )
    assert "Reshape" not in {node.op_type for node in ir.load(out / "model.onnx").graph}
