"""Artifacts: a compiled model as a folder that a fresh process runs without the model's code or a compiler.

    manifest.json              versions, target, model, state, where weights lie, size and sha256 of every file
    recipe.json, report.json   what was asked for and what was done
    graphs/NAME.py, NAME.json  each graph, to read and to load
    weights-00001.safetensors  the weights the graphs use; equal ones are stored once
    tokenizer/                 the model's tokenizer files, if it has any
    code/                      compiled regions: source and libraries with the kernel library they call, or cubins

Every file is checked against its size and sha256 before anything is used, which takes about 0.8 s per GB and core;
files are checked side by side. Hashes find damage, not malice: graphs are read as data and call nothing outside the
dialect, but what lies in code/ is run, so load only artifacts from where you would install software from.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llmopt.compiler.errors import ArtifactError
from llmopt.compiler.program import NOT_KEPT, ModelFacts, Program, StateSpec, Weight
from llmopt.compiler.recipe import Recipe
from llmopt.compiler.target import Target
from llmopt.runtime import native
from llmopt.runtime.gpu_code import GpuCode
from llmopt.runtime.loader import Regions
from llmopt.runtime.replace import Folder, replacing, settle
from llmopt.runtime.report import Report
from llmopt.runtime.serialize import graph_from_data, graph_to_data
from llmopt.runtime.tensors import distinct, encoded, read_shards, shards
from llmopt.runtime.tokenizer import TOKENIZER_FILES, load_tokenizer

VERSION = 4
MANIFEST = "manifest.json"
_AGAIN = "save the artifact again"
_MALFORMED = (KeyError, TypeError, ValueError, IndexError, AttributeError)


class Parts(NamedTuple):
    """What a compiled model is made of."""

    program: Program
    recipe: Recipe
    target: Target
    report: Report
    regions: Regions | GpuCode


def save(parts: Parts, path: Path, weights: Mapping[str, Tensor], version: str) -> Path:
    """Write an artifact folder; an older artifact at `path` is replaced at the very end, whole.

    `weights` are those in memory, others are read one at a time; `version` is llmopt's. Every region is compiled first.
    Raises ArtifactError: `path` is something else than an artifact, the disk is full, no permission.
    """
    parts.regions.compile_all()
    with replacing(path, _foreign) as new:
        _write(Folder(new), parts, weights, version)
    return path


def load(path: Path, runs_here: bool = True) -> Parts:
    """Read an artifact; weights are mapped into memory, and nothing is compiled.

    Without `runs_here` it is to be looked at only, and may be for another machine.

    Raises ArtifactError (none, damaged, too new, or of another torch) or TargetError (for another machine).
    """
    try:
        path = settle(Path(os.path.realpath(path)))
        manifest = _manifest(path)
        target = Target.from_dict(manifest["target"])
        if runs_here:
            native.check_machine(path, target, manifest["code"])
        _check_listed(path, manifest)
        _check_files(path, manifest["files"])
        return _read(path, manifest, target)
    except OSError as error:
        raise ArtifactError(f"artifact {str(path)!r} cannot be read: {error}; wanted files that may be read") from error
    except _MALFORMED as error:
        raise ArtifactError(
            f"{path}: malformed ({type(error).__name__}: {error}); wanted the form `save` writes: {_AGAIN}"
        ) from error


# writing


def _write(folder: Folder, parts: Parts, weights: Mapping[str, Tensor], version: str) -> None:
    program = parts.program
    placed = _write_weights(folder, program, weights)  # first, as the report tells of them
    folder.add("recipe.json", parts.recipe.to_json())
    folder.add("report.json", json.dumps(parts.report.to_dict(), indent=1))
    for name, graph in program.graphs.items():
        folder.add(f"graphs/{name}.py", graph.print())
        folder.add(f"graphs/{name}.json", _lines(graph_to_data(graph)))
    manifest = {
        "format": "llmopt",
        "version": VERSION,
        "llmopt": version,
        "torch": torch.__version__,
        "target": parts.target.to_dict(),
        "model": _facts_to_data(program.facts, _write_tokenizer(folder, program.facts.tokenizer)),
        "state": [{"name": s.name, "shape": list(s.shape), "dtype": _dtype_name(s.dtype)} for s in program.state],
        **({"near_pages": program.near_pages} if program.near_pages else {}),
        "neutral": program.neutral,
        "made_of": _made_of(program),
        "properties": sorted(program.properties),
        "choices": program.choices,
        "graphs": list(program.graphs),
        "code": native.write(folder, program, parts.regions),
        "weights": placed,
        "files": folder.files,
    }
    folder.add(MANIFEST, json.dumps({**manifest, "sha256": _digest(manifest)}, indent=1))


def _lines(data: dict[str, Any]) -> str:
    """JSON with one line for each node and type."""
    lists = (f'"{k}": [\n  ' + ",\n  ".join(map(json.dumps, data[k])) + "\n ]" for k in ("types", "nodes"))
    return "{\n " + ",\n ".join([f'"sizes": {json.dumps(data["sizes"])}', *lists]) + "\n}\n"


def _write_weights(folder: Folder, program: Program, weights: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """{name: [file, key, note]}"""

    def read(name: str) -> Tensor:
        return weights[name] if name in weights else program.weights[name].load()

    used = program.used_weights()
    stored: dict[str, str] = {}
    files: dict[str, str] = {}
    for number, group in enumerate(shards(distinct(used, read, stored)), 1):
        file = f"weights-{number:05d}.safetensors"
        with folder.open(file) as write:
            for piece in encoded(group):
                write(piece)
        files.update(dict.fromkeys(group, file))
    return {name: [files[stored[name]], stored[name], weight.note] for name, weight in used.items()}


def _made_of(program: Program) -> dict[str, Any]:
    """{name: [shape, dtype, what it is made of]} of the weights that graphs use and of all that those are made of."""
    found: dict[str, Any] = {}
    left = list(program.used_weights())
    while left:
        if (name := left.pop()) not in found:
            weight = program.weights[name]
            found[name] = [list(weight.shape), _dtype_name(weight.dtype), list(weight.inputs)]
            left += weight.inputs
    return dict(sorted(found.items()))


def _write_tokenizer(folder: Folder, source: str | None) -> str | None:
    if source is None:
        return None
    if Path(source).is_dir():
        return _copy_tokenizer(folder, Path(source))
    with tempfile.TemporaryDirectory() as made:  # it lies in the hub's cache
        load_tokenizer(source).save_pretrained(made)
        return _copy_tokenizer(folder, Path(made))


def _copy_tokenizer(folder: Folder, source: Path) -> str | None:
    found = [name for name in TOKENIZER_FILES if (source / name).is_file()]
    # which class reads the files may stand in the model's configuration only
    for name in [*found, *(["config.json"] if found and (source / "config.json").is_file() else [])]:
        folder.add(f"tokenizer/{name}", (source / name).read_bytes())
    return "tokenizer" if found else None


# what may be in the way


def _foreign(path: Path) -> str | None:
    """Why a folder may not be replaced: it is no artifact, or holds files that are not the artifact's."""
    try:
        files = {*_manifest(path)["files"], MANIFEST}
    except (ArtifactError, *_MALFORMED):
        return "the folder there is not an llmopt artifact that this version can read"
    inside = (Path(folder, name) for folder, _, names in os.walk(path) for name in names)
    extra = [p for p in inside if p.relative_to(path).as_posix() not in files]
    return f"the artifact there also holds {str(min(extra))!r}, which is not part of it" if extra else None


def _manifest(path: Path) -> dict[str, Any]:
    """The manifest, its version and its own hash checked; the files it lists may still be damaged."""
    place = path / MANIFEST
    if not place.is_file():
        seen = "it is a file" if path.is_file() else "it has no manifest.json" if path.exists() else "it does not exist"
        raise ArtifactError(
            f"{str(path)!r} is not an artifact: {seen}; wanted a folder that `llmopt compile` or `save` wrote"
        )
    manifest = _json(place)
    if not isinstance(manifest, dict) or manifest.get("format") != "llmopt":
        raise ArtifactError(f"{place}: not the manifest of an llmopt artifact; wanted a folder that `save` wrote")
    version = manifest.get("version")
    if version != VERSION:
        raise ArtifactError(
            f"{place}: artifact format {version!r}, written by llmopt {manifest.get('llmopt')}, and this llmopt "
            f"reads {VERSION}; compile the model again with this llmopt, or use the one that wrote it"
        )
    if manifest.pop("sha256", None) != _digest(manifest):
        raise ArtifactError(f"{place}: it was edited or damaged (its own sha256 does not match); {_AGAIN}")
    return manifest


def _check_listed(path: Path, manifest: Mapping[str, Any]) -> None:
    """Nothing is read but what the manifest lists, so nothing that is not checked, or lies elsewhere."""
    code, tokenizer = manifest["code"], manifest["model"]["tokenizer"]
    used = {"recipe.json", "report.json", *(f"graphs/{name}.json" for name in manifest["graphs"])}
    used |= {file for file, _, _ in manifest["weights"].values()}
    unlisted = sorted((used | native.files(code)) - manifest["files"].keys())
    if tokenizer not in (None, "tokenizer"):
        unlisted.append(tokenizer)
    if unlisted:
        raise ArtifactError(f"{path / MANIFEST}: it uses {unlisted[0]!r}, which is no file it lists; {_AGAIN}")


def _check_files(path: Path, files: Mapping[str, Mapping[str, Any]]) -> None:
    """Sizes of all files first, which is quick, then all hashes."""
    for name, entry in files.items():
        if name.startswith("/") or ".." in name.split("/"):
            raise ArtifactError(f"{path / MANIFEST}: file {name!r} lies outside the artifact; {_AGAIN}")
        size = (path / name).stat().st_size if (path / name).is_file() else None
        if size != entry["size"]:
            seen = "missing" if size is None else f"{size} bytes long, wanted {entry['size']} bytes"
            raise ArtifactError(f"{path / name}: the file is {seen}; {_AGAIN}, or copy it again")
    largest = sorted(files, key=lambda name: -files[name]["size"])
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for name, digest in zip(largest, pool.map(lambda name: _file_digest(path / name), largest), strict=True):
            if digest != files[name]["sha256"]:
                raise ArtifactError(
                    f"{path / name}: the file was edited or damaged (sha256 {digest[:12]}, wanted "
                    f"{files[name]['sha256'][:12]}); {_AGAIN}, or copy it again"
                )


def _file_digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


# reading


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path}: cannot be read as JSON ({error}); the artifact is damaged: {_AGAIN}") from error


def _read(path: Path, manifest: Mapping[str, Any], target: Target) -> Parts:
    names = manifest["graphs"]
    files = {name: path / f"graphs/{name}.json" for name in names}
    program = Program(
        {name: graph_from_data(name, _json(file), names, str(file)) for name, file in files.items()},
        _weights(path, manifest),
        _facts_from_data(manifest["model"], path),
        tuple(StateSpec(s["name"], tuple(s["shape"]), _dtype(s["dtype"])) for s in manifest["state"]),
        frozenset(manifest["properties"]),
        manifest["choices"],
        int(manifest.get("near_pages", 0)),
        manifest["neutral"],
    )
    for graph in program.graphs.values():
        for name in graph.weights():
            if name not in program.weights:
                raise ArtifactError(f"{path}: graph {graph.name} reads weight {name!r}, which is missing; {_AGAIN}")
    regions = native.read(path, manifest["code"], program, target)
    recipe = Recipe.from_dict(_json(path / "recipe.json"), str(path / "recipe.json"))
    return Parts(program, recipe, target, Report.from_dict(_json(path / "report.json")), regions)


def _weights(path: Path, manifest: Mapping[str, Any]) -> dict[str, Weight]:
    """The weights that graphs use, and those they are made of, which are known by name, shape and dtype only."""
    held = read_shards(path, {name: (file, key, note) for name, (file, key, note) in manifest["weights"].items()})
    found = {}
    for name, (shape, dtype, inputs) in manifest["made_of"].items():
        if name in held:
            found[name] = replace(held[name], inputs=tuple(inputs))
        else:
            load = functools.partial(_not_kept, path, name)
            found[name] = Weight(tuple(shape), _dtype(dtype), load, NOT_KEPT, tuple(inputs))
    return held | found


def _not_kept(path: Path, name: str) -> Tensor:
    raise ArtifactError(
        f"{path}: weight {name!r} is not kept, what the graphs make of it is; wanted a weight that a graph reads"
    )


def _facts_to_data(facts: ModelFacts, tokenizer: str | None) -> dict[str, Any]:
    return {
        "name": facts.name,
        "vocab_size": facts.vocab_size,
        "context_length": facts.context_length,
        "eos_token_ids": list(facts.eos_token_ids),
        "dtype": _dtype_name(facts.dtype),
        "tokenizer": tokenizer,
        "config": facts.config,
    }


def _facts_from_data(data: Mapping[str, Any], path: Path) -> ModelFacts:
    tokenizer = data["tokenizer"] and str(path / data["tokenizer"])
    name, vocab, context = data["name"], data["vocab_size"], data["context_length"]
    ends, dtype = tuple(data["eos_token_ids"]), _dtype(data["dtype"])
    return ModelFacts(name, vocab, context, ends, dtype, tokenizer, data["config"])


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _dtype(name: str) -> torch.dtype:
    found = getattr(torch, name)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"{name!r} is no dtype")
    return found
