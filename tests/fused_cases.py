"""Regions of lowered steps on real tensors: inputs that fit together, and what the region's own graph makes of them."""

from __future__ import annotations

import functools
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from models.families import FAMILIES
from torch import Tensor, fx

from llmopt.codegen.fused import region_code
from llmopt.codegen.interpret import launcher
from llmopt.compiler.capture_hf import capture_model
from llmopt.compiler.graph import Graph, target_name
from llmopt.compiler.op import op_of
from llmopt.compiler.pipeline import Context, Pipeline, verify_hook
from llmopt.compiler.program import Program
from llmopt.compiler.recipe import RECIPES
from llmopt.compiler.target import Target
from llmopt.passes import PASSES
from llmopt.runtime.attend import StepLayout
from llmopt.runtime.bound_region import BoundRegion, Frame
from llmopt.runtime.torch_calls import TORCH_CALLS

TARGET = Target.parse("cuda:sm_90")
PAGE = 16


@functools.cache
def lowered(family: str, dtype: torch.dtype = torch.float32, target: Target = TARGET) -> Program:
    """A small random model of a family (tests/models/families.py), lowered for a GPU."""
    (found,) = (f for f in FAMILIES if f.name == family)
    recipe = RECIPES["default"]
    pipeline = Pipeline(recipe.build(PASSES), [verify_hook])
    return pipeline.run(capture_model(found.model().to(dtype)), Context(target, recipe, None))


def regions(program: Program) -> list[str]:
    """The regions that the step calls."""
    return list(dict.fromkeys(str(n.target) for n in program.graph("step").fx.nodes if n.op == "call_module"))


@dataclass(frozen=True)
class Step:
    """Tokens of a step: `positions[i]` of sequence `sequences[i]`, all of `rows` wanted."""

    shape: str
    sequences: tuple[int, ...]
    positions: tuple[int, ...]
    rows: tuple[int, ...]

    @classmethod
    def decoding(cls, shape: str, positions: tuple[int, ...]) -> Step:
        """One token each of as many sequences."""
        count = tuple(range(len(positions)))
        return cls(shape, count, positions, count)

    @property
    def width(self) -> int:
        """Pages of the longest sequence."""
        return max(self.positions) // PAGE + 1

    def sizes(self) -> dict[str, int]:
        """Values of the symbolic sizes."""
        sequences = max(self.sequences) + 1
        count = {"N": len(self.positions), "R": len(self.rows), "S": sequences, "M": self.width}
        return {**count, "P": sequences * self.width + 1, "T": 1, "SPLITS": 1}

    def numbers(self) -> dict[str, Tensor]:
        """The step's own inputs by name; pages are dealt out at random."""
        sizes = self.sizes()
        tables = torch.randperm(sizes["P"])[: sizes["S"] * self.width].view(sizes["S"], self.width)
        at, seq = torch.tensor(self.positions), torch.tensor(self.sequences)
        words = torch.randint(0, 96, at.shape)
        slots = tables[seq, at // PAGE] * PAGE + at % PAGE
        return {
            "input_ids": words[None], "position_ids": at[None], "slots": slots, "seq_ids": seq,
            "block_tables": tables, "rows": torch.tensor(self.rows),
        }  # fmt: skip


def inputs_of(graph: Graph, step: Step) -> list[Tensor]:
    """Random tensors for a region's placeholders."""
    known, sizes = step.numbers(), step.sizes()
    found = []
    for node in graph.inputs():
        value = node.meta["val"]
        shape = [s if isinstance(s, int) else sizes[graph.named_sizes(str(s))] for s in value.shape]
        found.append(known[node.name] if node.name in known else torch.randn(shape).to(value.dtype))
    return found


def reference(graph: Graph, inputs: list[Tensor], wide: bool) -> dict[str, Tensor]:
    """Outputs by `out{i}` and written pages by `in{i}`, as torch computes them node by node; in fp64 if `wide`."""

    def cast(arg: Any) -> Any:
        return torch.float64 if wide and isinstance(arg, torch.dtype) and arg.is_floating_point else arg

    values: dict[fx.Node, Any] = {}
    for node, value in zip(graph.inputs(), inputs, strict=True):
        values[node] = value.double() if wide and value.is_floating_point() else value.clone()
    places = {n: f"in{i}" for i, n in enumerate(graph.inputs())}
    found: dict[str, Tensor] = {}
    for node in graph.calls():
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: values[n])
        op = op_of(node.target)
        values[node] = (op.fn if op else node.target)(*map(cast, args), **kwargs)
        if target_name(node) == "kv_write":
            found[places[node.args[0]]] = values[node]
    return {**found, **{f"out{i}": values[n] for i, n in enumerate(graph.outputs())}}


def run(
    graph: Graph,
    inputs: list[Tensor],
    step: Step,
    parts: int = 1,
    target: Target = TARGET,
    spent: Collection[int] = (),
) -> dict[str, Tensor]:
    """The same from the region's code, its kernels interpreted; inputs that are `spent` may be written over."""
    code = region_code(graph, step.shape, target)
    inputs = [value.clone() for value in inputs]
    layout = StepLayout.of(torch.tensor(step.sequences), torch.tensor(step.positions)[None])
    frame = Frame({**step.sizes(), "SPLITS": parts}, layout)
    bound = BoundRegion(code, launcher, TORCH_CALLS, frame, torch.device("cpu"), spent)
    outputs = bound(inputs)
    return {**{f"in{i}": v for i, v in enumerate(inputs)}, **{f"out{i}": v for i, v in enumerate(outputs)}}


def check(
    graph: Graph, step: Step, parts: int = 1, target: Target = TARGET, spent: Collection[int] = ()
) -> dict[str, Tensor]:
    """What `run` gives, which is, in the norm, at most half as far again from fp64 as torch, node by node in the
    graph's own dtype.

    Errors below the dtype's eps are as good as that: there the ratio is chance, as for one token of 64 values (over ten
    draws from 0.6 to 2.3 for attention and LayerNorm, but 0.7 to 1.2 for all of them together).
    """
    torch.manual_seed(1)
    inputs = inputs_of(graph, step)
    exact, plain = reference(graph, inputs, wide=True), reference(graph, inputs, wide=False)
    got = run(graph, inputs, step, parts, target, spent)
    for place, wanted in exact.items():
        assert got[place].shape == wanted.shape, (graph.name, place)
        error, theirs = ((value[place].double() - wanted).norm() for value in (got, plain))
        allowed = 1.5 * max(theirs, torch.finfo(plain[place].dtype).eps * wanted.norm())
        assert error <= allowed, f"{graph.name} {place}: off by {error:.2g}, allowed {allowed:.2g}"
    return got
