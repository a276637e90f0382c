"""Artifacts for a GPU with low-bit weights: what is made of them once is written down, and made anew when loaded.

Nothing is compiled here: the kernels' places are taken by empty cubins.
"""

from __future__ import annotations

import json
import sys
from subprocess import run

import pytest
import torch
from gpu_models import tiny

import llmopt
from llmopt.codegen.cubin import Cubin
from llmopt.codegen.kernel import Prepared
from llmopt.compiler.quant import SCHEMES
from llmopt.runtime.gpu_code import GpuCode
from llmopt.runtime.prepared import only_prepared

pytest.importorskip("triton")

# what a machine with the GPU does up to the first launch, on tensors of the CPU
PLAN = """
import sys, pathlib, torch
from llmopt.runtime import artifact, native, prepared
from llmopt.runtime.session import open_session
native._mismatch = lambda target: None
parts = artifact.load(pathlib.Path(sys.argv[1]))
seen = []
def launcher(kernel):
    def launch(grid, args):
        if kernel.template == "lowbit:lowbit":
            given = dict(zip([name for name, _ in kernel.types], args))
            seen.append((str(given["w"].dtype), *given["w"].shape, str(given["factor"].dtype)))
    return launch
session = open_session(parts.program, parts.recipe, parts.target, parts.regions, launcher=launcher, device="cpu")
made = session.engine.generate([[1, 2, 3], [4]])
print(len(made), "triton" in sys.modules, *sorted(set(seen)), sep="|")
"""


@pytest.fixture
def uncompiled(monkeypatch):
    """Cubins are empty."""

    def compile(self, kernels):
        for kernel in kernels:
            self.cubins[kernel.digest()] = Cubin(b"", "entry", 0, 4, (), False, "sm_90", "0", 0, 0)

    monkeypatch.setattr(GpuCode, "compile", compile)


def test_it_is_loaded_and_planned_without_triton(tmp_path, uncompiled):
    model = llmopt.compile(tiny("llama", torch.bfloat16, num_hidden_layers=1), "nvfp4", target="cuda:sm_90")
    model.save(tmp_path / "a")
    entries = json.loads((tmp_path / "a" / "code" / "regions.json").read_text())
    prepared = [Prepared.from_data(p) for e in entries for p in e["prepared"] if e["shape"] == "1"]
    assert [p.form for p in prepared] == ["lowbit"] * 4
    assert {dict(p.constants)["columns"] for p in prepared} == {32, 48, 64}
    assert {json.dumps(e["prepared"]) for e in entries if e["region"] == "gemm"} == {
        json.dumps([prepared[0].to_data()])
    }
    said = run([sys.executable, "-c", PLAN, str(tmp_path / "a")], capture_output=True, text=True, check=True).stdout
    low_bit = {name for name in model.program.graph("step").weights() if ".weight." in name}
    assert only_prepared(model.program) == low_bit
    assert len(low_bit) == 3 * 4
    prompts, triton, *weights = said.strip().split("|")
    assert (prompts, triton) == ("2", "False")
    stripes = {rows // 16 for rows in (128, 32, 96)}  # q|k|v, o and down, gate|up; columns are padded to 256
    words = 256 * SCHEMES["nvfp4"].element.bits // 32 // 8
    assert weights == [f"('torch.int32', {s}, {words}, 1, 32, 4, 'torch.float32')" for s in sorted(stripes)]
