"""The folder that a model leaves in: whole or not there, and replaced only where it holds nothing but an export."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from llmopt.runtime.replace import check_replaceable, replacing
from llmopt.runtime.tokenizer import TOKENIZER_FILES

RECEIPT = "llmopt_export.json"
PRODUCER = "llmopt"


@contextlib.contextmanager
def export_folder(out: Path, told: Mapping[str, Any]) -> Iterator[Path]:
    """Yields a new folder, which takes the name `out` when the block ends and is removed if it raises.

    `told` says what leaves, in the file RECEIPT that also lists the others. Raises ArtifactError: something that no
    export wrote is there, the disk is full, no permission.
    """
    with replacing(out, _foreign, "export") as new:
        yield new
        files = sorted(path.relative_to(new).as_posix() for path in new.rglob("*") if path.is_file())
        receipt = {"producer": PRODUCER, **told, "files": [*files, RECEIPT]}
        (new / RECEIPT).write_text(json.dumps(receipt, indent=1) + "\n", encoding="utf-8")
        for name in receipt["files"]:
            number = os.open(new / name, os.O_RDONLY)
            try:
                os.fsync(number)
            finally:
                os.close(number)


def check_out(out: Path) -> None:
    """Before anything is compiled: raises ArtifactError if `export_folder` would not replace what is at `out`."""
    check_replaceable(Path(os.path.realpath(out)), _foreign, "export")


def companions(source: str | None) -> dict[str, bytes]:
    """What lies beside the weights of a folder or hub id: tokenizer and generation config."""
    if source is None:
        return {}
    from transformers.utils import cached_file

    names = (*TOKENIZER_FILES, "generation_config.json")
    found = {name: cached_file(source, name, _raise_exceptions_for_missing_entries=False) for name in names}
    return {name: Path(path).read_bytes() for name, path in found.items() if path is not None}


def _foreign(path: Path) -> str | None:
    """Why a folder may not be replaced: no export wrote it, or it holds more."""
    try:
        receipt = json.loads((path / RECEIPT).read_text(encoding="utf-8"))
        ours, files = receipt["producer"] == PRODUCER, set(receipt["files"])
    except (OSError, ValueError, KeyError, TypeError):
        ours, files = False, set()
    if not ours:
        return "what is there was not written by `llmopt export`"
    extra = [p for p in path.rglob("*") if p.is_file() and p.relative_to(path).as_posix() not in files]
    return f"the export there also holds {str(min(extra))!r}, which is not part of it" if extra else None
