"""Low-bit weights through every door; the oracle is transformers with weights that were rounded beforehand."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import llmopt
from llmopt.backend import llmopt as backend
from llmopt.backend import reports
from llmopt.cli import app
from llmopt.compiler.ops import quantized
from llmopt.compiler.quant import quantize

PICO = Path(__file__).parents[2] / "examples" / "models" / "pico-llama-4m"
IDS = torch.randint(3, 8000, (2, 9), generator=torch.Generator().manual_seed(5))
PROMPT = "def fibonacci(n):"


@pytest.fixture(scope="module")
def pico() -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(PICO, dtype=torch.float32).eval().requires_grad_(False)


@pytest.fixture
def compiling() -> Iterator[None]:
    torch._dynamo.reset()
    backend.reset()
    yield
    torch._dynamo.reset()


def rounded(model: nn.Module, scheme: str, joined: bool) -> Any:
    """transformers' model with rounded weights; `joined`: q, k, v as one matrix, and gate, up."""
    made = copy.deepcopy(model)
    for layer in made.model.layers:
        a, m = layer.self_attn, layer.mlp
        groups = [[a.q_proj, a.k_proj, a.v_proj], [a.o_proj], [m.gate_proj, m.up_proj], [m.down_proj]]
        for group in groups if joined else [[m] for g in groups for m in g]:
            whole = quantize(torch.cat([m.weight for m in group]), scheme, "search").dequantize()
            for module, part in zip(group, whole.split([m.out_features for m in group]), strict=True):
                module.weight.copy_(part)
    return made


def assert_close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-5 * float(want.abs().max()))


@pytest.mark.parametrize(("recipe", "scheme"), [("nvfp4", "nvfp4"), ("int4", "int4_g128")])
def test_compile_generates_what_rounded_weights_give(pico: nn.Module, recipe: str, scheme: str, tmp_path: Path) -> None:
    model = llmopt.compile(PICO, recipe, dtype="float32")
    want = rounded(pico, scheme, joined=True)
    assert_close(model(IDS), want(IDS).logits)
    prompt = IDS[:1]
    tokens = want.generate(prompt, max_new_tokens=12, do_sample=False)[0, prompt.shape[1] :].tolist()
    assert model.generate(prompt[0].tolist(), max_new_tokens=12) == tokens
    model.save(tmp_path / "a")
    again = llmopt.load(tmp_path / "a")
    assert again.generate(prompt[0].tolist(), max_new_tokens=12) == tokens
    figures = next(p.stats.figures for p in again.report.passes if p.name == "quantize")
    assert len(figures) == 8
    assert all(18 < f["sqnr_db"] < 25 and f["bytes"] * 6 < f["bytes_before"] for f in figures.values())


@pytest.mark.parametrize("recipe", ["w4a4", "int4-asym"])
def test_compiled_regions_and_the_plain_meaning_agree(recipe: str) -> None:
    tokens = IDS[0].tolist()
    got = llmopt.compile(PICO, recipe, dtype="float32").generate(tokens, max_new_tokens=6)
    assert got == llmopt.compile(PICO, f"{recipe}+reference", dtype="float32").generate(tokens, max_new_tokens=6)


def test_the_command_line_compiles_and_runs_it(tmp_path: Path) -> None:
    out = tmp_path / "a"
    made = CliRunner().invoke(
        app, ["compile", str(PICO), "-o", str(out), "-r", "W4A16", "--dtype", "float32", "--json"]
    )
    assert made.exit_code == 2
    assert "did you mean" in made.stderr or "Known" in made.stderr
    made = CliRunner().invoke(
        app, ["compile", str(PICO), "-o", str(out), "-r", "nvfp4", "--dtype", "float32", "--json"]
    )
    assert made.exit_code == 0, made.stderr
    passes = json.loads(made.stdout)["report"]["passes"]
    assert all("sqnr_db" in f for p in passes if p["name"] == "quantize" for f in p["figures"].values())
    told = CliRunner().invoke(app, ["run", str(out), PROMPT, "-n", "8"])
    assert told.exit_code == 0, told.stderr
    want = llmopt.compile(PICO, "nvfp4", dtype="float32").generate(PROMPT, max_new_tokens=8)
    assert told.stdout.rstrip("\n") == want


# torch.compile: the weights stay the module's own


def compiled(model: nn.Module, recipe: str) -> Any:
    return torch.compile(model, backend="llmopt", options={"recipe": recipe, "strict": True})


def test_torch_compile_rounds_each_weight_once_and_sees_edits(
    pico: nn.Module, compiling: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Tensor] = []
    monkeypatch.setattr(quantized, "quantize", lambda w, *a: calls.append(w) or quantize(w, *a))
    model = copy.deepcopy(pico)
    module = model.model.layers[0].mlp.down_proj
    run = compiled(model, "nvfp4")

    def check() -> Tensor:
        got = run(IDS).logits
        assert_close(got, rounded(model, "nvfp4", joined=False)(IDS).logits)
        return got

    with torch.no_grad():
        first = check()
        assert torch.equal(first, run(IDS).logits)
        assert len(calls) == 14
        module.weight.mul_(-1)
        edited = check()
        assert not torch.allclose(edited, first)
        assert len(calls) == 15
        module.weight = nn.Parameter(torch.randn_like(module.weight), requires_grad=False)
        assert not torch.allclose(check(), edited)
    assert reports[-1].providers["rounded_linear=reference"] == 14


def test_torch_compile_rounds_activations(pico: nn.Module, compiling: None) -> None:
    with torch.no_grad():
        plain, got = pico(IDS).logits, compiled(pico, "w4a4")(IDS).logits
        weights_only = rounded(pico, "nvfp4", joined=False)(IDS).logits
    errors = [float((x - plain).norm() / plain.norm()) for x in (weights_only, got)]
    assert 0.01 < errors[0] < errors[1] < 0.5


def test_torch_compile_rewrites_a_model_with_its_own_dynamic_cache(pico: nn.Module, compiling: None) -> None:
    with torch.no_grad():
        made = compiled(pico, "default")(IDS)
        assert_close(made.logits, pico(IDS).logits)
    assert reports[-1].fallback is None
    assert reports[-1].matched == 26
    assert made.past_key_values.get_seq_length() == IDS.shape[1]
