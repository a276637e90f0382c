"""Trained models: 128 greedy tokens of 16 ragged prompts of Python code in one batch, as transformers makes them."""

from __future__ import annotations

import os
import textwrap
from pathlib import Path

import pytest
import torch
from models.oracle import hf_tokens
from transformers import AutoModelForCausalLM, AutoTokenizer

import llmopt

ROOT = Path(__file__).resolve().parents[2]
PICO = ROOT / "examples/models/pico-llama-4m"
SMALL = Path(os.environ.get("LLMOPT_TEST_MODELS", ROOT.parent / "shared/models")) / "small-llama-28m"
LENGTHS = (1, 2, 3, 7, 15, 16, 17, 31, 40, 64, 65, 100, 128, 150, 200, 300)
RECIPES = ("reference", "default")


def needs(path: Path) -> pytest.MarkDecorator:
    return pytest.mark.skipif(not (path / "config.json").is_file(), reason=f"{path.name} is not on this machine")


MODELS = [pytest.param(PICO, id="pico"), pytest.param(SMALL, id="small", marks=needs(SMALL))]


def python_prompts(tokenizer: AutoTokenizer) -> list[list[int]]:
    """Prompts of the wanted lengths from this test suite's neighbour: real code, each from another place of it."""
    text = textwrap.dedent((ROOT / "compiler/pattern.py").read_text() + (ROOT / "compiler/graph.py").read_text())
    ids = tokenizer.encode(text)
    assert len(ids) > 2000
    return [ids[97 * i : 97 * i + n] for i, n in enumerate(LENGTHS)]


@pytest.mark.parametrize("folder", MODELS)
def test_128_tokens_of_16_ragged_prompts(folder: Path):
    prompts = python_prompts(AutoTokenizer.from_pretrained(folder))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    want = hf_tokens(model, prompts, 128)
    assert len({t for row in want for t in row}) > 100
    for recipe in RECIPES:
        mine = llmopt.compile(folder, recipe=recipe, dtype="float32")
        assert mine.generate(prompts, max_new_tokens=128, ignore_eos=True) == want, recipe


@pytest.mark.parametrize("recipe", RECIPES)
def test_generation_ends_where_that_of_transformers_ends(recipe: str):
    """Of many short prompts some reach the end token; the end token is part of the result on both sides."""
    tokenizer = AutoTokenizer.from_pretrained(PICO)
    model = AutoModelForCausalLM.from_pretrained(PICO, dtype=torch.float32, attn_implementation="eager")
    (stop,) = {model.generation_config.eos_token_id}
    with torch.no_grad():  # an end token that is likely: what the model says third for this prompt
        prompt = tokenizer.encode("import os\n")
        third = hf_tokens(model, [prompt], 3)[0][2]
    mine = llmopt.compile(PICO, recipe=recipe, dtype="float32")
    assert mine.program.facts.eos_token_ids == (stop,)
    out = mine.generate([prompt], max_new_tokens=20, stop_token_ids=[third])[0]
    ids = torch.tensor([prompt])
    want = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False, eos_token_id=third
    )
    assert out == want[0, len(prompt) :].tolist()
    assert out[-1] == third
    assert len(out) <= 3
