"""Statistics of named values, in memory or in a file that is read as asked for.

    names.safetensors   "<key>.second" f32 [K, K] or "<key>.diagonal" f32 [K], "<key>.amax" f32 [K]; metadata: which
                        names share a key, token counts, what they were made of, checksums

Names that watch the same value (q, k and v) share one key. The file is written tensor by tensor, so it may be larger
than memory, and becomes visible only when it is whole.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from llmopt.compiler.calibration_file import LazyTensor, StoredTensors, format_of, read_metadata, write_tensors
from llmopt.compiler.calibration_fingerprint import Fingerprint, fingerprint_of
from llmopt.compiler.errors import InputError, did_you_mean
from llmopt.compiler.program import Program

FORMAT = "llmopt statistics 2"
UNFINISHED = "llmopt unfinished statistics 2"
_ANY_FORMAT = "llmopt statistics "


@dataclass(frozen=True)
class Entry:
    """One watched value: where its tensors are (`key`), K, and how many rows (tokens) were counted."""

    key: str
    columns: int
    tokens: int


@dataclass(frozen=True)
class Origin:
    """What sums were made of: the model's weights, and by name (tokens, values, each setting) the rest that they
    depend on, as JSON values. How values were grouped to fit a bound of memory is no part of it.
    """

    fingerprint: Fingerprint
    facts: Mapping[str, Any]

    @property
    def digest(self) -> str:
        """SHA-256 of all of it."""
        text = json.dumps([self.fingerprint.digest, sorted(self.facts.items())])
        return hashlib.sha256(text.encode()).hexdigest()

    def difference(self, wanted: Origin) -> str | None:
        """What of `facts` is not as wanted: "other tokens", "device 'cuda', wanted 'cpu'"; None where all is."""
        other = [name for name, fact in wanted.facts.items() if self.facts.get(name) != fact]
        hashed = [name for name in other if name in ("tokens", "values")]
        plain = [f"{n} {self.facts.get(n)!r}, wanted {wanted.facts[n]!r}" for n in other if n not in hashed]
        return "; ".join([*(f"other {name}" for name in hashed), *plain]) or None

    def to_json(self) -> dict[str, Any]:
        """JSON values that `from_json` reads."""
        return asdict(self)

    @staticmethod
    def from_json(made: Mapping[str, Any]) -> Origin:
        """The origin that `to_json` wrote."""
        seen = made["fingerprint"]
        shapes = {name: tuple(shape) for name, shape in seen["shapes"].items()}
        return Origin(Fingerprint(shapes, {n: (d, h) for n, (d, h) in seen["values"].items()}), made["facts"])


@dataclass(frozen=True)
class Statistics:
    """Sums over the calibration tokens of what each named value [..., K] was.

    `origin` is what they were made of; `notes` say what a reader of the report should know. Where `tensors` are a
    file's, whatever reads one raises InputError if the file is damaged.
    """

    origin: Origin
    entries: Mapping[str, Entry]
    tensors: Mapping[str, Tensor] = field(repr=False)
    second_moments: bool
    notes: tuple[str, ...] = ()

    @property
    def digest(self) -> str:
        """SHA-256 of what they were made of."""
        return self.origin.digest

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
        """How many rows of the value were seen: what the sums have to be divided by for means, and the most that the
        rank of X^T X can be. A weight used on several values counts all of them.
        """
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

    def check(self, program: Program, known: Fingerprint | None = None) -> Statistics:
        """These statistics, if they are of this model's weights. Raises InputError for other ones.

        `known` is the program's fingerprint where it was taken already.
        """
        if difference := (known or fingerprint_of(program)).difference(self.origin.fingerprint):
            file = self.tensors.path if isinstance(self.tensors, StoredTensors) else None
            raise other_model("statistics", file, program, difference)
        return self

    def save(self, path: str | Path) -> None:
        """Write them to a file that `load` reads."""
        self.write(Path(path), {key: _lazy(self.tensors, key) for key in self.tensors})

    def write(self, path: Path, tensors: Mapping[str, LazyTensor]) -> None:
        """The file of these statistics with tensors made one by one."""
        metadata = {
            "origin": self.origin.to_json(),
            "second_moments": self.second_moments,
            "notes": list(self.notes),
            "entries": {name: asdict(entry) for name, entry in self.entries.items()},
        }
        write_tensors(path, FORMAT, metadata, tensors)

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> Statistics:
        """The same statistics, their tensors read from elsewhere."""
        return replace(self, tensors=tensors)

    @staticmethod
    def load(path: str | Path) -> Statistics:
        """Statistics of a file, whose tensors are read when asked for.

        Raises InputError if the file is none, damaged, or of another version.
        """
        path = Path(path)
        if not is_statistics(path):
            raise InputError(f"file {str(path)!r} holds no finished statistics; wanted one that a calibration wrote")
        if (form := format_of(path)) != FORMAT:
            raise InputError(
                f"file {str(path)!r} holds {form!r}, wanted {FORMAT!r}: another version of llmopt wrote it; remove it, "
                "or give another name, and calibrate again"
            )
        meta = read_metadata(path)
        return Statistics(
            Origin.from_json(meta["origin"]),
            {name: Entry(**e) for name, e in meta["entries"].items()},
            StoredTensors(path),
            meta["second_moments"],
            tuple(meta["notes"]),
        )


def other_model(what: str, file: Path | None, program: Program, difference: str) -> InputError:
    """What to raise where `what`, in a file or in memory, was made with weights that are not the program's."""
    where = "" if file is None else f", in {str(file)!r}"
    return InputError(
        f"{what} are of another model than {program.facts.name}{where}: {difference}; calibrate this model, with the "
        "same passes before and into another file, or use the weights that they were made with"
    )


def is_statistics(path: Path) -> bool:
    """Whether the path is a file of finished statistics, of any version (one cut off at its end is none)."""
    with contextlib.suppress(InputError):
        return path.suffix == ".safetensors" and path.is_file() and format_of(path).startswith(_ANY_FORMAT)
    return False


def _lazy(tensors: Mapping[str, Tensor], key: str) -> LazyTensor:
    tensor = tensors[key]
    return LazyTensor(tuple(tensor.shape), tensor.dtype, lambda: tensors[key])
