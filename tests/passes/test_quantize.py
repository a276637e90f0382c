"""quantize: which products it takes, what they compute afterwards, and what the report says."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from passes_common import context, counts, run
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from llmopt.compiler.capture_hf import capture_model
from llmopt.compiler.errors import LlmoptError, PassMatchedNothing, RecipeError
from llmopt.compiler.evaluate import evaluate
from llmopt.compiler.pipeline import PassStats, Pipeline
from llmopt.compiler.program import Program
from llmopt.compiler.quant import fake_quantize, quantize, scheme_of
from llmopt.compiler.recipe import Recipe
from llmopt.passes import PASSES, Canonicalize, InsertKVCache, Quantize, RaiseAten
from llmopt.passes.quantize import preset

STRUCTURE = (RaiseAten(), Canonicalize(), InsertKVCache())
LAYERS = "model.layers"


IDS = torch.randint(96, (2, 9), generator=torch.Generator().manual_seed(3))


def logits(program: Program, tokens: int = 9) -> Tensor:
    positions = torch.arange(tokens).expand(2, tokens).contiguous()
    inputs = {"input_ids": IDS[:, :tokens], "position_ids": positions}
    return evaluate(program.graph("forward"), inputs, program.weights)[0]


@functools.cache
def structured(model: LlamaForCausalLM) -> Program:
    return run(capture_model(model), *STRUCTURE)[0]


def quantised(model: LlamaForCausalLM, **options: Any) -> tuple[Program, PassStats]:
    """`Quantize` over the model's program."""
    after, (report,) = run(structured(model), Quantize(**options))
    return after, report.stats


@functools.cache
def tiny(bias: bool = False) -> LlamaForCausalLM:
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, attention_bias=bias, initializer_range=0.2,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def rounded(model: LlamaForCausalLM, scheme: str, scale: str, joined: bool = True) -> LlamaForCausalLM:
    """transformers' model with its weights rounded, q, k, v and gate, up as one matrix each."""
    made = copy.deepcopy(model)
    for layer in made.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        groups = [[attention.q_proj, attention.k_proj, attention.v_proj], [attention.o_proj],
                  [mlp.gate_proj, mlp.up_proj], [mlp.down_proj]]  # fmt: skip
        for group in groups if joined else [[m] for g in groups for m in g]:
            whole = quantize(torch.cat([m.weight.detach() for m in group]), scheme, scale).dequantize()
            for module, part in zip(group, whole.split([m.out_features for m in group]), strict=True):
                module.weight.data.copy_(part)
    return made


def test_every_product_but_the_last_is_quantised_in_both_graphs() -> None:
    after, stats = quantised(tiny(), weights="nvfp4")
    for name in ("forward", "step"):
        assert counts(after.graph(name))["quantized_linear"] == 2 * 4
        assert counts(after.graph(name))["linear"] == 1
    assert stats.rewritten == 2 * 2 * 4
    assert stats.rejected["quantize", "makes the logits, and lm_head is not set"] == 2
    assert f"{LAYERS}.0.mlp.gate_proj|up_proj.weight" not in after.graph("step").weights()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("scheme", "scale"),
    [("nvfp4", "search"), ("nvfp4", "max"), ("mxfp4", "search"), ("int4_g32_asym", "max"), ("int8", "max"),
     ("mxfp6_e2m3", "max"), ("fp8_channel", "max"), ("fp8", "max"), ("fp8_block", "max"), ("mxfp8", "max")],
)  # fmt: skip
def test_it_computes_what_transformers_does_with_rounded_weights(scheme: str, scale: str, bias: bool) -> None:
    model = tiny(bias)
    after, _ = quantised(model, weights=scheme, scale=scale)
    exact, got = rounded(model, scheme, scale)(IDS).logits, logits(after)
    torch.testing.assert_close(got, exact, rtol=1e-5, atol=1e-5 * float(exact.abs().max()))
    assert (model(IDS).logits - exact).abs().max() > 1e-3  # rounding shows


def test_joined_weights_share_a_global_scale() -> None:
    model = copy.deepcopy(tiny())
    model.model.layers[0].self_attn.k_proj.weight.data.mul_(40)
    after, _ = quantised(model, weights="nvfp4", scale="max")
    stem = f"{LAYERS}.0.self_attn."
    largest = max(getattr(model.model.layers[0].self_attn, f"{p}_proj").weight.abs().max().item() for p in "qkv")
    found = after.weights[f"{stem}q_proj|k_proj|v_proj.weight.global_scale"].load()
    assert float(found) == pytest.approx(largest / (448 * 6), rel=1e-6)


@pytest.mark.parametrize("scheme", ["NVFP4", "W8A8", "FP8", "MXFP4"])
def test_activations_are_rounded_token_by_token(scheme: str) -> None:
    after, _ = quantised(tiny(), scheme=scheme)
    weights, activations = preset(scheme)
    weights_only, _ = quantised(tiny(), weights=weights)
    assert (logits(after) - logits(weights_only)).abs().max() > 1e-4
    x = torch.randn(2, 5, 64) * torch.tensor([1.0, 30.0])[:, None, None]
    together = fake_quantize(x, scheme_of(activations))
    assert torch.equal(together[1, 3:], fake_quantize(x[1, 3:], scheme_of(activations)))


def test_lm_head_has_a_scheme_of_its_own() -> None:
    after, _ = quantised(tiny(), weights="nvfp4", lm_head="fp8_channel")
    calls = list(after.graph("step").calls("quantized_linear"))
    assert [n.args[6] for n in calls] == ["nvfp4"] * 8 + ["fp8_channel"]
    assert counts(after.graph("step"))["linear"] == 0


def test_names_choose_by_the_checkpoints_own_weights() -> None:
    after, stats = quantised(tiny(), weights="int8", include=("*.layers.1.*",), exclude=("*.k_proj.weight",))
    read = [n for n in after.graph("step").weights() if n.endswith(".packed")]
    assert sorted(n.removeprefix(f"{LAYERS}.1.") for n in read) == [
        "mlp.down_proj.weight.packed", "mlp.gate_proj|up_proj.weight.packed", "self_attn.o_proj.weight.packed",
    ]  # fmt: skip
    assert stats.rejected["quantize", "its weight is excluded"] == 2
    assert stats.rejected["quantize", "its weight is not included"] == 8


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "is told nothing"),
        ({"scheme": "NVFP4", "weights": "mxfp4"}, "set one of"),
        ({"weights": "nvfp5"}, "did you mean"),
        ({"scheme": "W4A61"}, "did you mean"),
        ({"weights": "nvfp4", "activations": "int9"}, "did you mean"),
        ({"weights": "nvfp4", "lm_head": "fp9"}, "did you mean"),
        ({"weights": "nvfp4", "scale": "serach"}, "did you mean"),
    ],
)
def test_wrong_options_are_told_before_any_weight_is_read(options: dict[str, str], said: str) -> None:
    with pytest.raises(LlmoptError, match=said):
        quantised(tiny(), **options)


def test_a_second_run_finds_nothing() -> None:
    with pytest.raises(PassMatchedNothing):
        run(structured(tiny()), Quantize(weights="nvfp4"), Quantize(weights="nvfp4"))


def test_rewrites_are_counted_against_the_limit() -> None:
    after = Pipeline((Quantize(weights="nvfp4"),)).run(structured(tiny()), context(limit=3))
    assert sum(counts(g)["quantized_linear"] for g in after.graphs.values()) == 3


def test_the_report_tells_bytes_at_once_and_accuracy_once_a_weight_is_read() -> None:
    after, stats = quantised(tiny(), weights="nvfp4")
    name = f"{LAYERS}.0.mlp.down_proj.weight"  # [64, 96]
    known = {"scheme": "nvfp4", "bytes": 64 * 96 // 2 + 64 * 6 + 4, "bytes_before": 4 * 64 * 96}
    assert stats.figures[name] == known
    stored = {part: after.weights[f"{name}.{part}"].load() for part in ("packed", "scales", "global_scale")}
    want = quantize(structured(tiny()).weights[name].load(), "nvfp4", "search")
    assert torch.equal(stored["packed"], want.packed())
    assert stats.figures[name]["sqnr_db"] == pytest.approx(want.sqnr(), abs=1e-3)


def test_recipes_compose() -> None:
    recipe = Recipe.parse("nvfp4+max")
    (quantizing,) = (p for p in recipe.build(PASSES) if isinstance(p, Quantize))
    assert quantizing == Quantize(weights="nvfp4", scale="max")
    with pytest.raises(RecipeError, match="both"):
        Recipe.parse("nvfp4+mxfp4")
