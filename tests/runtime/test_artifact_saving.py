"""Saving: the path holds the whole old or the whole new artifact, and nothing else is ever replaced."""

from __future__ import annotations

import errno
import os
import re
import resource
import shutil
from pathlib import Path

import pytest
from artifacts import files_of, refusal, save_as, small_model, version_at

from llmopt.compiler.errors import ArtifactError
from llmopt.model import CompiledModel
from llmopt.runtime.replace import Folder


@pytest.fixture(scope="module")
def model() -> CompiledModel:
    return small_model()


@pytest.fixture(scope="module")
def saved(model: CompiledModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model.save(tmp_path_factory.mktemp("artifact") / "gpt")


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    return shutil.copytree(saved, tmp_path / "gpt")


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
