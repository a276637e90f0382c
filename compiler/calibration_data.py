"""Tokens to calibrate with, or to measure on: from a token file, text, a folder of texts, or ids; cut into windows.

Every source becomes a list of sequences (a file, a row, a list each), a sequence becomes windows that are read on their
own from position 0, so no text sees another.
"""

from __future__ import annotations

import bisect
import codecs
import hashlib
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmopt.compiler.errors import InputError
from llmopt.compiler.program import open_safetensors

Encode = Callable[[str], Sequence[int]]
TokenSource = str | Path | Tensor | Sequence[Any]
KEY = "tokens"
_DENSEST = 16  # bytes of text a token: of so much for each token wanted, not all is read
_PIECE = 8  # bytes of text a token: a piece of so much holds a window, of most texts


def read_tokens(
    source: TokenSource, vocab_size: int, encode: Encode | None = None, purpose: str = "calibration"
) -> list[Tensor]:
    """The sequences (int64 [T] each, none empty) that `source` holds, the whole of it.

    A path: a safetensors file with integers `tokens` [T] or [B, T]; a UTF-8 text file; a folder of such text files,
    read in the order of their paths, hidden ones left out. Otherwise token ids ([T], [B, T], or a list of sequences) or
    a list of texts. `encode` makes ids of a text. Raises InputError for what is empty, unreadable, or no id of this
    vocabulary; it begins with the `purpose`.
    """
    what = f"{purpose} {str(source)!r}" if isinstance(source, (str, Path)) else purpose
    sequences = [s for s in _sequences(source, what, encode) if s.numel()]
    if not sequences:
        raise _empty(what)
    for at, ids in enumerate(sequences):
        _check_ids(ids, what, vocab_size, at)
    return sequences


def windows_of(sequences: Sequence[Tensor], length: int, limit: int | None) -> list[Tensor]:
    """Windows of at most `length` tokens, of each sequence from its beginning; no more than `limit` tokens in all.

    Where there are too many, windows are taken at even distances, so that a sorted source is met in all its parts; the
    last one is cut where the limit falls. The same arguments give the same windows.
    """
    return [sequences[at][start:end] for at, start, end in _spans([s.numel() for s in sequences], length, limit)]


@dataclass(frozen=True)
class Chosen:
    """Windows (int64 [T] each, none empty) and what they were chosen from, in words."""

    windows: list[Tensor]
    source: str


def choose_windows(
    source: TokenSource, vocab_size: int, encode: Encode | None, length: int, limit: int | None
) -> Chosen:
    """Windows of at most `length` tokens of what `read_tokens` takes; no more than `limit` tokens in all.

    They are those of `windows_of`, but that no more is read than is taken, however large the source. Of a token file
    the windows alone are read. Texts of more than 16 bytes (in memory: characters) for each token wanted are cut into
    pieces of some 8 bytes for each token of a window, and the first window of as many pieces as it takes is used. They
    lie evenly over all texts, each begins at a line where one is near, and is encoded as a text of its own. With
    `limit` None, or less text, all is read. Raises InputError as `read_tokens`, for what is read.
    """
    what = f"calibration {str(source)!r}" if isinstance(source, (str, Path)) else "calibration"
    if isinstance(source, (str, Path)) and Path(source).suffix == ".safetensors" and Path(source).is_file():
        return _of_token_file(Path(source), what, vocab_size, length, limit)
    texts = _texts(source, what) if limit is not None else []
    if limit is not None and sum(text.size for text in texts) > _DENSEST * limit:
        return _of_texts(texts, what, vocab_size, encode, length, limit)
    sequences = read_tokens(source, vocab_size, encode)
    return Chosen(windows_of(sequences, length, limit), f"{sum(s.numel() for s in sequences)} tokens")


def digest_of(windows: Sequence[Tensor]) -> str:
    """SHA-256 of the windows' lengths and ids."""
    digest = hashlib.sha256()
    for window in windows:
        digest.update(window.numel().to_bytes(8, "little"))
        digest.update(window.contiguous().numpy().tobytes())
    return digest.hexdigest()


def _spans(sizes: Sequence[int], length: int, limit: int | None) -> list[tuple[int, int, int]]:
    """The windows of `windows_of` as (sequence, start, end), from the sizes of the sequences alone."""
    ends = list(itertools.accumulate(-(-size // length) for size in sizes))  # windows up to and with each sequence
    total, count = sum(sizes), ends[-1] if ends else 0
    wanted = count if limit is None or total <= limit else max(1, -(-count * limit // total))
    left = total if limit is None else limit
    picked = []
    for at in range(wanted):
        window = at * count // wanted
        sequence = bisect.bisect_right(ends, window)
        start = (window - (ends[sequence - 1] if sequence else 0)) * length
        end = min(start + length, sizes[sequence], start + left)
        picked.append((sequence, start, end))
        left -= end - start
        if left == 0:
            break
    return picked


def _check_ids(ids: Tensor, what: str, vocab_size: int, sequence: int | None = None) -> None:
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocab_size:
        of = "" if sequence is None else f" (sequence {sequence})"
        raise InputError(
            f"{what}: token id {low if low < 0 else high}{of} is not in [0, {vocab_size}); use ids of this model's "
            "tokenizer"
        )


def _empty(what: str) -> InputError:
    return InputError(f"{what}: it has no tokens, wanted at least one; give some text or ids of the model's tokenizer")


def _sequences(source: TokenSource, what: str, encode: Encode | None) -> list[Tensor]:
    if isinstance(source, (str, Path)):
        path = _found(source, what)
        if path.suffix == ".safetensors" and path.is_file():
            return _token_file(path, what)
        return [_encoded(text.whole(), text.what, encode) for text in _files(path, what)]
    if isinstance(source, Tensor):
        return _rows(source, what)
    if isinstance(source, Sequence) and all(isinstance(s, str) for s in source):
        return [_encoded(text, f"{what}, text {at}", encode) for at, text in enumerate(source)]
    return _lists(source, what)


def _lists(source: Any, what: str) -> list[Tensor]:
    """A list of ids, or of lists or tensors of ids."""
    try:
        items = list(source)
        nested = [not isinstance(item, int) and torch.as_tensor(item).dim() > 0 for item in items]
        if any(nested) != all(nested):
            raise TypeError("ids and lists of ids side by side")
        return [row for item in (items if any(nested) else [items]) for row in _rows(torch.as_tensor(item), what)]
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(
            f"{what}: a {type(source).__name__} that is not token ids ({str(error).splitlines()[0]}); wanted integers "
            "[T] or [B, T], a list of such, a list of texts, or a path"
        ) from error


def _rows(ids: Tensor, what: str) -> list[Tensor]:
    if ids.numel() == 0 and ids.dim() in (1, 2):
        return []  # torch makes an empty list a float tensor
    _check_kind(ids.dtype, ids.shape, what)
    return list(ids.detach().cpu().to(torch.int64).reshape(-1, ids.shape[-1]))


def _check_kind(dtype: torch.dtype, shape: Sequence[int], what: str) -> None:
    if dtype.is_floating_point or dtype.is_complex or dtype == torch.bool or len(shape) not in (1, 2):
        raise InputError(
            f"{what}: tokens are {str(dtype).removeprefix('torch.')} {list(shape)}; wanted integers [T] or [B, T]"
        )


def _check_key(keys: Sequence[str], what: str) -> None:
    if KEY not in keys:
        raise InputError(
            f"{what}: the file has no {KEY!r} (it has {', '.join(keys[:3]) or 'nothing'}"
            f"{', ...' if len(keys) > 3 else ''}); wanted integers [T] or [B, T] under that key"
        )


def _token_file(path: Path, what: str) -> list[Tensor]:
    with open_safetensors(path) as file:
        _check_key(list(file.keys()), what)
        return _rows(file.get_tensor(KEY), what)


def _of_token_file(path: Path, what: str, vocab_size: int, length: int, limit: int | None) -> Chosen:
    with open_safetensors(path) as file:
        _check_key(list(file.keys()), what)
        ids = file.get_tensor(KEY)  # mapped: what is not looked at is not read
        if ids.numel() == 0 and ids.dim() in (1, 2):
            raise _empty(what)
        _check_kind(ids.dtype, ids.shape, what)
        rows = ids.reshape(-1, ids.shape[-1])
        windows = []
        for row, start, end in _spans([rows.shape[1]] * rows.shape[0], length, limit):
            window = rows[row, start:end].to(torch.int64, copy=True)
            _check_ids(window, what, vocab_size, row)
            windows.append(window)
    return Chosen(windows, f"{ids.numel()} tokens")


@dataclass(frozen=True)
class _Text:
    """A text that can be read in part: the text itself, of `size` characters, or a file of so many bytes."""

    what: str
    size: int
    source: str | Path

    def whole(self) -> str:
        """All of it. Raises InputError."""
        return self.source if isinstance(self.source, str) else self._decoded(0, None)

    def piece(self, at: int, count: int) -> str:
        """One of `count` pieces of nearly one size, without the line that it begins within. Raises InputError."""
        start, end = self.size * at // count, self.size * (at + 1) // count
        text = self.source[start:end] if isinstance(self.source, str) else self._decoded(start, end)
        line = text.find("\n", 0, len(text) // 4) + 1 if start else 0  # 0 where there is none near
        return text[line:]

    def _decoded(self, start: int, end: int | None) -> str:
        """The characters that lie in these bytes whole."""
        assert isinstance(self.source, Path)
        try:
            with open(self.source, "rb") as file:
                file.seek(start)
                content = file.read(-1 if end is None else end - start)
            within = 0
            while start and within < min(3, len(content)) and content[within] & 0xC0 == 0x80:
                within += 1  # the rest of a character of which the beginning belongs to the piece before
            start += within
            decoder = codecs.getincrementaldecoder("utf-8")()
            return decoder.decode(content[within:], final=end is None or end == self.size)
        except OSError as error:
            raise InputError(f"{self.what}: it cannot be read: {error}") from error
        except UnicodeDecodeError as error:
            raise InputError(
                f"{self.what}: byte {start + error.start} is not UTF-8 text; wanted text, or a safetensors file with "
                f"{KEY!r}; convert it, or take it out of the folder"
            ) from error


def _texts(source: TokenSource, what: str) -> list[_Text]:
    """The texts of a source in order; none where it holds ids."""
    if isinstance(source, (str, Path)):
        return _files(_found(source, what), what)
    if isinstance(source, Sequence) and all(isinstance(text, str) for text in source):
        return [_Text(f"{what}, text {at}", len(text), text) for at, text in enumerate(source)]
    return []


def _found(source: str | Path, what: str) -> Path:
    path = Path(source)
    if source == "" or not (path.is_dir() or path.is_file()):  # the path "" would be the current folder
        seen = "the path is empty" if source == "" else "there is no such file or folder"
        raise InputError(
            f"{what}: {seen}; give a safetensors file with {KEY!r}, a text file, a folder of text files, or saved "
            "statistics"
        )
    return path


def _files(path: Path, what: str) -> list[_Text]:
    """A text file, or those of a folder in the order of their paths, hidden ones left out."""
    if not path.is_dir():
        return [_Text(what, path.stat().st_size, path)]
    found = {p.relative_to(path).as_posix(): p for p in path.rglob("*") if p.is_file()}
    names = sorted(n for n in found if not any(part.startswith(".") for part in n.split("/")))
    if not names:
        raise InputError(f"{what}: the folder has no files, wanted text files; give another folder")
    return [_Text(f"{what}, file {name!r}", found[name].stat().st_size, found[name]) for name in names]


def _of_texts(
    texts: Sequence[_Text], what: str, vocab_size: int, encode: Encode | None, length: int, limit: int
) -> Chosen:
    """The first window of each of some pieces, as many as make up `limit` tokens, in the texts' order."""
    counts = [-(-text.size // (_PIECE * length)) for text in texts]
    ends = list(itertools.accumulate(counts))  # pieces up to and with each text
    taken: dict[int, Tensor] = {}
    left = limit
    for piece in _scattered(ends[-1]):
        at = bisect.bisect_right(ends, piece)
        text = texts[at].piece(piece - ends[at] + counts[at], counts[at])
        window = _encoded(text, texts[at].what, encode)[: min(length, left)].clone()  # not a view of all the piece
        if window.numel():
            _check_ids(window, texts[at].what, vocab_size)
            taken[piece] = window
            left -= window.numel()
        if left == 0:
            break
    if not taken:
        raise _empty(what)
    size = sum(text.size for text in texts) / 1e6
    unit = "MB" if isinstance(texts[0].source, Path) else "million characters"
    return Chosen([taken[piece] for piece in sorted(taken)], f"the tokens of {size:.1f} {unit} of text")


def _scattered(count: int) -> Iterator[int]:
    """range(count) in an order of which every beginning lies evenly over it: steps of the golden section, around."""
    step = max(1, round(count * (math.sqrt(5) - 1) / 2))
    while math.gcd(step, count) != 1:
        step += 1
    return (at * step % count for at in range(count))


def _encoded(text: str, what: str, encode: Encode | None) -> Tensor:
    if encode is None:
        raise InputError(
            f"{what}: it is text and this model comes without a tokenizer; give token ids (a safetensors file with "
            f"{KEY!r}), or put tokenizer.json beside the weights"
        )
    return torch.as_tensor(list(encode(text)), dtype=torch.int64)
