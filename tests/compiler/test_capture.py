"""Capture: where nodes come from, how a graph prints, which weights it reads, and that a model stays as it was."""

from __future__ import annotations

import inspect
import re

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from llmopt.compiler.capture import capture
from llmopt.compiler.capture_hf import capture_config, capture_model
from llmopt.compiler.errors import CaptureError
from llmopt.compiler.evaluate import evaluate
from llmopt.compiler.graph import Graph, origin, target_name
from llmopt.compiler.program import ModelFacts, Program

FACTS = ModelFacts("Tiny", 11, 32)
CONFIG = LlamaConfig(
    vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True,
)  # fmt: skip


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.up(x))  # the line a node should name


class Tiny(nn.Module):
    """Tied by sharing one parameter; attention over 2 heads."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 8)
        self.inner = Inner()
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.table.weight
        self.unused = nn.Linear(3, 3)

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        x = self.table(input_ids) + position_ids[..., None]
        q = x.view(*x.shape[:2], 2, 4).transpose(1, 2)
        x = F.scaled_dot_product_attention(q, q, q, is_causal=True).transpose(1, 2).reshape(x.shape)
        return self.head(self.inner(x))


def node_of(graph: Graph, name: str) -> torch.fx.Node:
    (found,) = (n for n in graph.calls() if target_name(n) == name)
    return found


def test_a_node_knows_its_line_and_module():
    graph = capture(Tiny(), FACTS).graph("forward")
    lines, first = inspect.getsourcelines(Inner.forward)
    at = first + next(i for i, line in enumerate(lines) if "tanh" in line)
    assert origin(node_of(graph, "aten.tanh")).source == f"test_capture.py:{at}"
    assert origin(node_of(graph, "aten.tanh")).module == "inner"
    # a module of torch's own is named by the line that calls it
    inner, _ = (n for n in graph.calls() if target_name(n) == "aten.linear")
    assert str(origin(inner)) == f"inner.up test_capture.py:{at}"


def test_sizes_print_by_name():
    text = capture(Tiny(), FACTS).graph("forward").print()
    assert text.startswith("def forward(input_ids: i64[B, T], position_ids: i64[B, T]):\n")
    assert re.search(r"tanh: f32\[B, T, 8\] = aten\.tanh\(linear\)  # inner test_capture\.py:\d+", text)
    assert not re.search(r"\bs\d+\b", text)
    assert text.rstrip().endswith("return linear_1")


def test_a_tied_weight_is_one_weight_and_unused_ones_are_none():
    program = capture(Tiny(), FACTS)
    assert set(program.weights) == {"table.weight", "inner.up.weight", "inner.up.bias"}
    (read,) = (n for n in program.graph("forward").fx.nodes if n.op == "get_attr" and n.target == "table.weight")
    assert {target_name(n) for n in read.users} == {"aten.embedding", "aten.linear"}


def test_weights_are_the_models_own_tensors():
    model = Tiny()
    assert capture(model, FACTS).weights["table.weight"].load().data_ptr() == model.table.weight.data_ptr()


def logits(program: Program, ids: Tensor) -> Tensor:
    inputs = {"input_ids": ids, "position_ids": torch.arange(ids.shape[1]).expand(ids.shape)}
    return evaluate(program.graph("forward"), inputs, program.weights)[0]


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (4, 1), (3, 31), (2, 32)])
def test_the_graph_holds_for_any_sizes_up_to_the_whole_context(shape: tuple[int, int]):
    model = Tiny()
    ids = torch.randint(11, shape, generator=torch.Generator().manual_seed(0))
    want = model(ids, torch.arange(shape[1]).expand(shape))
    torch.testing.assert_close(logits(capture(model, FACTS), ids), want)


def test_a_transformers_model_is_left_as_it_was():
    model = LlamaForCausalLM._from_config(CONFIG, attn_implementation="sdpa").train()
    program = capture_model(model)
    assert model.training
    assert model.config._attn_implementation == "sdpa"
    assert sum(target_name(n) == "attention" for n in program.graph("forward").calls()) == 2
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    torch.testing.assert_close(logits(program, ids), model.eval()(ids).logits)


def test_names_of_a_transformers_model_are_the_checkpoints():
    program = capture_config(CONFIG, torch.float32)
    names = set(program.weights)
    assert {"model.embed_tokens.weight", "model.layers.1.self_attn.q_proj.weight", "model.norm.weight"} <= names
    assert "lm_head.weight" not in names  # tied
    modules = {origin(n).module for n in program.graph("forward").calls()}
    assert {"layers.0.self_attn", "layers.1.mlp.gate_proj", "norm"} <= modules


def test_structure_alone_needs_no_weights():
    program = capture_config(CONFIG.__class__(**{**CONFIG.to_dict(), "hidden_size": 8192, "num_hidden_layers": 1}))
    assert program.weights["model.embed_tokens.weight"].shape == (50, 8192)
    assert program.weights["model.embed_tokens.weight"].load().is_meta


class Buffered(Tiny):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(input_ids, position_ids)


def test_a_model_that_writes_to_its_buffers_is_refused_by_name_and_line():
    with pytest.raises(CaptureError, match=r"writes to calls \(test_capture\.py:\d+\)"):
        capture(Buffered(), FACTS)


class Floor(Tiny):
    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        if input_ids.max() > 3:
            return super().forward(input_ids, position_ids)
        return super().forward(input_ids + 1, position_ids)


def test_a_branch_on_values_is_refused_by_line():
    at = inspect.getsourcelines(Floor.forward)[1] + 1
    with pytest.raises(CaptureError, match=rf"test_capture\.py:{at}: .*wanted a forward that torch\.export"):
        capture(Floor(), FACTS)
