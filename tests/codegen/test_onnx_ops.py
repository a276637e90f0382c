"""Every op that a forward may hold has a lowering to ONNX, and ONNX Runtime computes the op's own meaning by it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from onnx_runtime import session
from torch import Tensor
from torch.fx import Graph as FxGraph

import llmopt.codegen.onnx.attend
import llmopt.codegen.onnx.ops
import llmopt.codegen.onnx.products  # noqa: F401
from llmopt.codegen.onnx.emitter import onnx_model
from llmopt.codegen.onnx.options import OnnxOptions
from llmopt.compiler.errors import InputError
from llmopt.compiler.graph import Graph
from llmopt.compiler.op import OPS, Op
from llmopt.compiler.program import ModelFacts, Program, tensor_weight
from llmopt.compiler.propagate import propagate, symbolic_inputs

ONLY_IN_STEPS = {"attend", "attend_near", "kv_write", "near_write"}
OF_TORCH_COMPILE = {"rounded_linear"}
ABLE = sorted(set(OPS) - ONLY_IN_STEPS - OF_TORCH_COMPILE)


def test_which_ops_have_a_lowering() -> None:
    assert {name for name, op in OPS.items() if op.onnx_fn is not None} == set(ABLE)


def program_of(op: Op, args: tuple[Any, ...]) -> Program:
    """A forward that calls the op on weights, named by its arguments, and does nothing with its inputs."""
    fx, weights, given = FxGraph(), {}, []
    for name in ("input_ids", "position_ids"):
        fx.placeholder(name)
    for declared, arg in zip(op.overload._schema.arguments, args, strict=False):
        if isinstance(arg, Tensor):
            weights[f"w.{declared.name}"] = tensor_weight(arg)
            given.append(fx.create_node("get_attr", f"w.{declared.name}"))
        else:
            given.append(arg)
    fx.output((fx.call_function(op.overload, tuple(given)),))
    graph = Graph("forward", fx)
    propagate(graph, symbolic_inputs({"input_ids": ("B", "T"), "position_ids": ("B", "T")}), weights)
    return Program({"forward": graph}, weights, ModelFacts("op", 8, 8))


CASES = [(name, at) for name in ABLE for at, _ in enumerate(OPS[name].samples_fn())]  # type: ignore[misc]


@pytest.mark.parametrize(("name", "at"), CASES)
def test_onnx_runtime_computes_its_meaning(name: str, at: int, tmp_path: Path) -> None:
    """In float32; bfloat16, which ONNX Runtime's CPU provider has few kernels for, in ONNX's reference."""
    torch.manual_seed(1)
    args = list(OPS[name].samples_fn())[at]  # type: ignore[misc]
    program = program_of(OPS[name], args)
    tokens = args[0].shape[2] if name == "attention" else 1
    given = {key: np.zeros((1, tokens), np.int64) for key in ("input_ids", "position_ids")}
    refused = ""
    if name == "quantized_linear" and args[7] not in ("", "int8", "fp8_channel"):
        refused = "cannot leave as ONNX, whose operators make no such scales"
    if name == "attention" and args[3] is not None:
        refused = "has sinks, which ONNX's Attention does not"
    if refused:
        with pytest.raises(InputError, match=refused):
            onnx_model(program, program.graph("forward"), OnnxOptions(cache=False))
        return
    ir.save(onnx_model(program, program.graph("forward"), OnnxOptions(cache=False)), tmp_path / "model.onnx")
    onnx.checker.check_model(str(tmp_path / "model.onnx"), full_check=True)
    want = OPS[name].fn(*args)
    if want.dtype == torch.bfloat16:
        (made,) = ReferenceEvaluator(str(tmp_path / "model.onnx")).run(None, given)
        torch.testing.assert_close(torch.from_numpy(made.astype(np.float32)), want.float(), rtol=2**-7, atol=1e-2)
    else:
        opened = session(tmp_path)
        wanted = {value.name for value in opened.get_inputs()}
        (made,) = opened.run(None, {key: value for key, value in given.items() if key in wanted})
        torch.testing.assert_close(torch.from_numpy(made), want, rtol=1e-5, atol=1e-5)
