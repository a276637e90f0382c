"""llmopt.Cache under transformers' generate."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gpu_models import ragged, tiny
from transformers import DynamicCache, GenerationConfig

import llmopt
from llmopt.compiler.errors import InputError
from llmopt.compiler.recipe import Recipe
from llmopt.runtime.engine import SamplingParams


def generated(model: Any, ids: torch.Tensor, cache: Any, count: int = 10, **options: Any) -> list[list[int]]:
    config = GenerationConfig(max_new_tokens=count, do_sample=False, pad_token_id=0, **options)
    mask = torch.ones_like(ids)
    made = model.generate(ids, attention_mask=mask, generation_config=config, past_key_values=cache)
    return made[:, ids.shape[1] :].tolist()  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("name", "options", "row"),
    [("int4-kv", {}, 16 // 2 + 4), ("fp8-kv", {"keys": "fp8", "values": "fp8", "rotate": "none"}, 16 + 4)],
)
def test_tokens_are_those_of_the_compiled_model(name: str, options: dict[str, Any], row: int) -> None:
    model, prompts = tiny("llama"), ragged(12)
    recipe = Recipe(name, Recipe.parse(name).passes, providers=("reference",))
    compiled = llmopt.compile(tiny("llama"), recipe, target="cpu")
    want = compiled.engine.generate(prompts, SamplingParams(max_new_tokens=10))
    cache = llmopt.Cache(model.config, **options)
    assert generated(model, torch.tensor(prompts), cache) == want
    assert cache.get_seq_length() == 12 + 9
    assert {layer.keys.dtype for layer in cache.layers} == {torch.uint8}
    assert cache.layers[0].keys.shape == (1, 2, 21, row)


def test_four_bits_make_other_tokens_than_all() -> None:
    model, ids = tiny("llama"), torch.tensor(ragged(12))
    assert generated(model, ids, llmopt.Cache(model.config)) != generated(model, ids, DynamicCache(config=model.config))


def test_beams_reorder_rows() -> None:
    model, ids = tiny("qwen3"), torch.tensor(ragged(9))
    plain = generated(model, ids, DynamicCache(config=model.config), num_beams=3)
    exact = llmopt.Cache(model.config, keys="none", values="none")
    assert generated(model, ids, exact, num_beams=3) == plain
    assert generated(model, ids, llmopt.Cache(model.config, keys="int8", values="int8"), num_beams=3) == plain


def test_cropping_takes_the_last_tokens() -> None:
    model, ids = tiny("llama"), torch.tensor(ragged(9))
    cache = llmopt.Cache(model.config)
    with torch.no_grad():
        model(ids, past_key_values=cache)
        first = cache.layers[1].keys[..., :6, :].clone()
        cache.crop(-3)
    assert torch.equal(cache.layers[1].keys, first)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"keys": "int2"}, "keys is 'int2'; wanted one of int4, int8, fp8, nvfp4, none"),
        ({"rotate": "q"}, "rotate is 'q'"),
        ({"order": 12}, "order is 12; wanted 0"),
    ],
)
def test_options_that_are_wrong(options: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        llmopt.Cache(tiny("llama").config, **options)


def test_what_it_does_not_take() -> None:
    config = tiny(
        "qwen3", use_sliding_window=True, sliding_window=8, layer_types=["full_attention", "sliding_attention"]
    )
    with pytest.raises(InputError, match="has sliding_attention; wanted full attention in every layer"):
        llmopt.Cache(config.config)
    model = tiny("llama", head_dim=12)
    with pytest.raises(InputError, match="heads of 12 channels cannot be packed"), torch.no_grad():
        model(torch.tensor([[1, 2]]), past_key_values=llmopt.Cache(model.config))
