"""lower and outline: providers, in-place state, and equal layers that share one region."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import replace

import pytest
import torch
from passes_common import context, llama, run
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from llmopt.codegen import cpp  # noqa: F401 - registers the providers
from llmopt.compiler.capture_hf import capture_model
from llmopt.compiler.errors import ProviderError
from llmopt.compiler.pipeline import Context, Pipeline
from llmopt.compiler.program import Program
from llmopt.compiler.recipe import Recipe
from llmopt.compiler.target import Target
from llmopt.passes import Canonicalize, Fuse, InsertKVCache, Lower, RaiseAten

ALL = (RaiseAten(), Canonicalize(), InsertKVCache(), Lower())


def calls(program: Program) -> list[str]:
    """Region calls and lone ops of the step, in order."""
    nodes = [n for n in program.graph("step").fx.nodes if n.op in ("call_module", "call_function")]
    return [
        n.name if n.op == "call_function" else str(n.target)
        for n in nodes
        if not n.name.startswith(("getitem", "sym_size"))
    ]


def test_a_decoder_is_positions_embed_layers_head() -> None:
    program, _ = run(llama(layers=5), *ALL, recipe="default")
    assert calls(program) == ["positions", "embed", *["layer"] * 5, "index_select", "head"]
    assert set(program.graphs) == {"forward", "step", "positions", "embed", "layer", "head"}


def test_equal_layers_are_matched_and_lowered_once() -> None:
    few, few_reports = run(llama(layers=2), *ALL, recipe="default")
    many, many_reports = run(llama(layers=24), *ALL, recipe="default")
    assert set(few.graphs) == set(many.graphs)
    assert [r.stats.attempts for r in few_reports] == [r.stats.attempts for r in many_reports]
    assert few_reports[0].stats.attempts > 0


def test_layers_of_two_kinds_are_two_regions() -> None:
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, sliding_window=5, max_position_embeddings=64,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"] * 2,
    )  # fmt: skip
    program, _ = run(capture_model(Gemma3ForCausalLM(config).eval()), *ALL, recipe="default")
    layers = Counter(name for name in calls(program) if name.startswith("layer"))
    assert sorted(layers.values()) == [2, 4]


def test_state_is_written_in_place_and_no_longer_returned() -> None:
    program, _ = run(llama(), *ALL)
    step = program.graph("step")
    assert len(step.outputs()) == 1
    assert all(n.meta["in_place"] for n in step.calls("kv_write"))


def test_providers_follow_the_recipe() -> None:
    program, _ = run(llama(), *ALL, recipe="default")
    chosen = program.choices["providers"]
    assert chosen["linear=cpp"] == 2 * 4 + 1
    assert chosen["rms_norm=inductor"] == 2 * 2 + 1
    reference, _ = run(llama(), *ALL)
    assert all(name.endswith("=reference") for name in reference.choices["providers"])


def test_a_provider_that_cannot_take_the_dtype_is_passed_over_with_its_reason() -> None:
    program, _ = run(capture_model(_double()), *ALL, recipe="default")
    assert program.choices["providers"]["attend=reference"] == 1
    assert any("float64" in reason for reason in program.choices["against"])


def _double() -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        max_position_embeddings=64,
    )
    return LlamaForCausalLM(config).double().eval()


def test_no_provider_is_an_error_that_lists_what_was_tried() -> None:
    program, _ = run(llama(layers=1), *ALL[:3])
    own = context("default")
    own.recipe = Recipe("only-inductor", own.recipe.passes, providers=("inductor",))
    with pytest.raises(ProviderError, match="add 'reference'"):
        Pipeline([Lower()]).run(program, own)


def without(feature: str = "", fuse: bool = True, providers: tuple[str, ...] = ("triton", "reference")) -> Context:
    target, recipe = Target.parse("cuda:sm_90"), Recipe.parse("default")
    passes = tuple(spec for spec in recipe.passes if fuse or spec.name != "fuse")
    features = (target.features | {"triton"}) - {feature}
    return Context(replace(target, features=features), replace(recipe, passes=passes, providers=providers), None)


@pytest.mark.parametrize(
    ("where", "said", "warned"),
    [
        (without("triton"), "Triton is not installed for target cuda:sm_90; pip install triton", True),
        (without(fuse=False), "pass fuse, which makes them, is not in the recipe; add it before lower", True),
        (without(providers=("reference",)), "triton is not among the providers allowed (reference)", False),
    ],
    ids=["no Triton", "no fuse", "not allowed"],
)
def test_a_gpu_without_kernels_is_said(
    where: Context, said: str, warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    passes = (*ALL[:-1], *([Fuse()] if "fuse" in {p.name for p in where.recipe.passes} else []), Lower())
    pipeline = Pipeline(passes)
    with caplog.at_level(logging.WARNING, "llmopt"):
        pipeline.run(llama(layers=1), where)
    line = f"no GPU kernels: {said}; torch runs the step node by node"
    assert pipeline.reports[-1].stats.notes == [line]
    assert caplog.messages == [f"llmopt: {line}"] * warned


def test_kernels_there_are_and_a_cpu_are_not_worth_a_word() -> None:
    for where in (without(), context("default")):
        pipeline = Pipeline((*ALL[:-1], Fuse(), Lower()))
        pipeline.run(llama(layers=1), where)
        assert not [n for n in pipeline.reports[-1].stats.notes if "no GPU kernels" in n]
