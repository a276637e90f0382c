"""What the exactness benchmark and the check of artifacts find, and what they let pass."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import llmopt

ROOT = Path(__file__).resolve().parents[1]
ARGS = Namespace(device="cpu", lengths=[1, 12, 5], new_tokens=8, steps=3, dtypes=("bfloat16",))


@pytest.fixture(scope="module")
def bench() -> SimpleNamespace:
    """The benchmarks' modules."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        import _exact_models as models
        import _exact_runs as runs
        import artifact_check
        import exactness
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))
    return SimpleNamespace(models=models, runs=runs, artifact=artifact_check, exactness=exactness)


@pytest.fixture(scope="module")
def kept() -> dict[torch.dtype, object]:
    """Sessions of the model as it is."""
    return {}


@pytest.fixture
def compiled_as(bench: SimpleNamespace, kept: dict[torch.dtype, object], monkeypatch: pytest.MonkeyPatch):
    """Have what is checked compiled by the recipe `reference`, from a model that `change` was done to."""

    def use(change=None) -> None:
        def opened(model, device, recipe="default"):
            if recipe == "default" and change is not None:
                change(model := copy.deepcopy(model))
                return bench.runs.opened(model, "cpu", "reference")
            if model.dtype not in kept:
                kept[model.dtype] = bench.runs.opened(model, "cpu", "reference")
            return kept[model.dtype]

        monkeypatch.setattr(bench.exactness, "opened", opened)

    return use


@torch.no_grad()
def shifted(model) -> None:
    """A norm off by 2 %: no rounding of bf16, and of fp32 far less."""
    model.model.norm.weight.mul_(1.0).add_(0.02)


def test_the_right_program_has_every_token_and_no_more_than_eager_s_error(bench, compiled_as) -> None:
    compiled_as()
    found = bench.exactness.check_model("tiny", ARGS)
    assert found["failed"] == []
    ways = found["float32"]["ways"]
    assert set(ways) == {"reference on the CPU", "batch", "alone", "chunks"}
    assert all(way["equal"] == way["of"] == 24 for way in ways.values())
    assert found["float32"]["distinct_tokens"] > 5
    errors = found["bfloat16"]["errors"]
    assert set(errors) == {f"{half}, {way}" for half in ("prompt", "decode") for way in ("batch", "alone")}
    assert all(0.2 < e["ratio"] <= 1.5 and e["eager"] > 1e-4 for e in errors.values())
    assert found["bfloat16"]["bits"]["prompts run again"]["equal"] == 3


def test_a_program_that_is_a_little_off_fails_in_both_precisions(bench, compiled_as) -> None:
    compiled_as(lambda model: model.get_input_embeddings().weight.mul_(1.1))
    failed = bench.exactness.check_tokens(bench.models.subject("tiny"), ARGS)[1]
    assert any(line.startswith("fp32, batch: ") and "'within_rounding': False" in line for line in failed)
    assert not any("reference on the CPU" in line for line in failed)
    compiled_as(shifted)
    failed = bench.exactness.check_errors(bench.models.subject("tiny"), torch.bfloat16, ARGS)[1]
    assert len(failed) == 4
    assert all("times eager's error, wanted 1.5" in line for line in failed)


def test_only_a_token_that_rounding_may_turn_is_excused(bench) -> None:
    subject = bench.models.subject("tiny")
    exact = bench.models.widened(subject.model)
    order = bench.models.exact_logits(exact, [1, 2, 3])[-1].argsort(descending=True).tolist()
    found = bench.exactness.difference(subject, exact, [1, 2, 3], order[0], order[1], 0)
    assert found["gap_fp64"] == found["below_best_fp64"] > 100 * found["rounding_fp32"] > 0
    assert not found["within_rounding"]
    assert bench.exactness.difference(subject, exact, [1, 2, 3], order[0], order[0], 0)["within_rounding"]


def test_a_model_that_cannot_be_checked_fails_the_run(tmp_path: Path) -> None:
    script, out, model = str(ROOT / "benchmarks" / "exactness.py"), tmp_path / "out.json", tmp_path / "broken"
    model.mkdir()
    (model / "config.json").write_text("{}")
    command = [sys.executable, script, "--device", "cpu", "--models", str(model), "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "1 failures in 1 models" in done.stderr
    (failed,) = json.loads(out.read_text())["models"][str(model)]["failed"]
    assert failed.startswith("its process ended with 1")


def test_folders_of_models_join_the_random_ones(bench, tmp_path: Path) -> None:
    for name in ("own", "pico-llama-4m"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").touch()
    folders = [str(tmp_path / "own"), str(tmp_path / "pico-llama-4m")]
    rest = [name for name in bench.exactness.DEFAULT if name != "pico"]
    assert bench.exactness.chosen(None, tmp_path) == [*folders, *rest]
    assert bench.exactness.chosen(None, None) == ["pico", *rest]
    assert bench.exactness.chosen(["own", "qwen3"], tmp_path) == [folders[0], "qwen3"]
    with pytest.raises(SystemExit, match="'absent' is neither a folder"):
        bench.exactness.chosen(["absent"], tmp_path)


def test_an_artifact_must_make_the_tokens_that_were_recorded(bench, tmp_path: Path, monkeypatch) -> None:
    pico, artifact = ROOT / "examples" / "models" / "pico-llama-4m", tmp_path / "artifact"
    expect, out = tmp_path / "tokens.json", tmp_path / "out.json"
    llmopt.compile(pico, "reference", "cpu", dtype="float32").save(artifact)
    command = [str(artifact), "--expect", str(expect)]
    assert bench.artifact.main([*command, "--record", str(pico), "--new-tokens", "6"]) == 0
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.setattr("llmopt.codegen.cubin_parallel.compile_all", None)
    monkeypatch.setattr("llmopt.codegen.cubin_parallel.compile_kernel", None)
    monkeypatch.setattr("llmopt.codegen.cubin.compile_kernel", None)
    assert bench.artifact.main([*command, "--out", str(out)]) == 0
    result = json.loads(out.read_text())["artifact"]
    assert result["ways"]["batch"] == {"equal": 18, "of": 18, "differences": []}
    expected = json.loads(expect.read_text())
    expected["tokens"][2][3] = expected["best"][2][3]["ids"][1]
    expect.write_text(json.dumps(expected))
    assert bench.artifact.main(command) == 1
    expected["best"][2][3]["rounding"] = 100.0
    expect.write_text(json.dumps(expected))
    assert bench.artifact.main(command) == 0
