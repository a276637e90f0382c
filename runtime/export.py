"""A model in another project's format: which formats there are, and what each takes of a program."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from llmopt.codegen.onnx.options import OnnxOptions
from llmopt.compiler.errors import InputError, did_you_mean
from llmopt.compiler.program import Program
from llmopt.compiler.quant.compressed_tensors import COMPRESSED_TENSORS
from llmopt.compiler.quant.modelopt import MODELOPT
from llmopt.compiler.recipe import Recipe
from llmopt.runtime.build import Calibration
from llmopt.runtime.export_kv import kv_steps

CHECKPOINTS = {each.name: each for each in (COMPRESSED_TENSORS, MODELOPT)}
FORMATS = ("onnx", "genai", *CHECKPOINTS)
# passes that make what only llmopt's runtime has; the graph `forward` is the same without them
RUNTIME = frozenset({"insert-kv-cache", "quantize-kv", "fuse", "lower"})


def check_format(to: str, settings: Mapping[str, Any]) -> None:
    """Raises InputError: `to` is no format, or has no such settings."""
    if not isinstance(to, str) or to not in FORMATS:
        raise InputError(f"--to {to!r} is no format; {did_you_mean(str(to), FORMATS)}")
    if to in ("onnx", "genai"):
        onnx_options(to, settings)
        return
    if others := ["--no-cache" if n == "cache" else "--" + n.replace("_", "-") for n in settings if n != "kv_cache"]:
        said = " and ".join(others)
        raise InputError(f"{said} says how an ONNX graph is made, and --to {to} makes none; leave it out")
    if settings.get("kv_cache", "fp8") != "fp8":
        raise InputError(
            f"--kv-cache {settings['kv_cache']} cannot leave as {to}, which has static numbers for fp8 keys and "
            "values; take fp8, or --to onnx with --attention gqa"
        )


def export(
    program: Program,
    recipe: Recipe,
    to: str,
    out: Path,
    settings: Mapping[str, Any],
    calibration: Calibration | None = None,
) -> dict[str, Any]:
    """Write a program, behind the passes of its recipe, to the folder `out`; what was written.

    `settings` are those of `codegen.onnx.options.OnnxOptions` that are not the format's defaults; `calibration` is what
    the steps of a `kv_cache` in few bits are learned from. Raises InputError (an unknown format or setting, what the
    format cannot say, a package is missing) and ArtifactError (the folder).
    """
    check_format(to, settings)
    if any(spec.name == "quantize-kv" for spec in recipe.passes):
        raise InputError(
            f"recipe {recipe.name!r} packs keys and values with scales of each token, which {to} does not hold (what "
            "runs it decides on its cache); leave the recipe's -kv part out"
        )
    told = {"format": to, "recipe": recipe.name, **({"settings": dict(settings)} if settings else {})}
    kv = kv_steps(program, settings["kv_cache"], calibration) if settings.get("kv_cache") else ()
    if to in CHECKPOINTS:
        from llmopt.runtime.export_checkpoint import write_checkpoint

        return write_checkpoint(program, CHECKPOINTS[to], kv, out, told)
    from llmopt.runtime.export_onnx import write_onnx

    return write_onnx(program, onnx_options(to, settings), kv, out, told)


def onnx_options(to: str, settings: Mapping[str, Any]) -> OnnxOptions:
    """Those given, and the format's defaults: a GenAI folder shares its cache with GroupQueryAttention."""
    if to == "genai" and not settings.get("cache", True):
        raise InputError("--to genai generates with a cache; leave out --no-cache, or export --to onnx")
    known = {field.name for field in fields(OnnxOptions)}
    for name in settings:
        if name not in known:
            raise InputError(f"an ONNX graph has no setting {name!r}; {did_you_mean(name, known)}")
    return OnnxOptions(**{**({"attention": "gqa"} if to == "genai" else {}), **settings})
