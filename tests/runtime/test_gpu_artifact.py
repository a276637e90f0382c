"""Artifacts for a GPU: written where there is none, read and planned without Triton."""

from __future__ import annotations

import json
import sys
from subprocess import run

import pytest
import torch
from gpu_models import tiny

import llmopt
from llmopt.compiler.errors import TargetError
from llmopt.runtime.gpu_code import SHAPES

pytestmark = [pytest.mark.xcompile, pytest.mark.timeout(600)]

# what a machine with the GPU does up to the first launch, on tensors of the CPU
PLAN = """
import sys, pathlib, torch
from llmopt.runtime import artifact, native
from llmopt.runtime.session import open_session
native._mismatch = lambda target: None
parts = artifact.load(pathlib.Path(sys.argv[1]))
launched = []
def launcher(kernel):
    cubin = parts.regions.cubin(kernel)
    assert cubin.isa == "sm_90" and cubin.data[:4] == b"\\x7fELF"
    return lambda grid, args: launched.append(cubin.entry)
session = open_session(parts.program, parts.recipe, parts.target, parts.regions, launcher=launcher, device="cpu")
made = session.engine.generate([[1, 2, 3], [4]])
print(len(launched), len(made), "triton" in sys.modules)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("artifact") / "a"
    llmopt.compile(tiny("llama"), target="cuda:sm_90").save(path)
    return path


def test_every_region_is_there_for_every_class_of_shapes(folder):
    entries = json.loads((folder / "code" / "regions.json").read_text())
    found = {(e["region"], e["shape"]) for e in entries}
    assert {shape for _, shape in found} == set(SHAPES)
    assert {("attention", s) for s in SHAPES} <= found
    assert ("sample", "1") in found
    assert ("sample", "many") not in found
    assert len(list((folder / "code").glob("*.cubin"))) > 10


def test_it_is_loaded_and_planned_without_triton(folder):
    said = run([sys.executable, "-c", PLAN, str(folder)], capture_output=True, text=True, check=True).stdout.split()
    launched, prompts, triton = said
    assert int(launched) > 50
    assert (prompts, triton) == ("2", "False")


def test_a_program_without_graphs_has_code_for_other_steps_alone(tmp_path):
    """In fp64 attention is torch's, and sampling, for which there is no kernel."""
    llmopt.compile(tiny("llama", torch.float64), target="cuda:sm_90").save(tmp_path / "a")
    entries = json.loads((tmp_path / "a" / "code" / "regions.json").read_text())
    assert {e["shape"] for e in entries} == {"many"}
    said = run([sys.executable, "-c", PLAN, str(tmp_path / "a")], capture_output=True, text=True, check=True).stdout
    assert said.split()[1:] == ["2", "False"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_machine_without_the_gpu_refuses_to_load_it_and_says_why(folder):
    with pytest.raises(TargetError, match="compiled for cuda:sm_90"):
        llmopt.load(folder)
