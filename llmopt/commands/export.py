"""`llmopt export`: a model in another project's format."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from llmopt.commands.model import Wanted, notes_to_say, say_notes
from llmopt.compiler.checkpoint import checkpoint_dtype, read_config
from llmopt.compiler.errors import InputError
from llmopt.compiler.program import Program
from llmopt.compiler.recipe import Recipe
from llmopt.console import Progress, check_parent, is_artifact, say, stages, write_json
from llmopt.runtime.artifact import load
from llmopt.runtime.build import Calibration, build, learns
from llmopt.runtime.export import RUNTIME, check_format
from llmopt.runtime.export import export as write
from llmopt.runtime.export_folder import check_out


def export(model: str, to: str, out: Path, settings: Mapping[str, Any], wanted: Wanted, as_json: bool) -> None:
    """Write the model as its recipe leaves it, in the format `to`, to the folder `out`.

    `settings` are as for `runtime.export.export`, None where they were not given. Raises InputError (an
    unknown format, what the format cannot say), ArtifactError (the folder) and what compiling does.
    """
    settings = {name: value for name, value in settings.items() if value is not None}
    check_format(to, settings)
    if Path(model).exists() and out.exists() and out.resolve() == Path(model).resolve():
        raise InputError(
            f"--out {str(out)!r} is the model itself, which the export would replace; choose another folder"
        )
    check_parent(out)
    check_out(out)
    started = time.perf_counter()
    with stages(f"exporting {model}") as progress:
        data = wanted.data(progress)
        program, recipe, notes = _opened(model, to, settings, wanted, data, progress)
        progress("writing")
        told = write(program, recipe, to, out, settings, data)
    say_notes(notes)
    seconds = time.perf_counter() - started
    if as_json:
        write_json({"out": str(out), "format": to, **told, "seconds": round(seconds, 3)})
        return
    held = ", ".join(f"{value} {name}" for name, value in told.items() if name != "bytes")
    print(f"wrote {out}: {to}, {told['bytes'] / 2**20:.1f} MiB ({held}) in {seconds:.1f} s")


def _opened(
    model: str, to: str, settings: Mapping[str, Any], wanted: Wanted, data: Calibration | None, progress: Progress
) -> tuple[Program, Recipe, list[str]]:
    """The program of a model or an artifact, its recipe, and what is to be said of it."""
    if is_artifact(model):
        asked = replace(wanted, calibration=None, statistics=None) if "kv_cache" in settings else wanted
        asked.check_artifact(model)
        parts = load(Path(model), runs_here=False)
        return parts.program, parts.recipe, []
    recipe, dtype = wanted.parsed(), wanted.dtype
    widens = to == "genai" or (to == "onnx" and settings.get("weights") != "standard")
    widens = widens and not dtype and not recipe.dtype
    if widens and checkpoint_dtype(read_config(model)) != torch.float32:
        dtype = "float32"
        say("note: computes in float32, as ONNX Runtime's CPU provider does; --dtype float16 keeps 16 bits")
    ahead = replace(recipe, passes=tuple(spec for spec in recipe.passes if spec.name not in RUNTIME))
    if wanted.statistics is not None and not learns(ahead):
        raise InputError(
            f"--statistics {str(wanted.statistics)!r} keeps what a recipe learns, and no pass of {recipe.name!r} "
            "learns; leave it out (steps of --kv-cache are not kept), or add a recipe such as +gptq"
        )
    # a cache in few bits learns from them, too, and then the recipe need not
    given = None if "kv_cache" in settings and not learns(ahead) else data
    program, report, _ = build(model, ahead, dtype=dtype, progress=progress, calibration=given)
    return program, recipe, notes_to_say(report.passes)
