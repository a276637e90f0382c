"""Codegen: kernels and code generators behind the providers, for each target."""

from __future__ import annotations

from llmopt.compiler.target import Target


def usable(target: Target) -> Target:
    """The target with only those features that really work on this machine."""
    return target
