"""What a region hands over in another order, and what it must not."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from lowbit_steps import CASES, HANDED_CASES, Case, lowered

from llmopt.codegen.fused import region_code
from llmopt.codegen.handed import handed_over
from llmopt.codegen.kernel import RegionCode
from llmopt.compiler.graph import Graph
from llmopt.compiler.target import Target

pytestmark = pytest.mark.interp

SPOTS = {("attention", "out0"), ("gemm_1", "in0"), ("gemm_2", "out0"), ("gemm_3", "in0")}


def found(case: Case, tokens: int = 16, change: Callable[[Graph], None] = lambda step: None, isa: str = "sm_90") -> set:
    program, *_ = lowered(case)
    target = Target.parse(f"cuda:{isa}")

    @functools.cache
    def code(name: str) -> RegionCode:
        return region_code(program.graph(name), str(tokens), target)

    step = program.graph("step").copy()
    change(step)
    return set(handed_over(step, program.graph, code, tokens, target))


def result_of(step: Graph, region: str, call: int) -> torch.fx.Node:
    return [n for n in step.fx.nodes if n.op == "call_module" and n.target == region][call].next


def test_attention_and_gates_hand_over_in_every_layer() -> None:
    assert found(HANDED_CASES[0]) == SPOTS


def test_one_region_may_be_o_and_down() -> None:
    alike = replace(HANDED_CASES[0], changes=(*HANDED_CASES[0].changes, ("intermediate_size", 128)))
    assert found(alike) == {("attention", "out0"), ("gemm_2", "out0"), ("gemm_1", "in0")}


def test_few_tokens_and_other_gpus_take_columns_as_they_are() -> None:
    assert not found(HANDED_CASES[0], tokens=8)
    assert not found(HANDED_CASES[0], isa="sm_80")


def test_blocks_of_columns_must_be_whole() -> None:
    assert found(CASES[0]) == {("attention", "out0"), ("gemm_1", "in0")}  # down has 96 columns, wanted 64


def test_what_is_read_elsewhere_too_stays_as_it_is_in_all_layers() -> None:
    def by_an_op(step: Graph) -> None:
        attended = result_of(step, "attention", 1)
        with step.fx.inserting_after(attended):
            step.fx.call_function(torch.ops.aten.neg.default, (attended,))

    def as_a_residual(step: Graph) -> None:
        (first, second) = (n for n in step.fx.nodes if n.op == "call_module" and n.target == "gemm_1")
        second.args = (*second.args[:-1], first.args[0])

    def by_the_caller(step: Graph) -> None:
        (end,) = (n for n in step.fx.nodes if n.op == "output")
        end.args = ((*end.args[0], result_of(step, "attention", 0)),)

    for change in (by_an_op, as_a_residual, by_the_caller):
        assert found(HANDED_CASES[0], change=change) == SPOTS - {("attention", "out0"), ("gemm_1", "in0")}, change
