"""The examples run as they stand and say what they promise."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def run(name: str, *args: str) -> str:
    done = subprocess.run([sys.executable, "-P", EXAMPLES / name, *args], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_compile_and_generate():
    said = run("compile_and_generate.py", "reference")
    assert "loaded gives the same: True" in said
    assert said.count(" -> ") == 3


def test_own_module():
    lines = run("own_module.py", "reference").splitlines()
    assert len(lines) == 2
    assert all(line.endswith("same as the plain forward: True") for line in lines)


def test_own_rule():
    right, wrong = run("own_rule.py").splitlines()
    assert right == "open-gated: nothing is wrong"
    assert "rule wrong-in-layer1" in wrong
    assert "(layers.1.mlp" in wrong


def test_demo():
    said = run("demo.py", "--recipe", "reference", "--new-tokens", "8", "--rounds", "1", "--no-memory")
    for name in ("raise-aten", "canonicalize", "insert-kv-cache", "fuse", "lower"):
        assert name in said
    assert "class Config:" in said
    (same,) = [line for line in said.splitlines() if "same tokens" in line]
    assert same.count("yes") == 2
    assert "llmopt decodes" in said
