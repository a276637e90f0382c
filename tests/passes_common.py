"""What the tests of passes share: a small model as a Program, and passes run over it."""

from __future__ import annotations

from collections import Counter

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from llmopt.compiler.capture_hf import capture_model
from llmopt.compiler.graph import Graph, target_name
from llmopt.compiler.pipeline import Context, Pass, PassReport, Pipeline, verify_hook
from llmopt.compiler.program import Program
from llmopt.compiler.recipe import RECIPES
from llmopt.compiler.target import Target


def llama(layers: int = 2, bias: bool = False, **options: object) -> Program:
    """A captured Llama with random weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        attention_bias=bias,
        initializer_range=0.2,
        **options,
    )
    return capture_model(LlamaForCausalLM(config).eval())


def context(recipe: str = "reference", limit: int | None = None) -> Context:
    """The context a build would make, on a CPU that claims a C++ compiler."""
    return Context(Target("cpu", "generic", 2, frozenset({"cpp"})), RECIPES[recipe], limit)


def run(program: Program, *passes: Pass, recipe: str = "reference") -> tuple[Program, list[PassReport]]:
    """The program after the passes, verified, and their reports."""
    pipeline = Pipeline(passes, [verify_hook])
    return pipeline.run(program, context(recipe)), pipeline.reports


def counts(graph: Graph) -> Counter[str]:
    """How often each op is called."""
    return Counter(target_name(n) for n in graph.calls())
