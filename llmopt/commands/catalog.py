"""`llmopt recipes` and `llmopt targets`."""

from __future__ import annotations

import json
from pathlib import Path

from rich.table import Table

from llmopt.compiler.errors import TargetError
from llmopt.compiler.quant import scheme_of
from llmopt.compiler.recipe import RECIPES, Recipe
from llmopt.compiler.target import TARGETS, Target
from llmopt.console import stages, write_json, write_table
from llmopt.passes.quantize_options import preset

MEASURED_ON = "small-llama-28m"


def list_recipes(name: str | None, as_json: bool) -> None:
    """All recipes in a table, or one as YAML."""
    if name is not None:
        recipe = Recipe.parse(name)
        write_json(recipe.to_dict()) if as_json else print(recipe.to_yaml(), end="")
        return
    if as_json:
        write_json([recipe.to_dict() for recipe in RECIPES.values()])
        return
    table = Table("recipe", "what it is", "bits a weight", f"perplexity ({MEASURED_ON})")
    for recipe in RECIPES.values():
        table.add_row(recipe.name, recipe.about, bits_of(recipe), measured(recipe.name))
    write_table(table)
    print("join recipes with +, such as nvfp4+gptq; `llmopt recipes NAME` prints one as YAML")


def bits_of(recipe: Recipe) -> str:
    """Bits of a weight of all products but the last, with its share of scales; "" if the recipe does not say."""
    options = {name: value for spec in recipe.passes if spec.name == "quantize" for name, value in spec.options}
    if "bits" in options:
        return f"{options['bits']:g}"
    chosen = options.get("scheme") or options.get("weights")
    return f"{scheme_of(preset(str(chosen)).weights).bits_per_weight:g}" if chosen else ""


def measured(name: str) -> str:
    """What the recipe's perplexity was measured to be, "" if it was not."""
    found = json.loads((Path(__file__).parents[1] / "measured.json").read_text(encoding="utf-8")).get(name)
    return "" if found is None else f"{found:.4f}"


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
