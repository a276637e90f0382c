"""Which constants a kernel is compiled with: measured ones where the tables of `tuned/` have them, else the default.

A table is one JSON file for an architecture. An entry says for a template, shape and dtype what was fastest (`config`),
how fast (`us` of a launch; null where whole steps were compared), on which `device` and `date`. It holds for the
kernels that were measured: once a template's functions change (comments and docstrings aside) its entries are passed
over. LLMOPT_TUNE=off passes over all of them. Who measures says with `trial` what is picked.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from llmopt.codegen import hooks
from llmopt.compiler import knobs
from llmopt.compiler.target import Target

TABLES = Path(__file__).parent / "tuned"


@dataclass(frozen=True)
class Choice:
    """What `pick` was asked for, and the constants it gave."""

    module: str
    shape: dict[str, int]
    dtype: str
    config: dict[str, Any]


@dataclass(frozen=True)
class _Trial:
    configs: Mapping[str, Mapping[str, Any]]
    asked: dict[str, Choice] = field(default_factory=dict)


_TRIAL: ContextVar[_Trial | None] = ContextVar("trial", default=None)


@contextmanager
def trial(configs: Mapping[str, Mapping[str, Any]]) -> Iterator[dict[str, Choice]]:
    """Inside, `pick` gives these constants by `key`, whatever the tables say; yields all that is asked for, by key."""
    current = _Trial(configs)
    token = _TRIAL.set(current)
    try:
        yield current.asked
    finally:
        _TRIAL.reset(token)


def pick(template: str, shape: Mapping[str, int], dtype: str, target: Target) -> dict[str, Any]:
    """Constants, num_warps and num_stages for `template` (`module:function` or the module), `shape` as the module's
    `configs` takes it and a dtype by its torch name: the table's entry, else the first of `configs`."""
    module, current = template.partition(":")[0], _TRIAL.get()
    if current is None:
        return _best(module, shape, dtype, target)
    name = key(module, shape, dtype)
    config = dict(current.configs[name]) if name in current.configs else _best(module, shape, dtype, target)
    current.asked[name] = Choice(module, dict(shape), dtype, dict(config))
    return config


def _best(module: str, shape: Mapping[str, int], dtype: str, target: Target) -> dict[str, Any]:
    if knobs.tune() == "cached":
        found = table(target.isa).get(key(module, shape, dtype))
        if found is not None and found["source"] == source_hash(module):
            return dict(found["config"])
    first: dict[str, Any] = importlib.import_module(f"{hooks.TEMPLATES}.{module}").configs(shape, dtype, target)[0]
    return first


def key(module: str, shape: Mapping[str, int], dtype: str) -> str:
    """`gemv bfloat16 J=4096 K=4096 N=1 NORM=0 PARTS=1`."""
    return " ".join([module, dtype, *(f"{name}={value}" for name, value in sorted(shape.items()))])


@cache
def table(isa: str) -> Mapping[str, Mapping[str, Any]]:
    """The shipped entries of an architecture by key; empty if there is no table."""
    path = TABLES / f"{isa}.json"
    if not path.exists():
        return {}
    data = json.loads(path.read_text(encoding="utf-8"))
    return {key(e["template"], e["shape"], e["dtype"]): e for e in data["entries"]}


@cache
def source_hash(module: str) -> str:
    """16 hex digits over the text of a template's kernels, comments and docstrings left out."""
    tree = ast.parse((Path(__file__).parent / "templates" / f"{module}.py").read_text(encoding="utf-8"))
    kernels = [node for node in tree.body if isinstance(node, ast.FunctionDef) and _compiled(node)]
    for node in kernels:
        if ast.get_docstring(node) is not None:
            del node.body[0]
    return hashlib.sha256("\n".join(map(ast.unparse, kernels)).encode()).hexdigest()[:16]


def write(isa: str, entries: Iterable[Mapping[str, Any]], folder: Path | None = None) -> Path:
    """Put entries into an architecture's table, each in place of the one of the same key; the file's path."""
    path = (folder or TABLES) / f"{isa}.json"
    old = json.loads(path.read_text(encoding="utf-8"))["entries"] if path.exists() else []
    merged = {key(e["template"], e["shape"], e["dtype"]): e for e in [*old, *entries]}
    lines = ",\n".join(json.dumps(merged[k], sort_keys=True) for k in sorted(merged))
    path.write_text(f'{{"entries": [\n{lines}\n]}}\n', encoding="utf-8")
    return path


def _compiled(node: ast.FunctionDef) -> bool:
    return any(ast.unparse(decorator).startswith("triton.jit") for decorator in node.decorator_list)
