"""Checkpoints that compressed-tensors packed, saved as llm-compressor saves them, are compiled with their codes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.base import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
from compressed_tensors.quantization.quant_scheme import preset_name_to_scheme
from packed_checkpoint import ATTENTION, MLP, SIZES, written
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

import llmopt
from llmopt.compiler.errors import InputError
from llmopt.compiler.recipe import PassSpec, Recipe

IDS = torch.randint(0, 96, (2, 11), generator=torch.Generator().manual_seed(1))


def scheme(**weights: Any) -> QuantizationScheme:
    return QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**weights))


KINDS: dict[str, tuple[QuantizationScheme, str]] = {  # and the scheme that codes are kept in
    **{
        name: (preset_name_to_scheme(name, ["Linear"]), kept)
        for name, kept in (
            ("W4A16", "int4_g128"), ("W4A16_ASYM", "int4_g128_asym"), ("W8A16", "int8_g128"), ("W8A8", "int8"),
            ("FP8", "fp8"), ("FP8_DYNAMIC", "fp8_channel"), ("FP8_BLOCK", "fp8_block"), ("NVFP4A16", "nvfp4"),
            ("NVFP4", "nvfp4"), ("MXFP4A16", "mxfp4"), ("MXFP8A16", "mxfp8"), ("MXFP6A16", "mxfp6_e2m3"),
        )
    },
    "by rows": (scheme(num_bits=4, type="int", strategy="channel", symmetric=True), "int4_g128"),
    "groups of 256": (
        scheme(num_bits=4, type="int", strategy="group", group_size=256, symmetric=False), "int4_g128_asym",
    ),
    "3 bits": (scheme(num_bits=3, type="int", strategy="group", group_size=64, symmetric=True), ""),
    "int8 by tensor": (scheme(num_bits=8, type="int", strategy="tensor", symmetric=True), "int8"),
}  # fmt: skip


def restored(folder: Path, kind: QuantizationScheme, only: str = "") -> dict[str, Tensor]:
    """Every weight that compressed-tensors restores, by module; `only` one of them."""
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    stored, found = load_file(folder / "model.safetensors"), {}
    packed = config["format"] if config["format"] != "mixed-precision" else "pack-quantized"
    compressor: Any = BaseCompressor.get_value_from_registry(packed)
    for module in {name.rpartition(".")[0] for name in stored if name.endswith("weight_scale") and only in name}:
        state = {n.rpartition(".")[2]: t for n, t in stored.items() if n.rpartition(".")[0] == module}
        found[module] = compressor.decompress(state, kind)["weight"]
    return found


@pytest.mark.parametrize("name", list(KINDS))
def test_weights_and_logits(name: str, tmp_path: Path) -> None:
    """Codes are kept, stand for what compressed-tensors restores, and the model computes what that gives."""
    kind, kept = KINDS[name]
    source = written(tmp_path / "in", kind)
    theirs = restored(source, kind)
    compiled = llmopt.compile(str(source), dtype="float32", target="cpu:generic")
    program = compiled.program
    assert len(theirs) == 14
    for module, weight in theirs.items():
        ours = program.weights[f"{module}.weight"].load()
        assert torch.equal(ours.to(weight.dtype), weight)
    found = {str(n.args[6]) for n in program.graph("forward").calls("quantized_linear")}
    # joined weights with a scale each have one a row
    assert found == ({"fp8", "fp8_channel"} if kept == "fp8" else {kept} - {""})
    if kind.input_activations is None:
        plain = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES)).eval()
        tensors = load_file(source / "model.safetensors")
        state = {n: t.float() for n, t in tensors.items() if n.rpartition(".")[0] not in theirs}
        decoded = {f"{module}.weight": program.weights[f"{module}.weight"].load() for module in theirs}
        plain.load_state_dict(state | decoded)
        with torch.no_grad():
            want = plain(IDS).logits
        assert float((compiled(IDS) - want).norm() / want.norm()) < 1e-5


def test_what_is_read_leaves_the_same(tmp_path: Path) -> None:
    for name in ("W4A16_ASYM", "NVFP4A16", "FP8_DYNAMIC", "FP8_BLOCK", "MXFP4A16", "W8A8"):
        source = written(tmp_path / name, KINDS[name][0])
        out = llmopt.compile(str(source), target="cpu:generic").export(tmp_path / "out", "compressed-tensors")
        before, after = load_file(source / "model.safetensors"), load_file(out / "model-00001-of-00001.safetensors")
        assert set(before) == set(after)
        for key in before:
            assert torch.equal(before[key].float(), after[key].float()), key
        told = [json.loads((f / "config.json").read_text())["quantization_config"] for f in (source, out)]
        groups = [
            QuantizationConfig.model_validate(t).config_groups["group_0"].weights.model_dump(exclude={"observer"})
            for t in told
        ]
        for left, right in [(groups[0][key], groups[1][key]) for key in ("num_bits", "type", "strategy", "symmetric")]:
            assert left == right


def test_notes(tmp_path: Path) -> None:
    for name, said in (
        ("NVFP4", "scales of each token instead of the checkpoint's own number"),
        ("3 bits", "restored"),
    ):
        compiled = llmopt.compile(str(written(tmp_path / name, KINDS[name][0])), target="cpu:generic")
        (entry,) = [entry for entry in compiled.report.passes if entry.name == "keep-codes"]
        assert any(said in note for note in entry.stats.notes)


def test_a_head_that_the_config_ties(tmp_path: Path) -> None:
    source = written(tmp_path / "in", KINDS["FP8_DYNAMIC"][0], ignore=())
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    compiled = llmopt.compile(str(source), target="cpu:generic")
    (entry,) = [entry for entry in compiled.report.passes if entry.name == "keep-codes"]
    assert "codes of lm_head.weight are not read: config.json ties the weight to another" in entry.stats.notes


def test_global_scales_of_their_own_are_not_joined(tmp_path: Path) -> None:
    kind = KINDS["NVFP4A16"][0]
    apart = llmopt.compile(str(written(tmp_path / "apart", kind, share=False)), target="cpu:generic", dtype="float32")
    joined = llmopt.compile(str(written(tmp_path / "joined", kind)), target="cpu:generic", dtype="float32")
    assert len(list(apart.program.graph("forward").calls("quantized_linear"))) == 14
    assert len(list(joined.program.graph("forward").calls("quantized_linear"))) == 8
    assert apart.generate([[3, 4, 5]], max_new_tokens=4, ignore_eos=True)


def test_scales_that_bfloat16_does_not_hold(tmp_path: Path) -> None:
    """Those of a float16 model are kept as they are, those of a float32 model fit in neither."""
    for name, kept in (("W4A16", "int4_g128_f16"), ("W4A16_ASYM", "int4_g128_asym_f16"), ("W8A16", "int8_g128_f16")):
        for dtype in (torch.float16, torch.float32):
            source = written(tmp_path / f"{name} {dtype}", KINDS[name][0], dtype)
            compiled = llmopt.compile(str(source), target="cpu:generic")
            found = {str(n.args[6]) for n in compiled.program.graph("forward").calls("quantized_linear")}
            assert found == ({kept} if dtype == torch.float16 else set())
            theirs = restored(source, KINDS[name][0])
            assert all(torch.equal(compiled.program.weights[f"{m}.weight"].load(), w) for m, w in theirs.items())
            if dtype == torch.float16:
                out = compiled.export(tmp_path / "out", "compressed-tensors")
                before, after = (load_file(next(folder.glob("*.safetensors"))) for folder in (source, out))
                assert set(before) == set(after)
                assert all(torch.equal(before[key].float(), after[key].float()) for key in before)


def test_other_weights_can_be_quantised(tmp_path: Path) -> None:
    recipe = Recipe.parse("int8")
    head = PassSpec.of("quantize", weights="int8", lm_head="int8")
    recipe = replace(recipe, passes=tuple(head if s.name == "quantize" else s for s in recipe.passes))
    compiled = llmopt.compile(str(written(tmp_path / "in", KINDS["W4A16"][0])), recipe, target="cpu:generic")
    found = [n.args[6] for n in compiled.program.graph("forward").calls("quantized_linear")]
    assert found == ["int4_g128"] * 8 + ["int8"]


def test_the_most_specific_group_counts(tmp_path: Path) -> None:
    """A pattern before the class, in either order, as in compressed-tensors."""
    eight = QuantizationScheme(targets=["re:.*q_proj"], weights=KINDS["W8A16"][0].weights)
    for number, groups in enumerate(((KINDS["W4A16"][0], eight), (eight, KINDS["W4A16"][0]))):
        source = written(tmp_path / str(number), groups)
        program = llmopt.compile(str(source), dtype="float32", target="cpu:generic").program
        for module, kind in ((f"{ATTENTION}.q_proj", eight), (f"{ATTENTION}.k_proj", KINDS["W4A16"][0])):
            theirs = restored(source, kind, module)[module]
            assert torch.equal(program.weights[f"{module}.weight"].load().to(theirs.dtype), theirs)


def test_what_is_refused(tmp_path: Path) -> None:
    source = written(tmp_path / "in", KINDS["W4A16"][0])
    with pytest.raises(InputError, match=r"holds in codes, which would be lost; leave out what changes weights"):
        llmopt.compile(str(source), "rotate", target="cpu:generic")
    config = json.loads((source / "config.json").read_text())
    group = config["quantization_config"]["config_groups"]["group_0"]
    for more, said in (
        ({"quant_method": "gptq"}, r"a quantised checkpoint \(gptq\)"),
        ({"config_groups": {"group_0": {"targets": 3}}}, "is none that compressed-tensors reads"),
        (
            {"config_groups": {"g": {**group, "targets": ["re:*("]}}},
            "has a pattern that is none",
        ),
        ({"transform_config": [1]}, r"has a transform_config that is \[1\]; wanted an object"),
        ({"sparsity_config": {"format": "sparse-24-bitmask"}}, r"sparse weights \(sparse-24-bitmask\)"),
    ):  # fmt: skip
        changed = {**config, "quantization_config": {**config["quantization_config"], **more}}
        (source / "config.json").write_text(json.dumps(changed))
        with pytest.raises(InputError, match=said):
            llmopt.compile(str(source), target="cpu:generic")
    (source / "config.json").write_text(json.dumps(config))
    tensors = load_file(source / "model.safetensors")
    for lost, change, said in (
        (f"{MLP}.down_proj.weight_packed", None, "has no weight_packed"),
        (f"{MLP}.down_proj.weight_packed", lambda t: t[:-1], r"packed of the checkpoint are torch.uint8 \(255, 256\)"),
        (f"{MLP}.down_proj.weight_packed", lambda t: t.repeat(1, 2), r"packed of the checkpoint are .* \(256, 512\)"),
        (f"{MLP}.down_proj.weight_scale", lambda t: t[:, :-1], "has 3 scales a row; wanted 4"),
        (f"{MLP}.down_proj.weight_scale", lambda t: t.repeat_interleave(2, 1), "has 8 scales a row; wanted 4"),
        (f"{MLP}.down_proj.weight_scale", None, "down_proj.weight is not among its tensors"),
    ):
        changed = {n: t for n, t in tensors.items() if n != lost}
        if change is not None:
            changed[lost] = change(tensors[lost]).contiguous()
        save_file(changed, source / "model.safetensors", {"format": "pt"})
        with pytest.raises(InputError, match=said):
            llmopt.compile(str(source), target="cpu:generic")(IDS)


def test_a_head_in_codes(tmp_path: Path) -> None:
    source = written(tmp_path / "in", KINDS["W4A16"][0], ignore=())
    compiled = llmopt.compile(str(source), target="cpu:generic", dtype="float32")
    assert len(list(compiled.program.graph("forward").calls("quantized_linear"))) == 9
    prompts = [[3, 4, 5], [9, 2]]
    made = compiled.generate(prompts, max_new_tokens=5, ignore_eos=True)
    for prompt, tokens in zip(prompts, made, strict=True):
        ids = torch.tensor([prompt + tokens[:-1]])
        assert compiled(ids)[0, len(prompt) - 1 :].argmax(-1).tolist() == tokens
