"""Artifacts: what is saved comes back in a process without the model's code."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from artifacts import PICO, files_of, parts_of, small_model
from safetensors.torch import load_file
from tiny_gpt import tiny_gpt

import llmopt
from llmopt.codegen.regions import CompiledRegion
from llmopt.compiler.program import tensor_weight
from llmopt.model import CompiledModel
from llmopt.runtime import artifact, tensors

PROMPTS = [[3, 14, 15, 9, 2], [6], [5, 35]]


@pytest.fixture(scope="module")
def model() -> CompiledModel:
    return small_model()


@pytest.fixture(scope="module")
def saved(model: CompiledModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model.save(tmp_path_factory.mktemp("artifact") / "gpt")


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    return shutil.copytree(saved, tmp_path / "gpt")


def in_a_fresh_process(folder: Path, code: str, **environment: str) -> dict:
    """What `code` puts into `out`, run elsewhere with `model` loaded from the artifact."""
    script = (
        "import json, sys, llmopt\nmodel = llmopt.load(sys.argv[1])\nout = {}\n"
        f"{code}\nout['modules'] = sorted(sys.modules)\nprint(json.dumps(out))"
    )
    # the same llmopt as here, which may come from the folder this process was started in; not the tests' own modules
    environment |= {"PYTHONPATH": str(Path(llmopt.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", script, str(folder)],
        cwd=folder.parent, env=os.environ | environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_fresh_process_without_the_models_code(model: CompiledModel, saved: Path):
    out = in_a_fresh_process(
        saved,
        f"out['greedy'] = model.generate({PROMPTS}, max_new_tokens=12)\n"
        f"out['sampled'] = model.generate({PROMPTS}, max_new_tokens=12, temperature=1.0, seed=4)\n"
        "out['text'], out['report'] = model.text(), model.report.to_dict()",
    )
    assert out["greedy"] == model.generate(PROMPTS, max_new_tokens=12)
    assert out["sampled"] == model.generate(PROMPTS, max_new_tokens=12, temperature=1.0, seed=4)
    assert out["text"] == model.text()
    assert out["report"] == json.loads(json.dumps(model.report.to_dict()))
    assert not {"tiny_gpt", "transformers", "torch._dynamo", "torch._inductor"} & set(out["modules"])


def test_logits_are_the_modules_own(saved: Path):
    ids = torch.tensor([[3, 14, 15, 9, 2, 6, 5, 35]])
    ours, theirs = llmopt.load(saved)(ids), tiny_gpt()(ids, torch.arange(8)[None])
    torch.testing.assert_close(ours, theirs)


def test_everything_but_values_comes_back(model: CompiledModel, saved: Path):
    loaded = artifact.load(saved)
    assert (loaded.recipe, loaded.target) == (model.recipe, model.target)
    assert loaded.program.state == model.program.state
    assert loaded.program.properties == model.program.properties
    facts = dataclasses.replace(model.program.facts, tokenizer=str(saved / "tokenizer"))
    assert loaded.program.facts == facts
    assert loaded.program.choices == json.loads(json.dumps(model.program.choices))


def test_readable_text_is_the_printed_graph(model: CompiledModel, saved: Path):
    for name, graph in model.program.graphs.items():
        assert (saved / "graphs" / f"{name}.py").read_text() == graph.print()


def test_second_generation_is_the_first(saved: Path, tmp_path: Path):
    """Saving what was loaded changes no graph and no weight."""
    again = llmopt.load(saved).save(tmp_path / "again")
    for name in files_of(saved):
        if name != "manifest.json":
            assert (again / name).read_bytes() == (saved / name).read_bytes(), name


def test_saved_onto_itself(model: CompiledModel, copy: Path):
    loaded = llmopt.load(copy)
    loaded.save(copy)
    assert files_of(copy.parent) == [f"gpt/{name}" for name in files_of(copy)]
    want = model.generate(PROMPTS, max_new_tokens=8)
    assert loaded.generate(PROMPTS, max_new_tokens=8) == want
    assert llmopt.load(copy).generate(PROMPTS, max_new_tokens=8) == want


def test_weights_as_safetensors_reads_them(model: CompiledModel, saved: Path):
    """Tied weights and those both graphs read are stored once, unused ones not at all."""
    stored = load_file(saved / "weights-00001.safetensors")
    where = json.loads((saved / "manifest.json").read_text())["weights"]
    assert set(where) == set(model.program.used_weights())
    assert set(stored) == {key for _, key, _ in where.values()}
    for name, tensor in model.weights.items():
        torch.testing.assert_close(stored[where[name][1]], tensor, rtol=0, atol=0)
    own = {p.data_ptr(): p.numel() * p.element_size() for p in tiny_gpt().parameters()}
    assert sum(t.numel() * t.element_size() for t in stored.values()) == sum(own.values())


def test_equal_weights_share_memory():
    tied = torch.arange(600.0).reshape(20, 30)
    other = tied.clone()
    other[10, 10] = -1  # equal ends
    named = {"a": tied, "b": other, "c": tied.clone(), "d": tied.reshape(30, 20), "e": tied.to(torch.float16)}
    weights = {name: tensor_weight(t) for name, t in named.items()}
    stored: dict[str, str] = {}
    found = [name for name, _ in tensors.distinct(weights, named.__getitem__, stored)]
    assert stored == {"a": "a", "b": "b", "c": "a", "d": "d", "e": "e"}
    assert found == ["a", "b", "d", "e"]


@pytest.mark.parametrize("limit", [1, 100, 10**6])
def test_shards(limit: int, tmp_path: Path):
    kinds = [torch.float32, torch.bfloat16, torch.int8, torch.bool, torch.float8_e4m3fn, torch.int64]
    named = {f"w{i}": torch.arange(i * 3).to(kinds[i % 6]).reshape(3, i) for i in range(9)} | {"s": torch.tensor(2.5)}
    found = {}
    for number, group in enumerate(tensors.shards(named.items(), limit)):
        (tmp_path / str(number)).write_bytes(b"".join(tensors.encoded(group)))
        assert sum(w.nbytes for w in group.values()) <= limit or len(group) == 1
        found.update(load_file(tmp_path / str(number)))
    assert found.keys() == named.keys()
    for name, tensor in named.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        assert found[name].view(torch.uint8).tolist() == tensor.view(torch.uint8).tolist() if tensor.dim() else True
    assert found["s"] == named["s"]


def test_loaded_weights_are_mapped_not_copied(saved: Path):
    loaded = artifact.load(saved).program.weights
    assert loaded["tokens.weight"].load().data_ptr() == loaded["tokens.weight"].load().data_ptr()


def test_tokenizer_travels(saved: Path, model: CompiledModel):
    loaded = llmopt.load(saved)
    text = "def f(x):\n    return é"
    assert loaded.tokenizer.encode(text) == model.tokenizer.encode(text)


def test_no_tokenizer_is_fine(model: CompiledModel, tmp_path: Path):
    program = dataclasses.replace(model.program, facts=dataclasses.replace(model.program.facts, tokenizer=None))
    artifact.save(parts_of(model)._replace(program=program), tmp_path / "a", model.weights, "1")
    loaded = llmopt.load(tmp_path / "a")
    assert loaded.tokenizer is None
    assert len(loaded.generate([1, 2], max_new_tokens=3)) == 3


def test_compiled_regions_come_back(model: CompiledModel, tmp_path: Path):
    shared = b"\x7fELF shared"
    regions = {"layer@1": CompiledRegion("a = 1\n", {"x.so": shared}), "layer@n": CompiledRegion("b = 'é'\n", {})}
    regions["head@1"] = CompiledRegion("", {"x.so": b"other", "y.so": shared})
    made = parts_of(model)._replace(regions=SimpleNamespace(compiled=regions, compile_all=lambda: None))
    artifact.save(made, tmp_path / "a", model.weights, "1")
    assert artifact.load(tmp_path / "a").regions.compiled == regions
    assert len(list((tmp_path / "a" / "code").glob("*.so"))) == 2


@pytest.mark.slow
def test_default_recipe_without_a_compiler(tmp_path: Path):
    model = llmopt.compile(PICO, dtype="float32")
    model.save(tmp_path / "a")
    ids = model.tokenizer.encode("def fibonacci(n):")
    code = f"out['tokens'] = model.generate({ids}, max_new_tokens=16)\nout['text'] = model.text()"
    environment = {"CXX": "/bin/false", "LLMOPT_CACHE": str(tmp_path / "cache"), "PATH": ""}
    out = in_a_fresh_process(tmp_path / "a", code, **environment)
    assert out["tokens"] == model.generate(ids, max_new_tokens=16)
    assert out["text"] == model.text()


def test_a_weight_is_read_once_to_be_saved():
    read: list[str] = []
    named = {name: torch.full((64, 64), float(i)) for i, name in enumerate("abc")}
    weights = {name: tensor_weight(t) for name, t in named.items()}
    stored: dict[str, str] = {}
    for _ in tensors.shards(tensors.distinct(weights, lambda n: read.append(n) or named[n], stored), limit=20000):
        pass
    assert read == ["a", "b", "c"]
