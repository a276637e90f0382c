"""Every environment variable llmopt reads, typed, in one table (`python -m llmopt.compiler.knobs` prints it).

A variable is read when it is asked for, never at import, so a test or a caller may change it at any time. The
knobs are for looking inside and for narrowing down a fault; what a program computes is the recipe's matter.
"""

from __future__ import annotations

import errno
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from llmopt.compiler.errors import BuildError, KnobError, did_you_mean

PREFIX = "LLMOPT_"

T = TypeVar("T")

# what a write says, which names no file
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO)


@dataclass(frozen=True)
class Knob(Generic[T]):
    """One variable; call it for its value. `read` turns text into a value or raises ValueError."""

    name: str
    wanted: str
    read: Callable[[str], T]
    default: Callable[[], T]
    default_text: str
    meaning: str

    def __call__(self) -> T:
        """The value now; an empty variable counts as unset. Raises KnobError."""
        _warn_of_unknown()
        text = os.environ.get(self.name, "").strip()
        return self.parse(text) if text else self.default()

    def parse(self, text: str) -> T:
        """The value that `text` stands for. Raises KnobError."""
        try:
            return self.read(text)
        except ValueError:
            raise KnobError(f"{self.name} is {text!r}, wanted {self.wanted}; unset means {self.default_text}") from None


def _level(highest: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        level = int(text)
        if not 0 <= level <= highest:
            raise ValueError(text)
        return level

    return read


def _count(text: str) -> int:
    if not text.isdecimal():
        raise ValueError(text)
    return int(text)


def _choice(*values: str) -> Callable[[str], str]:
    def read(text: str) -> str:
        if text not in values:
            raise ValueError(text)
        return text

    return read


def _switch(text: str) -> bool:
    return bool(_level(1)(text))


def _names(text: str) -> tuple[str, ...]:
    names = tuple(part.strip() for part in text.split(","))
    if not all(names):
        raise ValueError(text)
    return names


def _folder(text: str) -> Path:
    path = Path(text).expanduser().absolute()
    # os.path, as Path.exists raises for what lies in a folder that may not be read
    nearest = next((place for place in (path, *path.parents) if os.path.exists(place)), path)
    if not os.path.isdir(nearest):
        raise ValueError(text)
    return path


def _cache_home() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "llmopt"


debug: Knob[int] = Knob(
    "LLMOPT_DEBUG", "a whole number 0..4", _level(4), lambda: 0, "0",
    "Print while compiling: 1 the statistics of each pass, 2 also the graphs, 3 also every rewrite, "
    "4 also the near miss of each rule that rewrote nothing.",
)  # fmt: skip
dump: Knob[Path | None] = Knob(
    "LLMOPT_DUMP", "a folder (made if absent)", _folder, lambda: None, "no dump",
    "Write the graph after each pass (`NN_pass.py`) and the differences between them into this folder.",
)  # fmt: skip
verify: Knob[bool] = Knob(
    "LLMOPT_VERIFY", "0 or 1", _switch, lambda: True, "1",
    "Check the structure of every graph after each pass.",
)  # fmt: skip
numerics: Knob[bool] = Knob(
    "LLMOPT_NUMERICS", "0 or 1", _switch, lambda: False, "0",
    "Run the graph before and after each pass on sample inputs and compare.",
)  # fmt: skip
bisect: Knob[int | None] = Knob(
    "LLMOPT_BISECT", "a whole number >= 0", _count, lambda: None, "no limit",
    "Stop rewriting after this many rewrites, counted over all passes.",
)  # fmt: skip
provider: Knob[tuple[str, ...] | None] = Knob(
    "LLMOPT_PROVIDER", "provider names separated by commas", _names, lambda: None, "the recipe's list",
    "Allow these implementations only, in this order, in place of the recipe's (`reference`: the plain one).",
)  # fmt: skip
cache: Knob[Path] = Knob(
    "LLMOPT_CACHE", "a folder (made if absent)", _folder, _cache_home, "~/.cache/llmopt",
    "Keep compiled kernels here (XDG_CACHE_HOME is honoured for the default).",
)  # fmt: skip
tune: Knob[str] = Knob(
    "LLMOPT_TUNE", "off or cached", _choice("off", "cached"), lambda: "cached", "cached",
    "Compile GPU kernels with the constants measured for their shape where there are such; off: with the defaults.",
)  # fmt: skip

KNOBS: dict[str, Knob[Any]] = {
    knob.name.removeprefix(PREFIX).lower(): knob
    for knob in (debug, dump, verify, numerics, bisect, provider, cache, tune)
}


@contextmanager
def scope(**values: object) -> Iterator[None]:
    """Set knobs for the length of a `with`, child processes included: `scope(debug=2, verify=False)`.

    None unsets one; True and False become 1 and 0, tuples of names are joined. Raises KnobError, and then
    sets none.
    """
    texts = {_knob(key).name: _text(value) for key, value in values.items()}
    for key, value in values.items():
        if value is not None:
            _knob(key).parse(_text(value) or "")
    before = {name: os.environ.get(name) for name in texts}
    _set(texts)
    try:
        yield
    finally:
        _set(before)


@contextmanager
def writing_cache() -> Iterator[None]:
    """Within it the cache is written: what the system refuses there, or for want of space, is a BuildError."""
    try:
        yield
    except OSError as error:
        folder = cache()
        place = Path(error.filename) if isinstance(error.filename, str) else folder
        near = place.is_relative_to(folder) or folder.is_relative_to(place)
        if not near or (error.filename is None and error.errno not in _FULL):
            raise  # another cache would not help
        raise BuildError(
            f"cache {place} cannot be written ({error.strerror or error}); set {cache.name} to a writable folder with "
            "free space"
        ) from error


def table() -> str:
    """The knobs as a Markdown table."""
    rows = [
        "| variable | value | default | meaning |",
        "|---|---|---|---|",
        *(f"| `{k.name}` | {k.wanted} | {k.default_text} | {k.meaning} |" for k in KNOBS.values()),
    ]
    return "\n".join(rows) + "\n"


def _knob(key: str) -> Knob[Any]:
    if key not in KNOBS:
        raise KnobError(f"knob {key!r} is unknown; {did_you_mean(key, KNOBS)}")
    return KNOBS[key]


def _text(value: object) -> str | None:
    if isinstance(value, bool):
        return str(int(value))
    if isinstance(value, (tuple, list)):
        return ",".join(map(str, value))
    return None if value is None else str(value)


def _set(texts: dict[str, str | None]) -> None:
    for name, text in texts.items():
        if text is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = text


def _warn_of_unknown() -> None:
    known = {knob.name for knob in KNOBS.values()}
    for name in sorted(os.environ):
        if name.startswith(PREFIX) and name not in known:
            warnings.warn(f"environment variable {name} does nothing; {did_you_mean(name, known)}", stacklevel=3)


if __name__ == "__main__":
    print(table(), end="")
