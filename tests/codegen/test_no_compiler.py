"""Without a working C++ compiler a model still compiles and runs: one clear line, then the reference provider."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import llmopt

PICO = Path(__file__).resolve().parents[2] / "examples" / "models" / "pico-llama-4m"
PROGRAM = """
import llmopt
model = llmopt.compile({pico!r}, target="cpu", dtype="float32")
assert "cpp" not in model.target.features
assert all(name.endswith("=reference") for name in model.program.choices["providers"]), model.program.choices
print(model.generate("def main():", max_new_tokens=12))
llmopt.compile({pico!r}, target="cpu", dtype="float32")
"""


@pytest.mark.parametrize(
    ("variables", "reason"),
    [
        ({"CXX": "absent-c++"}, "no C++ compiler was found"),
        ({"CXX": "false"}, "C++ compiler false failed with exit code 1"),
    ],
)
def test_one_line_then_the_reference_provider(variables: dict[str, str], reason: str, tmp_path: Path) -> None:
    environment = {**os.environ, **variables, "LLMOPT_CACHE": str(tmp_path), "PYTHONWARNINGS": "ignore"}
    program = PROGRAM.format(pico=str(PICO))
    done = subprocess.run([sys.executable, "-P", "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("llmopt:")]
    assert line.startswith(f"llmopt: {reason}")
    assert line.endswith("; the reference provider runs instead, slowly")
    expected = llmopt.compile(PICO, recipe="reference", target="cpu", dtype="float32").generate(
        "def main():", max_new_tokens=12
    )
    assert done.stdout.rstrip("\n") == expected.rstrip("\n")
