"""quantize with calibration data: GPTQ, weighted scales, mixed precision under a budget of bits."""

from __future__ import annotations

import functools
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from passes_common import context
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import llmopt
from llmopt.backend import llmopt as backend
from llmopt.compiler.calibration import Settings, calibrate
from llmopt.compiler.capture_hf import capture_model
from llmopt.compiler.errors import InputError, LlmoptError, RecipeError
from llmopt.compiler.pipeline import PassStats, Pipeline
from llmopt.compiler.program import Program
from llmopt.compiler.quant import scheme_of
from llmopt.compiler.quant.gptq import output_error
from llmopt.passes import Canonicalize, InsertKVCache, Quantize, RaiseAten

TOKENS = torch.randint(96, (40, 60), generator=torch.Generator().manual_seed(8))
EIGHTS = ("nvfp4", "fp8_channel")


@functools.cache
def model() -> LlamaForCausalLM:
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.2,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@functools.cache
def structured() -> Program:
    return Pipeline((RaiseAten(), Canonicalize(), InsertKVCache())).run(capture_model(model()), context())


def quantised(**options: Any) -> tuple[Program, PassStats]:
    given = context()
    given.calibrate = lambda program, second: calibrate(program, TOKENS, settings=Settings(second_moments=second))
    pipeline = Pipeline((Quantize(**options),))
    return pipeline.run(structured(), given), pipeline.reports[0].stats


def read(program: Program) -> None:
    for name in program.graph("step").weights():
        program.weights[name].load()


@functools.cache
def statistics() -> Any:
    return calibrate(structured(), TOKENS)


def restored(program: Program, name: str, scheme: str) -> torch.Tensor:
    from llmopt.compiler.quant import dequantize

    parts = [program.weights[f"{name}.{p}"].load() for p in ("packed", "scales")]
    shared = program.weights.get(f"{name}.global_scale")
    columns = structured().weights[name].shape[1]
    return dequantize(*parts, shared.load() if shared else None, None, scheme_of(scheme), columns)


@pytest.mark.parametrize("scheme", ["nvfp4", "int4_g32"])
def test_what_learns_from_data_loses_less_of_the_products(scheme: str) -> None:
    errors = {}
    ways = {"rtn": {}, "weighted": {"weighted": True}, "gptq": {"method": "gptq"}}
    for way, options in ways.items():
        program, stats = quantised(weights=scheme, **options)
        names = list(stats.figures)
        errors[way] = [
            output_error(structured().weights[n].load(), restored(program, n, scheme), statistics().second_moment(n))
            for n in names
        ]
        assert len(names) == 8
    assert sum(errors["gptq"]) < 0.9 * sum(errors["rtn"])
    assert sum(errors["weighted"]) < sum(errors["rtn"])


def test_gptq_reports_the_error_of_the_products() -> None:
    program, stats = quantised(weights="nvfp4", method="gptq")
    read(program)
    name = "model.layers.1.mlp.down_proj.weight"
    error = output_error(
        structured().weights[name].load(), restored(program, name, "nvfp4"), statistics().second_moment(name)
    )
    assert stats.figures[name]["output_error"] == pytest.approx(error)
    assert 15 < stats.figures[name]["sqnr_db"] < 25


def test_too_few_tokens_are_told() -> None:
    given = context()
    given.calibrate = lambda program, second: calibrate(program, TOKENS[:1])
    pipeline = Pipeline((Quantize(weights="nvfp4", method="gptq"),))
    read(pipeline.run(structured(), given))
    (note,) = (n for n in pipeline.reports[0].stats.notes if "more values" in n)
    assert "60 tokens" in note
    assert "use at least 64 tokens" in note


# of 8 weights in fp32, whose products are 8.5 or 8.33 bits a weight in fp8_channel: 9 bits leave too little for one of
# them to stay in 32, unless others lose far more in nvfp4; 31.9 bits are enough for all of them but one
MIXTURES = {4.5: {"nvfp4": 8}, 6.0: {"nvfp4": 4, "fp8_channel": 4}, 9.0: {"fp8_channel": 8},
            31.9: {"fp8_channel": 1, "unquantised": 7}}  # fmt: skip


@pytest.mark.parametrize("bits", list(MIXTURES))
def test_mixed_precision_stays_within_its_bits(bits: float) -> None:
    _, stats = quantised(bits=bits, choices=EIGHTS)
    weights = {n: structured().weights[n] for n in stats.figures}
    count = sum(w.shape[0] * w.shape[1] for w in weights.values())
    used = sum(f.get("bytes", weights[n].nbytes) for n, f in stats.figures.items())
    assert 8 * used <= bits * count + 32 * len(weights)  # NVFP4's global scales are not counted
    assert Counter(f.get("scheme", "unquantised") for f in stats.figures.values()) == MIXTURES[bits]


def test_more_bits_never_cost_more() -> None:
    costs = [sum(f["cost"] for f in quantised(bits=b, choices=EIGHTS)[1].figures.values()) for b in (5, 6, 8, 12, 20)]
    assert costs == sorted(costs, reverse=True)
    assert costs[0] > 10 * costs[-1]


@pytest.mark.parametrize(
    ("options", "kind", "said"),
    [
        ({"weights": "nvfp4", "method": "qptq"}, RecipeError, "did you mean 'gptq'"),
        ({"weights": "nvfp4", "bits": 4.5}, RecipeError, "set one of"),
        ({"bits": 2.0}, InputError, "raise the budget"),
    ],
)
def test_wrong_options(options: dict[str, Any], kind: type[LlmoptError], said: str) -> None:
    with pytest.raises(kind, match=said):
        quantised(**options)


@pytest.mark.parametrize("recipe", ["nvfp4+gptq", "nvfp4+weighted", "mixed"])
def test_data_are_asked_for(recipe: str) -> None:
    with pytest.raises(InputError, match=r"needs calibration data.*--calibration"):
        llmopt.compile(model(), recipe, target="cpu")


def test_data_that_nothing_reads_are_refused() -> None:
    with pytest.raises(InputError, match=r"no pass of recipe .* reads any"):
        llmopt.compile(model(), "nvfp4+reference", target="cpu", calibration=TOKENS)


def test_statistics_of_another_model_are_refused(tmp_path: Path) -> None:
    statistics().save(tmp_path / "s.safetensors")
    other = LlamaForCausalLM(LlamaConfig(**{**model().config.to_dict(), "intermediate_size": 112})).eval()
    with pytest.raises(InputError, match="statistics are of another model"):
        llmopt.compile(other, "nvfp4+gptq+reference", target="cpu", calibration=tmp_path / "s.safetensors")


def test_torch_compile_says_that_it_cannot_have_data() -> None:
    torch._dynamo.reset()
    backend.reset()
    compiled = torch.compile(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 8)), backend="llmopt",
                             options={"recipe": "nvfp4+gptq", "strict": True})  # fmt: skip
    with torch.no_grad(), pytest.raises(Exception, match="belong to the module"):
        compiled(torch.randn(2, 64))
