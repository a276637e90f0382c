"""`llmopt eval`: figures as transformers has them, what is compared with what, plots, and mistakes told in one line."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

import llmopt
from llmopt.cli import app
from llmopt.commands import eval as command
from llmopt.commands.eval import Settings, layers, prepared
from llmopt.commands.model import uncompressed
from llmopt.compiler.errors import InputError
from llmopt.compiler.recipe import RECIPES, Recipe
from llmopt.passes import QuantizeKV
from llmopt.runtime.layer_error import Loaded, ScoreError, score_errors

PICO = str(Path(__file__).resolve().parents[2] / "examples" / "models" / "pico-llama-4m")
WINDOW = 96
FP32 = ("--dtype", "float32", "--window", str(WINDOW))


def cli(*args: str) -> tuple[int, str, str]:
    done = CliRunner().invoke(app, ["eval", *args])
    return done.exit_code, done.stdout, done.stderr


def figures(*args: str) -> dict:
    code, out, err = cli(*args, "--json")
    assert code == 0, err
    return json.loads(out)


def rejected(*args: str) -> str:
    code, out, err = cli(*args)
    assert (code, out) == (2, ""), err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    return err


@pytest.fixture(scope="module")
def source() -> str:
    """Python text: a module of the standard library."""
    return Path(json.decoder.__file__).read_text()


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory, source: str) -> str:
    ids = AutoTokenizer.from_pretrained(PICO).encode(source, verbose=False)
    path = tmp_path_factory.mktemp("data") / "tokens.safetensors"
    save_file({"tokens": torch.tensor([1, *ids], dtype=torch.int32)[: 6 * WINDOW + 1]}, path)
    return str(path)


@pytest.fixture(scope="module")
def want(tokens: str) -> Tensor:
    """The loss of every position of six windows, by transformers in fp32."""
    from safetensors.torch import load_file

    ids = load_file(tokens)["tokens"].long()
    model = AutoModelForCausalLM.from_pretrained(PICO, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = model(ids[:-1].view(6, WINDOW)).logits.double()
    return functional.cross_entropy(logits.flatten(0, 1), ids[1:], reduction="none").view(6, WINDOW)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> str:
    out = tmp_path_factory.mktemp("eval") / "pico.llmopt"
    llmopt.compile(PICO, recipe="reference+int4", dtype="float32").save(out)
    return str(out)


@pytest.fixture(scope="module")
def compared(tokens: str, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """The figures of a lossy recipe, with a picture."""
    picture = tmp_path_factory.mktemp("plot") / "layers.png"
    said = figures(PICO, "-d", tokens, *FP32, "-r", "reference+int4", "--plot", str(picture))
    return {**said, "picture": picture.read_bytes()}


@pytest.mark.parametrize("recipe", ["reference", "default"])
def test_perplexity_is_transformers(tokens: str, want: Tensor, recipe: str):
    said = figures(PICO, "-d", tokens, *FP32, "-r", recipe, "--batch", "4")
    assert (said["windows"], said["tokens"], said["against"]) == (6, 6 * WINDOW, None)
    assert said["nll"] == pytest.approx(float(want.mean()), rel=1e-6)
    assert said["perplexity"] == pytest.approx(math.exp(want.mean()), rel=1e-6)
    assert said["nll_error"] == pytest.approx(float(want.mean(1).std()) / math.sqrt(6), rel=1e-4)
    assert {"commit", "torch", "command", "cpu", "date"} <= set(said)
    # the embedding is the head, and the cache is no weight
    assert said["weight_bytes"] == pytest.approx(4 * 3_574_016, rel=0.01)


def test_windows_and_the_file_of_figures(artifact: str, tokens: str, tmp_path: Path):
    out, args = tmp_path / "figures.json", (artifact, "-d", tokens, "--window", str(WINDOW), "--against", artifact)
    whole = figures(*args)
    said = figures(*args, "--windows", "2", "-o", str(out))
    assert (said["windows"], said["tokens"]) == (2, 2 * WINDOW)
    assert said["nll"] != whole["nll"]
    assert json.loads(out.read_text()) == said
    assert (said["against"]["kl"], said["against"]["top1"]) == (0.0, 1.0)


def test_text_ends_with_the_end_token_and_a_folder_is_one_text(artifact: str, tmp_path: Path, source: str):
    tokenizer = AutoTokenizer.from_pretrained(PICO)
    parts = {"b.py": source[:900], "a/z.txt": source[900:2000], ".hidden": "x" * 400}
    for name, part in parts.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(part)
    joined = [i for name in ("a/z.txt", "b.py") for i in (*tokenizer.encode(parts[name]), tokenizer.eos_token_id)]
    subject = prepared(Settings(artifact, str(tmp_path), window=64))
    read = [t for w in subject.windows for t in w[:-1].tolist()]
    assert read == joined[: len(read)]
    assert len(read) == (len(joined) - 1) // 64 * 64
    alone = prepared(Settings(artifact, str(tmp_path / "b.py"), window=64))
    assert alone.windows[0][:-1].tolist() == tokenizer.encode(parts["b.py"])[:64]


def test_a_lossy_recipe_is_compared_with_the_uncompressed_program(compared: dict, want: Tensor):
    other = compared["against"]
    assert (other["recipe"], other["dtype"]) == ("uncompressed", "float32")
    assert other["nll"] == pytest.approx(float(want.mean()), rel=1e-6)
    assert other["nll_difference"] == pytest.approx(compared["nll"] - other["nll"], rel=1e-6)
    assert other["weight_bytes"] > 1.3 * compared["weight_bytes"]
    assert 1e-3 < other["kl"] < 1
    assert other["kl"] < other["kl_largest"]
    assert 0.5 < other["top1"] < 1


def test_against_none(tokens: str):
    subject = prepared(Settings(PICO, tokens, "reference+int4", against="none", window=WINDOW))
    assert subject.theirs is None


def test_the_uncompressed_recipe_keeps_everything_else():
    lossy = replace(Recipe.parse("reference+w4a4"), page_size=32, dtype="float16")
    plain = uncompressed(lossy)
    assert plain.passes == RECIPES["default"].passes
    assert (plain.providers, plain.page_size, plain.dtype) == (("reference",), 32, "float16")
    assert uncompressed(RECIPES["default"]) is RECIPES["default"]


def test_a_recipe_that_learns(tokens: str, compared: dict):
    args = ("-d", tokens, *FP32, "-r", "reference+int4+gptq")
    said = figures(PICO, *args, "--calibration", tokens)
    assert said["against"]["recipe"] == "uncompressed"
    assert said["against"]["nll"] == compared["against"]["nll"]
    assert said["against"]["kl"] < compared["against"]["kl"]  # it has seen these very tokens
    assert "--calibration FILE" in rejected(PICO, *args)


def test_an_artifact_against_its_model(artifact: str, tokens: str, compared: dict):
    said = figures(artifact, "-d", tokens, "--window", str(WINDOW), "--against", PICO)
    for key in ("nll", "dtype", "weight_bytes"):
        assert said[key] == compared[key]
    for key in ("kl", "top1", "nll", "recipe", "dtype"):
        assert said["against"][key] == compared["against"][key]


def test_the_table(artifact: str, tokens: str):
    args = (artifact, "-d", tokens, "--window", str(WINDOW))
    code, out, err = cli(*args, "--against", artifact)
    assert (code, err) == (0, "")
    assert "6 windows of 96 tokens of tokens.safetensors, float32" in " ".join(out.split())
    assert "KL divergence 0.00000 ± 0.00000 nats a token" in out
    assert "at 100.00% of positions" in out
    code, out, err = cli(*args)
    assert code == 0
    assert "KL" not in out
    assert "give --against MODEL" in " ".join(err.split())


def test_a_terminal_is_shown_a_bar_and_nothing_else_is(artifact: str, tokens: str, monkeypatch: pytest.MonkeyPatch):
    args = (artifact, "-d", tokens, "--window", str(WINDOW), "--against", artifact, "--json")
    assert cli(*args)[2] == ""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TTY_INTERACTIVE", "1")
    code, out, err = cli(*args)
    assert code == 0
    assert "6/6" in err
    assert f"perplexity {json.loads(out)['perplexity']:.4f}" in err


def test_the_plot_and_the_numbers_behind_it(compared: dict):
    said, picture = compared["layers"], compared["picture"]
    assert picture.startswith(b"\x89PNG\r\n\x1a\n")
    assert len(picture) > 5000
    names = [e["name"] for e in said["hidden_state"]]
    assert names == ["embed_tokens", *(f"layers.{i}.{part}" for i in (0, 1) for part in ("self_attn", "mlp"))]
    errors = [e["relative"] for e in said["hidden_state"]]
    assert errors[0] == 0.0
    assert all(1e-3 < e < 1 for e in errors[1:])
    kinds = ("q_proj", "o_proj", "gate_proj", "down_proj")
    assert len(said["weights"]) == 8
    for at, weight in enumerate(said["weights"]):
        assert f"layers.{at // 4}" in weight["name"]
        assert kinds[at % 4] in weight["name"]
        assert weight["scheme"].startswith("int4")
        assert 10 < weight["sqnr_db"] < 30


def test_more_bits_less_error_everywhere(tokens: str, compared: dict):
    fine = layers(prepared(Settings(PICO, tokens, "reference+int8", dtype="float32", window=WINDOW)))
    coarse = compared["layers"]
    for more, less in list(zip(fine["hidden_state"], coarse["hidden_state"], strict=True))[1:]:
        assert more["relative"] < less["relative"] / 4
    for more, less in zip(fine["weights"], coarse["weights"], strict=True):
        assert more["sqnr_db"] > less["sqnr_db"] + 12


def test_errors_of_scores_over_packed_keys(tokens: str):
    subject = prepared(Settings(PICO, tokens, "int4-kv", "cpu", "float32", window=WINDOW))
    ours, window = subject.ours, subject.windows[0][None, :-1]

    def found(**options: object) -> list[ScoreError]:
        return score_errors(Loaded(ours.program, ours.weights, ours.session.device), QuantizeKV(**options), window)

    int4, int8 = found(), found(keys="int8")
    assert [asdict(e) for e in int4] == command.scores(subject)
    assert [e.name for e in int4] == ["layers.0.self_attn", "layers.1.self_attn"]
    assert all(0 < b.rmse < a.rmse / 8 < a.deviation for a, b in zip(int4, int8, strict=True))
    assert [e.name for e in found(skip=(0,))] == ["layers.1.self_attn"]
    assert [e.rmse for e in found(recent=WINDOW)] == [0, 0]
    assert found(keys="none", values="int8") == []
    (first, _) = score_errors(Loaded(ours.program, ours.weights, ours.session.device), QuantizeKV(), window[:, :1])
    assert first.deviation == 0  # one score does not vary
    out = " ".join(cli(PICO, "-d", tokens, "--recipe", "int4-kv", *FP32)[1].split())
    assert "packed keys: attention's scores are off by" in out


def test_mistakes_in_data(artifact: str, tmp_path: Path):
    run = (artifact, "--window", "16")
    assert "error: eval: --data '" in (said := rejected(*run, "-d", str(tmp_path / "none")))
    assert "' does not exist; give" in said
    keyless, bad, wide = (tmp_path / f"{name}.safetensors" for name in ("keyless", "bad", "wide"))
    save_file({"ids": torch.arange(99)}, keyless)
    save_file({"tokens": torch.arange(90) + 8150}, bad)
    save_file({"tokens": torch.ones(2, 3, 4, dtype=torch.int32)}, wide)
    assert "has no 'tokens' (it has ids)" in rejected(*run, "-d", str(keyless))
    assert "token id 8239 (sequence 0) is not in [0, 8192)" in rejected(*run, "-d", str(bad))
    assert rejected(*run, "-d", str(wide)).startswith("error: data ")
    (tmp_path / "x.npy").write_bytes(b"\x93NUMPY\xff\xfe")
    assert "is not UTF-8 text; wanted text, or a safetensors file" in rejected(*run, "-d", str(tmp_path / "x.npy"))
    (tmp_path / "short.txt").write_text("import os\n")
    assert "longest text has 4 tokens; wanted at least 17" in rejected(*run, "-d", str(tmp_path / "short.txt"))
    assert cli(artifact)[0] == 2


def test_mistakes_in_options(artifact: str, tokens: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    given = ("-d", tokens)
    for name in ("--window", "--windows", "--batch"):
        assert f"{name} is 0; wanted at least 1" in rejected(PICO, *given, name, "0")
    assert "the model's context is 4096 tokens" in rejected(artifact, *given, "--window", "5000")
    assert "wanted at most that" in rejected(artifact, *given, "--batch", "257")
    assert "leave out --recipe and --dtype" in rejected(artifact, *given, "-r", "int4", "--dtype", "float32")
    assert "leave out --calibration and --bits" in rejected(artifact, *given, "--calibration", "x", "--bits", "4.5")
    assert "cannot run here" in rejected(PICO, *given, "--target", "cuda:sm_120")
    assert "unknown extension; wanted one of .png" in rejected(PICO, *given, "--plot", str(tmp_path / "a.gif"))
    assert "there is no folder" in rejected(PICO, *given, "--plot", str(tmp_path / "none" / "a.png"))
    plain = (artifact, *given, "--window", str(WINDOW), "--plot", str(tmp_path / "a.png"))
    assert "it is compared with none; give --against MODEL" in rejected(*plain)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "pip install 'llmopt[plot]'" in rejected(*plain)


def test_another_vocabulary_cannot_be_compared(artifact: str, tokens: str, tmp_path: Path):
    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=100,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "other")
    args = (artifact, "-d", tokens, "--window", str(WINDOW), "--against", str(tmp_path / "other"))
    assert "has a vocabulary of 100 tokens and" in rejected(*args)


def test_no_file_is_left_where_measuring_fails(
    artifact: str, tokens: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def fail(*_: object) -> dict:
        raise InputError("no")

    monkeypatch.setattr(command, "measured", fail)
    out = tmp_path / "figures.json"
    rejected(artifact, "-d", tokens, "--window", str(WINDOW), "-o", str(out))
    assert not list(tmp_path.iterdir())
