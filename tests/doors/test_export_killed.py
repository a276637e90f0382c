"""An export that dies leaves nothing that loads: no folder, or the older one, whole."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from llmopt.cli import app

PICO = Path(__file__).parents[2] / "examples" / "models" / "pico-llama-4m"
DYING = """
import os, signal, sys
from dataclasses import replace
import llmopt
source, to, out = sys.argv[1:]
model = llmopt.compile(source, recipe="fp8", dtype="float32", target="cpu:generic")
names = [name for name in model.program.weights if name.endswith("down_proj.weight.packed")]
last = names[-1]  # most of the file is written by then
model.program.weights[last] = replace(model.program.weights[last], load=lambda: os.kill(os.getpid(), signal.SIGKILL))
model.export(out, to)
"""


def die(to: str, out: Path) -> int:
    """How the process ends; no pipes, which its own children would keep open."""
    quiet = subprocess.DEVNULL
    return subprocess.run([sys.executable, "-c", DYING, str(PICO), to, str(out)], stdout=quiet, stderr=quiet).returncode


@pytest.mark.parametrize("to", ["compressed-tensors", "onnx", "genai"])
def test_killed_in_the_middle(to: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert die(to, out) == -signal.SIGKILL
    assert not out.exists()
    (left,) = tmp_path.iterdir()  # begun under another name
    assert left.name.startswith(".out.llmopt-new-")
    assert not any((left / name).exists() for name in ("config.json", "genai_config.json", "llmopt_export.json"))
    made = CliRunner().invoke(app, ["export", str(PICO), "--to", to, "-o", str(out), "-r", "int8"])
    assert made.exit_code == 0, made.output
    assert [path.name for path in tmp_path.iterdir()] == ["out"]  # what was left is gone
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert die(to, out) == -signal.SIGKILL
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
