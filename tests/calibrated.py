"""What the tests of calibration share: a program to watch, tokens, runs that are stopped, and results bit for bit."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest
from passes_common import run

from llmopt.compiler.calibration import Settings, calibrate
from llmopt.compiler.calibration_statistics import Statistics
from llmopt.compiler.program import Program
from llmopt.passes.canonicalize import Canonicalize
from llmopt.passes.raise_aten import RaiseAten

IDS = [at * 7 % 96 for at in range(200)]
WINDOWS = 10
WHOLE = Settings(window=20, every=3)
# K = 32 and 48: 8320 and 18624 bytes a value, 7 + 2 values
GROUPS = Settings(window=20, every=3, memory=30_000)


def raised(program: Program) -> Program:
    return run(program, RaiseAten(), Canonicalize())[0]


class Stopped(Exception):
    """Someone pulled the plug."""


def stop_at(count: int) -> Callable[[str, int, int], None]:
    def tell(name: str, done: int, total: int) -> None:
        if done == count:
            raise Stopped

    return tell


def stopped(program: Program, path: Path, settings: Settings = WHOLE, at: int = 40, ids: list[int] = IDS) -> None:
    """A run that stops after `at` values of windows."""
    with pytest.raises(Stopped):
        calibrate(program, ids, path=path, settings=settings, progress=stop_at(at))


def bits(made: Statistics) -> dict[str, str]:
    return {key: hashlib.sha256(made.tensors[key].numpy().tobytes()).hexdigest() for key in made.tensors}
