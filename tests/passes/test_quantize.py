"""quantize: which products it takes, what they compute afterwards, and what the report says."""

from __future__ import annotations

import copy
import functools
import json
import math
import re
from typing import Any

import pytest
import torch
from passes_common import context, counts, run
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from llmopt.compiler.calibration import Settings, calibrate
from llmopt.compiler.calibration_statistics import Statistics
from llmopt.compiler.capture_hf import capture_model
from llmopt.compiler.errors import InputError, LlmoptError, PassMatchedNothing, RecipeError
from llmopt.compiler.evaluate import evaluate
from llmopt.compiler.pipeline import PassStats, Pipeline
from llmopt.compiler.program import Program
from llmopt.compiler.quant import dequantize, fake_quantize, quantize, scheme_of
from llmopt.compiler.recipe import Recipe
from llmopt.passes import PASSES, Canonicalize, InsertKVCache, Quantize, RaiseAten
from llmopt.passes.quantize_options import preset

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
def tiny(bias: bool = False, tied: bool = False) -> LlamaForCausalLM:
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, attention_bias=bias, initializer_range=0.2,
        tie_word_embeddings=tied,
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
    both = preset(scheme)
    weights_only, _ = quantised(tiny(), weights=both.weights)
    assert (logits(after) - logits(weights_only)).abs().max() > 1e-4
    x = torch.randn(2, 5, 64) * torch.tensor([1.0, 30.0])[:, None, None]
    together = fake_quantize(x, scheme_of(both.activations))
    assert torch.equal(together[1, 3:], fake_quantize(x[1, 3:], scheme_of(both.activations)))


@pytest.mark.parametrize(
    ("lm_head", "weights", "activations"),
    [("fp8_channel", "fp8_channel", ""), ("FP8_DYNAMIC", "fp8_channel", "fp8_channel"), ("nvfp4", "nvfp4", ""),
     ("NVFP4", "nvfp4", "nvfp4")],
)  # fmt: skip
def test_lm_head_has_a_format_of_its_own(lm_head: str, weights: str, activations: str) -> None:
    after, _ = quantised(tiny(), scheme="W8A8", lm_head=lm_head)
    for name in ("forward", "step"):
        calls = [n.args[6:8] for n in after.graph(name).calls("quantized_linear")]
        assert calls == [("int8", "int8")] * 8 + [(weights, activations)]
        assert counts(after.graph(name))["linear"] == 0


@pytest.mark.parametrize("name", ["lm_head.weight", "lm_*", "model.embed_tokens.weight"])
def test_a_tied_head_is_left_out_by_either_of_its_names(name: str) -> None:
    after, stats = quantised(tiny(tied=True), weights="nvfp4", lm_head="fp8_channel", exclude=(name,))
    assert [counts(after.graph("step"))[op] for op in ("quantized_linear", "linear")] == [8, 1]
    assert stats.rejected == {("quantize", "its weight is excluded"): 2}


def test_a_scheme_that_cannot_have_the_rule_takes_its_own_and_says_so() -> None:
    after, stats = quantised(tiny(), weights="nvfp4", scale="fast", lm_head="fp8_channel")
    assert stats.notes == ["scales of fp8_channel are chosen by 'search', not by 'fast'"]
    for name, scheme, scale in (
        (f"{LAYERS}.0.mlp.down_proj.weight", "nvfp4", "fast"),
        ("lm_head.weight", "fp8_channel", "search"),
    ):
        want = quantize(structured(tiny()).weights[name].load(), scheme, scale)
        assert torch.equal(after.weights[f"{name}.scales"].load().float(), want.scales.float())
        assert torch.equal(after.weights[f"{name}.packed"].load(), want.packed())


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
        ({"weights": "int8", "scale": "optimal"}, "scales of int8 .* cannot be chosen by 'optimal'"),
        ({"weights": "int8", "scale": "optimal", "lm_head": "nvfp4"}, "scales of int8 .* cannot be chosen"),
        ({"bits": 4.5, "scale": "serach"}, "none of int4_g128, .* can have; did you mean 'search'"),
        ({"bits": 4.5, "choices": ("mxfp4", "int8"), "scale": "optimal"}, "none of mxfp4, int8 can have"),
        ({"weights": "nvfp4", "weighted": True, "scale": "max"}, "'max' searches nothing: set scale to 'search'"),
        ({"bits": math.nan}, "option 'bits' is nan; wanted a finite number of bits a weight above 0"),
        ({"bits": math.inf}, "option 'bits' is inf; wanted a finite number"),
        ({"bits": 0.0}, "option 'bits' is 0.0; wanted a finite number"),
        ({"bits": -1.0}, "option 'bits' is -1.0; wanted a finite number"),
        ({"bits": 4.5, "choices": ()}, "option 'choices' is empty"),
        ({"weights": "nvfp4", "exclude": ("*.layer.0.*",)}, r"exclude has '\*.layer.0.\*'.* mean '\*.layers.0.\*'"),
        ({"weights": "nvfp4", "include": ("*.layers.0.*", "*.lyers.1.*")}, r"include has .* mean '\*.layers.1.\*'"),
        ({"weights": "nvfp4", "exclude": ("lm_haed.weight",)}, r"exclude has .* did you mean 'lm_head.weight'"),
        ({"weights": "nvfp4", "exclude": ("q_proj",)}, r"exclude has .* did you mean '\*.q_proj.\*'"),
        ({"weights": "nvfp4", "exclude": ("#",)}, r"'#', which is the name of no weight and fits none; wanted a name"),
    ],
)
def test_wrong_options_are_told_before_any_weight_is_read(options: dict[str, Any], said: str) -> None:
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


def test_where_nothing_is_left_to_quantise_the_reasons_are_told() -> None:
    with pytest.raises(PassMatchedNothing, match=r"rewrote nothing: its weight is excluded \(16x\); makes the logits"):
        quantised(tiny(), weights="nvfp4", exclude=("*",))


def spoilt(value: float) -> LlamaForCausalLM:
    model = copy.deepcopy(tiny())
    model.model.layers[1].mlp.down_proj.weight.data.fill_(value)
    return model


def test_a_weight_that_is_not_finite_is_named() -> None:
    after, _ = quantised(spoilt(math.nan), weights="nvfp4")
    name = f"{LAYERS}.1.mlp.down_proj.weight"
    with pytest.raises(InputError, match=rf"^weight '{re.escape(name)}': .*are not finite.*`exclude`"):
        after.weights[f"{name}.packed"].load()


def test_figures_of_a_weight_of_zeros_are_json() -> None:
    after, stats = quantised(spoilt(0.0), weights="nvfp4")
    name = f"{LAYERS}.1.mlp.down_proj.weight"
    for part in after.graph("step").weights():
        after.weights[part].load()

    def fail(constant: str) -> None:
        pytest.fail(f"{constant} is no JSON")

    figures = json.loads(json.dumps(stats.figures), parse_constant=fail)
    assert figures[name]["lossless"]
    assert [n for n, f in figures.items() if "sqnr_db" not in f] == [name]


# with calibration data

TOKENS = torch.randint(96, (20, 60), generator=torch.Generator().manual_seed(8))


@functools.cache
def statistics() -> Statistics:
    return calibrate(structured(tiny()), TOKENS)


def calibrated(model: LlamaForCausalLM, **options: Any) -> tuple[Program, PassStats]:
    given = context()
    given.calibrate = lambda program, second: calibrate(program, TOKENS, settings=Settings(second_moments=second))
    pipeline = Pipeline((Quantize(**options),))
    return pipeline.run(structured(model), given), pipeline.reports[0].stats


@pytest.mark.parametrize("way", [{}, {"weighted": True}, {"method": "gptq"}, {"scale": "max"}], ids=str)
def test_mixed_precision_chooses_by_the_cost_of_what_it_makes(way: dict[str, Any]) -> None:
    after, stats = calibrated(tiny(), bits=5.2, choices=("nvfp4", "int8"), **way)
    assert {f["scheme"] for f in stats.figures.values()} == {"nvfp4", "int8"}
    for name, figures in stats.figures.items():
        exact, scheme = structured(tiny()).weights[name].load().double(), scheme_of(figures["scheme"])
        stored = [after.weights.get(f"{name}.{part}") for part in ("packed", "scales", "global_scale")]
        parts = [None if weight is None else weight.load() for weight in stored]
        lost = exact - dequantize(*parts, None, scheme, exact.shape[1]).double()
        moment = statistics().second_moment(name).double()
        if way != {"method": "gptq"}:
            moment = moment.diagonal().diag()
        error = ((lost @ moment) * lost).sum() / ((exact @ moment) * exact).sum()
        assert figures["cost"] == pytest.approx(float(error), rel=1e-5)


@pytest.mark.parametrize("bits", [32, 1e30, 1e308])
def test_bits_for_all_weights_as_they_are_leave_them_so(bits: float) -> None:
    after, stats = calibrated(tiny(), bits=float(bits))
    assert counts(after.graph("step"))["linear"] == 9
    assert (stats.rewritten, len(stats.figures)) == (0, 8)
    assert f"all 8 weights fit into {bits:g} bits a weight unquantised, and stay as they are" in stats.notes


def test_what_bits_cover_and_what_all_weights_take_is_told() -> None:
    options = {"exclude": ("*.layers.1.*",), "lm_head": "int8", "choices": ("nvfp4", "fp8_channel")}
    _, stats = calibrated(tiny(), bits=5.5, **options)
    sizes = {n: structured(tiny()).weights[n] for n in structured(tiny()).graph("forward").weights() if "proj" in n}
    sizes["lm_head.weight"] = structured(tiny()).weights["lm_head.weight"]

    def average(names: list[str]) -> float:
        bits = 8 * sum(stats.figures.get(n, {}).get("bytes", sizes[n].nbytes) for n in names)
        bits -= 32 * sum(stats.figures.get(n, {}).get("scheme") == "nvfp4" for n in names)
        return bits / sum(math.prod(sizes[n].shape) for n in names)

    (said,) = (note for note in stats.notes if note.startswith("5.5 bits a weight asked for"))
    first, everything = ([n for n in sizes if k in n] for k in (".layers.0.", ""))
    assert f"the 4 weights that this covers take {average(first):.3f}," in said
    assert f"all 9 of products (with those left out and the logits' own) {average(everything):.3f}" in said
    assert average(first) <= 5.5 < average(everything)


def test_a_budget_that_is_too_small_is_told_in_bits_a_weight_before_anything_is_learned() -> None:
    with pytest.raises(InputError, match=r"take 4\.5 bits a weight in .* budget is 3 bits a weight; raise .*--bits"):
        quantised(tiny(), bits=3.0, choices=("nvfp4",))


def test_a_rule_that_some_choices_have_is_taken_for_those() -> None:
    _, stats = calibrated(tiny(), bits=5.2, choices=("nvfp4", "int8"), scale="fast")
    assert "scales of int8 are chosen by 'search', not by 'fast'" in stats.notes
    best, usual = (calibrated(tiny(), bits=4.5, choices=("nvfp4",), scale=s)[1].figures for s in ("fast", "search"))
    assert all(best[name]["cost"] != usual[name]["cost"] for name in usual)


def test_a_weight_that_is_not_finite_is_named_where_schemes_are_tried() -> None:
    model = copy.deepcopy(tiny())
    program = structured(model)
    name = f"{LAYERS}.1.mlp.down_proj.weight"
    given = context()

    def spoil(program: Program, second: bool) -> Statistics:
        found = calibrate(program, TOKENS, settings=Settings(second_moments=second))
        model.model.layers[1].mlp.down_proj.weight.data.fill_(math.nan)
        return found

    given.calibrate = spoil
    with pytest.raises(InputError, match=rf"^weight '{re.escape(name)}': "):
        Pipeline((Quantize(bits=5.0),)).run(program, given)
