from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch

from llmopt.compiler.errors import TargetError
from llmopt.compiler.target import ISAS, TARGETS, Target, cxx


def target(isa: str, *features: str, cores: int = 4) -> Target:
    return Target("cpu", isa, cores, frozenset(features))


@pytest.mark.parametrize("text", sorted(set(TARGETS) - {"cuda"}))
def test_every_listed_target_parses(text: str):
    parsed = Target.parse(text)
    assert text in (parsed.name, parsed.kind)
    assert parsed.cores >= 1


def test_cpu_is_this_machine():
    assert Target.parse("cpu") == Target.detect("cpu")
    verdict = torch.backends.cpu.get_cpu_capability().lower()
    if verdict in ISAS["cpu"]:
        assert verdict in Target.detect("cpu").facts


def test_facts_name_what_the_instruction_set_includes():
    assert target("avx512", "cpp").facts == {"cpu", "avx512", "avx2", "generic", "cpp"}
    assert target("generic").facts == {"cpu", "generic"}


@pytest.mark.parametrize("made", [target("avx512", "cpp"), target("neon"), Target.parse("cuda:sm_90")])
def test_json_both_ways(made: Target):
    assert Target.from_json(made.to_json()) == made
    assert Target.from_dict(json.loads(json.dumps(made.to_dict()))) == made


@pytest.mark.parametrize(
    ("built", "machine", "runs"),
    [
        ("avx2", "avx512", True),
        ("avx512", "avx512", True),
        ("generic", "neon", True),
        ("avx512", "avx2", False),
        ("avx2", "neon", False),
        ("neon", "avx512", False),
        ("avx2", "generic", False),
    ],
)
def test_fits(built: str, machine: str, runs: bool):
    reason = target(built, "cpp").fits(target(machine, cores=1))
    assert (reason is None) == runs
    assert runs or (built in reason and machine in reason)


@pytest.mark.parametrize(("text", "meant"), [("cpu:avx215", "cpu:avx2"), ("cpi", "cpu"), ("cpu:avx_512", "cpu:avx512")])
def test_misspelt_target(text: str, meant: str):
    with pytest.raises(TargetError, match=f"did you mean '{meant}'"):
        Target.parse(text)


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        ({"version": 1}, "version 1, this llmopt reads 2"),
        ({"kind": "cudaa"}, "did you mean 'cuda'"),
        ({"kind": "cuda"}, "isa 'avx2' is unknown; Known: sm_100"),
        ({"isa": "sm_90"}, "isa 'sm_90' is unknown; Known: avx2"),
        ({"isa": "avx51"}, "did you mean 'avx512'"),
        ({"isa": ["avx2"]}, "target: isa"),
        ({"cores": 0}, "cores is 0"),
        ({"cores": True}, "cores is True"),
        ({"bandwidth": 4.8e12}, "bandwidth is 4800000000000.0, wanted a whole number >= 0"),
        ({"l2_bytes": -1}, "l2_bytes is -1"),
        ({"features": "cpp"}, "features is 'cpp', wanted a list"),
        ({"core": 1}, "did you mean 'cores'"),
    ],
)
def test_bad_data(edit: dict, said: str):
    with pytest.raises(TargetError) as caught:
        Target.from_dict(target("avx2").to_dict() | edit)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_older_form_is_told_from_a_damaged_one():
    with pytest.raises(TargetError, match="version 1, this llmopt reads 2: compile the model again"):
        Target.from_dict({"version": 1, "kind": "cpu", "isa": "avx2", "cores": 2, "features": []})


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "null"])
def test_what_is_no_target(text: str):
    with pytest.raises(TargetError):
        Target.from_json(text)


def test_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        target("avx2").isa = "neon"


def executable(path: Path) -> Path:
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    return path


def test_compiler_is_found_on_the_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert cxx() is None
    assert "cpp" not in Target.detect("cpu").facts
    executable(tmp_path / "clang++")
    assert cxx() == ("clang++",)
    assert "cpp" in Target.detect("cpu").facts


def test_cxx_wins_and_may_hold_arguments(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    made = executable(tmp_path / "my c++")
    monkeypatch.setenv("CXX", f"'{made}' -m64")
    assert cxx() == (str(made), "-m64")


def test_a_wrong_cxx_is_not_passed_over(monkeypatch: pytest.MonkeyPatch):
    assert shutil.which("no-such-compiler") is None
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert cxx() is None
    assert "cpp" not in Target.parse("cpu:generic").facts
