"""Codegen: kernels and code generators behind the providers, for each target."""

from __future__ import annotations

import functools
import logging
from collections.abc import Collection
from dataclasses import replace

from llmopt.codegen.cpp import compiler_fails, cpp_available
from llmopt.compiler.target import Target

_log = logging.getLogger("llmopt")


def usable(target: Target, providers: Collection[str]) -> Target:
    """The target with only those features that really work here; says in one line what is lost, and why.

    Nothing is tried, built or said for features that none of the `providers` allowed would use.
    """
    if not {"cpp", "inductor"} & set(providers):
        return target
    lost = compiler_fails() or cpp_available()
    if lost is None:
        return target
    _say_once(f"{lost}; the reference provider runs instead, slowly")
    return replace(target, features=target.features - {"cpp"})


@functools.cache
def _say_once(line: str) -> None:
    _log.warning("llmopt: %s", line)
