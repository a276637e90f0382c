"""`llmopt export --to modelopt`, and such checkpoints as compile input: the codes of one are those of the other.

The tensors' names, shapes and types are those that NVIDIA's exporter writes; what they stand for is computed here by
the formats' own formulas.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig
from typer.testing import CliRunner

import llmopt
from llmopt.cli import app
from llmopt.compiler.capture_hf import capture_hf
from llmopt.compiler.errors import InputError
from llmopt.compiler.quant import ELEMENTS, SCHEMES, pack, quantize
from llmopt.compiler.quant.modelopt import tensors_of
from llmopt.compiler.quant.storage import parts_of
from llmopt.compiler.recipe import PassSpec, Recipe

SIZES = {
    "vocab_size": 96, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 64, "initializer_range": 0.1,
}  # fmt: skip
IDS = torch.randint(0, 96, (2, 11), generator=torch.Generator().manual_seed(1))
DOWN, KEYS = "model.layers.0.mlp.down_proj", "model.layers.0.self_attn.k_proj"
FILE = "model-00001-of-00001.safetensors"
E4M3 = torch.float8_e4m3fn


def quantised(**options: Any) -> Recipe:
    recipe = Recipe.parse("fp8")
    quantize = PassSpec.of("quantize", **options)
    return replace(recipe, name="mine", passes=tuple(quantize if s.name == "quantize" else s for s in recipe.passes))


RECIPES = {  # of each algorithm, and the tensors of a module [128, 256]
    "W4A16_NVFP4": (
        "nvfp4",
        {
            "weight": ((128, 128), torch.uint8), "weight_scale": ((128, 16), E4M3),
            "weight_scale_2": ((), torch.float32),
        },
    ),
    "FP8_PER_CHANNEL_PER_TOKEN": (
        "w8a8-fp8", {"weight": ((128, 256), E4M3), "weight_scale": ((128,), torch.float32)},
    ),
    "fp8_pb_wo": (
        quantised(weights="fp8_block"),
        {"weight": ((128, 256), E4M3), "weight_scale": ((1, 1, 2, 1), torch.float32)},
    ),
    "MXFP8": (
        quantised(scheme="MXFP8"), {"weight": ((128, 256), E4M3), "weight_scale": ((128, 8), torch.uint8)},
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("llama")
    AutoModelForCausalLM.from_config(LlamaConfig(**SIZES)).to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def written(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of an algorithm, made once, with the logits of the model that it was made of."""
    made: dict[str, Path] = {}

    def of(algo: str) -> Path:
        if algo not in made:
            made[algo] = tmp_path_factory.mktemp("out") / algo
            compiled = llmopt.compile(str(source), RECIPES[algo][0], target="cpu:generic")
            compiled.export(made[algo], "modelopt")
            torch.save(compiled(IDS), made[algo].with_suffix(".pt"))
        return made[algo]

    return of


def changed(folder: Path, to: Path, tensors: dict[str, Tensor | None], **config: Any) -> Path:
    """A copy with other tensors (None: left out) and entries of `quantization_config`."""
    shutil.copytree(folder, to)
    held = {**load_file(folder / FILE), **tensors}
    save_file({name: tensor for name, tensor in held.items() if tensor is not None}, to / "model.safetensors")
    (to / FILE).unlink()
    (to / "model.safetensors.index.json").unlink()
    whole = json.loads((to / "config.json").read_text())
    whole["quantization_config"] |= config
    (to / "config.json").write_text(json.dumps(whole))
    return to


def notes(compiled: llmopt.Model) -> list[str]:
    (entry,) = [entry for entry in compiled.report.passes if entry.name == "keep-codes"]
    return entry.stats.notes


def restored(held: dict[str, Tensor]) -> Tensor:
    """What the tensors of a module stand for, in float64."""
    weight, scales = held["weight"], held["weight_scale"]
    if weight.dtype == torch.uint8:
        table = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)
        nibbles = torch.stack((weight & 15, weight >> 4), -1).flatten(1).long()
        values = table[nibbles & 7] * (1 - 2 * (nibbles >> 3))
        return values * scales.double().repeat_interleave(16, 1) * held["weight_scale_2"].double()
    values = weight.double()
    if scales.dtype == torch.uint8:
        return values * torch.exp2(scales.double() - 127).repeat_interleave(32, 1)
    if scales.dim() == 4:
        return values * scales[:, 0, :, 0].double().repeat_interleave(128, 0).repeat_interleave(128, 1)
    return values * scales.double()[:, None]


@pytest.mark.parametrize("algo", list(RECIPES))
def test_what_is_written_is_read(algo: str, written: Callable[[str], Path], tmp_path: Path) -> None:
    out = written(algo)
    tensors = load_file(out / FILE)
    got = {name.rpartition(".")[2]: tensors[name] for name in tensors if name.startswith(KEYS)}
    assert {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in got.items()} == RECIPES[algo][1]
    read = llmopt.compile(str(out), target="cpu:generic")
    assert torch.equal(read(IDS), torch.load(out.with_suffix(".pt")))
    assert len(list(read.program.graph("forward").calls("quantized_linear"))) == 8
    assert not notes(read)
    again = load_file(read.export(tmp_path / "again", "modelopt") / FILE)
    assert set(again) == set(tensors)
    for name, tensor in tensors.items():
        assert again[name].dtype == tensor.dtype
        assert torch.equal(again[name].float(), tensor.float())


@pytest.mark.parametrize("algo", list(RECIPES))
def test_what_it_stands_for(algo: str, written: Callable[[str], Path], source: Path) -> None:
    """By the formulas here, it is near to the weights, and it is what is read."""
    tensors, before = load_file(written(algo) / FILE), load_file(source / "model.safetensors")
    read = capture_hf(str(written(algo)), torch.float32).weights
    for module in (DOWN, KEYS):
        value = restored({last: tensors[f"{module}.{last}"] for last in RECIPES[algo][1]})
        torch.testing.assert_close(read[f"{module}.weight"].load().double(), value, rtol=1e-6, atol=0)
        weight = before[f"{module}.weight"].double()
        assert float((value - weight).norm() / weight.norm()) < (0.1 if algo == "W4A16_NVFP4" else 0.03)


def test_bytes_of_nvfp4() -> None:
    """The even column in the low bits; the global scale, one for modules that are joined, is a multiplier."""
    x = torch.tensor([[0, 0.25, 0.25, 0.75, 1.25, -1.75, 2.5, -3.5, 5, 6, -6, 0.2, 1, -1, 3, 7]])
    parts = {
        "packed": pack(ELEMENTS["e2m1"].encode(x.clamp(-6, 6)), 4),
        "scales": torch.ones(1, 1).to(E4M3),
        "global_scale": torch.tensor(0.5),
    }
    made = tensors_of(parts, SCHEMES["nvfp4"], 16)
    assert bytes(made["weight"].flatten().tolist()).hex(" ") == "00 20 c2 e4 76 0f a2 75"
    assert made["weight_scale_2"].item() == 0.5
    weight = torch.randn(64, 32, generator=torch.Generator().manual_seed(1))
    made = tensors_of(parts_of(quantize(weight, "nvfp4")), SCHEMES["nvfp4"], 32)
    assert float(made["weight_scale_2"]) == pytest.approx(float(weight.abs().max()) / (6 * 448))


def test_joined_modules_share_a_global_scale(written: Callable[[str], Path]) -> None:
    tensors = load_file(written("W4A16_NVFP4") / FILE)
    for layer in (0, 1):
        attention, mlp = f"model.layers.{layer}.self_attn", f"model.layers.{layer}.mlp"
        for modules in ([f"{attention}.{p}_proj" for p in "qkv"], [f"{mlp}.{p}_proj" for p in ("gate", "up")]):
            assert len({float(tensors[f"{module}.weight_scale_2"]) for module in modules}) == 1


def test_configs(written: Callable[[str], Path]) -> None:
    """As NVIDIA's exporter writes them, but for the producer."""
    sizes = {"W4A16_NVFP4": {"group_size": 16}, "MXFP8": {"group_size": 32}}
    for algo in RECIPES:
        out = written(algo)
        assert json.loads((out / "hf_quant_config.json").read_text()) == {
            "producer": {"name": "llmopt"},
            "quantization": {
                "quant_algo": algo, "kv_cache_quant_algo": None, **sizes.get(algo, {}), "exclude_modules": ["lm_head"],
            },
        }  # fmt: skip
        weights = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16}
        groups = {"config_groups": {"group_0": {"weights": weights, "targets": ["Linear"]}}}
        assert json.loads((out / "config.json").read_text())["quantization_config"] == {
            **(groups if algo == "W4A16_NVFP4" else {}), "ignore": ["lm_head"], "quant_algo": algo,
            "producer": {"name": "llmopt"}, "quant_method": "modelopt",
        }  # fmt: skip


def test_modules_in_two_algorithms(source: Path, tmp_path: Path) -> None:
    compiled = llmopt.compile(str(source), quantised(weights="nvfp4", lm_head="FP8_DYNAMIC"), target="cpu:generic")
    out = compiled.export(tmp_path / "out", "modelopt")
    told = json.loads((out / "hf_quant_config.json").read_text())["quantization"]
    layers = told.pop("quantized_layers")
    assert told == {"quant_algo": "MIXED_PRECISION", "kv_cache_quant_algo": None, "exclude_modules": []}
    assert len(layers) == 15
    assert layers["lm_head"] == {"quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"}
    assert layers[DOWN] == {"quant_algo": "W4A16_NVFP4", "group_size": 16}
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert config["quantized_layers"] == layers
    byte = {"dynamic": False, "num_bits": 8, "type": "float"}
    assert config["config_groups"]["group_1"] == {
        "input_activations": byte, "weights": {**byte, "strategy": "channel"}, "targets": ["lm_head"],
    }  # fmt: skip
    read = llmopt.compile(str(out), target="cpu:generic")
    assert torch.equal(read(IDS), compiled(IDS))
    found = [str(n.args[6]) for n in read.program.graph("forward").calls("quantized_linear")]
    assert found == ["nvfp4"] * 8 + ["fp8_channel"]
    lost = changed(out, tmp_path / "lost", {}, quantized_layers={DOWN: layers[DOWN]})
    with pytest.raises(InputError, match=r"q_proj: quant_algo none is not read; wanted one of W4A16_NVFP4"):
        capture_hf(str(lost))
    with pytest.raises(InputError, match="MIXED_PRECISION without quantized_layers"):
        capture_hf(str(changed(out, tmp_path / "none", {}, quantized_layers=None)))


def test_activations_of_one_scale_are_rounded_by_tokens(written: Callable[[str], Path], tmp_path: Path) -> None:
    """What NVIDIA's defaults NVFP4 and FP8 leave: an `input_scale` beside each weight."""
    said = "have scales of each token instead of the checkpoint's own number"
    tensors = load_file(written("W4A16_NVFP4") / FILE)
    modules = [name.removesuffix(".weight_scale_2") for name in tensors if name.endswith(".weight_scale_2")]
    fixed: dict[str, Tensor | None] = {f"{module}.input_scale": torch.tensor(0.01) for module in modules}
    four = changed(
        written("W4A16_NVFP4"), tmp_path / "four", fixed, quant_algo="NVFP4",
        kv_cache_scheme={"dynamic": False, "num_bits": 8, "type": "float"},
    )  # fmt: skip
    compiled = llmopt.compile(str(four), target="cpu:generic")
    assert {n.args[7] for n in compiled.program.graph("forward").calls("quantized_linear")} == {"nvfp4"}
    assert any(said in note for note in notes(compiled))
    assert any(note.startswith("keys and values are not rounded as the checkpoint says") for note in notes(compiled))
    eight: dict[str, Tensor | None] = {}
    for module in modules:
        scale = 2.0**-9 * (1 + modules.index(module))
        codes = (torch.randn(restored_shape(tensors, module)) * 20).to(E4M3)
        eight |= {f"{module}.weight": codes, f"{module}.weight_scale": torch.tensor(scale)}
        eight |= {f"{module}.weight_scale_2": None, f"{module}.input_scale": torch.tensor(0.01)}
    whole = changed(written("W4A16_NVFP4"), tmp_path / "eight", eight, quant_algo="FP8")
    program = capture_hf(str(whole))
    assert {(c.scheme, c.activations) for c in program.coded.values()} == {("fp8", "fp8_channel")}
    assert all(said in note for c in program.coded.values() for note in c.notes)
    for module in modules:
        codes, scale = eight[f"{module}.weight"], eight[f"{module}.weight_scale"]
        assert codes is not None
        assert scale is not None
        assert torch.equal(program.weights[f"{module}.weight"].load(), (codes.float() * scale).bfloat16())


def restored_shape(tensors: dict[str, Tensor], module: str) -> tuple[int, int]:
    rows, half = tensors[f"{module}.weight"].shape
    return rows, half * 2


def test_scales_of_keys_and_values(source: Path, tmp_path: Path) -> None:
    compiled = llmopt.compile(str(source), "nvfp4", target="cpu:generic")
    out = compiled.export(tmp_path / "out", "modelopt", IDS, kv_cache="fp8")
    theirs = load_file(compiled.export(tmp_path / "theirs", "compressed-tensors", IDS, kv_cache="fp8") / FILE)
    tensors = load_file(out / FILE)
    for layer in (0, 1):
        for letter in "kv":
            scale = tensors[f"model.layers.{layer}.self_attn.{letter}_proj.{letter}_scale"]
            assert scale.shape == ()
            assert scale == theirs[f"model.layers.{layer}.self_attn.{letter}_scale"]
    told = json.loads((out / "hf_quant_config.json").read_text())["quantization"]
    assert (told["quant_algo"], told["kv_cache_quant_algo"]) == ("W4A16_NVFP4", "FP8")
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert config["kv_cache_scheme"] == {"dynamic": False, "num_bits": 8, "type": "float"}
    assert all(
        "keys and values are not rounded" in note for c in capture_hf(str(out)).coded.values() for note in c.notes
    )
    plain = llmopt.compile(str(source), target="cpu:generic")
    with pytest.raises(InputError, match="modelopt has no quant_algo for keys and values alone"):
        plain.export(tmp_path / "none", "modelopt", IDS, kv_cache="fp8")


def test_a_config_in_a_file_of_its_own(written: Callable[[str], Path], tmp_path: Path) -> None:
    """As ModelOpt wrote it before 0.31, with nothing of it in config.json."""
    older = tmp_path / "older"
    shutil.copytree(written("MXFP8"), older)
    whole = json.loads((older / "config.json").read_text())
    del whole["quantization_config"]
    (older / "config.json").write_text(json.dumps(whole))
    assert {(c.scheme, c.activations) for c in capture_hf(str(older)).coded.values()} == {("mxfp8", "mxfp8")}
    (older / "hf_quant_config.json").write_text("[")
    with pytest.raises(InputError, match="does not say how weights are quantised"):
        capture_hf(str(older))


def test_what_is_not_read(written: Callable[[str], Path], tmp_path: Path) -> None:
    four, scale = written("W4A16_NVFP4"), f"{DOWN}.weight_scale"
    tensors = load_file(four / FILE)
    cases: list[tuple[dict[str, Tensor | None], dict[str, Any], str]] = [
        ({}, {"quant_algo": "NVFP4_AWQ"}, "quant_algo NVFP4_AWQ is not read; wanted one of W4A16_NVFP4, NVFP4, FP8"),
        ({}, {"group_size": 32}, "W4A16_NVFP4 in groups of 32; wanted groups of 16; use the checkpoint it was made"),
        ({f"{DOWN}.pre_quant_scale": torch.ones(512)}, {}, "down_proj: its pre_quant_scale changes what it reads"),
        ({f"{DOWN}.weight_scale_2": None}, {}, "down_proj: the checkpoint has no weight_scale_2"),
        (
            {scale: tensors[scale][:, :-1].contiguous()},
            {},
            r"scales of the checkpoint are torch.float8_e4m3fn \(256, 31",
        ),
        ({scale: None}, {}, "down_proj.weight of model.safetensors has shape"),
    ]
    for number, (other, config, said) in enumerate(cases):
        folder = changed(four, tmp_path / str(number), other, **config)
        with pytest.raises(InputError, match=said):
            capture_hf(str(folder)).weights[f"{DOWN}.weight"].load()


def test_what_the_format_cannot_say(source: Path, tmp_path: Path) -> None:
    out, file = tmp_path / "out", tmp_path / "mine.yaml"
    eight = "nearest is fp8_channel with activations in fp8_channel (recipe w8a8-fp8)"
    for recipe, said in (
        ("fp8", f"no algorithm that vLLM loads for fp8_channel alone; {eight}, or export --to compressed-tensors"),
        ("int8", f"for int8 alone; {eight}"),
        ("mxfp8", "for mxfp8 alone; nearest is mxfp8 with activations in mxfp8 (scheme MXFP8)"),
        ("mxfp6", "for mxfp6_e2m3 alone; nearest is mxfp8 with activations in mxfp8"),
        ("int4", "for int4_g128 alone; nearest is nvfp4 without activations"),
        (
            "w4a4",
            "activations in nvfp4 have one static scale in modelopt, and here each token has its own; nearest is nv",
        ),
        (quantised(scheme="FP8_BLOCK"), "nearest is fp8_block without activations, which vLLM and TensorRT-LLM round"),
        ("nvfp4+int4-kv", "leave the recipe's -kv part out"),
        ("rotate-online", "is rotated while the model runs, which modelopt does not say; leave r3 and r4 out"),
    ):
        if isinstance(recipe, Recipe):
            file.write_text(recipe.to_yaml())
        name = str(file) if isinstance(recipe, Recipe) else recipe
        result = CliRunner().invoke(app, ["export", str(source), "--to", "modelopt", "-o", str(out), "-r", name])
        assert result.exit_code != 0
        assert said in " ".join(f"{result.output}{result.exception}".split())
        assert not out.exists()


def test_the_command(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    given = ["export", str(source), "--to", "modelopt", "-r", "rotate+nvfp4", "-o", str(out)]
    result = CliRunner().invoke(app, given)
    assert result.output.startswith("wrote")
    assert "14 modules" in result.output
    want = llmopt.compile(str(source), "rotate+nvfp4", target="cpu:generic")(IDS)
    assert torch.equal(llmopt.compile(str(out), target="cpu:generic")(IDS), want)
