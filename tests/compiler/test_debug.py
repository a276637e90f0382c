"""LLMOPT_DEBUG: each level prints more of what a pass did."""

from __future__ import annotations

import pytest
from passes_common import context, llama

from llmopt.compiler import knobs
from llmopt.compiler.pipeline import Pipeline, hooks_from_knobs
from llmopt.passes import RaiseAten


@pytest.mark.parametrize("level", [0, 1, 2, 3, 4])
def test_each_level_says_more(level: int, capsys: pytest.CaptureFixture[str]) -> None:
    with knobs.scope(debug=level):
        Pipeline([RaiseAten()], hooks_from_knobs()).run(llama(layers=1), context())
    said = capsys.readouterr().err
    assert ("raise-aten: matched" in said) == (level >= 1)
    assert ("def forward(" in said) == (level >= 2)
    assert ("  rms-norm at %" in said) == (level >= 3)
    assert ("  near: " in said) == (level >= 4)
