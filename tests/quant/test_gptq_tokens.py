"""GPTQ from few tokens: products with other tokens suffer no more than by rounding to nearest."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmopt.compiler.quant import quantize
from llmopt.compiler.quant.gptq import gptq, output_error

ROOT = Path(__file__).parents[2]
PICO = ROOT / "examples" / "models" / "pico-llama-4m"


def source(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def moment(x: Tensor) -> Tensor:
    return x.T.double() @ x.double()


def mixed(tokens: int, seed: int) -> Tensor:
    """[tokens, 100], each column a sum of the same 100 independent ones."""
    return torch.randn(tokens, 100, generator=source(seed)) @ torch.randn(100, 100, generator=source(0))


def single(tokens: int, seed: int) -> Tensor:
    """[tokens, 100] that are independent, so that there is nothing to make up for."""
    return torch.randn(tokens, 100, generator=source(seed))


def errors(weight: Tensor, seen: Tensor, unseen: Tensor, scheme: str = "nvfp4") -> tuple[float, float, float]:
    """Errors of the products with `unseen` tokens: GPTQ that knows how many it saw, one that does not, to nearest."""
    ways = (
        gptq(weight, moment(seen), scheme, "search", tokens=len(seen)),
        gptq(weight, moment(seen), scheme, "search"),
        quantize(weight, scheme, "search"),
    )
    told, untold, nearest = (output_error(weight, made.dequantize(), moment(unseen)) for made in ways)
    return told, untold, nearest


@pytest.mark.parametrize("scheme", ["nvfp4", "mxfp4", "int4_g32"])
@pytest.mark.parametrize("tokens", [1, 5, 20, 50, 100, 200, 400])
@pytest.mark.parametrize("inputs", [mixed, single])
def test_few_tokens_do_no_harm(inputs, tokens: int, scheme: str):
    weight = torch.randn(24, 100, generator=source(1))
    told, untold, nearest = errors(weight, inputs(tokens, 2), inputs(4000, 3), scheme)
    assert told <= 1.002 * nearest
    if tokens < 100 or inputs is single:
        assert untold > 1.02 * nearest
    else:
        assert told < 0.9 * nearest


def test_many_tokens_are_taken_for_what_they_are_worth():
    weight, unseen = torch.randn(24, 100, generator=source(1)), mixed(4000, 3)
    told, untold, nearest = errors(weight, mixed(20000, 2), unseen)
    assert told < 1.02 * untold < 0.6 * nearest


def test_the_rule():
    """Against the formula spelled out, on the correlations of living columns."""
    x = mixed(60, 2)
    x[:, 5] = 0
    alive = [c for c in range(100) if c != 5]
    seen = moment(x)
    pairs = [float(seen[i, j]) ** 2 / float(seen[i, i] * seen[j, j]) for i in alive for j in alive if i != j]
    chance = min(1.0, sum(1 + square for square in pairs) / (60 * sum(pairs)))
    assert 0.5 < chance < 0.9
    keep = (1 - chance) * 60 / (60 + 99)
    spelled = torch.where(torch.eye(100, dtype=torch.bool), seen, keep * seen)
    weight = torch.randn(24, 100, generator=source(1))
    for hessian in (seen, seen / 60):
        made = gptq(weight, hessian, "nvfp4", tokens=60, say=lambda text: None)
        want = gptq(weight, spelled, "nvfp4", say=lambda text: None)
        assert torch.equal(made.codes, want.codes)
        assert torch.equal(made.scales.float(), want.scales.float())


def test_one_token_teaches_nothing():
    weight = torch.randn(24, 100, generator=source(1))
    made = gptq(weight, moment(mixed(1, 2)), "nvfp4", "search", tokens=1)
    assert torch.equal(made.codes, quantize(weight, "nvfp4", "search").codes)


@pytest.fixture(scope="module")
def fed() -> tuple[Tensor, Tensor, Tensor]:
    """A weight [256, 704] of a trained model, and what its columns are fed by two texts."""
    model = AutoModelForCausalLM.from_pretrained(PICO, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(PICO, model_max_length=10**6)
    module, seen = model.model.layers[1].mlp.down_proj, []
    module.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, 1)))
    for folder in ("passes", "runtime"):
        text = "\n".join(path.read_text() for path in sorted((ROOT / folder).glob("*.py"))[:5])
        with torch.inference_mode():
            model(torch.tensor(tokenizer(text)["input_ids"])[:2048].view(8, 256))
    first, second = (x.clone() for x in seen)
    return module.weight.detach(), first, second


@pytest.mark.parametrize("tokens", [8, 32, 176, 704, 2048])
def test_the_tokens_of_a_text_do_no_harm(fed: tuple[Tensor, Tensor, Tensor], tokens: int):
    weight, seen, unseen = fed
    told, untold, nearest = errors(weight, seen[:tokens], unseen)
    assert told <= 1.002 * nearest
    assert told < untold
    if tokens < 704:
        assert untold > 1.1 * nearest
    else:
        assert told < 0.9 * nearest
