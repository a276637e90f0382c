"""Weights of an artifact: safetensors shards written tensor by tensor, equal tensors once, read without copying."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from llmopt.compiler.errors import ArtifactError
from llmopt.compiler.program import STORED_DTYPES, Weight

SHARD_BYTES = 1 << 30  # files are hashed side by side, so several small ones are checked faster than a large one
_NAMES = {dtype: name for name, dtype in STORED_DTYPES.items()}
_ALIGNMENT = 64  # of the first byte of data in a shard: a cache line, and the widest vector

Read = Callable[[str], Tensor]


def _bytes(tensor: Tensor) -> Tensor:
    """uint8 [nbytes], the tensor's own memory where it is contiguous and on the CPU."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def distinct(weights: Mapping[str, Weight], read: Read, stored: dict[str, str]) -> Iterator[tuple[str, Tensor]]:
    """Each weight that no earlier one equals, read once, as some are computed when they are read.

    `stored` gets for each weight the name its data are stored under: its own, or that of an earlier one with the same
    bytes. Tied weights are found this way however they came apart (two names of a file, a fold and its copy). Only
    tensors that agree in type and in their ends are compared whole, and read again for it.
    """
    firsts: dict[Any, list[str]] = {}
    for name, weight in weights.items():
        tensor = read(name)
        data = _bytes(tensor)
        if len(data) != weight.nbytes:
            raise ArtifactError(
                f"weight {name!r} reads as {len(data)} bytes, wanted {weight.nbytes}; the model's weights were changed "
                "after it was compiled: compile it again"
            )
        ends = bytes(data[:1024].numpy()) + bytes(data[-1024:].numpy())
        same = firsts.setdefault((weight.dtype, weight.shape, ends), [])
        stored[name] = next((s for s in same if _is_same(_bytes(read(s)), data)), name)
        if stored[name] == name:
            same.append(name)
            yield name, tensor


def _is_same(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() or torch.equal(a, b)


def shards(tensors: Iterable[tuple[str, Tensor]], limit: int = SHARD_BYTES) -> Iterator[dict[str, Tensor]]:
    """The tensors in order, in groups of at most `limit` bytes (or of a single larger one); one group is held."""
    group: dict[str, Tensor] = {}
    room = limit
    for name, tensor in tensors:
        if group and tensor.nbytes > room:
            yield group
            group, room = {}, limit
        group[name] = tensor
        room -= tensor.nbytes
    if group:
        yield group


def header(types: Mapping[str, tuple[tuple[int, ...], torch.dtype]]) -> bytes:
    """What a safetensors file of tensors of these shapes and dtypes begins with; their bytes follow in this order."""
    told: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, (shape, dtype) in types.items():
        if dtype not in _NAMES:
            raise ArtifactError(
                f"weight {name!r} is {dtype}, which a file cannot hold; wanted {', '.join(_NAMES.values())}"
            )
        end = at + math.prod(shape) * dtype.itemsize
        told[name] = {"dtype": _NAMES[dtype], "shape": shape, "data_offsets": [at, end]}
        at = end
    text = json.dumps(told).encode()
    size = math.ceil((len(text) + 8) / _ALIGNMENT) * _ALIGNMENT - 8
    return size.to_bytes(8, "little") + text.ljust(size)


def encoded(tensors: Mapping[str, Tensor]) -> Iterator[Any]:
    """A safetensors file of these tensors, piece by piece (bytes-like)."""
    yield header({name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()})
    for tensor in tensors.values():
        yield bytes_of(tensor)


def bytes_of(tensor: Tensor) -> Any:
    """The tensor's data (bytes-like)."""
    return _bytes(tensor).numpy().data


def read_shards(folder: Path, where: Mapping[str, tuple[str, str, str]]) -> dict[str, Weight]:
    """Weights by name from `where` = {name: (file, key, note)}.

    Tensors are views of the mapped file: one that goes by several names is in memory once. Raises ArtifactError.
    """
    wanted: dict[str, set[str]] = {}
    for file, key, _ in where.values():
        wanted.setdefault(file, set()).add(key)
    opened = {file: _open(folder / file, keys) for file, keys in wanted.items()}
    found: dict[str, Weight] = {}
    for name, (file, key, note) in where.items():
        handle = opened[file]
        part = handle.get_slice(key)
        shape, dtype = tuple(part.get_shape()), STORED_DTYPES[part.get_dtype()]
        found[name] = Weight(shape, dtype, _Load(handle, key), note)
    return found


class _Load:
    """Reads one tensor of an open file."""

    def __init__(self, handle: Any, key: str) -> None:
        self.handle, self.key = handle, key

    def __call__(self) -> Tensor:
        return self.handle.get_tensor(self.key)  # type: ignore[no-any-return]


def _open(path: Path, wanted: set[str]) -> Any:
    try:
        handle = safe_open(path, framework="pt")
        missing = wanted - set(handle.keys())
    except (SafetensorError, OSError) as error:
        raise ArtifactError(f"{path}: no safetensors file ({error}); save the artifact again") from error
    if missing:
        raise ArtifactError(f"{path}: weight {min(missing)!r} is missing; save the artifact again")
    return handle
