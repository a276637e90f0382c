"""Codegen: kernels and code generators behind the providers, for each target."""

from __future__ import annotations

import dataclasses
import warnings

from llmopt.codegen.cpp import cpp_available
from llmopt.compiler.target import Target


def usable(target: Target) -> Target:
    """The target with only those features that really work on this machine: without a C++ compiler, no `cpp`."""
    if "cpp" not in target.features:
        return target
    reason = cpp_available()
    if reason is None:
        return target
    warnings.warn(f"target {target.name} runs without compiled kernels, slowly: {reason}", stacklevel=2)
    return dataclasses.replace(target, features=target.features - {"cpp"})
