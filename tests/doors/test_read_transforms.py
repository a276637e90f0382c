"""Checkpoints with a `transform_config` compute what compressed-tensors' transforms make of transformers' model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.transform import TransformArgs, TransformConfig, TransformScheme, apply_transform_config
from onnx_runtime import logits, off
from packed_checkpoint import MLP, SIZES, written
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, Olmo2Config

import llmopt
from llmopt.compiler.emittable import op_name
from llmopt.compiler.errors import InputError
from llmopt.compiler.hadamard import hadamard
from llmopt.compiler.quant.transforms_read import Turn
from llmopt.compiler.recipe import PassSpec, Recipe

IDS = torch.randint(0, 96, (2, 11), generator=torch.Generator().manual_seed(1))
EIGHT_BITS = QuantizationScheme(
    targets=["Linear"], weights=QuantizationArgs(num_bits=8, type="int", strategy="channel", symmetric=True)
)


def turned(kind: str, target: str, *places: str, **more: Any) -> TransformScheme:
    """Matrices at `places`; a `-` before one means the inverse."""
    apply = [TransformArgs(targets=[target], location=p.removeprefix("-"), inverse=p[0] == "-") for p in places]
    return TransformScheme(type=kind, apply=apply, **more)


CONFIGS = {
    "down projections": {"R4": turned("hadamard", "re:.*down_proj", "input", "-weight_input")},
    "random signs": {"R4": turned("random-hadamard", "re:.*down_proj", "input", "-weight_input")},
    "the inverse": {"R4": turned("random-hadamard", "re:.*down_proj", "-input", "weight_input")},
    "blocks in random order": {
        "R4": turned("hadamard", "re:.*down_proj", "input", "-weight_input", head_dim=128, randomize=True)
    },
    "in front and behind": {
        "v": turned("random-hadamard", "re:.*[qkv]_proj", "input", "-weight_input", head_dim=64),
        "u": turned("hadamard", "re:.*(gate|up)_proj", "weight_output", "-output", head_dim=128),
    },
    "two on one module": {
        "A": turned("random-hadamard", "re:.*down_proj", "input", "-weight_input", head_dim=32),
        "B": turned("random-hadamard", "re:.*down_proj", "input", "-weight_input", head_dim=256),
    },
    "all inputs": {"v": turned("random-hadamard", "Linear", "input", "-weight_input", head_dim=256)},
    "any matrix": {"M": turned("random-matrix", "re:.*o_proj", "input", "-weight_input", head_dim=16)},
    "queries and keys": {"R3": turned("random-hadamard", "re:.*self_attn$", "q_attn", "k_cache", head_dim=64)},
}


def state(source: Path, decoded: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of the checkpoint that are no codes, and what codes stand for."""
    tensors = load_file(source / "model.safetensors")
    coded = {name.removesuffix("_scale") for name in tensors if name.endswith("weight_scale")}
    plain = {n: v for n, v in tensors.items() if not any(n.startswith(f"{name}_") for name in coded)}
    return plain | {name: decoded[name] for name in coded}


@pytest.mark.parametrize("name", list(CONFIGS))
def test_logits(name: str, tmp_path: Path) -> None:
    config = TransformConfig(config_groups=CONFIGS[name])
    source = written(tmp_path / "in", EIGHT_BITS, torch.float32, transforms=config)
    assert json.loads((source / "config.json").read_text())["quantization_config"]["transform_config"]
    compiled = llmopt.compile(str(source), dtype="float32", target="cpu:generic")
    weights = compiled.program.weights
    assert list(compiled.program.graph("forward").calls("quantized_linear"))
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES)).eval()
    online = {
        n: s.model_copy(update={"apply": [a for a in s.apply if a.is_online()]}) for n, s in CONFIGS[name].items()
    }
    apply_transform_config(model, TransformConfig(config_groups=online))
    stored = state(source, {n: w.load() for n, w in weights.items() if n.endswith("_proj.weight")})
    left = model.load_state_dict(stored, strict=False)
    assert not left.unexpected_keys
    with torch.no_grad():
        want = model(IDS).logits
    assert float((compiled(IDS) - want).norm() / want.norm()) < 1e-5


def test_weights_are_joined_behind_one_rotation(tmp_path: Path) -> None:
    config = TransformConfig(config_groups=CONFIGS["in front and behind"])
    source = written(tmp_path / "in", EIGHT_BITS, torch.float32, transforms=config)
    graph = llmopt.compile(str(source), dtype="float32", target="cpu:generic").program.graph("forward")
    # of queries, keys and values one in front of all; of gates and inputs one behind each
    assert len(list(graph.calls("rotate"))) == 2 * (1 + 2)
    assert len(list(graph.calls("quantized_linear"))) == 2 * 4


def test_what_left_with_rotations_comes_back(tmp_path: Path) -> None:
    """Blocks of 64 in a factor each: the same tensors leave again, with the same logits."""
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(LlamaConfig(**SIZES)).save_pretrained(tmp_path / "in")
    recipe = Recipe.parse("rotate+fp8")
    rotate = PassSpec.of("rotate-hadamard", r4=True, order=64)
    recipe = replace(recipe, passes=tuple(rotate if s.name == rotate.name else s for s in recipe.passes))
    first = llmopt.compile(str(tmp_path / "in"), recipe, target="cpu:generic")
    out = first.export(tmp_path / "out", "compressed-tensors")
    second = llmopt.compile(str(out), target="cpu:generic")
    assert len(list(second.program.graph("forward").calls("rotate"))) == 2
    assert torch.equal(first(IDS), second(IDS))
    again = second.export(tmp_path / "again", "compressed-tensors")
    before, after = (load_file(folder / "model-00001-of-00001.safetensors") for folder in (out, again))
    assert set(before) == set(after)
    assert all(torch.equal(before[n].float(), after[n].float()) for n in before)


LEAVE = {"down projections", "random signs", "blocks in random order", "all inputs", "queries and keys"}


@pytest.mark.parametrize("name", list(CONFIGS))
def test_what_was_read_leaves_whole_or_not_at_all(name: str, tmp_path: Path) -> None:
    """With its signs, for joined weights, too; what the format cannot say is refused."""
    config = TransformConfig(config_groups=CONFIGS[name])
    source = written(tmp_path / "in", EIGHT_BITS, torch.float32, transforms=config)
    compiled = llmopt.compile(str(source), dtype="float32", target="cpu:generic")
    if name in LEAVE:
        again = llmopt.compile(str(compiled.export(tmp_path / "out", "compressed-tensors")), target="cpu:generic")
        assert float((again(IDS) - compiled(IDS)).norm() / compiled(IDS).norm()) < 1e-6
    else:
        with pytest.raises(InputError, match=r"products (read|write) alone; export --to onnx, which takes it as it is"):
            compiled.export(tmp_path / "out", "compressed-tensors")
    if name != "queries and keys":
        with pytest.raises(InputError, match=r"export --to (compressed-tensors|onnx)"):
            compiled.export(tmp_path / "out", "modelopt")
    out = compiled.export(tmp_path / "onnx", "onnx", cache=False)
    assert off(logits(out, IDS), compiled(IDS)) < 1e-5


def test_what_a_norm_reads_is_no_product_s(tmp_path: Path) -> None:
    """OLMo 2 has norms right behind its queries' and keys' products."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(Olmo2Config(**SIZES)).eval()
    turn = Turn(hadamard(256).float(), 16.0, 256, torch.float32)
    model.add_module("transform_0", turn)
    for layer in model.model.layers:
        layer.self_attn.q_proj.register_forward_hook(lambda _, given, made: turn(made))
    compiled = llmopt.compile(model, target="cpu:generic")
    (reader, *_) = [user for node in compiled.program.graph("forward").calls("rotate") for user in node.users]
    assert op_name(reader) == "rms_norm"
    with pytest.raises(InputError, match=r"is rotated for rms_norm, and runtimes of compressed-tensors rotate what"):
        compiled.export(tmp_path / "out", "compressed-tensors")


def test_notes(tmp_path: Path) -> None:
    config = TransformConfig(config_groups=CONFIGS["queries and keys"])
    compiled = llmopt.compile(str(written(tmp_path, EIGHT_BITS, transforms=config)), target="cpu:generic")
    (entry,) = [entry for entry in compiled.report.passes if entry.name == "keep-codes"]
    assert "queries and keys are not turned by R3: that changes none of their products" in entry.stats.notes


def test_what_is_refused(tmp_path: Path) -> None:
    source = written(tmp_path, EIGHT_BITS, transforms=TransformConfig(config_groups=CONFIGS["random signs"]))
    config, tensors = json.loads((source / "config.json").read_text()), load_file(source / "model.safetensors")
    group = config["quantization_config"]["transform_config"]["config_groups"]["R4"]
    place = {"targets": ["re:.*self_attn$"], "ignore": [], "inverse": False}
    for changed, said in (
        ({**group, "apply": [{"location": "v_cache"}]}, "none that compressed-tensors reads"),
        ({**group, "type": "butterfly"}, "type 'butterfly', which is none of hadamard, random-hadamard, random-matrix"),
        ({**group, "head_dim": 0}, "by blocks of 0, which do not divide its 512"),
        (
            {**group, "apply": [{**place, "targets": ["re:*("], "location": "input"}]},
            "has a pattern that is none in R4",
        ),
        ({**group, "apply": [{**place, "targets": ["re:.*w2$"], "location": "input"}]}, "the model has no such module"),
        ({**group, "head_dim": 96}, "by blocks of 96, which do not divide its 512"),
        ({**group, "head_dim": 128}, r"has no model.layers.0.mlp.down_proj.R4_input.weight of \[128, 128\]"),
        ({**group, "randomize": True}, "R4_input.weight of .* or no .perm of"),
        ({**group, "head_dim": 64, "apply": [{**place, "location": "k_cache"}]}, r"turns k_cache of .*self_attn"),
        (
            {**group, "apply": [{**place, "targets": ["Embedding"], "location": "output"}]},
            r"embed_tokens \(Embedding\)",
        ),
    ):
        told = {**config["quantization_config"], "transform_config": {"config_groups": {"R4": changed}}}
        (source / "config.json").write_text(json.dumps({**config, "quantization_config": told}))
        with pytest.raises(InputError, match=said):
            llmopt.compile(str(source), target="cpu:generic")
    (source / "config.json").write_text(json.dumps(config))
    (matrix,) = (n for n in tensors if "R4_input" in n)
    bad = {**tensors, matrix: torch.full_like(tensors[matrix], float("nan"))}
    save_file(bad, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=f"matrix {matrix} of the checkpoint has numbers that are not finite"):
        llmopt.compile(str(source), target="cpu:generic")
    kept = {n: t for n, t in tensors.items() if n != matrix}
    assert len(kept) == len(tensors) - 1  # saved once for all modules
    save_file(kept, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=f"has no {MLP}.down_proj.R4_input.weight"):
        llmopt.compile(str(source), target="cpu:generic")
