"""Kernels run by Triton's interpreter through the interface that a GPU's launches have."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from toy_kernels import DOUBLE, PLUS_Z, SQUARE, toy, toys

from llmopt.codegen.interpret import launcher
from llmopt.compiler import knobs
from llmopt.compiler.errors import BuildError

ROWS = 300


@pytest.fixture(autouse=True)
def fresh_cache(tmp_path):
    with knobs.scope(cache=tmp_path), toys():
        yield


def result(source, z=None, pdl=False):
    x, y = torch.linspace(-2, 2, ROWS), torch.full((ROWS,), torch.nan)
    launcher(toy(source, pdl=pdl))((-(-ROWS // 128),), [x, z, y, ROWS - 1, 3, 0.5])
    assert y[-1].isnan(), "past N"
    return x[:-1], y[:-1]


@pytest.mark.interp
def test_hooks_and_arguments_are_the_kernels():
    x, y = result(DOUBLE)
    torch.testing.assert_close(y, 2 * x * 0.5 + 3)
    x, y = result(SQUARE)
    torch.testing.assert_close(y, x * x * 0.5 + 3)
    x, y = result(PLUS_Z, torch.tensor([7.0]))
    torch.testing.assert_close(y, (x + 7) * 0.5 + 3)


@pytest.mark.interp
def test_waiting_for_the_kernel_ahead_is_left_out():
    x, y = result(DOUBLE, pdl=True)
    torch.testing.assert_close(y, 2 * x * 0.5 + 3)


@pytest.mark.interp
def test_empty_grid_and_wrong_arguments():
    launch = launcher(toy())
    launch((0,), [None, None, None, 0, 0, 0.0])
    with pytest.raises(BuildError, match=r"takes 6 arguments \(x, z, y, N, C, S\), got 2"):
        launch((1,), [None, None])


@pytest.mark.interp
def test_unknown_hook():
    with pytest.raises(BuildError, match="which its source lacks"):
        launcher(dataclasses.replace(toy(), hooks=(("HOOK", "absent"),)))


def test_says_how_to_start_it(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(BuildError, match="started with TRITON_INTERPRET=1"):
        launcher(toy())
