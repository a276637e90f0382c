"""Codegen: kernels and code generators behind the providers, for each target."""

from __future__ import annotations

import functools
import importlib
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
    if target.kind == "cuda":
        return _with_triton(target, providers)
    if not {"cpp", "inductor"} & set(providers):
        return target
    lost = compiler_fails() or cpp_available()
    if lost is None:
        return target
    _say_once(f"{lost}; the reference provider runs instead, slowly")
    return replace(target, features=target.features - {"cpp"})


def _with_triton(target: Target, providers: Collection[str]) -> Target:
    lost = _triton_fails() if {"triton", "inductor"} & set(providers) else None
    if lost is None:
        return target
    _say_once(f"{lost}; torch's own kernels run instead, slowly")
    return replace(target, features=target.features - {"triton"})


def _triton_fails() -> str | None:
    try:
        importlib.import_module("triton")
    except (ImportError, OSError) as error:  # OSError: a library that it loads is missing or broken
        why = str(error).strip().partition("\n")[0]
        return f"Triton cannot be imported ({why}), so no GPU kernels can be made; install triton"
    return None


@functools.cache
def _say_once(line: str) -> None:
    _log.warning("llmopt: %s", line)
