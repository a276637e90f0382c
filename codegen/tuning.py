"""Which constants a kernel is compiled with: measured ones where the tables of `tuned/` have them, else the default.

A table is one JSON file for an architecture. An entry says for a template, shape and dtype what was fastest (`config`),
how fast (`us` of a launch; null where whole steps were compared), on which `device` and `date`. It holds for the
kernels that were measured (`source`), with any Triton: it is a choice of speed. Once the kernels of a template, or what
they call or read, change (comments and docstrings aside) its entries are passed over, with a warning; a change that was
checked to leave the machine code of every entry as it was writes the new `source` into them. LLMOPT_TUNE=off passes
over all of them. Who measures says with `trial` what is picked.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
_log = logging.getLogger("llmopt")
_WARNED: set[Path] = set()  # tables of which a stale entry was asked for


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
        if found is not None:
            _warn_stale(target.isa, module)
    first: dict[str, Any] = importlib.import_module(f"{hooks.TEMPLATES}.{module}").configs(shape, dtype, target)[0]
    return first


def _warn_stale(isa: str, module: str) -> None:
    """Once for each table."""
    path = TABLES / f"{isa}.json"
    if path not in _WARNED:
        _WARNED.add(path)
        _log.warning(
            "%s: its entries for the template %r were measured on other kernels than there are now, so defaults are "
            "used, which may be slower; measure again",
            path,
            module,
        )


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
    """16 hex digits over the kernels of a template (`hooks.template_texts`) and all that they read: what is assigned,
    and functions and classes that make it; comments and docstrings left out."""
    bodies = {name: ast.parse(text).body for name, text in sorted(hooks.template_texts(module).items())}
    nodes = [node for body in bodies.values() for node in body]
    kernels = [node for node in nodes if hooks.is_compiled(node)]
    kept = [*kernels, *_read_by(kernels, nodes)]
    for node in kept:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    forms = [[name, *(_form(node) for node in body if node in kept)] for name, body in bodies.items()]
    return hashlib.sha256(repr(forms).encode()).hexdigest()[:16]


def _form(value: Any) -> Any:
    """A syntax tree in lists that are the same under every Python: `ast.unparse` quotes f-strings by version, and
    `ast.dump` writes fields that are empty by version."""
    if isinstance(value, ast.AST):
        fields = [(name, _form(item)) for name, item in ast.iter_fields(value) if name not in ("ctx", "kind")]
        return [type(value).__name__, *((name, form) for name, form in fields if form not in (None, []))]
    return [_form(item) for item in value] if isinstance(value, list) else value


def _read_by(readers: Sequence[ast.stmt], nodes: list[ast.stmt]) -> list[ast.stmt]:
    """Those of `nodes` that give `readers` a name, and the ones that give these a name, and so on."""
    kinds = ast.Assign | ast.AnnAssign | ast.AugAssign | ast.FunctionDef | ast.ClassDef
    waiting = [node for node in nodes if isinstance(node, kinds) and node not in readers]
    found: list[ast.stmt] = []
    reading: list[ast.stmt] = [*readers]
    while reading:
        names = {name for node in reading for name in _names(node, ast.Load)}
        reading = [node for node in waiting if node not in found and _given(node) & names]
        found += reading
    return found


def _given(node: ast.stmt) -> set[str]:
    """The names that a statement gives something."""
    return {node.name} if isinstance(node, ast.FunctionDef | ast.ClassDef) else _names(node, ast.Store)


def _names(node: ast.AST, context: type[ast.expr_context]) -> set[str]:
    """The variables and attributes that are read or written."""
    named = [n for n in ast.walk(node) if isinstance(n, ast.Name | ast.Attribute) and isinstance(n.ctx, context)]
    return {n.id if isinstance(n, ast.Name) else n.attr for n in named}


def write(isa: str, entries: Iterable[Mapping[str, Any]], folder: Path | None = None) -> Path:
    """Put entries into an architecture's table, each in place of the one of the same key, and drop those of the same
    templates that were measured on other kernels than there are now; the file's path."""
    path, entries = (folder or TABLES) / f"{isa}.json", list(entries)
    measured = {e["template"] for e in entries}
    old = json.loads(path.read_text(encoding="utf-8"))["entries"] if path.exists() else []
    old = [e for e in old if e["template"] not in measured or e["source"] == source_hash(e["template"])]
    merged = {key(e["template"], e["shape"], e["dtype"]): e for e in [*old, *entries]}
    lines = ",\n".join(json.dumps(merged[k], sort_keys=True) for k in sorted(merged))
    new = path.with_suffix(".tmp")
    new.write_text(f'{{"entries": [\n{lines}\n]}}\n', encoding="utf-8")
    return new.replace(path)
