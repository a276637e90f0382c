"""A user's mistake ends in one line that says what, where and the remedy: LlmoptError in Python, else exit code 2."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, LlamaConfig
from typer.testing import CliRunner

import llmopt
from llmopt.cli import app
from llmopt.compiler.errors import InputError, LlmoptError
from llmopt.model import CompiledModel

PICO = Path(__file__).resolve().parents[1] / "examples" / "models" / "pico-llama-4m"


@pytest.fixture(scope="module")
def model() -> CompiledModel:
    return llmopt.compile(PICO, recipe="reference", dtype="float32")


def cli(*args: str, stdin: str | None = None) -> tuple[int, str, str]:
    done = CliRunner().invoke(app, list(args), input=stdin)
    return done.exit_code, done.stdout, done.stderr


def rejected(*args: str, stdin: str | None = None) -> str:
    """The one line on stderr of a command that exits with 2 and prints nothing else."""
    code, out, err = cli(*args, stdin=stdin)
    assert code == 2, err
    assert out == ""
    (line,) = [text for text in err.splitlines() if not text.startswith("warning: ")]
    assert line.startswith("error: ")
    assert "Traceback" not in err
    return line


def bert(folder: Path) -> Path:
    BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32).save_pretrained(folder)
    return folder


def t5(folder: Path) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "t5"}))
    return folder


def corrupt(folder: Path) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama", ')
    return folder


def unknown_type(folder: Path) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "no-such-model"}')
    return folder


def weightless(folder: Path) -> Path:
    LlamaConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=64).save_pretrained(folder)
    return folder


def lost_shard(folder: Path) -> Path:
    weightless(folder)
    index = {"weight_map": {"model.embed_tokens.weight": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def torn_index(folder: Path) -> Path:
    weightless(folder)
    (folder / "model.safetensors.index.json").write_text("{}")
    return folder


def torn_weights(folder: Path) -> Path:
    shutil.copytree(PICO, folder)
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])
    return folder


def a_file(folder: Path) -> Path:
    folder.write_text("hello")
    return folder


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda folder: folder, "no such folder"),
        (a_file, "a file; wanted a transformers checkpoint folder"),
        (t5, "is not a causal language model"),
        (corrupt, "its config cannot be read"),
        (unknown_type, "its config cannot be read"),
        (weightless, "no model.safetensors"),
        (lost_shard, "model-00001-of-00002.safetensors, which is not there"),
        (torn_index, "model.safetensors.index.json' is no index of weights"),
        (torn_weights, "model.safetensors' cannot be read"),
    ],
)
def test_models(tmp_path: Path, make: Callable[[Path], Path], said: str):
    path = make(tmp_path / "model")
    with pytest.raises(LlmoptError) as caught:
        llmopt.compile(path, recipe="reference")
    assert said in str(caught.value)
    assert str(path) in str(caught.value)
    assert said in rejected("compile", str(path), "-o", str(tmp_path / "out"), "-r", "reference")
    assert not (tmp_path / "out").exists()


def test_an_artifact_without_its_manifest_is_called_one(tmp_path: Path):
    (tmp_path / "graphs").mkdir()
    said = f"model {str(tmp_path)!r}: it is an artifact without its manifest.json; copy the artifact again, or "
    for args in (["run", str(tmp_path), "hello"], ["kernels", str(tmp_path)], ["show", str(tmp_path)]):
        assert said in rejected(*args)


def test_an_artifact_is_no_model_to_compile(tmp_path: Path, model: CompiledModel):
    made = tmp_path / "made"
    model.save(made)
    said = f"model {str(made)!r}: it is an artifact, compiled already; wanted the model it was made from"
    for args in (["compile", str(made), "-o", str(tmp_path / "out")], ["bench", str(made)], ["bisect", str(made)]):
        assert said in rejected(*args)


def test_bert_is_no_causal_model(tmp_path: Path):
    """transformers would load a BertConfig as a decoder; its attention sees all tokens."""
    with pytest.raises(LlmoptError, match="causal"):
        llmopt.compile(bert(tmp_path / "bert"), recipe="reference")
    assert "causal" in rejected("show", str(tmp_path / "bert"))


RECIPE = {"version": 1, "name": "mine"}


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({**RECIPE, "passes": ["raise-atten", "lower"]}, "pass 'raise-atten' is unknown; did you mean 'raise-aten'?"),
        (
            {**RECIPE, "passes": ["lower", "insert-kv-cache"]},
            "requires 'cached', which 'insert-kv-cache' (2nd) ensures",
        ),
        ({**RECIPE, "passes": [{"name": "canonicalize", "options": {"merge": 1}}]}, "option 'merge' is unknown"),
        ({**RECIPE, "passes": []}, "has no passes"),
        ({"version": 9, "name": "mine", "passes": ["lower"]}, "reads recipes of `version: 1`"),
    ],
)
def test_recipe_files(tmp_path: Path, data: dict[str, object], said: str):
    path = tmp_path / "mine.yaml"
    path.write_text(json.dumps(data))
    with pytest.raises(LlmoptError) as caught:
        llmopt.compile(PICO, recipe=str(path))
    assert said in str(caught.value)
    assert said in rejected("compile", str(PICO), "-o", str(tmp_path / "out"), "-r", str(path))


def test_recipe_file_that_is_no_yaml(tmp_path: Path):
    path = tmp_path / "mine.yaml"
    path.write_text("name: [")
    assert "not YAML" in rejected("diff", str(PICO), "-r", str(path))
    assert "cannot be read" in rejected("diff", str(PICO), "-r", str(tmp_path / "absent.yaml"))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("-r", "refrence"), "recipe 'refrence' is unknown; did you mean 'reference'?"),
        (("-t", "cuda:90"), "target 'cuda:90' is unknown; did you mean 'cuda:sm_90'?"),
        (("-t", "cpu:avx9"), "target 'cpu:avx9' is unknown"),
        (("--dtype", "int4"), "dtype 'int4' is not supported"),
    ],
)
def test_names(tmp_path: Path, options: tuple[str, str], said: str):
    keyword = {"-r": "recipe", "-t": "target", "--dtype": "dtype"}[options[0]]
    with pytest.raises(LlmoptError) as caught:
        llmopt.compile(PICO, **{"recipe": "reference", keyword: options[1]})
    assert said in str(caught.value)
    assert said in rejected("compile", str(PICO), "-o", str(tmp_path / "out"), *options)


@pytest.mark.parametrize(
    ("prompts", "options", "said"),
    [
        ([], {}, "no prompt"),
        ([[]], {}, "is empty"),
        ([[1, 8192]], {}, "token id 8192 at index 1, the vocabulary has 8192"),
        ([[1], [-1]], {}, "prompt 1 has token id -1"),
        ([[1] * 4096], {}, "has 4096 tokens, the model's context is 4096"),
        ([["a"]], {}, "ids that are no whole numbers"),
        ([[1, True]], {}, "ids that are no whole numbers"),
        (b"ab", {}, "wanted a text"),
        ({"a": 1}, {}, "wanted a text"),
        ([[1]], {"seed": "x"}, "seed is 'x' (str); wanted a whole number"),
        ([[1]], {"max_new_tokens": 2.5}, "max_new_tokens is 2.5 (float); wanted a whole number"),
        ([[1]], {"stop_token_ids": 5}, "stop_token_ids is 5; wanted a tuple"),
        ([[1], "a"], {}, "prompts of several kinds"),
        (None, {}, "wanted a text"),
        (7, {}, "wanted a text"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens is 0; wanted at least 1"),
        ([[1]], {"temperature": -1.0}, "temperature is -1.0"),
        ([[1]], {"top_p": 0.0}, "top_p is 0.0"),
        ([[1]], {"seed": -1}, "seed is -1"),
    ],
)
def test_prompts(model: CompiledModel, prompts: object, options: dict[str, object], said: str):
    with pytest.raises(LlmoptError) as caught:
        model.generate(prompts, **options)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_prompts_of_the_command(tmp_path: Path):
    run = ("run", str(PICO), "-r", "reference")
    assert "the prompt is empty" in rejected(*run, stdin="")
    assert "the prompt is empty" in rejected(*run, "")
    assert "max_new_tokens is 0" in rejected(*run, "hello", "-n", "0")
    assert "temperature is -0.5" in rejected(*run, "hello", "--temperature", "-0.5")
    assert "No such file" in rejected(*run, "-f", str(tmp_path / "absent.txt"))
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    assert "not UTF-8" in rejected(*run, "-f", str(tmp_path / "binary"))
    assert "Is a directory" in rejected(*run, "-f", str(tmp_path))
    assert "both as arguments and as --prompt-file" in rejected(*run, "hello", "-f", str(tmp_path / "binary"))
    assert "the model's context is 4096" in rejected(*run, stdin="x = 1\n" * 5000)


def test_outputs(tmp_path: Path):
    (tmp_path / "file").write_text("")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "config.json").write_text("{}")
    for out, said in (("file", "is a file"), ("full", "with other files in it"), ("file/inside", "cannot be made")):
        assert said in rejected("compile", str(PICO), "-o", str(tmp_path / out), "-r", "reference")
    assert (tmp_path / "full" / "config.json").read_text() == "{}"


@pytest.mark.parametrize("option", ["--batch=0", "--batch=two", "--new-tokens=1", "--rounds=0", "--peers=vllm"])
def test_bench_options(option: str):
    assert "bench: " in rejected("bench", str(PICO), option)


@pytest.mark.parametrize("text", ["", "1 2 3", "1 2 x 4", "1 2 3 4\n1 2 3 4 5", "1 2 3 8192"])
def test_bisect_tokens(tmp_path: Path, text: str):
    (tmp_path / "ids").write_text(text)
    rejected("bisect", str(PICO), "-r", "reference", "--tokens", str(tmp_path / "ids"))


def test_damaged_artifact(tmp_path: Path):
    (tmp_path / "manifest.json").write_text("{")
    assert "manifest" in rejected("run", str(tmp_path), "hello")
    assert "manifest" in rejected("show", str(tmp_path))


def test_unknown_graph_and_pass():
    assert "has no graph 'setp'" in rejected("show", str(PICO), "-r", "reference", "-g", "setp")
    assert "no pass 'lwer'; did you mean 'lower'?" in rejected("diff", str(PICO), "-r", "reference", "-p", "lwer")


def test_debug_shows_the_traceback(tmp_path: Path):
    code, out, err = cli("show", str(tmp_path / "absent"), "--debug")
    assert code == 2
    assert out == ""
    assert "Traceback (most recent call last)" in err
    assert err.splitlines()[-1].startswith("error: ")


@pytest.mark.parametrize(
    ("ids", "positions", "said"),
    [
        (torch.ones(1, 3), None, "wanted whole numbers"),
        (torch.ones(1, 5000, dtype=torch.int64), None, "context of 4096"),
        (torch.ones(1, 3, dtype=torch.int64), torch.tensor([[0, 1]]), "wanted the same"),
        (torch.ones(1, 4, dtype=torch.int64), torch.tensor([[0, 1, 0, 1]]), "consecutive positions"),
        (torch.ones(1, 1, dtype=torch.int64), torch.tensor([[10**6]]), "within the context"),
    ],
)
def test_inputs_of_the_plain_forward(
    model: CompiledModel, ids: torch.Tensor, positions: torch.Tensor | None, said: str
):
    with pytest.raises(InputError, match=said):
        model(ids, positions)
