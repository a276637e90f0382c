"""Checkpoint folders as people have them: shards, ties, dtypes, stop tokens, and what is wrong with them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from models.families import FAMILIES
from models.oracle import hf_tokens
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BertConfig, BertModel, GenerationConfig, PreTrainedModel

import llmopt
from llmopt.compiler.errors import CaptureError, InputError

LLAMA, TIED = FAMILIES[0], FAMILIES[1]
PROMPTS = [[5, 6, 7], [9] * 12, [100, 3]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    LLAMA.model().save_pretrained(tmp_path)
    return tmp_path


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def edit_weights(folder: Path, **changes: torch.Tensor | None) -> None:
    """Replace tensors of the single file, or take them out (None); `__` in a name stands for a dot."""
    path = folder / "model.safetensors"
    tensors = {**load_file(path), **{k.replace("__", "."): v for k, v in changes.items()}}
    save_file({k: v for k, v in tensors.items() if v is not None}, path, metadata={"format": "pt"})


def tokens(source: Path, **options: object) -> list[list[int]]:
    compiled = llmopt.compile(source, recipe="reference", **options)
    return compiled.generate(PROMPTS, max_new_tokens=8, ignore_eos=True)


def reloaded(folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager")


def test_sharded_checkpoint(tmp_path: Path):
    model = LLAMA.model()
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert tokens(tmp_path) == hf_tokens(model, PROMPTS, 8)


def test_missing_shard_is_named(tmp_path: Path):
    LLAMA.model().save_pretrained(tmp_path, max_shard_size="50KB")
    lost = sorted(tmp_path.glob("model-*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(InputError, match=f"{lost.name}, which is not there"):
        llmopt.compile(tmp_path, recipe="reference")


def test_tied_embeddings_are_one_weight(tmp_path: Path):
    model = TIED.model()
    model.save_pretrained(tmp_path)
    compiled = llmopt.compile(tmp_path, recipe="reference")
    assert "model.embed_tokens.weight" in compiled.weights
    assert "lm_head.weight" not in compiled.weights
    assert tokens(tmp_path) == hf_tokens(model, PROMPTS, 8)


def test_bf16_checkpoint_in_float32(tmp_path: Path):
    LLAMA.model().to(torch.bfloat16).save_pretrained(tmp_path)
    compiled = llmopt.compile(tmp_path, recipe="reference", dtype="float32")
    assert {w.dtype for w in compiled.weights.values()} == {torch.float32}
    assert compiled.generate(PROMPTS, max_new_tokens=8) == hf_tokens(reloaded(tmp_path), PROMPTS, 8)


def test_config_without_architectures(folder: Path):
    edit_config(folder, architectures=None)
    assert tokens(folder) == hf_tokens(reloaded(folder), PROMPTS, 8)


@pytest.mark.parametrize("eos", [7, [7, 9, 11]])
def test_stop_tokens_of_the_generation_config_win(folder: Path, eos: int | list[int]):
    edit_config(folder, eos_token_id=3)
    GenerationConfig(eos_token_id=eos).save_pretrained(folder)
    want = (7,) if eos == 7 else (7, 9, 11)
    assert llmopt.compile(folder, recipe="reference").program.facts.eos_token_ids == want
    live = reloaded(folder)
    assert llmopt.compile(live, recipe="reference").program.facts.eos_token_ids == want


def test_generation_stops_at_any_of_the_stop_tokens(folder: Path):
    row = hf_tokens(reloaded(folder), PROMPTS[:1], 8)[0]
    stop = row[3]
    GenerationConfig(eos_token_id=[159, stop]).save_pretrained(folder)
    made = llmopt.compile(folder, recipe="reference").generate(PROMPTS[:1], max_new_tokens=8)[0]
    assert made == row[: row.index(stop) + 1]


def test_not_a_causal_model(tmp_path: Path):
    config = BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=50)
    BertModel(config).save_pretrained(tmp_path)
    with pytest.raises((InputError, CaptureError), match="causal"):
        llmopt.compile(tmp_path, recipe="reference")


def test_missing_weight_is_named(folder: Path):
    edit_weights(folder, model__layers__1__mlp__up_proj__weight=None)
    with pytest.raises(InputError, match=r"lacks model\.layers\.1\.mlp\.up_proj\.weight"):
        llmopt.compile(folder, recipe="reference")


def test_weight_of_another_shape_is_named(folder: Path):
    edit_weights(folder, model__norm__weight=torch.ones(65))
    with pytest.raises(InputError, match=r"model\.norm\.weight.*\(65,\); wanted \(64,\)"):
        llmopt.compile(folder, recipe="reference")


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_quantised_weight_is_named(folder: Path, dtype: torch.dtype):
    edit_weights(folder, model__layers__0__mlp__up_proj__weight=torch.ones(96, 64).to(dtype))
    with pytest.raises(InputError, match=r"layers\.0\.mlp\.up_proj\.weight.*stored as (I8|F8_E4M3); wanted one of"):
        llmopt.compile(folder, recipe="reference")


def test_quantised_checkpoint_is_refused_before_its_weights(folder: Path):
    edit_config(folder, quantization_config={"quant_method": "fp8"})
    with pytest.raises(InputError, match=r"quantised checkpoint.*fp8"):
        llmopt.compile(folder, recipe="reference")


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda f: (f / "config.json").unlink(), "a folder without config.json"),
        (lambda f: (f / "config.json").write_text("{"), "config cannot be read"),
        (lambda f: edit_config(f, model_type="no_such_type"), "config cannot be read"),
        (lambda f: (f / "model.safetensors").unlink(), "no model.safetensors"),
    ],
    ids=["no config", "damaged config", "unknown type", "no weights"],
)
def test_damaged_folder(folder: Path, damage, says: str):
    damage(folder)
    with pytest.raises(InputError, match=says):
        llmopt.compile(folder, recipe="reference")


def test_no_such_folder():
    with pytest.raises(InputError, match="no such folder"):
        llmopt.compile("./no/such/folder", recipe="reference")


def test_rope_that_depends_on_the_length_is_refused(tmp_path: Path):
    """NTK scaling by the longest position seen: what a token's key is would depend on tokens yet to come."""
    model = LLAMA.model()
    scaled = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0, "original_max_position_embeddings": 16}
    model.save_pretrained(tmp_path)
    edit_config(tmp_path, rope_parameters=scaled)
    with pytest.raises(CaptureError, match=r"rope|modeling_llama"):
        llmopt.compile(tmp_path, recipe="reference")
