"""`llmopt export`: a model in another project's format."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.utils import cached_file

from llmopt.commands.model import Wanted, notes_to_say, say_notes
from llmopt.compiler.checkpoint import DTYPES, read_config
from llmopt.compiler.errors import InputError, did_you_mean
from llmopt.compiler.pipeline import Pass, PassReport
from llmopt.compiler.program import Program
from llmopt.console import is_artifact, stages, write_json
from llmopt.runtime.build import build
from llmopt.runtime.export_checkpoint import norm_shifts, plan, write
from llmopt.runtime.tokenizer import TOKENIZER_FILES

FORMATS = ("compressed-tensors",)
RUNTIME = frozenset({"insert-kv-cache", "fuse", "lower"})  # passes that make what only llmopt's runtime has


def export(model: str, to: str, out: Path, wanted: Wanted, as_json: bool) -> None:
    """Write the model as its recipe leaves it, in the format `to`, to the folder `out`.

    Raises InputError (an unknown format, what the format cannot say), ArtifactError (the folder) and what compiling
    does.
    """
    if to not in FORMATS:
        raise InputError(f"--to {to!r} is no format; {did_you_mean(to, FORMATS)}")
    if is_artifact(model):
        raise InputError(
            f"{model!r} is an artifact, whose weights are arranged for llmopt's runtime; export the model that it was "
            "compiled from, with the same recipe"
        )
    started, config = time.perf_counter(), read_config(model)
    shifts: dict[str, float] = {}

    def norms(before: Program, item: Pass, after: Program, report: PassReport) -> None:
        shifts.update(norm_shifts(after))

    with stages(f"exporting {model}") as progress:
        recipe = wanted.parsed()
        if any(spec.name == "quantize-kv" for spec in recipe.passes):
            raise InputError(
                f"recipe {recipe.name!r} packs keys and values with scales of each token, which a compressed-tensors "
                "checkpoint does not hold (what runs it decides on its cache); leave the recipe's -kv part out"
            )
        recipe = replace(recipe, passes=tuple(spec for spec in recipe.passes if spec.name not in RUNTIME))
        data = wanted.data(progress)
        program, report, _ = build(
            model, recipe, dtype=wanted.dtype, hooks=(norms,), progress=progress, calibration=data
        )
        made = plan(program, shifts, _stored(config))
        progress("writing")
        told = write(made, _config(config, program), _others(model), out)
    say_notes(notes_to_say(report.passes))
    seconds = time.perf_counter() - started
    if as_json:
        write_json({"checkpoint": str(out), "format": to, **told, "seconds": round(seconds, 3)})
        return
    quantised = sum(map(len, made.groups.values()))
    print(f"wrote {out}: {told['bytes'] / 2**20:.1f} MiB, {quantised} quantised modules, in {seconds:.1f} s")


def _stored(config: PretrainedConfig) -> list[str]:
    """Names of the tensors that a checkpoint of this model holds; tied ones once."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    model.tie_weights()
    names = [name for name, _ in model.named_parameters()]
    return names + [name for name, _ in model.named_buffers() if name in model.state_dict()]


def _config(config: PretrainedConfig, program: Program) -> dict[str, object]:
    names = {dtype: name for name, dtype in DTYPES.items()}
    return {**json.loads(config.to_json_string()), "dtype": names[program.facts.dtype]}


def _others(model: str) -> dict[str, bytes]:
    """The files beside the weights: tokenizer and generation config."""
    names = (*TOKENIZER_FILES, "generation_config.json")
    found = {name: cached_file(model, name, _raise_exceptions_for_missing_entries=False) for name in names}
    return {name: Path(path).read_bytes() for name, path in found.items() if path is not None}
