"""`llmopt export --to compressed-tensors`: what transformers loads from it computes what the compiled model does."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.transform import TransformConfig, apply_transform_config
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, CompressedTensorsConfig
from typer.testing import CliRunner

import llmopt
from llmopt.cli import app
from llmopt.commands.export import export
from llmopt.commands.model import Wanted
from llmopt.compiler import ops
from llmopt.compiler.errors import ArtifactError, InputError
from llmopt.compiler.quant.storage import PARTS
from llmopt.compiler.recipe import PassSpec, Recipe
from llmopt.runtime import export_checkpoint
from llmopt.runtime.export_checkpoint import Item, write

SIZES = {
    "vocab_size": 96, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 64, "initializer_range": 0.2,
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "llama-tied": {"tie_word_embeddings": True},
    "qwen2": {},
    "qwen3": {},
    "gemma": {},  # norms with 1 + weight, tied embeddings
}
IDS = torch.randint(0, 96, (2, 11), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {}
    for kind, more in KINDS.items():
        torch.manual_seed(1)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind.partition("-")[0], **{**SIZES, **more}))
        for weight in model.parameters():
            if weight.dim() == 1:  # norms, and biases, which begin as ones and zeros
                weight.data += torch.randn_like(weight) * 0.3
        found[kind] = tmp_path_factory.mktemp(kind)
        model.save_pretrained(found[kind])
    return found


def exported(source: Path, recipe: str, out: Path, *more: str) -> str:
    """What the command says."""
    given = ["export", str(source), "--to", "compressed-tensors", "-o", str(out), "-r", recipe, *more]
    result = CliRunner().invoke(app, given)
    return result.output if result.exit_code == 0 else f"failed: {result.output}{result.exception}"


def read(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, by its index."""
    where = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    found = {}
    for file in set(where.values()):
        with safe_open(folder / file, framework="pt") as opened:
            found |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    assert set(found) == set(where)
    return found


def logits(folder: Path) -> torch.Tensor:
    """By transformers and compressed-tensors."""
    config = json.loads((folder / "config.json").read_text())
    more = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if "quantization_config" in config else {}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **more)
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize(
    ("kind", "recipe"),
    [
        ("llama", "default"),
        ("llama", "rotate+mxfp4"),
        ("llama", "mxfp6"),
        ("llama", "rotate+mxfp6"),
        ("llama-tied", "fp8"),
        ("llama-tied", "rotate+fp8"),
        ("llama-tied", "rotate+int8"),
        ("qwen2", "rotate+mxfp8"),
        ("qwen3", "rotate"),
        ("gemma", "rotate+mxfp4"),
    ],
)
def test_transformers_computes_the_same(kind: str, recipe: str, sources: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert exported(sources[kind], recipe, out).startswith("wrote")
    want = llmopt.compile(str(sources[kind]), recipe=recipe, target="cpu")(IDS)
    assert float((logits(out) - want).norm() / want.norm()) < 1e-5


@pytest.mark.parametrize("recipe", ["int4", "int4-asym", "nvfp4"])
def test_what_it_restores_to_bfloat16(recipe: str, sources: dict[str, Path], tmp_path: Path) -> None:
    """Its scales are that by then: weights are as near to ours as one rounding to eight bits leaves them."""
    out = tmp_path / "out"
    exported(sources["qwen3"], recipe, out)
    model = AutoModelForCausalLM.from_pretrained(
        out, dtype=torch.float32, quantization_config=CompressedTensorsConfig(dequantize=True)
    )
    program = llmopt.compile(str(sources["qwen3"]), recipe=recipe, target="cpu").program
    for name in ("model.layers.1.self_attn.o_proj.weight", "model.layers.1.mlp.down_proj.weight"):
        parts = [program.weights.get(f"{name}.{part}") for part in PARTS]
        stored = [None if part is None else part.load() for part in parts]
        eye = torch.eye(program.weights[name].shape[1])
        scheme = {"int4": "int4_g128", "int4-asym": "int4_g128_asym"}.get(recipe, recipe)
        want = ops.quantized_linear(eye, *stored, None, scheme, "").T
        got = model.get_submodule(name.removesuffix(".weight")).weight
        assert float(((got - want).abs() - want.abs() * 2.0**-8).max()) <= 0
        assert not torch.equal(want, program.weights[name].load())


def test_the_config_is_compressed_tensors_own(sources: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    exported(sources["llama"], "w8a8-fp8", out)
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    found = QuantizationConfig.model_validate(config)
    (group,) = found.config_groups.values()
    assert (group.weights.num_bits, group.weights.strategy, group.input_activations.strategy) == (8, "channel", "token")
    assert found.ignore == ["lm_head"]
    tensors = read(out)
    assert tensors["model.layers.0.self_attn.k_proj.weight"].dtype == torch.float8_e4m3fn
    assert tensors["model.layers.0.self_attn.k_proj.weight_scale"].shape == (64, 1)
    assert tensors["model.layers.0.self_attn.k_proj.bias"].shape == (64,)


def test_modules_of_two_schemes(sources: dict[str, Path], tmp_path: Path) -> None:
    """The head in another one, of embeddings that were tied to it. transformers' `dequantize` knows one scheme only."""
    recipe = Recipe.parse("fp8")
    quantize = PassSpec.of("quantize", weights="fp8_channel", lm_head="int8")
    passes = tuple(quantize if spec.name == "quantize" else spec for spec in recipe.passes)
    file, out = tmp_path / "mine.yaml", tmp_path / "out"
    file.write_text(replace(recipe, name="mine", passes=passes).to_yaml())
    assert exported(sources["llama-tied"], str(file), out).startswith("wrote")
    config = json.loads((out / "config.json").read_text())
    assert config["quantization_config"]["format"] == "mixed-precision"
    assert not config["tie_word_embeddings"]
    want = llmopt.compile(str(sources["llama-tied"]), recipe=str(file), target="cpu")(IDS)
    with torch.no_grad():
        got = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)(IDS).logits
    assert float((got - want).norm() / want.norm()) < 1e-5


def test_joined_modules_share_nvfp4_s_global_scale(sources: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    exported(sources["qwen3"], "nvfp4", out)
    tensors = read(out)
    for layer in (0, 1):
        attention, mlp = f"model.layers.{layer}.self_attn", f"model.layers.{layer}.mlp"
        for modules in ([f"{attention}.{p}_proj" for p in "qkv"], [f"{mlp}.{p}_proj" for p in ("gate", "up")]):
            shared = {float(tensors[f"{module}.weight_global_scale"]) for module in modules}
            assert len(shared) == 1


def test_scales_of_keys_and_values(sources: dict[str, Path], tmp_path: Path) -> None:
    """The largest magnitudes that transformers' own cache holds behind the calibration tokens, over 448."""
    compiled = llmopt.compile(str(sources["qwen3"]), recipe="fp8", target="cpu:generic")
    out = compiled.export(tmp_path / "out", "compressed-tensors", IDS, kv_cache="fp8")
    config = QuantizationConfig.model_validate(json.loads((out / "config.json").read_text())["quantization_config"])
    assert config.kv_cache_scheme is not None
    assert (config.kv_cache_scheme.num_bits, config.kv_cache_scheme.type) == (8, "float")
    tensors = read(out)
    model = AutoModelForCausalLM.from_pretrained(
        out, dtype=torch.float32, quantization_config=CompressedTensorsConfig(dequantize=True)
    )
    with torch.no_grad():
        layers = model(IDS, use_cache=True).past_key_values.layers
    for number, layer in enumerate(layers):
        for letter, value in (("k", layer.keys), ("v", layer.values)):
            scale = tensors[f"model.layers.{number}.self_attn.{letter}_scale"]
            assert scale.shape == (1,)
            torch.testing.assert_close(scale, value.abs().max().reshape(1) / 448, rtol=1e-5, atol=0)
    with pytest.raises(InputError, match="--kv-cache int4 cannot leave as compressed-tensors"):
        compiled.export(tmp_path / "none", "compressed-tensors", IDS, kv_cache="int4")


def test_a_turned_head_is_no_longer_tied(sources: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    exported(sources["gemma"], "rotate", out)
    config, tensors = json.loads((out / "config.json").read_text()), read(out)
    assert config["tie_word_embeddings"] is False
    assert not torch.equal(tensors["lm_head.weight"], tensors["model.embed_tokens.weight"])
    assert not tensors["model.norm.weight"].any()  # 1 + 0


def turned(file: Path, **options: bool | int) -> Path:
    """A recipe that rotates and quantises."""
    recipe = Recipe.parse("rotate+fp8")
    rotate = PassSpec.of("rotate-hadamard", **options)
    passes = tuple(rotate if spec.name == rotate.name else spec for spec in recipe.passes)
    file.write_text(replace(recipe, name="turned", passes=passes).to_yaml())
    return file


@pytest.mark.parametrize("order", [0, 64])
def test_rotations_that_run_in_the_model(order: int, sources: dict[str, Path], tmp_path: Path) -> None:
    """compressed-tensors puts them into transformers' model, with the matrices of the checkpoint."""
    recipe, out = str(turned(tmp_path / "mine.yaml", r4=True, order=order)), tmp_path / "out"
    assert exported(sources["llama"], recipe, out).startswith("wrote")
    config = json.loads((out / "config.json").read_text())["quantization_config"]["transform_config"]
    model = AutoModelForCausalLM.from_pretrained(
        out, dtype=torch.float32, quantization_config=CompressedTensorsConfig(dequantize=True)
    )
    apply_transform_config(model, TransformConfig.model_validate(config))
    stored = {name: tensor for name, tensor in read(out).items() if "R4" in name}
    assert [tuple(t.shape) for t in stored.values()] == [(order or 256, order or 256)] * 2
    with torch.no_grad():
        want = llmopt.compile(str(sources["llama"]), recipe=recipe, target="cpu")(IDS)
        for name, tensor in stored.items():
            model.get_parameter(name).copy_(tensor)
        got = model(IDS).logits
    assert float((got - want).norm() / want.norm()) < 1e-5


def test_what_the_format_cannot_say(sources: dict[str, Path], tmp_path: Path) -> None:
    out, source = tmp_path / "out", sources["llama"]
    for recipe, said in (
        ("mxfp6-e3m2", "no format for mxfp6_e3m2; nearest is mxfp6_e2m3 or mxfp8"),
        ("w4a4", "activations in nvfp4 have one static scale"),
        (str(turned(tmp_path / "queries.yaml", r3=True)), "leave r3 out of the rotation"),
        ("nvfp4+int4-kv", "leave the recipe's -kv part out"),
    ):
        assert said in " ".join(exported(source, recipe, out).split())
        assert not out.exists()
    with pytest.raises(InputError, match="--to 'onx' is no format"):
        export(str(source), "onx", out, {}, Wanted("fp8"), as_json=False)


def test_what_stands_in_the_way(sources: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    source = sources["llama"]
    for there, said in ((source, "is the model itself"), (sources["qwen2"], "was not written by `llmopt export`")):
        before = {path.name: path.read_bytes() for path in there.iterdir()}
        assert said in " ".join(exported(source, "fp8", there).split())
        assert {path.name: path.read_bytes() for path in there.iterdir()} == before
    with pytest.raises(ArtifactError, match="was not written by `llmopt export`"):  # before the recipe is looked at
        export(str(source), "onnx", sources["qwen2"], {}, Wanted("no such recipe"), as_json=False)
    with pytest.raises(InputError, match="is not a folder to write to"):
        export(str(source), "onnx", source / "config.json" / "out", {}, Wanted("no such recipe"), as_json=False)
    assert exported(source, "fp8", out).startswith("wrote")
    assert exported(source, "int8", out).startswith("wrote")  # over the older one
    assert read(out)["model.layers.0.mlp.up_proj.weight"].dtype == torch.int8
    (out / "thesis.tex").write_text("mine")
    assert "thesis.tex" in "".join(exported(source, "fp8", out).split())
    assert read(out)["model.layers.0.mlp.up_proj.weight"].dtype == torch.int8


def test_nothing_is_left_of_an_export_that_fails(tmp_path: Path) -> None:
    def fail() -> dict[str, torch.Tensor]:
        raise ArtifactError("no more")

    good = Item({"a": ((2,), torch.float32)}, lambda: {"a": torch.ones(2)})
    with pytest.raises(ArtifactError, match="no more"):
        write([good, Item({"b": ((2,), torch.float32)}, fail)], {}, {}, tmp_path / "out", {})
    assert not list(tmp_path.iterdir())


def test_large_checkpoints_have_several_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export_checkpoint, "SHARD_BYTES", 20)
    tensors = {name: torch.full((3,), value) for value, name in enumerate("abcd", 1)}
    items = [Item({n: ((3,), torch.int64)}, lambda n=n: {n: tensors[n]}) for n in tensors]
    told = write(items, {"model_type": "llama"}, {}, tmp_path / "out", {})
    assert told == {"bytes": 96, "files": 4, "tensors": 4}
    assert {name: tensor.tolist() for name, tensor in read(tmp_path / "out").items()} == {
        name: tensor.tolist() for name, tensor in tensors.items()
    }
