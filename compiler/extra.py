"""Passes and rules of one's own, put into a recipe's list: `file.py:Name` or `file.py:Name@after-pass`.

class MyNorm(Rule): ...                  # llmopt diff MODEL --with my_rules.py:MyNorm
@dataclass(frozen=True)
class MyPass(Pass): ...                  # llmopt bisect MODEL --with my_rules.py:MyPass@raise-aten
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmopt.compiler.errors import RecipeError, did_you_mean
from llmopt.compiler.pipeline import Context, Pass, PassStats
from llmopt.compiler.program import Program
from llmopt.compiler.rewrite import Rule, apply_rules


@dataclass(frozen=True)
class RulePass(Pass):
    """One rule as a pass over every graph; the pass has the rule's name."""

    rule: Rule

    @property
    def name(self) -> str:  # type: ignore[override]
        """The rule's."""
        return self.rule.name

    def run(self, program: Program, context: Context) -> PassStats:
        """Apply the rule to every graph until it matches no more."""
        stats = PassStats()
        for graph in program.graphs.values():
            done = apply_rules(graph, [self.rule], limit=context.rewrites_left)
            context.spend(done.rewritten)
            stats.add(done)
        return stats


def load_pass(spec: str) -> tuple[Pass, str | None]:
    """The pass that `file.py:Name[@after-pass]` names, and the pass to put it behind. Raises RecipeError."""
    where, _, after = spec.partition("@")
    file, colon, name = where.rpartition(":")
    path = Path(file)
    if not colon or not name.isidentifier():
        raise RecipeError(f"--with {spec!r}: wanted file.py:Name or file.py:Name@after-pass, Name a Pass or a Rule")
    if not path.is_file():
        raise RecipeError(f"--with {spec!r}: there is no file {file!r}; give the path of a Python file")
    kind = getattr(_module(path, spec), name, None)
    if kind is None:
        names = [n for n, v in vars(_module(path, spec)).items() if _is_usable(v)]
        raise RecipeError(f"--with {spec!r}: {file} defines no {name}; {did_you_mean(name, names)}")
    if not _is_usable(kind):
        raise RecipeError(f"--with {spec!r}: {name} is {kind!r}, wanted a subclass of llmopt's Pass or Rule")
    try:
        made = kind()
    except TypeError as error:
        raise RecipeError(f"--with {spec!r}: {name}() fails: {error}; every option needs a default") from error
    return RulePass(made) if isinstance(made, Rule) else made, after or None


def insert_passes(passes: Sequence[Pass], extra: Sequence[tuple[Pass, str | None]]) -> tuple[Pass, ...]:
    """`passes` with each extra one behind the pass it names; without a name, before the cache goes in.

    There it sees IR ops in `forward`, from which `step` is made next. Raises RecipeError.
    """
    found = list(passes)
    for item, after in extra:
        names = [p.name for p in found]
        if after is not None and after not in names:
            raise RecipeError(f"--with ...@{after}: the recipe has no pass {after!r}; {did_you_mean(after, names)}")
        cached = next((i for i, p in enumerate(found) if "cached" in p.ensures), len(found))
        found.insert(cached if after is None else names.index(after) + 1, item)
    return tuple(found)


def _is_usable(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, (Pass, Rule)) and kind not in (Pass, Rule, RulePass)


def _module(path: Path, spec: str) -> Any:
    name = f"llmopt_with_{path.stem}"
    known = sys.modules.get(name)
    if known is not None and known.__file__ == str(path.resolve()):
        return known
    found = importlib.util.spec_from_file_location(name, path.resolve())
    if found is None or found.loader is None:
        raise RecipeError(f"--with {spec!r}: {path} is not a Python file")
    module = importlib.util.module_from_spec(found)
    sys.modules[name] = module  # dataclasses look their module up
    try:
        found.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise RecipeError(f"--with {spec!r}: {path} fails: {type(error).__name__}: {error}") from error
    return module
