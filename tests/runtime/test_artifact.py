"""Artifacts: what is saved comes back in a process without the model's code, and damage of any kind is said."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from tiny_gpt import tiny_gpt

import llmopt
from llmopt.codegen.regions import CompiledRegion
from llmopt.compiler.errors import ArtifactError, TargetError
from llmopt.compiler.program import tensor_weight
from llmopt.compiler.target import ISAS, Target
from llmopt.model import CompiledModel
from llmopt.runtime import artifact, native, tensors
from llmopt.runtime.artifact import Parts
from llmopt.runtime.replace import Folder

PICO = Path(__file__).resolve().parents[2] / "examples" / "models" / "pico-llama-4m"
PROMPTS = [[3, 14, 15, 9, 2], [6], [5, 35]]


@pytest.fixture(scope="module")
def model() -> CompiledModel:
    made = llmopt.compile(tiny_gpt(), recipe="reference")
    # token ids of this model are not pico's: the tokenizer only stands for files that travel along
    made.program.facts = dataclasses.replace(made.program.facts, tokenizer=str(PICO))
    return made


@pytest.fixture(scope="module")
def saved(model: CompiledModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model.save(tmp_path_factory.mktemp("artifact") / "gpt")


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    return shutil.copytree(saved, tmp_path / "gpt")


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


def in_a_fresh_process(folder: Path, code: str, **environment: str) -> dict:
    """What `code` puts into `out`, run elsewhere with `model` loaded from the artifact."""
    script = (
        "import json, sys, llmopt\nmodel = llmopt.load(sys.argv[1])\nout = {}\n"
        f"{code}\nout['modules'] = sorted(sys.modules)\nprint(json.dumps(out))"
    )
    # the same llmopt as here, which may come from the folder this process was started in; not the tests' own modules
    environment |= {"PYTHONPATH": str(Path(llmopt.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", script, str(folder)],
        cwd=folder.parent, env=os.environ | environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


# what comes back


def test_fresh_process_without_the_models_code(model: CompiledModel, saved: Path):
    out = in_a_fresh_process(
        saved,
        f"out['greedy'] = model.generate({PROMPTS}, max_new_tokens=12)\n"
        f"out['sampled'] = model.generate({PROMPTS}, max_new_tokens=12, temperature=1.0, seed=4)\n"
        "out['text'], out['report'] = model.text(), model.report.to_dict()",
    )
    assert out["greedy"] == model.generate(PROMPTS, max_new_tokens=12)
    assert out["sampled"] == model.generate(PROMPTS, max_new_tokens=12, temperature=1.0, seed=4)
    assert out["text"] == model.text()
    assert out["report"] == json.loads(json.dumps(model.report.to_dict()))
    assert not {"tiny_gpt", "transformers", "torch._dynamo", "torch._inductor"} & set(out["modules"])


def test_logits_are_the_modules_own(saved: Path):
    ids = torch.tensor([[3, 14, 15, 9, 2, 6, 5, 35]])
    ours, theirs = llmopt.load(saved)(ids), tiny_gpt()(ids, torch.arange(8)[None])
    torch.testing.assert_close(ours, theirs)


def test_everything_but_values_comes_back(model: CompiledModel, saved: Path):
    loaded = artifact.load(saved)
    assert (loaded.recipe, loaded.target) == (model.recipe, model.target)
    assert loaded.program.state == model.program.state
    assert loaded.program.properties == model.program.properties
    facts = dataclasses.replace(model.program.facts, tokenizer=str(saved / "tokenizer"))
    assert loaded.program.facts == facts
    assert loaded.program.choices == json.loads(json.dumps(model.program.choices))


def test_readable_text_is_the_printed_graph(model: CompiledModel, saved: Path):
    for name, graph in model.program.graphs.items():
        assert (saved / "graphs" / f"{name}.py").read_text() == graph.print()


def test_second_generation_is_the_first(saved: Path, tmp_path: Path):
    """Saving what was loaded changes no graph and no weight."""
    again = llmopt.load(saved).save(tmp_path / "again")
    for name in files_of(saved):
        if name != "manifest.json":
            assert (again / name).read_bytes() == (saved / name).read_bytes(), name


def test_saved_onto_itself(model: CompiledModel, copy: Path):
    loaded = llmopt.load(copy)
    loaded.save(copy)
    assert files_of(copy.parent) == [f"gpt/{name}" for name in files_of(copy)]
    want = model.generate(PROMPTS, max_new_tokens=8)
    assert loaded.generate(PROMPTS, max_new_tokens=8) == want
    assert llmopt.load(copy).generate(PROMPTS, max_new_tokens=8) == want


def test_weights_as_safetensors_reads_them(model: CompiledModel, saved: Path):
    """Tied weights and those both graphs read are stored once, unused ones not at all."""
    stored = load_file(saved / "weights-00001.safetensors")
    where = json.loads((saved / "manifest.json").read_text())["weights"]
    assert set(where) == set(model.program.used_weights())
    assert set(stored) == {key for _, key, _ in where.values()}
    for name, tensor in model.weights.items():
        torch.testing.assert_close(stored[where[name][1]], tensor, rtol=0, atol=0)
    own = {p.data_ptr(): p.numel() * p.element_size() for p in tiny_gpt().parameters()}
    assert sum(t.numel() * t.element_size() for t in stored.values()) == sum(own.values())


def test_equal_weights_share_memory():
    tied = torch.arange(600.0).reshape(20, 30)
    other = tied.clone()
    other[10, 10] = -1  # equal ends
    named = {"a": tied, "b": other, "c": tied.clone(), "d": tied.reshape(30, 20), "e": tied.to(torch.float16)}
    weights = {name: tensor_weight(t) for name, t in named.items()}
    assert tensors.stored_names(weights, named.__getitem__) == {"a": "a", "b": "b", "c": "a", "d": "d", "e": "e"}


@pytest.mark.parametrize("limit", [1, 100, 10**6])
def test_shards(limit: int, tmp_path: Path):
    kinds = [torch.float32, torch.bfloat16, torch.int8, torch.bool, torch.float8_e4m3fn, torch.int64]
    named = {f"w{i}": torch.arange(i * 3).to(kinds[i % 6]).reshape(3, i) for i in range(9)} | {"s": torch.tensor(2.5)}
    weights = {name: tensor_weight(t) for name, t in named.items()}
    found = {}
    for number, group in enumerate(tensors.shards(weights, limit)):
        (tmp_path / str(number)).write_bytes(b"".join(tensors.encoded(group, named.__getitem__)))
        assert sum(w.nbytes for w in group.values()) <= limit or len(group) == 1
        found.update(load_file(tmp_path / str(number)))
    assert found.keys() == named.keys()
    for name, tensor in named.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        assert found[name].view(torch.uint8).tolist() == tensor.view(torch.uint8).tolist() if tensor.dim() else True
    assert found["s"] == named["s"]


def test_loaded_weights_are_mapped_not_copied(saved: Path):
    loaded = artifact.load(saved).program.weights
    assert loaded["tokens.weight"].load().data_ptr() == loaded["tokens.weight"].load().data_ptr()


def test_tokenizer_travels(saved: Path, model: CompiledModel):
    loaded = llmopt.load(saved)
    text = "def f(x):\n    return é"
    assert loaded.tokenizer.encode(text) == model.tokenizer.encode(text)


def test_no_tokenizer_is_fine(model: CompiledModel, tmp_path: Path):
    program = dataclasses.replace(model.program, facts=dataclasses.replace(model.program.facts, tokenizer=None))
    artifact.save(parts_of(model)._replace(program=program), tmp_path / "a", model.weights, "1")
    loaded = llmopt.load(tmp_path / "a")
    assert loaded.tokenizer is None
    assert len(loaded.generate([1, 2], max_new_tokens=3)) == 3


def test_compiled_regions_come_back(model: CompiledModel, tmp_path: Path):
    shared = b"\x7fELF shared"
    regions = {"layer@1": CompiledRegion("a = 1\n", {"x.so": shared}), "layer@n": CompiledRegion("b = 'é'\n", {})}
    regions["head@1"] = CompiledRegion("", {"x.so": b"other", "y.so": shared})
    made = parts_of(model)._replace(regions=SimpleNamespace(compiled=regions, compile_all=lambda: None))
    artifact.save(made, tmp_path / "a", model.weights, "1")
    assert artifact.load(tmp_path / "a").regions.compiled == regions
    assert len(list((tmp_path / "a" / "code").glob("*.so"))) == 2


@pytest.mark.slow
def test_default_recipe_without_a_compiler(tmp_path: Path):
    model = llmopt.compile(PICO, dtype="float32")
    model.save(tmp_path / "a")
    ids = model.tokenizer.encode("def fibonacci(n):")
    code = f"out['tokens'] = model.generate({ids}, max_new_tokens=16)\nout['text'] = model.text()"
    environment = {"CXX": "/bin/false", "LLMOPT_CACHE": str(tmp_path / "cache"), "PATH": ""}
    out = in_a_fresh_process(tmp_path / "a", code, **environment)
    assert out["tokens"] == model.generate(ids, max_new_tokens=16)
    assert out["text"] == model.text()


# damage


def refusal(path: Path, kind: type[Exception] = ArtifactError) -> str:
    with pytest.raises(kind) as caught:
        llmopt.load(path)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    return message


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


def test_newer_format(copy: Path):
    reseal(copy, version=artifact.VERSION + 1, llmopt="7.0")
    message = refusal(copy)
    assert "7.0" in message
    assert "upgrade llmopt" in message


def test_wrong_target(model: CompiledModel, tmp_path: Path):
    foreign = next(isa for isa in ISAS if isa not in ISAS[Target.detect().isa])
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


# saving


def failure(model: CompiledModel, path: Path) -> str:
    with pytest.raises(ArtifactError) as caught:
        model.save(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_nothing_of_the_users_is_replaced(model: CompiledModel, copy: Path):
    folder = copy.parent
    (folder / "file").write_text("mine")
    (folder / "photos").mkdir()
    (folder / "photos" / "manifest.json").write_text("{}")
    assert "a file of that name" in failure(model, folder / "file")
    assert "not an llmopt artifact" in failure(model, folder / "photos")
    assert "not an llmopt artifact" in failure(model, folder)
    (copy / "notes.txt").write_text("mine")
    assert "notes.txt" in failure(model, copy)
    assert (folder / "file").read_text() == (copy / "notes.txt").read_text() == "mine"
    assert files_of(folder) == sorted(["file", "photos/manifest.json", *(f"gpt/{n}" for n in files_of(copy))])


def test_empty_folders_links_and_new_parents(model: CompiledModel, tmp_path: Path):
    (tmp_path / "empty").mkdir()
    save_as("1", model, tmp_path / "empty")
    (tmp_path / "link").symlink_to("empty")
    save_as("2", model, tmp_path / "link")
    save_as("3", model, tmp_path / "a" / "b" / "c*[x]")
    assert (tmp_path / "link").is_symlink()
    assert version_at(tmp_path / "empty") == version_at(tmp_path / "link") == "2"
    assert version_at(tmp_path / "a" / "b" / "c*[x]") == "3"


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (errno.ENOSPC, "the disk is full"),
        (errno.EDQUOT, "quota"),
        (errno.EACCES, "no permission"),
        (errno.EIO, "error"),
    ],
)
@pytest.mark.parametrize("old", [True, False])
def test_failing_disk(model: CompiledModel, tmp_path: Path, monkeypatch, number: int, said: str, old: bool):
    path = tmp_path / "a"
    if old:
        save_as("old", model, path)
    calls = []

    def fsync(file: int) -> None:
        calls.append(file)
        if len(calls) == 4:
            raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fsync)
    assert said in failure(model, path)
    assert [p.name for p in tmp_path.iterdir()] == (["a"] if old else [])
    assert not old or version_at(path) == "old"


def test_real_limit_on_file_size(model: CompiledModel, tmp_path: Path):
    save_as("old", model, tmp_path / "a")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        message = failure(model, tmp_path / "a")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert re.search(r"a file is too large.*free some space", message)
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    assert version_at(tmp_path / "a") == "old"


def test_no_permission(model: CompiledModel, copy: Path):
    """In a child process, since root, which tests may run as, can write and read anywhere."""
    child = os.fork()
    if not child:
        status = 1
        try:
            copy.parent.chmod(0o500)
            copy.chmod(0)
            if os.geteuid() == 0:
                os.setuid(65534)
            assert "no permission" in failure(model, copy.parent / "a")
            assert "cannot be read" in refusal(copy)
            status = 0
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    copy.parent.chmod(0o700)
    copy.chmod(0o700)


def test_rename_that_fails_puts_the_old_one_back(model: CompiledModel, tmp_path: Path, monkeypatch):
    save_as("old", model, tmp_path / "a")
    rename = os.rename

    def failing(source: Path, target: Path) -> None:
        if ".llmopt-new-" in str(source):
            raise OSError(errno.EIO, "input/output error")
        rename(source, target)

    monkeypatch.setattr(os, "rename", failing)
    failure(model, tmp_path / "a")
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    assert version_at(tmp_path / "a") == "old"


def die_at(function: str, call: int, when: str, model: CompiledModel, path: Path) -> bool:
    """Save in a child process that vanishes `when` the call-th os.function runs; did it get there?"""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    real, count = getattr(os, function), 0

    def fatal(*args: object, **kwargs: object) -> object:
        nonlocal count
        count += 1
        if count == call and when == "before":
            os._exit(9)
        result = real(*args, **kwargs)
        if count == call:
            os._exit(9)
        return result

    setattr(os, function, fatal)
    try:
        save_as("new", model, path)
    finally:
        os._exit(0)


@pytest.mark.parametrize(
    ("function", "call", "when", "found"),
    [
        ("mkdir", 2, "after", "old"),
        ("fsync", 1, "before", "old"),
        ("fsync", 7, "after", "old"),
        ("rename", 1, "before", "old"),
        ("rename", 1, "after", "old"),
        ("rename", 2, "before", "old"),
        ("rename", 2, "after", "new"),
        ("rmdir", 1, "before", "new"),
        ("rmdir", 2, "after", "new"),
    ],
)
def test_crash_leaves_the_old_or_the_new_one(model, tmp_path: Path, function: str, call: int, when: str, found: str):
    path = tmp_path / "a"
    save_as("old", model, path)
    assert die_at(function, call, when, model, path)
    assert version_at(path) == found
    save_as("newest", model, path)
    assert version_at(path) == "newest"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize(
    ("function", "call", "when", "found"), [("fsync", 5, "before", None), ("rename", 1, "after", "new")]
)
def test_crash_of_the_first_save(model, tmp_path: Path, function: str, call: int, when: str, found: str | None):
    path = tmp_path / "a"
    assert die_at(function, call, when, model, path)
    assert (version_at(path) if path.exists() else None) == found
    save_as("newest", model, path)
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_living_writer_is_left_alone(model: CompiledModel, tmp_path: Path, monkeypatch):
    """A save that comes while another one writes to the same path removes nothing of it; the last to finish stays."""
    path, add = tmp_path / "a", Folder.add
    inner = iter(["inner"])

    def slow(self: Folder, name: str, data: str | bytes) -> str:
        if name == "report.json" and (version := next(inner, None)):
            save_as(version, model, path)
            assert version_at(path) == "inner"
        return add(self, name, data)

    monkeypatch.setattr(Folder, "add", slow)
    save_as("outer", model, path)
    assert version_at(path) == "outer"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
