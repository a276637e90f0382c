"""A model compiled for a GPU that is not there, into an artifact, and its kernels listed."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import pytest

import llmopt
from llmopt.codegen.kernel import RegionCode
from llmopt.commands.kernels import code_notes, list_kernels
from llmopt.commands.model import Wanted, compile_to
from llmopt.compiler.errors import InputError, TargetError
from llmopt.runtime.gpu_code import SHAPES, GpuCode

PICO = str(Path(__file__).resolve().parents[2] / "examples" / "models" / "pico-llama-4m")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("artifact") / "pico"
    compile_to(PICO, path, Wanted("default", "cuda:sm_90", "bfloat16"), as_json=True)
    return path


@pytest.mark.xcompile
def test_an_artifacts_kernels_are_listed_without_compiling(saved, capsys, monkeypatch):
    from llmopt.codegen import cubin_parallel

    monkeypatch.setattr(cubin_parallel, "compile_all", None)
    list_kernels(str(saved), Wanted(), as_json=True)
    calls = json.loads(capsys.readouterr().out)["calls"]
    kernels = [c for c in calls if c["kernel"]]
    assert {shape for c in calls for shape in c["classes"]} == set(SHAPES)
    assert {c["kernel"].split(":")[0] for c in kernels} >= {"gemv", "gemm", "decode_attention", "rows", "sample"}
    assert all(c["registers"] > 0 and c["cubin_bytes"] > 0 and c["instructions"] > 0 for c in kernels)
    assert sum(c["instructions"] % 8 == 0 for c in kernels) < len(kernels) / 2, "padding is counted"
    list_kernels(str(saved), Wanted(), as_json=False)
    ways = {c["when"]: c["op"] or c["kernel"] for c in calls if c["when"]}
    assert ways == {"fresh": "attend", "paged": "prefill_attention:prefill_attention"}
    text = capsys.readouterr().out
    assert "kernels for cuda:sm_90" in text
    assert re.search(r"torch: linear", text)


@pytest.mark.xcompile
def test_an_artifact_for_a_gpu_needs_one_to_run(saved, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    if __import__("torch").cuda.is_available():
        pytest.skip("this process has a GPU open")
    with pytest.raises(TargetError, match="it was compiled for cuda:sm_90; this machine has no GPU to use"):
        llmopt.load(saved)


@pytest.mark.xcompile
def test_an_artifact_takes_no_options(saved):
    with pytest.raises(InputError, match="leave out --recipe and --target"):
        list_kernels(str(saved), Wanted("default", "cuda:sm_90"), as_json=True)


def test_what_no_single_kernel_does_is_said_once_for_all_its_classes():
    why = "torch multiplies: seven tensors"
    codes = {("gemm", shape): RegionCode((), (), notes=(why,) * (shape != "many")) for shape in ("1", "8", "many")}
    assert code_notes(GpuCode(None, None, codes)) == [f"gemm, classes 1 8: {why}"]


def test_a_cpu_has_no_kernels():
    with pytest.raises(InputError, match="--target cuda:sm_90"):
        list_kernels(PICO, Wanted(None, "cpu:generic"), as_json=True)


def test_without_triton_nothing_is_written_for_a_gpu(tmp_path, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "triton" else found(name, *rest)
    )
    with pytest.raises(InputError, match=r"^no GPU kernels: Triton is not installed .*: nothing was written"):
        compile_to(PICO, tmp_path / "a", Wanted("default", "cuda:sm_90", "float32"), as_json=True)
    assert not (tmp_path / "a").exists()
    with pytest.raises(InputError, match="has no GPU kernels: Triton is not installed for target cuda:sm_90"):
        list_kernels(PICO, Wanted(None, "cuda:sm_90"), as_json=True)
