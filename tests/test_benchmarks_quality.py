"""What the benchmark of recipes' accuracy measures, and what it does not measure twice."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmopt.commands.eval import Settings, measured, prepared
from llmopt.compiler.errors import InputError
from llmopt.compiler.recipe import Recipe

ROOT = Path(__file__).resolve().parents[1]
PICO = ROOT / "examples" / "models" / "pico-llama-4m"
DATA = ROOT / "docs" / "generate.py"


def module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    return module(ROOT / "benchmarks" / "quality.py")


def run(bench: ModuleType, out: Path, *recipes: str, more: tuple[str, ...] = ()) -> int:
    sizes = ("--window", "64", "--windows", "3")
    return bench.main(["--tokens", str(DATA), *sizes, "--out", str(out), *more, "--recipes", *recipes])


@pytest.fixture(scope="module")
def result(bench: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("quality") / "quality.json"
    assert run(bench, out, "reference", "reference+int4", "nothing", "reference+int8") == 1
    return out


def rows(out: Path) -> list[dict]:
    return json.loads(out.read_text())["rows"]


def test_rows(result: Path):
    plain, int4, int8 = rows(result)
    assert [r["recipe"] for r in (plain, int4, int8)] == ["reference", "reference+int4", "reference+int8"]
    assert plain["against"] is None
    assert plain["bits_per_weight"] is None
    assert int8["against"]["nll"] == int4["against"]["nll"] == pytest.approx(plain["nll"], rel=1e-9)
    assert int8["against"]["kl"] < int4["against"]["kl"] / 4
    assert 4 < int4["bits_per_weight"] < 5 < 8 < int8["bits_per_weight"] < 9
    assert int4["sqnr_db"].keys() == int8["sqnr_db"].keys()
    assert len(int4["sqnr_db"]) == 8
    assert {"commit", "torch", "date", "command"} <= set(int4)


def test_the_remembered_program_is_the_one_that_runs(result: Path):
    said = rows(result)[2]
    direct = measured(prepared(Settings(str(PICO), str(DATA), "reference+int8", None, "float32", None, 3, 64)))
    for key in ("kl", "top1", "nll", "nll_difference", "weight_bytes"):
        assert direct["against"][key] == said["against"][key]
    assert direct["nll"] == said["nll"]


def test_what_is_known_is_not_measured_again(
    bench: ModuleType, result: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    out = tmp_path / "quality.json"
    out.write_text(result.read_text())
    measured_now: list[str] = []

    def pretend(self: object, name: str) -> dict:
        measured_now.append(name)
        old = next(r for r in rows(result) if r["recipe"] == name)
        return {**old, "perplexity": 1.0}

    monkeypatch.setattr(bench.Bench, "run", pretend)
    assert run(bench, out, "reference", "reference+int4") == 0
    assert (measured_now, out.read_text()) == ([], result.read_text())
    assert run(bench, out, "reference+int4", more=("--again",)) == 0
    assert measured_now == ["reference+int4"]
    assert [r["perplexity"] == 1.0 for r in rows(out)] == [False, True, False]


def test_other_windows_are_another_measurement(bench: ModuleType):
    keys = {
        bench.wanted_key(PICO, recipe, bench.parsed(["--tokens", "x", "--windows", str(n), "--dtype", dtype]))
        for recipe in ("int4", "int8")
        for n in (0, 5)
        for dtype in ("float32", "bfloat16")
    }
    assert len(keys) == 8


def test_nothing_is_written_unless_tokens_are_given(bench: ModuleType):
    assert bench.parsed([]).out is None
    assert bench.parsed(["--tokens", "x"]).out == bench.OUT


def test_logits_are_computed_once(bench: ModuleType):
    calls: list[int] = []

    def logits(ids: torch.Tensor):
        calls.append(1)
        yield torch.full((1, 2, 3), float(len(calls)))

    known = bench.Remembered(logits)
    for _ in range(3):
        known.at = 0
        assert [float(next(known(torch.zeros(1, 2)))[0, 0, 0]) for _ in range(2)] == [1.0, 2.0]
    assert len(calls) == 2


def test_the_last_quarter_is_learned_from_and_not_measured_on(bench: ModuleType, tmp_path: Path):
    data = tmp_path / "tokens.safetensors"
    save_file({"tokens": torch.arange(1001, dtype=torch.int32)}, data)
    args = ("--tokens", str(data), "--window", "64", "--statistics", str(tmp_path / "learned"))
    with pytest.raises(InputError, match="12 windows of 64 tokens reach into the last quarter of 1001 tokens"):
        bench.calibration_data(bench.parsed([*args, "--windows", "12"]))
    with pytest.raises(InputError, match="all windows of 64 tokens"):
        bench.calibration_data(bench.parsed([*args, "--windows", "0"]))
    made = bench.calibration_data(bench.parsed([*args, "--windows", "11"]))
    assert load_file(made)["tokens"].tolist() == [*range(750, 1001)]
    assert bench.calibration_data(bench.parsed([*args, "--calibration", "mine.txt"])) == Path("mine.txt")
    with pytest.raises(InputError, match="give --calibration FILE"):
        bench.calibration_data(bench.parsed(["--tokens", str(DATA), "--statistics", str(tmp_path / "none")]))


def test_which_recipes_learn(bench: ModuleType):
    assert [name for name in ("default", "nvfp4", "int4+search", "w4a4") if bench.learns(Recipe.parse(name))] == []
    assert all(bench.learns(Recipe.parse(name)) for name in ("nvfp4+gptq", "int4+weighted", "mixed"))


def test_a_recipe_that_learns_keeps_what_it_learned(bench: ModuleType, tmp_path: Path):
    data, out, kept = tmp_path / "tokens.safetensors", tmp_path / "quality.json", tmp_path / "learned"
    save_file({"tokens": torch.randint(8000, (1024,), generator=torch.Generator().manual_seed(0))}, data)
    sizes = ("--window", "64", "--windows", "2", "--out", str(out), "--statistics", str(kept))
    assert bench.main(["--tokens", str(data), *sizes, "--recipes", "reference+int4+weighted"]) == 0
    (row,) = rows(out)
    assert row["recipe"] == "reference+int4+weighted"
    assert {p.name for p in kept.iterdir()} == {"calibration.safetensors", "pico-llama-4m-float32.safetensors"}
