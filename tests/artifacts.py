"""What the tests of artifacts share: a model, its artifact, and ways to look at one."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path

import pytest
from tiny_gpt import tiny_gpt

import llmopt
from llmopt.compiler.errors import ArtifactError
from llmopt.model import CompiledModel
from llmopt.runtime import artifact
from llmopt.runtime.artifact import Parts

PICO = Path(__file__).resolve().parents[1] / "examples" / "models" / "pico-llama-4m"


def small_model() -> CompiledModel:
    """Pico's tokenizer stands for files that travel along; its ids are not this model's."""
    made = llmopt.compile(tiny_gpt(), recipe="reference")
    made.program.facts = dataclasses.replace(made.program.facts, tokenizer=str(PICO))
    return made


def parts_of(model: CompiledModel) -> Parts:
    return Parts(model.program, model.recipe, model.target, model.report, model.regions)


def save_as(version: str, model: CompiledModel, path: Path) -> None:
    artifact.save(parts_of(model), path, model.weights, version)


def version_at(path: Path) -> str:
    """Load the artifact (which checks every file) and say which llmopt wrote it."""
    artifact.load(path)
    return json.loads((path / "manifest.json").read_text())["llmopt"]


def files_of(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def reseal(folder: Path, **entries: object) -> None:
    """What someone does who edits an artifact on purpose: new sizes and hashes for everything."""
    manifest = json.loads((folder / "manifest.json").read_text()) | entries
    for name in manifest["files"]:
        data = (folder / name).read_bytes()
        manifest["files"][name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    manifest.pop("sha256")
    digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest | {"sha256": digest}))


def refusal(path: Path, kind: type[Exception] = ArtifactError) -> str:
    with pytest.raises(kind) as caught:
        llmopt.load(path)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    return message
