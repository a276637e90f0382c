"""Writing a folder so that its path holds the whole old one or the whole new one, whatever happens meanwhile.

    .NAME.llmopt-new-XXXX    the folder being written; its writer holds a lock on it for as long as it lives
    .NAME.llmopt-old         the folder being replaced, between two renames

Both lie beside NAME. A writer that dies leaves one or both behind: the next save or load puts an old folder without a
successor back, and the next save deletes the rest.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from llmopt.compiler.errors import ArtifactError

_FULL = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "a file is too large",
}
_FORBIDDEN = {errno.EACCES: "no permission", errno.EPERM: "no permission", errno.EROFS: "the file system is read-only"}
_UNDONE = "what was written is removed again, what was there before is whole"


class Folder:
    """A folder being filled: each file is hashed on its way and flushed to the disk."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.files: dict[str, dict[str, Any]] = {}

    @contextlib.contextmanager
    def open(self, name: str) -> Iterator[Callable[[Any], None]]:
        """Yields the function that writes bytes to the file `name`."""
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        digest = hashlib.sha256()
        with open(path, "wb") as file:

            def write(data: Any) -> None:
                digest.update(data)
                file.write(data)

            yield write
            file.flush()
            os.fsync(file.fileno())
            self.files[name] = {"size": file.tell(), "sha256": digest.hexdigest()}

    def add(self, name: str, data: str | bytes) -> str:
        """Write a whole file; its name."""
        with self.open(name) as write:
            write(data.encode() if isinstance(data, str) else data)
        return name


@contextlib.contextmanager
def replacing(path: Path, may_replace: Callable[[Path], str | None], what: str = "artifact") -> Iterator[Path]:
    """Yield a new empty folder that takes the place of `path` when the block ends, and is removed if it raises.

    `may_replace(path)` says why an existing path must stay (None: it may go); an empty folder may always go. `what`
    is what errors call it. Raises ArtifactError, also in place of an OSError from within the block.
    """
    path = Path(os.path.realpath(path))
    try:
        check_replaceable(path, may_replace, what)
        path.parent.mkdir(parents=True, exist_ok=True)
        settle(path)
        _sweep(path)
        new = path.with_name(f".{path.name}.llmopt-new-{secrets.token_hex(4)}")
        new.mkdir()
        with _lock(new, fcntl.LOCK_EX):
            try:
                yield new
                _swap(new, path)
            finally:
                shutil.rmtree(new, ignore_errors=True)
    except OSError as error:
        raise ArtifactError(f"{what} {str(path)!r} cannot be saved: {_explained(error)}") from error


def check_replaceable(path: Path, may_replace: Callable[[Path], str | None], what: str = "artifact") -> None:
    """Raises ArtifactError if `replacing` would, because of what is at `path` now."""
    reason = _obstacle(path, may_replace)
    if reason is not None:
        raise ArtifactError(f"{what} {str(path)!r} cannot be saved: {reason}; nothing was changed: choose another path")


def settle(path: Path) -> Path:
    """Where the folder of `path` is: after a crash between two renames, the old one is put back first.

    Without permission to rename, the place the old one lies at.
    """
    old = _old(path)
    if path.exists() or not old.exists():
        return path
    try:
        with _lock(path.parent, fcntl.LOCK_EX):  # whoever is between the renames right now holds it
            if not path.exists() and old.exists():
                os.rename(old, path)
    except OSError:
        return old
    return path


def _obstacle(path: Path, may_replace: Callable[[Path], str | None]) -> str | None:
    if not path.exists():
        return None
    if not path.is_dir():
        return "there is a file of that name"
    return may_replace(path) if any(path.iterdir()) else None


def _explained(error: OSError) -> str:
    at = f" at {error.filename!r}" if error.filename else ""
    if error.errno in _FULL:
        return f"{_FULL[error.errno]}{at}; {_UNDONE}: free some space"
    if error.errno in _FORBIDDEN:
        return f"{_FORBIDDEN[error.errno]}{at}; wanted a folder that can be written: choose another path"
    return f"{error.strerror or error}{at}; {_UNDONE}"


def _old(path: Path) -> Path:
    return path.with_name(f".{path.name}.llmopt-old")


def _swap(new: Path, path: Path) -> None:
    """Put `new` in the place of `path`; everything below `new` is on the disk before its name is."""
    for folder, _, _ in os.walk(new):
        _flush(Path(folder))
    old = _old(path)
    with _lock(path.parent, fcntl.LOCK_EX):
        shutil.rmtree(old, ignore_errors=True)  # of a save that died before it could delete it
        if path.exists():
            os.rename(path, old)
        try:
            os.rename(new, path)
        except BaseException:
            if old.exists() and not path.exists():
                os.rename(old, path)
            raise
        _flush(path.parent)
        shutil.rmtree(old, ignore_errors=True)


def _sweep(path: Path) -> None:
    """Delete what dead writers left: the new folders whose lock is free, and an old folder that has its successor."""
    for left in path.parent.glob(f".{_escaped(path.name)}.llmopt-new-*"):
        with contextlib.suppress(BlockingIOError), _lock(left, fcntl.LOCK_EX | fcntl.LOCK_NB):
            shutil.rmtree(left, ignore_errors=True)
    with _lock(path.parent, fcntl.LOCK_EX):
        if path.exists():
            shutil.rmtree(_old(path), ignore_errors=True)


def _escaped(name: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


@contextlib.contextmanager
def _lock(folder: Path, how: int) -> Iterator[None]:
    """Hold a lock on a folder; the system lets it go when the process dies. BlockingIOError if LOCK_NB and taken."""
    number = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(number, how)
        except OSError as error:  # taken; or the file system has no locks, and then whoever looks takes all as taken
            if how & fcntl.LOCK_NB:
                raise BlockingIOError(error.errno, error.strerror, str(folder)) from error
        yield
    finally:
        os.close(number)


def _flush(folder: Path) -> None:
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
