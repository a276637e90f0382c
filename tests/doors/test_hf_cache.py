"""llmopt.Cache under transformers' generate."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gpu_models import ragged, tiny
from transformers import DynamicCache, GenerationConfig

import llmopt
from llmopt.cache import PackedLayer
from llmopt.compiler.errors import InputError
from llmopt.compiler.quant.near import Near
from llmopt.compiler.recipe import PassSpec, Recipe
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


def stepwise(model: Any, ids: torch.Tensor, cache: Any, count: int) -> list[list[int]]:
    """Greedy tokens, the prompt read a token at a time."""
    with torch.no_grad():
        for at in range(ids.shape[1] - 1):
            model(ids[:, at : at + 1], past_key_values=cache)
    return generated(model, ids, cache, count)


@pytest.mark.parametrize(("sinks", "recent"), [(2, 0), (0, 3), (2, 5)])
def test_near_tokens_are_those_of_the_compiled_model(sinks: int, recent: int) -> None:
    model, prompts = tiny("llama"), ragged(12)
    plain = Recipe.parse("int4-kv")
    passes = [
        PassSpec.of(s.name, **{**dict(s.options), "sinks": sinks, "recent": recent}) if s.name == "quantize-kv" else s
        for s in plain.passes
    ]
    recipe = Recipe("near", tuple(passes), providers=("reference",))
    want = llmopt.compile(tiny("llama"), recipe, target="cpu").engine.generate(
        prompts, SamplingParams(max_new_tokens=16)
    )
    cache = llmopt.Cache(model.config, sinks=sinks, recent=recent)
    assert stepwise(model, torch.tensor(prompts), cache, 16) == want
    assert cache.layers[0].first.get_seq_length() == sinks
    assert cache.layers[0].last.get_seq_length() == recent


def test_where_every_token_is_near_nothing_is_rounded() -> None:
    model, ids = tiny("qwen3"), torch.tensor(ragged(9))
    plain = generated(model, ids, DynamicCache(config=model.config), num_beams=3)
    for near in ({"sinks": 40}, {"recent": 40}, {"sinks": 4, "recent": 15}):
        assert generated(model, ids, llmopt.Cache(model.config, **near), num_beams=3) == plain


def test_near_tokens_are_cropped_repeated_and_forgotten() -> None:
    layer = PackedLayer("int8", "int8", 0, "none", Near(4, 3))
    x, more = torch.randn(2, 1, 9, 16), torch.randn(2, 1, 1, 16)
    layer.update(x, x)
    layer.crop(-2)
    held, _ = layer.update(more, more)
    near = torch.tensor([0, 1, 2, 3, 6, 7])
    assert torch.equal(held[..., near, :], torch.cat((x[..., :7, :], more), -2)[..., near, :])
    assert not torch.equal(held[..., 5, :], x[..., 5, :])  # it was pushed out by those that are gone
    layer.crop(-6)
    layer.batch_repeat_interleave(2)
    layer.batch_select_indices(torch.tensor([3, 0]))
    held, _ = layer.update(more, more)
    assert torch.equal(held, torch.cat((x[[1, 0]][..., :2, :], more), -2))
    layer.reset()
    held, _ = layer.update(more, more)
    assert torch.equal(held, more)
    assert (layer.first.get_seq_length(), layer.last.get_seq_length()) == (1, 1)


def test_beams_reorder_rows() -> None:
    model, ids = tiny("qwen3"), torch.tensor(ragged(9))
    plain = generated(model, ids, DynamicCache(config=model.config), num_beams=3)
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
        ({"order": "16"}, "order is '16'; wanted 0"),
        ({"sinks": True}, "sinks is True; wanted a number of tokens"),
        ({"recent": -1}, "recent is -1; wanted a number of tokens from 0 on"),
        ({"keys": "none", "values": "none", "sinks": 4}, "keys and values are both none, so nothing is packed"),
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
