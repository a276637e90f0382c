"""Every family: transformers' own tokens for a ragged batch, and everything raised that should be."""

from __future__ import annotations

import copy
from collections import Counter
from pathlib import Path

import pytest
import torch
from models.families import FAMILIES, VOCAB, WINDOW, Family, markdown
from models.oracle import hf_tokens, relative_error

import llmopt
from llmopt.compiler.graph import target_name
from llmopt.model import CompiledModel

LENGTHS = (1, 2, WINDOW - 1, WINDOW + 2, 20, 41)
NEW_TOKENS = 24
BY_NAME = {family.name: family for family in FAMILIES}


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, VOCAB, (n,), generator=generator).tolist() for n in LENGTHS]


def compiled(
    family: Family, model: torch.nn.Module, folder: Path, dtype: str = "float32", recipe: str = "reference"
) -> CompiledModel:
    """From the saved folder, or as it is where the family's class does not fit its weights any more."""
    if family.alter is not None:
        return llmopt.compile(model, recipe=recipe)
    model.save_pretrained(folder)
    return llmopt.compile(folder, recipe=recipe, dtype=dtype)


# one of each kind of attention, norm and position: the compiled path is the same for the others
COMPILED = ("Llama 3.1", "Mistral", "Gemma 2", "Gemma 3", "Phi-3", "GPT-NeoX", "GPT-2", "GPT-OSS, dense")


@pytest.mark.parametrize("name", COMPILED)
def test_compiled_regions_give_the_tokens_of_transformers(name: str, tmp_path: Path):
    family = BY_NAME[name]
    model = family.model()
    mine = compiled(family, model, tmp_path, recipe="default")
    assert mine.program.choices["providers"]["attend=cpp"] > 0
    assert mine.generate(prompts(), max_new_tokens=NEW_TOKENS, ignore_eos=True) == hf_tokens(
        model, prompts(), NEW_TOKENS
    )


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
def test_tokens_are_those_of_transformers(family: Family, tmp_path: Path):
    model = family.model()
    want = hf_tokens(model, prompts(), NEW_TOKENS)
    assert len({t for row in want for t in row}) >= 12, "a degenerate model would prove nothing"
    assert len({tuple(row) for row in want}) >= 5, "the prompts must matter"
    mine = compiled(family, model, tmp_path)
    assert mine.generate(prompts(), max_new_tokens=NEW_TOKENS, ignore_eos=True) == want

    forward = mine.program.graph("forward")
    counts = Counter(target_name(n) for n in forward.calls())
    assert {name: counts[name] for name in family.counts} == family.counts
    calls = list(forward.calls("attention"))
    assert tuple(n.args[5] for n in calls) == family.attention_windows()
    assert {n.args[6] for n in calls} == {family.softcap}
    assert all((n.args[3] is not None) == family.sinks for n in calls)
    assert not list(forward.calls("aten.softmax"))


@pytest.mark.parametrize("name", ["Mistral", "Gemma 2", "Gemma 3", "Phi-4-mini", "GPT-OSS, dense"])
def test_the_window_of_these_models_matters(name: str):
    """The tokens differ without it, so the test above would notice a window that is ignored."""
    model = BY_NAME[name].model()
    want = hf_tokens(model, prompts(), NEW_TOKENS)
    for config in {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}.values():
        config.sliding_window = 200
    for module in model.modules():
        if getattr(module, "sliding_window", None) is not None:
            module.sliding_window = 200
    assert hf_tokens(model, prompts(), NEW_TOKENS) != want


@pytest.mark.parametrize("name", ["Llama", "Gemma 2", "Qwen3"])
def test_bfloat16_logits_are_as_close_to_fp64_as_those_of_transformers(name: str, tmp_path: Path):
    family = BY_NAME[name]
    model = family.model().to(torch.bfloat16)
    ids = torch.randint(3, VOCAB, (2, 33), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(ids).logits
        eager = model(ids).logits
    got = compiled(family, model, tmp_path, "bfloat16")(ids)
    assert got.dtype == torch.bfloat16
    assert relative_error(got, eager, exact) <= 1.5


def test_the_table_has_one_row_a_family():
    rows = markdown().splitlines()
    assert len(rows) == 2 + len(FAMILIES)
    assert len(BY_NAME) == len(FAMILIES)
    assert all(row.count("|") == 4 for row in rows)
