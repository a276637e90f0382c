"""`llmopt export --to onnx`: ONNX Runtime computes what the compiled model does, with and without a cache."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from onnx_runtime import FORMS, IDS, Cached, checked, greedy, logits, off
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from typer.testing import CliRunner

import llmopt
from llmopt.cli import app
from llmopt.compiler import ops
from llmopt.compiler.errors import InputError
from llmopt.compiler.evaluate import evaluate, evaluated
from llmopt.compiler.quant import scheme_of
from llmopt.compiler.quant.packing import unpack
from llmopt.compiler.quant.schemes import SCHEMES
from llmopt.compiler.recipe import PassSpec, Recipe
from llmopt.runtime import export_onnx

SHARED = Path(__file__).parents[2].parent / "shared" / "models"
PICO = Path(__file__).parents[2] / "examples" / "models" / "pico-llama-4m"
SIZES = {
    "vocab_size": 96, "hidden_size": 72, "intermediate_size": 200, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.3, "pad_token_id": 0,
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "head_dim": 16},
    "qwen3": {"head_dim": 16, "tie_word_embeddings": True},
    "gemma": {"head_dim": 16},
    "gemma2": {"head_dim": 16, "sliding_window": 5},  # softcaps, and every second layer sees 5 tokens
    "gemma3_text": {"head_dim": 16, "sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]},
    "phi": {"hidden_size": 64},  # half of each head turned, layer norms, biases
    "phi3": {"hidden_size": 64},
    "gpt2": {
        "hidden_size": 64,
        "n_positions": 64,
        "n_embd": 64,
        "n_layer": 2,
        "n_head": 4,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
}
PROMPTS = [[5, 17, 3, 80, 41, 9, 33], [12, 7, 64], [90, 2, 2, 51, 8]]


def tiny(kind: str, **more: Any) -> nn.Module:
    """A small model with weights that matter."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**SIZES, **KINDS[kind], **more})).eval()
    for weight in model.parameters():
        if weight.dim() == 1:
            weight.data += torch.randn_like(weight) * 0.3
    return model


def with_weights(scheme: str, activations: str = "") -> Recipe:
    """The default recipe that quantises to a scheme."""
    recipe = Recipe.parse("int4")
    options = {"weights": scheme, **({"activations": activations} if activations else {})}
    passes = tuple(PassSpec.of("quantize", **options) if s.name == "quantize" else s for s in recipe.passes)
    return Recipe(scheme, passes)


@pytest.mark.parametrize("kind", list(KINDS))
def test_logits_of_architectures(kind: str, tmp_path: Path) -> None:
    model = tiny(kind)
    compiled = llmopt.compile(model, target="cpu:generic")
    with torch.no_grad():
        want = model(IDS).logits
    for number, form in enumerate(FORMS):
        out = compiled.export(tmp_path / str(number), "onnx", **form)
        checked(out)
        for rows in (1, 3):
            # GroupQueryAttention takes several tokens only where none came before
            steps = () if form.get("cache") is False else (5, 1, 1, 4) if not form else (7, 1, 1, 1, 1)
            assert off(logits(out, IDS[:rows], steps), want[:rows]) < 2e-6


MODELS = ("small-llama-28m", "pico-llama-4m", "qwen3", "gemma", "phi")


@pytest.mark.parametrize(
    ("model", "recipe"),
    [*((model, recipe) for model in MODELS for recipe in ("default", "int4")), ("pico-llama-4m", "int4-asym")],
)
def test_greedy_tokens(model: str, recipe: str, tmp_path: Path) -> None:
    """Prompts of three lengths, alone and in one batch; the fp32 graphs also in one call without a cache."""
    if "llama" in model:
        folder = SHARED / model
        source: Any = str(folder if folder.is_dir() else PICO)
    else:
        source = tiny(model, hidden_size=128)
    plainly = replace(Recipe.parse(recipe), providers=("reference",))
    compiled = llmopt.compile(source, recipe=plainly, target="cpu:generic", dtype="float32")
    want = compiled.generate(PROMPTS, max_new_tokens=12, ignore_eos=True)
    for form in FORMS[1:]:
        out = compiled.export(tmp_path / "cached", "onnx", **form)
        checked(out)
        assert greedy(out, PROMPTS, 12, right=bool(form)) == want
        assert greedy(out, PROMPTS[:1], 12, right=bool(form)) == want[:1]
    out = compiled.export(tmp_path / "whole", "onnx", cache=False)
    for prompt, made in zip(PROMPTS, want, strict=True):
        ids = torch.tensor([prompt + made[:-1]])
        assert logits(out, ids)[0, len(prompt) - 1 :].argmax(-1).tolist() == made


@pytest.mark.parametrize("form", ["portable", "function", "standard"])
@pytest.mark.parametrize("scheme", list(SCHEMES))
def test_every_scheme(scheme: str, form: str, tmp_path: Path) -> None:
    """72 and 200 columns are no whole groups. What ONNX Runtime has no kernels for runs in ONNX's reference."""
    compiled = llmopt.compile(tiny("qwen3"), recipe=with_weights(scheme), target="cpu:generic")
    if form == "standard" and scheme.startswith("mxfp6"):
        with pytest.raises(InputError, match=r"q_proj.*ONNX has no type for e\dm\d; take --weights portable"):
            compiled.export(tmp_path / "out", "onnx", weights=form)
        assert not list(tmp_path.iterdir())
        return
    out = compiled.export(tmp_path / "out", "onnx", weights=form, cache=False)
    model = checked(out)
    if form == "standard" and scheme in ("nvfp4", "mxfp4", "mxfp8"):
        positions = torch.arange(11).expand(3, 11).contiguous().numpy()
        given = {"input_ids": IDS.numpy(), "position_ids": positions}
        got = torch.from_numpy(ReferenceEvaluator(model).run(None, given)[0])
    else:
        got = logits(out, IDS)
    assert off(got, compiled(IDS)) < 2e-6
    if form == "function":
        assert [f.name for f in model.functions] == [f"{scheme}_linear"]


@pytest.mark.parametrize("level", [0, 4])
@pytest.mark.parametrize("scheme", ["int4_g32", "int4_g128_asym", "int8", "int8_g128", "nvfp4", "mxfp6_e2m3"])
def test_codes_are_the_program_s(scheme: str, level: int, tmp_path: Path) -> None:
    """Those of 8 bits are two of 4 where activations are not rounded."""
    compiled = llmopt.compile(tiny("phi"), recipe=with_weights(scheme), target="cpu:generic")
    out = compiled.export(tmp_path / "out", "onnx", accuracy_level=level)
    found = {value.name: value.const_value for value in ir.load(out / "model.onnx").graph.initializers.values()}
    weights, kind = compiled.program.weights, scheme_of(scheme)
    names = [name.removesuffix(".packed") for name in weights if name.endswith(".packed")]
    whole = level == 4 and not scheme.startswith("int4")
    multiple = {"e2m1": 2, "e2m3": 8}.get(kind.element.name, 1)
    assert len(names) == 6

    def four_bits(label: str, columns: int) -> torch.Tensor:
        return unpack(torch.from_numpy(found[label].numpy().copy()).flatten(1), 4, columns)

    for name in names:
        codes = unpack(weights[f"{name}.packed"].load(), kind.element.bits, kind.padded(weights[name].shape[1]))
        columns = -(-codes.shape[1] // 128) * 128 if not kind.group else codes.shape[1]
        if scheme.startswith("int4"):
            got, want = four_bits(f"{name}.codes", columns), codes
        else:
            want = kind.element.decode(codes) * multiple + 128
            if whole:
                got = torch.from_numpy(found[f"{name}.codes"].numpy().copy()).flatten(1)
            else:
                low = four_bits(f"{name}.codes_low", columns).int() - (8 if kind.element.is_float else 0)
                got = 16 * four_bits(f"{name}.codes_high", columns) + low
        assert torch.equal(got[:, : codes.shape[1]].float(), want.float())
        assert (got[:, codes.shape[1] :] == 128).all()
    nodes = [n for n in ir.load(out / "model.onnx").graph if n.op_type == "MatMulNBits" and "mlp.fc2" in str(n.name)]
    found_bits = [n.attributes["bits"].value for n in nodes if "layers.0" in str(n.name)]
    assert found_bits == ([8] if whole else [4] if scheme.startswith("int4") else [4, 4])


@pytest.mark.parametrize(("weights", "activations"), [("int8", "int8"), ("fp8_channel", "fp8_channel"), ("fp8", "fp8")])
def test_rounded_activations(weights: str, activations: str, tmp_path: Path) -> None:
    """In bits, but for the few that a product's last bit moves over the middle between two codes."""
    compiled = llmopt.compile(tiny("qwen3"), recipe=with_weights(weights, activations), target="cpu:generic")
    out = compiled.export(tmp_path / "out", "onnx", cache=False)
    assert off(logits(out, IDS), compiled(IDS)) < 5e-3
    plain = llmopt.compile(tiny("qwen3"), recipe=with_weights(weights), target="cpu:generic")
    assert off(logits(out, IDS), plain(IDS)) > 5e-3


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_a_cache_in_few_bits(kind: str, tmp_path: Path) -> None:
    """ONNX Runtime attends to the nearest codes, by steps of the largest magnitudes of each channel."""
    compiled = llmopt.compile(tiny("llama"), target="cpu:generic")
    out = compiled.export(tmp_path / "out", "onnx", IDS, attention="gqa", kv_cache=kind)
    checked(out)
    model, places = Cached(out), torch.arange(11).expand(3, 11).contiguous()
    got = torch.cat([
        model.step(IDS[:, part], places[:, part], torch.ones(3, part.stop, dtype=torch.int64))
        for part in (slice(0, 8), slice(8, 9), slice(9, 10), slice(10, 11))
    ], 1)  # fmt: skip
    graph, inputs = compiled.program.graph("forward"), {"input_ids": IDS, "position_ids": places}
    reach, kept = {"int8": 127, "int4": 7}[kind], []
    plain = [node for attend in graph.calls("attention") for node in attend.args[1:3]]
    largest = [v.abs().amax((0, 1, 2)) for v in evaluate(graph, inputs, compiled.program.weights, plain)]

    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *settings: Any) -> torch.Tensor:
        steps = [amax / reach for amax in largest[len(kept) : len(kept) + 2]]
        kept.extend((value / step).round().clamp(-reach - 1, reach) for value, step in zip((k, v), steps, strict=True))
        return ops.attention.fn(q, *(codes * step for codes, step in zip(kept[-2:], steps, strict=True)), *settings)

    (logits_node,) = graph.outputs()
    walk = evaluated(
        graph, inputs, compiled.program.weights, [logits_node], instead={ops.attention.overload: attention}
    )
    want = {node: value for node, value in walk if node is logits_node}[logits_node]
    assert off(got, want) < {"int8": 2e-3, "int4": 2e-2}[kind]  # a code that the last bit moves over the middle
    assert off(compiled(IDS), want) > {"int8": 5e-3, "int4": 1e-1}[kind]
    for name, codes in zip(("key", "value"), kept, strict=False):
        held = torch.from_numpy(model.past[f"past_key_values.0.{name}"])
        if kind == "int4":
            held = torch.stack((held & 15, held >> 4), -1).flatten(-2).int() - 8
        assert torch.equal(held.float(), codes)
    with pytest.raises(InputError, match=r"--kv-cache int8 keeps keys and values by numbers .* give --calibration"):
        compiled.export(tmp_path / "none", "onnx", attention="gqa", kv_cache="int8")
    with pytest.raises(InputError, match=r"GroupQueryAttention \(gqa\) keeps keys and values in int8 or int4"):
        compiled.export(tmp_path / "none", "onnx", IDS, kv_cache="int8")
    assert not (tmp_path / "none").exists()


def test_an_artifact_with_a_cache_in_few_bits(tmp_path: Path) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text("def main():\n    return 0\n")
    compiled = llmopt.compile(str(PICO), recipe="int8", dtype="float32", target="cpu:generic")
    compiled.save(tmp_path / "artifact")
    given = ["--to", "onnx", "--attention", "gqa", "--kv-cache", "int8", "-o", str(tmp_path / "out")]
    code, said = run(str(tmp_path / "artifact"), *given, "--calibration", str(texts))
    assert code == 0, said
    ids = torch.tensor([compiled.tokenizer.encode(texts.read_text())])
    want = compiled.export(tmp_path / "want", "onnx", ids, attention="gqa", kv_cache="int8")
    assert (tmp_path / "out" / "model.onnx").read_bytes() == (want / "model.onnx").read_bytes()
    code, said = run(str(tmp_path / "artifact"), "--to", "onnx", "-o", str(tmp_path / "artifact"))
    assert (code, "is the model itself" in said) == (2, True)


def test_half_precision(tmp_path: Path) -> None:
    """No further from float32 than torch's own float16 is, but for a factor."""
    model = tiny("gemma").half()
    compiled = llmopt.compile(model, recipe="int4", target="cpu:generic")
    out = compiled.export(tmp_path / "out", "onnx", attention="gqa")
    got, ours = logits(out, IDS, (8, 1, 1, 1)).float(), compiled(IDS).float()
    want = llmopt.compile(model.float(), recipe="int4", target="cpu:generic")(IDS)
    assert off(got, want) < 2 * off(ours, want)
    assert {value.dtype for value in ir.load(out / "model.onnx").graph.outputs} == {ir.DataType.FLOAT16}


def test_what_grouped_query_attention_does_not_take(tmp_path: Path) -> None:
    compiled = llmopt.compile(tiny("qwen3", head_dim=12), target="cpu:generic")
    with pytest.raises(InputError, match=r"heads of 12 channels.*multiples of 8; take --attention standard"):
        compiled.export(tmp_path / "out", "onnx", attention="gqa")


def test_large_weights_lie_beside_the_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = llmopt.compile(tiny("llama"), target="cpu:generic")
    whole = compiled.export(tmp_path / "whole", "onnx", cache=False)
    monkeypatch.setattr(export_onnx, "EXTERNAL_BYTES", 1000)
    out = compiled.export(tmp_path / "out", "onnx", cache=False)
    assert (out / "model.onnx.data").stat().st_size > 10 * (out / "model.onnx").stat().st_size
    checked(out)
    assert torch.equal(logits(out, IDS), logits(whole, IDS))
    receipt = json.loads((out / "llmopt_export.json").read_text())
    assert receipt["format"] == "onnx"
    assert set(receipt["files"]) == {path.name for path in out.iterdir()}


def test_the_graph_can_be_read(tmp_path: Path) -> None:
    """Names of the model's modules, dynamic sizes by name, and no operator that nothing reads."""
    out = llmopt.compile(tiny("qwen3"), recipe="int4", target="cpu:generic").export(tmp_path / "out", "onnx")
    graph = ir.load(out / "model.onnx").graph
    names = [str(node.name) for node in graph]
    assert "layers.1.self_attn.o_proj/MatMulNBits" in " ".join(names)
    assert graph.inputs[0].shape == ir.Shape(["batch", "sequence"])
    assert graph.outputs[0].shape == ir.Shape(["batch", "sequence", 96])
    assert graph.outputs[-1].name == "present.1.value"
    assert sum(node.op_type == "Transpose" for node in graph) == 1  # the tied head's


def run(*given: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["export", *given])
    return result.exit_code, " ".join(result.output.split())


def test_the_command(tmp_path: Path) -> None:
    out = tmp_path / "out"
    code, said = run(str(PICO), "--to", "onnx", "-r", "int4", "-o", str(out))
    assert (code, "computes in float32" in said) == (0, True)
    assert f"wrote {out}: onnx" in said
    assert (out / "tokenizer.json").is_file()
    code, said = run(str(PICO), "--to", "onnx", "-o", str(out), "--json")
    assert json.loads(said[said.index("{") :])["opset"] == 23
    assert checked(out)


def test_an_artifact_leaves_as_the_model_would(tmp_path: Path) -> None:
    compiled = llmopt.compile(str(PICO), recipe="rotate+int4", dtype="float32", target="cpu:generic")
    want = compiled.export(tmp_path / "want", "onnx")
    compiled.save(tmp_path / "artifact")
    code, said = run(str(tmp_path / "artifact"), "--to", "onnx", "-o", str(tmp_path / "out"))
    assert code == 0, said
    assert (tmp_path / "out" / "model.onnx").read_bytes() == (want / "model.onnx").read_bytes()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--to", "onx"], "--to 'onx' is no format; did you mean 'onnx'?"),
        (["--to", "onnx", "--weights", "standart"], "--weights 'standart' is no form of weights"),
        (["--to", "onnx", "--attention", "mha"], "--attention 'mha' is unknown"),
        (["--to", "onnx", "--accuracy-level", "5"], "--accuracy-level 5 is none that MatMulNBits has"),
        (["--to", "onnx", "--attention", "gqa", "--no-cache"], "GroupQueryAttention always has one"),
        (["--to", "onnx", "--accuracy-level", "4", "--weights", "function"], "--weights function has none of"),
        (
            ["--to", "genai", "--dtype", "bfloat16", "--weights", "standard"],
            "ONNX Runtime's CPU provider has no products",
        ),
        (["--to", "compressed-tensors", "--no-cache"], "--no-cache says how an ONNX graph is made"),
        (["--to", "onnx", "--kv-cache", "int8"], "GroupQueryAttention (gqa) keeps keys and values in int8 or int4"),
        (["--to", "genai", "--no-cache"], "--to genai generates with a cache"),
        (["--to", "onnx", "--dtype", "bfloat16"], "ONNX Runtime's CPU provider has no products"),
        (["--to", "onnx", "-r", "w4a4"], "activations in nvfp4 cannot leave as ONNX"),
        (["--to", "onnx", "-r", "int8-kv"], "leave the recipe's -kv part out"),
        (["--to", "compressed-tensors", "--weights", "portable"], "--to compressed-tensors makes none"),
    ],
)
def test_what_cannot_be_said(given: list[str], said: str, tmp_path: Path) -> None:
    code, told = run(str(PICO), "-o", str(tmp_path / "out"), *given)
    assert code == 2
    assert said in told
    assert not list(tmp_path.iterdir())
