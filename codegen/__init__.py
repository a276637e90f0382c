"""Codegen: kernels and code generators behind the providers, for each target."""

from __future__ import annotations

import functools
import logging
from dataclasses import replace

from llmopt.codegen.cpp import cpp_available
from llmopt.compiler.target import Target

_log = logging.getLogger("llmopt")


def usable(target: Target) -> Target:
    """The target with only those features that really work here; says in one line what is lost, and why."""
    absent = "no C++ compiler was found: install g++ or clang++, or let CXX name one"
    lost = cpp_available() if "cpp" in target.features else absent
    if lost is None:
        return target
    _say_once(f"{lost}; the reference provider runs instead, slowly")
    return replace(target, features=target.features - {"cpp"})


@functools.cache
def _say_once(line: str) -> None:
    _log.warning("llmopt: %s", line)
