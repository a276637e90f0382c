"""`llmopt recipes` and `llmopt targets`."""

from __future__ import annotations

from rich.table import Table

from llmopt.compiler.errors import TargetError
from llmopt.compiler.recipe import RECIPES, Recipe
from llmopt.compiler.target import TARGETS, Target
from llmopt.console import stages, write_json, write_table


def list_recipes(name: str | None, as_json: bool) -> None:
    """All recipes in a table, or one as YAML."""
    if name is not None:
        recipe = Recipe.parse(name)
        write_json(recipe.to_dict()) if as_json else print(recipe.to_yaml(), end="")
        return
    if as_json:
        write_json([recipe.to_dict() for recipe in RECIPES.values()])
        return
    table = Table("recipe", "passes", "providers", "dtype", "page")
    for recipe in RECIPES.values():
        passes = " > ".join(spec.name for spec in recipe.passes)
        table.add_row(
            recipe.name,
            passes,
            ", ".join(recipe.providers),
            recipe.dtype or "the model's",
            f"{recipe.page_size} tokens",
        )
    write_table(table)


def list_targets(as_json: bool) -> None:
    """All targets, and whether this machine runs them, or why not."""
    with stages("looking at this machine"):
        here = Target.detect()
        rows = [
            {"target": name, "meaning": meaning, "runs_here": (why := _against(name)) is None, "reason": why}
            for name, meaning in TARGETS.items()
        ]
    if as_json:
        write_json({"this_machine": here.to_dict(), "targets": rows})
        return
    cores = "cores" if here.kind == "cpu" else "multiprocessors"
    table = Table("target", "meaning", "runs here", title=f"this machine: {here.name}, {here.cores} {cores}")
    for row in rows:
        table.add_row(str(row["target"]), str(row["meaning"]), "yes" if row["runs_here"] else "no")
    write_table(table)
    own = next(row for row in rows if row["target"] == "cuda")
    if own["reason"]:
        print(own["reason"])


def _against(name: str) -> str | None:
    """Why code for a target does not run on this machine, None if it does."""
    try:
        target = Target.parse(name)
        return target.fits(Target.detect(target.kind))
    except TargetError as error:
        return str(error)
