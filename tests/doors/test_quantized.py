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
    (quantizing,) = (p for p in json.loads(made.stdout)["report"]["passes"] if p["name"] == "quantize")
    assert len(quantizing["figures"]) == 8
    assert all(18 < f["sqnr_db"] < 25 for f in quantizing["figures"].values())
    told = CliRunner().invoke(app, ["run", str(out), PROMPT, "-n", "8"])
    assert told.exit_code == 0, told.stderr
    want = llmopt.compile(PICO, "nvfp4", dtype="float32").generate(PROMPT, max_new_tokens=8)
    assert told.stdout.rstrip("\n") == want


def cli(*args: str, code: int = 0) -> tuple[str, str]:
    """stdout and stderr, as one line of words, of a command that exits with `code`."""
    done = CliRunner().invoke(app, list(args))
    assert done.exit_code == code, done.stderr
    return done.stdout, " ".join(done.stderr.split())


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("data") / "short.txt"
    path.write_text("def f(x): pass\n")
    return str(path)


FEW = "its second moment has rank 7 of 256; use at least 256 tokens (and 8 more values)"


def test_too_few_tokens_are_said_by_every_command_that_learns(short: str, tmp_path: Path) -> None:
    learn = ("-r", "reference+nvfp4+weighted", "--calibration", short)
    out = tmp_path / "a"
    said, told = cli("compile", str(PICO), "-o", str(out), *learn, "--json")
    assert FEW in told
    assert "7 tokens" in json.dumps(json.loads(said)["report"])
    assert "note" not in cli("run", str(out), PROMPT, "-n", "2")[1]  # it was said when it was compiled
    assert FEW in cli("run", str(PICO), PROMPT, "-n", "2", *learn)[1]
    data = ("-d", str(PICO / "README.md"), "--window", "32", "--windows", "1", "--against", "none")
    assert FEW in cli("eval", str(PICO), *data, *learn)[1]


def test_a_recipe_that_learns_can_be_shown_and_compared(short: str) -> None:
    learn = ("-r", "reference+nvfp4+gptq", "--calibration", short)
    said, told = cli("show", str(PICO), "-g", "step", *learn)
    assert said.count("= quantized_linear(") == 8
    assert FEW in told
    said, told = cli("diff", str(PICO), "--pass", "quantize", *learn)
    assert said.count("\n+    quantized_linear") == 2 * 8
    assert FEW in told


def test_data_that_are_wanted_or_not_are_told(short: str) -> None:
    for command in (("show", str(PICO)), ("bench", str(PICO))):
        assert "--calibration FILE" in cli(*command, "-r", "reference+nvfp4+gptq", code=2)[1]
    unread = cli("show", str(PICO), "-r", "reference+nvfp4", "--calibration", short, code=2)[1]
    assert "no pass of recipe 'reference+nvfp4' reads any data; leave it out" in unread


def test_a_recipe_that_learns_is_benchmarked(short: str) -> None:
    sizes = ("--batch", "1", "--new-tokens", "2", "--prompt-tokens", "4", "--rounds", "1", "--peers", "")
    learn = (
        "-r",
        "reference+nvfp4+weighted",
        "--calibration",
        short,
    )  # float32, where exact recipes are held to tokens
    said, told = cli("bench", str(PICO), *sizes, *learn, "--json")
    figures = json.loads(said)
    assert "reference+nvfp4+weighted, learned from short.txt" in figures["peers"]["llmopt"]
    assert figures["settings"]["calibration"] == "short.txt"
    assert "statistics" not in figures["settings"]
    assert figures["peak_rss_bytes"]["llmopt"] > 50e6
    assert "calibrated with 7 tokens" in told


@pytest.mark.parametrize("bits", ["nan", "inf", "0", "-1"])
def test_bits_that_are_none_are_told_before_anything_is_read(bits: str, tmp_path: Path) -> None:
    told = cli("compile", str(tmp_path / "none"), "-o", str(tmp_path / "a"), f"--bits={bits}", code=2)[1]
    assert told.startswith(f"error: bits (--bits) is {float(bits)}; wanted a finite number of bits a weight above 0")


def test_bits_too_few_and_plenty(short: str, tmp_path: Path) -> None:
    args = ("compile", str(PICO), "-o", str(tmp_path / "a"), "-r", "reference", "--calibration", short)
    told = cli(*args, "--bits", "3", code=2)[1]
    assert "the weights take 4.1556 bits a weight in their smallest schemes, and the budget is 3 bits a weight" in told
    told = cli(*args, "--bits", "16")[1]  # the checkpoint is bfloat16
    assert "all 8 weights fit into 16 bits a weight unquantised, and stay as they are" in told
    data = ("-d", str(PICO / "README.md"), "--bits", "0")
    assert "leave out --bits," in cli("eval", str(tmp_path / "a"), *data, code=2)[1]
    assert "leave out --recipe," in cli("show", str(tmp_path / "a"), "-r", "nvfp4", code=2)[1]


def test_the_report_of_an_artifact_with_a_weight_of_zeros_is_json(pico: nn.Module, tmp_path: Path) -> None:
    model = copy.deepcopy(pico)
    model.model.layers[0].mlp.down_proj.weight.zero_()
    llmopt.compile(model, "nvfp4+reference", target="cpu").save(tmp_path / "a")

    def fail(constant: str) -> None:
        pytest.fail(f"{constant} is no JSON")

    for file in (tmp_path / "a").rglob("*.json"):
        json.loads(file.read_text(), parse_constant=fail)
    assert "lossless" in (tmp_path / "a" / "report.json").read_text()


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
