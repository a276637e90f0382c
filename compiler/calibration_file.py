"""Files of sums: safetensors that are written tensor by tensor and say themselves whether they are whole.

The metadata hold the SHA-256 of each tensor and of the metadata: a file that lost some bytes on the way has the right
length and reads like any other.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from llmopt.compiler.errors import InputError
from llmopt.compiler.program import open_safetensors

_NAMES = {torch.float64: "F64", torch.float32: "F32"}
_OWN = ("format", "tensors_sha256", "metadata_sha256")  # not the writer's


@dataclass(frozen=True)
class LazyTensor:
    """A tensor to be written: its shape and dtype (fp32 or fp64), and how to make it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def format_of(path: Path) -> str:
    """What a safetensors file says it is; "" if it says nothing. Raises InputError if it cannot be read."""
    with open_safetensors(path) as file:
        return str((file.metadata() or {}).get("format", ""))


def read_metadata(path: Path) -> dict[str, Any]:
    """What was given to `write_tensors`, the format among it.

    Raises InputError where the file is another's, or not as it was written.
    """
    raw = _raw(path)
    return {k: v if k == "format" else json.loads(v) for k, v in raw.items() if k == "format" or k not in _OWN}


class StoredTensors(Mapping[str, Tensor]):
    """The tensors of a file that `write_tensors` wrote, each read into memory of its own when asked for.

    Raises InputError when a tensor is read that is not as it was written. Each is checked once.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.digests: dict[str, str] = json.loads(_raw(path)["tensors_sha256"])
        self.checked: set[str] = set()

    def __getitem__(self, key: str) -> Tensor:
        if key not in self.digests:
            raise KeyError(key)
        with open_safetensors(self.path) as file:
            tensor: Tensor = file.get_tensor(key).clone()
        if key not in self.checked:
            seen = hashlib.sha256(_bytes(tensor)).hexdigest()
            if seen != self.digests[key]:
                raise _damaged(self.path, f"the SHA-256 of {key!r} is {seen[:12]}, wanted {self.digests[key][:12]}")
            self.checked.add(key)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.digests)

    def __len__(self) -> int:
        return len(self.digests)


def write_tensors(path: Path, form: str, metadata: Mapping[str, Any], tensors: Mapping[str, LazyTensor]) -> None:
    """A safetensors file of `form`, one tensor in memory at a time; the name is taken only when all is written.

    `metadata` are JSON values. Raises InputError where it cannot be written.
    """
    temporary = path.with_name(path.name + ".tmp")
    said = {"format": form} | {name: json.dumps(value) for name, value in metadata.items()}
    try:
        with open(temporary, "wb") as file:
            _write(file, said, tensors)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise InputError(
            f"statistics cannot be written to {str(path)!r}: {error.strerror or error}; give a folder that exists, "
            "with room to write"
        ) from error


def _write(file: BinaryIO, said: Mapping[str, str], tensors: Mapping[str, LazyTensor]) -> None:
    """The tensors are made once: the header, which comes first, is written again when their digests are known."""
    digests = {name: "0" * 64 for name in tensors}
    file.write(_header(said, tensors, digests))
    for name, tensor in tensors.items():
        content = _bytes(tensor.make())
        digests[name] = hashlib.sha256(content).hexdigest()
        file.write(content)
    file.seek(0)
    file.write(_header(said, tensors, digests))


def _header(said: Mapping[str, str], tensors: Mapping[str, LazyTensor], digests: Mapping[str, str]) -> bytes:
    """Length and header, as safetensors wants them; as long for any digests."""
    known = {**said, "tensors_sha256": json.dumps(digests)}
    header: dict[str, Any] = {"__metadata__": {**known, "metadata_sha256": _digest(known)}}
    at = 0
    for name, tensor in tensors.items():
        end = at + tensor.nbytes
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _raw(path: Path) -> dict[str, str]:
    with open_safetensors(path) as file:
        raw: dict[str, str] = dict(file.metadata() or {})
    wanted = raw.pop("metadata_sha256", None)
    if wanted is None:
        raise InputError(f"file {str(path)!r} holds no statistics; wanted one that a calibration wrote")
    if (seen := _digest(raw)) != wanted:
        raise _damaged(path, f"the SHA-256 of its metadata is {seen[:12]}, wanted {wanted[:12]}")
    return raw


def _digest(raw: Mapping[str, str]) -> str:
    return hashlib.sha256(json.dumps(raw, sort_keys=True).encode()).hexdigest()


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.contiguous().numpy().data.cast("B")


def _damaged(path: Path, why: str) -> InputError:
    return InputError(
        f"file {str(path)!r} is damaged, or was replaced while it was read: {why}; remove it and calibrate again"
    )
