"""Statistics of named values, in memory or in a file that is read as asked for.

    names.safetensors   "<key>.second" f32 [K, K] or "<key>.diagonal" f32 [K], "<key>.amax" f32 [K]; metadata: which
                        names share a key, token counts, the model's fingerprint, what was calibrated with

Names that watch the same value (q, k and v) share one key. The file is written tensor by tensor, so it may be larger
than memory, and becomes visible only when it is whole.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmopt.compiler.errors import InputError, did_you_mean
from llmopt.compiler.program import Program, open_safetensors

FORMAT = "llmopt statistics 1"
UNFINISHED = "llmopt unfinished statistics 1"
_NAMES = {torch.float64: "F64", torch.float32: "F32"}


@dataclass(frozen=True)
class Entry:
    """One watched value: where its tensors are (`key`), K, and how many rows (tokens) were counted."""

    key: str
    columns: int
    tokens: int


@dataclass(frozen=True)
class Statistics:
    """Sums over the calibration tokens of what each named value [..., K] was.

    `fingerprint` is that of the model, `digest` that of the run (tokens, settings, names); `notes` say what a reader of
    the report should know.
    """

    fingerprint: str
    digest: str
    entries: Mapping[str, Entry]
    tensors: Mapping[str, Tensor] = field(repr=False)
    second_moments: bool
    notes: tuple[str, ...] = ()

    def entry(self, name: str) -> Entry:
        """The entry of a name. Raises InputError with the nearest one."""
        if name not in self.entries:
            raise InputError(f"statistics have no value {name!r}; {did_you_mean(name, self.entries)}")
        return self.entries[name]

    def second_moment(self, name: str) -> Tensor:
        """X^T X, fp32 [K, K] symmetric, summed over the tokens. Raises InputError where only diagonals were kept."""
        if not self.second_moments:
            raise InputError(
                f"statistics of {name!r}: they hold diagonals only, a second moment [K, K] is wanted; "
                "calibrate with second_moments=True"
            )
        return self.tensors[f"{self.entry(name).key}.second"]

    def diagonal(self, name: str) -> Tensor:
        """The diagonal of X^T X, fp32 [K]: the sum of squares of each channel."""
        if self.second_moments:
            return self.second_moment(name).diagonal().clone()
        return self.tensors[f"{self.entry(name).key}.diagonal"]

    def amax(self, name: str) -> Tensor:
        """The largest magnitude of each channel, fp32 [K]."""
        return self.tensors[f"{self.entry(name).key}.amax"]

    def tokens(self, name: str) -> int:
        """How many rows of the value were seen."""
        return self.entry(name).tokens

    def rank_warning(self, name: str, wanted: int | None = None) -> str | None:
        """What to say where `name` saw fewer tokens than `wanted` (its K, below which X^T X is singular); else None."""
        entry = self.entry(name)
        least = entry.columns if wanted is None else wanted
        if entry.tokens >= least:
            return None
        singular = entry.tokens < entry.columns
        why = f"its second moment has rank {entry.tokens} of {entry.columns}" if singular else f"of {least} wanted"
        return f"{name}: calibrated with {entry.tokens} tokens, {why}; use at least {least} tokens"

    def check(self, program: Program) -> Statistics:
        """These statistics, if they are of this model. Raises InputError for another one."""
        if fingerprint_of(program) != self.fingerprint:
            shapes = {n: w.shape for n, w in program.used_weights().items()}
            strange = next((n for n in self.entries if n not in shapes), None)
            seen = (
                f"they know a weight {strange!r} that it has not" if strange else "its weights differ in name or shape"
            )
            raise InputError(
                f"statistics are of another model than {program.facts.name}: {seen}; calibrate this model, with the "
                "same passes before"
            )
        return self

    def save(self, path: str | Path) -> None:
        """Write them to a file that `load` reads."""
        self.write(Path(path), {key: _lazy(self.tensors, key) for key in self.tensors})

    def write(self, path: Path, tensors: Mapping[str, LazyTensor]) -> None:
        """The file of these statistics with tensors made one by one."""
        write_tensors(path, _metadata(self), tensors)

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> Statistics:
        """The same statistics, their tensors read from elsewhere."""
        return replace(self, tensors=tensors)

    @staticmethod
    def load(path: str | Path) -> Statistics:
        """Statistics of a file, whose tensors are read when asked for. Raises InputError if the file is none."""
        path = Path(path)
        if not is_statistics(path):
            raise InputError(f"file {str(path)!r} holds no finished statistics; wanted one that a calibration wrote")
        meta = read_metadata(path)["statistics"]
        entries = {name: Entry(**e) for name, e in meta.pop("entries").items()}
        notes = tuple(meta.pop("notes"))
        return Statistics(entries=entries, notes=notes, tensors=StoredTensors(path), **meta)


def fingerprint_of(program: Program) -> str:
    """SHA-256 of the names and shapes of the weights that a program reads."""
    shapes = sorted((name, list(weight.shape)) for name, weight in program.used_weights().items())
    return hashlib.sha256(json.dumps(shapes).encode()).hexdigest()


def is_statistics(path: Path) -> bool:
    """Whether the path is a file of finished statistics (another or a damaged file is none)."""
    with contextlib.suppress(InputError):
        return path.suffix == ".safetensors" and path.is_file() and read_metadata(path).get("format") == FORMAT
    return False


def read_metadata(path: Path) -> dict[str, Any]:
    """What a safetensors file says of itself; JSON values are parsed."""
    with open_safetensors(path) as file:
        raw = file.metadata() or {}
    if raw.get("format") not in (FORMAT, UNFINISHED):
        return dict(raw)
    return {k: v if k == "format" else json.loads(v) for k, v in raw.items()}


class StoredTensors(Mapping[str, Tensor]):
    """The tensors of a safetensors file, each read into memory of its own when asked for."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with open_safetensors(path) as file:
            self.names = tuple(file.keys())

    def __getitem__(self, key: str) -> Tensor:
        if key not in self.names:
            raise KeyError(key)
        with open_safetensors(self.path) as file:
            return file.get_tensor(key).clone()

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


@dataclass(frozen=True)
class LazyTensor:
    """A tensor to be written: its shape and dtype (fp32 or fp64), and how to make it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]


def _lazy(tensors: Mapping[str, Tensor], key: str) -> LazyTensor:
    tensor = tensors[key]
    return LazyTensor(tuple(tensor.shape), tensor.dtype, lambda: tensors[key])


def write_tensors(path: Path, metadata: Mapping[str, str], tensors: Mapping[str, LazyTensor]) -> None:
    """A safetensors file, one tensor in memory at a time; the name is taken only when all is written.

    Raises InputError where it cannot be written.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.writelines(_pieces(metadata, tensors))
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


def _pieces(metadata: Mapping[str, str], tensors: Mapping[str, LazyTensor]) -> Iterable[Any]:
    """Length of the header, header, tensors one behind the other: safetensors' format."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    at = 0
    for name, tensor in tensors.items():
        size = torch.Size(tensor.shape).numel() * tensor.dtype.itemsize
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little")
    yield text
    for tensor in tensors.values():
        yield tensor.make().contiguous().numpy().data.cast("B")


def _metadata(statistics: Statistics) -> dict[str, str]:
    meta = {
        "fingerprint": statistics.fingerprint,
        "digest": statistics.digest,
        "second_moments": statistics.second_moments,
        "notes": list(statistics.notes),
        "entries": {name: asdict(entry) for name, entry in statistics.entries.items()},
    }
    return {"format": FORMAT, "statistics": json.dumps(meta)}
