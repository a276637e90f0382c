"""Artifacts that are damaged, too new, for another machine, or edited on purpose: each is said in one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from artifacts import files_of, parts_of, refusal, reseal, small_model

from llmopt.compiler.errors import ArtifactError, TargetError
from llmopt.compiler.target import ISAS, Target
from llmopt.model import CompiledModel
from llmopt.runtime import artifact, native


@pytest.fixture(scope="module")
def model() -> CompiledModel:
    return small_model()


@pytest.fixture(scope="module")
def saved(model: CompiledModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model.save(tmp_path_factory.mktemp("artifact") / "gpt")


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    return shutil.copytree(saved, tmp_path / "gpt")


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    "damage",
    [flip, lambda p: p.write_bytes(p.read_bytes()[:-1]), lambda p: p.write_bytes(b""), Path.unlink],
    ids=["edited", "truncated", "empty", "missing"],
)
def test_every_damaged_file_is_named(copy: Path, damage):
    names = files_of(copy)
    assert {n.split("/")[0] for n in names} >= {"manifest.json", "graphs", "tokenizer", "weights-00001.safetensors"}
    for name in names:
        whole = (copy / name).read_bytes()
        damage(copy / name)
        assert name in refusal(copy)
        (copy / name).write_bytes(whole)
    artifact.load(copy)


def test_every_edited_entry_of_the_manifest_is_seen(copy: Path):
    manifest = json.loads((copy / "manifest.json").read_text())
    for key in manifest.keys() - {"format", "version"}:
        (copy / "manifest.json").write_text(json.dumps({k: v for k, v in manifest.items() if k != key}))
        assert "edited or damaged" in refusal(copy)


def test_no_artifact(tmp_path: Path):
    assert "it does not exist" in refusal(tmp_path / "nothing")
    assert "no manifest.json" in refusal(tmp_path)
    (tmp_path / "file").write_text("x")
    assert "it is a file" in refusal(tmp_path / "file")
    (tmp_path / "manifest.json").write_text('{"start_url": "/"}')
    assert "not the manifest of an llmopt artifact" in refusal(tmp_path)


@pytest.mark.parametrize("version", [artifact.VERSION - 1, artifact.VERSION + 1, "2", None])
def test_another_format(copy: Path, version: object):
    reseal(copy, version=version, llmopt="7.0")
    message = refusal(copy)
    assert f"artifact format {version!r}, written by llmopt 7.0" in message
    assert "compile the model again" in message


def test_wrong_target(model: CompiledModel, tmp_path: Path):
    foreign = next(isa for isa in ISAS["cpu"] if isa not in ISAS["cpu"][Target.detect("cpu").isa])
    artifact.save(parts_of(model)._replace(target=Target("cpu", foreign, 4)), tmp_path / "a", model.weights, "1")
    assert f"compiled for {foreign}" in refusal(tmp_path / "a", TargetError)


@pytest.mark.parametrize(
    ("needs", "kind", "said"),
    [
        ({"instructions": ["avx1024"]}, TargetError, "instructions this CPU lacks (avx1024)"),
        ({"machine": "mips"}, TargetError, "its code is for mips"),
        ({"torch": "2.5.0"}, ArtifactError, "code for torch 2.5.0"),
        ({"python": "2.7"}, ArtifactError, "code for python 2.7"),
    ],
)
def test_compiled_code_of_another_machine(copy: Path, needs: dict, kind: type[Exception], said: str):
    reseal(copy, code={"kernels": None, "regions": {}, "needs": needs})
    assert said in refusal(copy, kind)


def test_this_machine_has_what_it_has():
    native.check_machine(Path("x"), Target.detect(), {"needs": native._machine()})


def test_region_without_code(copy: Path):
    """A graph that calls a region which was not stored would have to be compiled."""
    text = (copy / "graphs" / "forward.json").read_text()
    (copy / "graphs" / "layer.json").write_text(text.replace('"B"', '"N"').replace('"T"', '"R"'))
    step = json.loads((copy / "graphs" / "step.json").read_text())
    step["nodes"][-1:-1] = [{"op": "call_module", "name": "call", "target": "layer", "args": []}]
    (copy / "graphs" / "step.json").write_text(json.dumps(step))
    manifest = json.loads((copy / "manifest.json").read_text())
    files = manifest["files"] | {"graphs/layer.json": {}}
    reseal(copy, graphs=[*manifest["graphs"], "layer"], files=files)
    assert "the code of region 'layer@" in refusal(copy)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('"llmopt::attend.default"', '"os.system"', "'os.system'"),
        ('"llmopt::attend.default"', '"aten::from_file.default"', "'aten::from_file.default'"),
        ('"llmopt::attend.default"', '"llmopt::attend_9.default"', "does not know"),
        ('"provider": "reference"', '"provider": "warp"', "provider 'warp'"),
        ('"name": "input_ids"', '"name": "x=print(1)"', "is no identifier"),
        ('"tokens.weight"', '"absent.weight"', "weight 'absent.weight'"),
        ('"dtype": "float32"', '"dtype": "load"', "malformed graph"),
    ],
)
def test_graph_edited_on_purpose(copy: Path, old: str, new: str, said: str):
    path = copy / "graphs" / "step.json"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    reseal(copy)
    assert said in refusal(copy)


def test_files_outside_are_not_touched(copy: Path):
    manifest = json.loads((copy / "manifest.json").read_text())
    (copy.parent / "secret").write_text("x")
    reseal(copy, files=manifest["files"] | {"../secret": {}})
    assert "lies outside the artifact" in refusal(copy)


def test_nothing_is_read_that_the_manifest_does_not_list(copy: Path):
    manifest = json.loads((copy / "manifest.json").read_text())
    name, (_, key, note) = next(iter(manifest["weights"].items()))
    shutil.copy(copy / "weights-00001.safetensors", copy.parent / "elsewhere.safetensors")
    for change, said in (
        ({"files": {}}, "which is no file it lists"),
        (
            {"weights": manifest["weights"] | {name: ["../elsewhere.safetensors", key, note]}},
            "'../elsewhere.safetensors'",
        ),
        ({"model": manifest["model"] | {"tokenizer": "../gpt/tokenizer"}}, "'../gpt/tokenizer'"),
        ({"version": True}, "artifact format True"),
    ):
        reseal(copy, **change)
        assert said in refusal(copy)
        reseal(copy, **{k: manifest[k] for k in change})
    artifact.load(copy)
