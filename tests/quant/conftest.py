"""What the tests of numbers and of calibration share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from calibrated import raised
from passes_common import llama

from llmopt.compiler.program import Program


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """These models are too small to share between threads, which make the order of sums another."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def small() -> Program:
    return raised(llama())
