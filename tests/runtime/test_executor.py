"""The flat plan: same results as plain interpretation, few slots, readable source, pages written where they are."""

from __future__ import annotations

import ast
import itertools
import operator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_gpt import CONTEXT, tiny_gpt
from torch import Tensor, fx

import llmopt
from llmopt.compiler.evaluate import evaluate
from llmopt.compiler.graph import Graph
from llmopt.model import CompiledModel
from llmopt.runtime.executor import Executor

aten = torch.ops.aten
LONG = (False, False)
UNARY = (aten.neg.default, aten.relu.default, aten.abs.default)
BINARY = (aten.add.Tensor, aten.mul.Tensor, aten.sub.Tensor, aten.maximum.default)


def interpreted(graph: Graph, inputs: list[Tensor], weights: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """The graph's results by torch's own interpreter."""
    root = torch.nn.Module()
    for name, tensor in weights.items():
        root.register_buffer(name, tensor)
    result = fx.Interpreter(fx.GraphModule(root, graph.fx)).run(*inputs)
    return tuple(result) if isinstance(result, (list, tuple)) else (result,)


def most_alive(graph: Graph) -> int:
    """How many computed values there are at once, a result being there beside its operands only if they live on."""
    nodes = list(graph.fx.nodes)
    place = {n: i for i, n in enumerate(nodes)}
    calls = [n for n in nodes if n.op == "call_function"]
    last = {n: max((place[u] for u in n.users), default=None) for n in calls}
    return max(sum(place[m] <= place[n] and (last[m] is None or last[m] > place[n]) for m in calls) for n in calls)


@st.composite
def graphs(draw: st.DrawFn) -> Graph:
    """Random DAGs over 4x4 tensors with splits, several results, inputs or weights as results, and unused nodes."""
    graph = fx.Graph()
    pool = [graph.placeholder("a"), graph.placeholder("b"), graph.get_attr("w")]
    for _ in range(draw(st.integers(1, 25))):
        kind = draw(st.integers(0, 3))
        x, y = (pool[draw(st.integers(max(0, len(pool) - 6), len(pool) - 1))] for _ in "xy")
        if kind == 0:
            pool.append(graph.call_function(draw(st.sampled_from(UNARY)), (x,)))
        elif kind == 1:
            halves = graph.call_function(aten.split.Tensor, (x, 2))
            parts = [graph.call_function(operator.getitem, (halves, i)) for i in draw(st.permutations([0, 1]))]
            pool.append(graph.call_function(aten.cat.default, (parts,), {"dim": 0}))
        else:
            pool.append(graph.call_function(draw(st.sampled_from(BINARY)), (x, y)))
    results = draw(st.lists(st.sampled_from(pool), min_size=1, max_size=3))
    graph.output(tuple(results))
    return Graph("g", graph)


@settings(max_examples=150, deadline=None)
@given(graphs(), st.integers(0, 1000))
def test_random_graphs_as_torch_interprets_them(graph: Graph, seed: int):
    generator = torch.Generator().manual_seed(seed)
    a, b, w = (torch.randn(4, 4, generator=generator) for _ in range(3))
    executor = Executor(graph, {"w": w})
    got = executor(a, b)
    got = got if isinstance(got, tuple) else (got,)
    want = interpreted(graph, [a, b], {"w": w})
    assert len(got) == len(want)
    for mine, theirs in zip(got, want, strict=True):
        assert torch.equal(mine, theirs)


def straight(length: int) -> Graph:
    graph = fx.Graph()
    x = graph.placeholder("x")
    for _ in range(length):
        x = graph.call_function(aten.neg.default, (x,))
    graph.output((x,))
    return Graph("g", graph)


def test_a_chain_takes_one_slot():
    plan = Executor(straight(40), {}).plan(LONG)
    assert (plan.launches, plan.slots) == (40, 1)


@settings(max_examples=80, deadline=None)
@given(graphs())
def test_slots_are_as_few_as_can_be(graph: Graph):
    calls = [n for n in graph.fx.nodes if n.op == "call_function"]
    plan = Executor(graph, {"w": torch.ones(4, 4)}).plan(LONG)
    assert plan.launches == len(calls)
    if calls and all(n.users for n in calls):
        assert plan.slots == most_alive(graph)


def test_values_are_dropped_after_their_last_reader():
    """A slot that is not taken over at once must not keep its tensor alive."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    wide = [graph.call_function(aten.add.Scalar, (x, i)) for i in range(4)]
    total = graph.call_function(aten.cat.default, (wide,))
    for _ in range(2):
        total = graph.call_function(aten.neg.default, (total,))
    graph.output((total,))
    plan = Executor(Graph("g", graph), {}).plan(LONG)
    line = next(line for line in plan.source.splitlines() if "cat" in line)
    result = line.split()[0]
    assert {part.split(" = ")[0].strip() for part in line.split(";")[1:]} == {"t0", "t1", "t2", "t3"} - {result}


@pytest.mark.parametrize(
    ("call", "args", "kwargs"),
    [
        (aten.full_like.default, (float("inf"),), {}),
        (aten.full_like.default, (float("-inf"),), {}),
        (aten.add.Scalar, (float("nan"),), {}),
        (aten.to.dtype, (torch.float64,), {}),
        (aten.sum.dim_IntList, ([0, 1],), {"keepdim": True, "dtype": torch.float64}),
        (aten.div.Tensor_mode, (3.0,), {"rounding_mode": "floor"}),
        (aten.gelu.default, (), {"approximate": "tanh"}),
    ],
)
def test_constants(call, args: tuple, kwargs: dict):
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output((graph.call_function(call, (x, *args), kwargs),))
    value = torch.randn(3, 4)
    torch.testing.assert_close(
        Executor(Graph("g", graph), {})(value), call(value, *args, **kwargs), rtol=0, atol=0, equal_nan=True
    )


# a whole model


@pytest.fixture(scope="module")
def model() -> CompiledModel:
    return llmopt.compile(tiny_gpt(), recipe="reference")


class Batch:
    """Two sequences on pages of their own, laid out as the engine does."""

    def __init__(self, model: CompiledModel) -> None:
        self.size, self.model = model.recipe.page_size, model
        self.pages = {0: [5, 2], 1: [1, 4]}
        generator = torch.Generator().manual_seed(1)
        self.state = {
            spec.name: torch.randn(7, *spec.shape, generator=generator).to(spec.dtype) for spec in model.program.state
        }

    def inputs(self, tokens: list[tuple[int, int, int]], rows: list[int]) -> list[Tensor]:
        """`tokens` are (id, sequence, position)."""
        slots = [self.pages[s][p // self.size] * self.size + p % self.size for _, s, p in tokens]
        return [
            torch.tensor([[i for i, _, _ in tokens]]),
            torch.tensor([[p for _, _, p in tokens]]),
            torch.tensor(slots),
            torch.tensor([s for _, s, _ in tokens]),
            torch.tensor([self.pages[0], self.pages[1]]),
            torch.tensor(rows),
        ]


TOKENS = [(3, 0, 0), (14, 0, 1), (15, 0, 2), (9, 1, 0), (2, 1, 1)]


def test_step_is_what_its_graph_says_and_writes_in_place(model: CompiledModel):
    """Against `evaluate`, which runs the functional ops; all pages but the written ones keep their bits and place."""
    batch = Batch(model)
    step = model.program.graph("step")
    inputs = batch.inputs(TOKENS, [2, 4])
    names = [n.name for n in step.inputs()]
    before = {name: tensor.clone() for name, tensor in batch.state.items()}
    places = {name: tensor.data_ptr() for name, tensor in batch.state.items()}
    named = dict(zip(names, [*inputs, *(before[n] for n in names if n in before)], strict=True))
    (want,) = evaluate(step, named, model.program.weights)
    got = Executor(step, model.weights, batch.state)(*inputs)
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    written = inputs[2]
    for name, tensor in batch.state.items():
        assert tensor.data_ptr() == places[name]
        kept = torch.ones(7, batch.size, dtype=torch.bool)
        kept[written // batch.size, written % batch.size] = False
        now, then = tensor.transpose(1, 2), before[name].transpose(1, 2)
        assert torch.equal(now[kept], then[kept])
        assert not torch.equal(now[~kept], then[~kept])


def test_steps_continue_a_forward(model: CompiledModel):
    """Prompt in two pieces, then one token at a time: logits of the module itself."""
    batch = Batch(model)
    run = Executor(model.program.graph("step"), model.weights, batch.state)
    ids = [(7 * i + 3) % 61 for i in range(batch.size + 9)]
    assert len(ids) <= CONTEXT
    want = tiny_gpt()(torch.tensor([ids]), torch.arange(len(ids))[None])[0]
    cuts = [0, 5, batch.size + 5, *range(batch.size + 6, len(ids) + 1)]
    for start, stop in itertools.pairwise(cuts):
        inputs = batch.inputs([(ids[p], 1, p) for p in range(start, stop)], list(range(stop - start)))
        torch.testing.assert_close(run(*inputs), want[start:stop], rtol=1e-4, atol=1e-4)


def test_plans_of_a_model(model: CompiledModel):
    """One launch for each node, slots that do not grow with depth, a plan for each shape class made when needed."""
    step = model.program.graph("step")
    batch = Batch(model)
    executor = Executor(step, model.weights, batch.state)
    executor(*batch.inputs(TOKENS, [2, 4]))
    executor(*batch.inputs(TOKENS[:1], [0]))
    assert set(executor.plans) == {(False, False), (True, True)}
    plan = executor.plans[False, False]
    assert plan.launches == len(step) == sum(n.op == "call_function" for n in step.fx.nodes)
    assert plan.slots <= 12
    (function,) = ast.parse(plan.source).body
    assert isinstance(function, ast.FunctionDef)
    assert [a.arg for a in function.args.args] == [n.name for n in step.inputs()]
    # one line a launch, calling what it is named after
    called = [line.split(" = ")[1].split("(")[0] for line in plan.source.splitlines()[1:-1]]
    assert sum(name.startswith("attend_") for name in called) == 3
    assert sum(name.startswith("linear_") for name in called) == 4 * 3 + 1
    assert {name for name in called if name.startswith("kv_write_")} == {"kv_write_0"}
    assert plan.names["kv_write_0"] is not llmopt.compiler.ops.kv_write.fn
