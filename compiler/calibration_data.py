"""Tokens to calibrate with, or to measure on: from a token file, text, a folder of texts, or ids; cut into windows.

Every source becomes a list of sequences (a file, a row, a list each), a sequence becomes windows that are read on their
own from position 0, so no text sees another.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmopt.compiler.errors import InputError
from llmopt.compiler.program import open_safetensors

Encode = Callable[[str], Sequence[int]]
TokenSource = str | Path | Tensor | Sequence[Any]
KEY = "tokens"


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
        raise InputError(
            f"{what}: it has no tokens, wanted at least one; give some text or ids of the model's tokenizer"
        )
    for at, ids in enumerate(sequences):
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= vocab_size:
            raise InputError(
                f"{what}: token id {low if low < 0 else high} (sequence {at}) is not in [0, {vocab_size}); "
                "use ids of this model's tokenizer"
            )
    return sequences


def windows_of(sequences: Sequence[Tensor], length: int, limit: int | None) -> list[Tensor]:
    """Windows of at most `length` tokens, of each sequence from its beginning; no more than `limit` tokens in all.

    Where there are too many, windows are taken at even distances, so that a sorted source is met in all its parts; the
    last one is cut where the limit falls. The same arguments give the same windows.
    """
    windows = [w for ids in sequences for w in ids.split(length)]
    total = sum(w.numel() for w in windows)
    if limit is None or total <= limit:
        return windows
    wanted = max(1, -(-len(windows) * limit // total))
    picked, left = [], limit
    for at in range(wanted):
        window = windows[at * len(windows) // wanted][:left]
        picked.append(window)
        left -= window.numel()
        if left == 0:
            break
    return picked


def digest_of(windows: Sequence[Tensor]) -> str:
    """SHA-256 of the windows' lengths and ids."""
    digest = hashlib.sha256()
    for window in windows:
        digest.update(window.numel().to_bytes(8, "little"))
        digest.update(window.contiguous().numpy().tobytes())
    return digest.hexdigest()


def _sequences(source: TokenSource, what: str, encode: Encode | None) -> list[Tensor]:
    if isinstance(source, (str, Path)):
        path = Path(source)
        if path.is_dir():
            return _folder(path, what, encode)
        if not path.is_file():
            raise InputError(
                f"{what}: there is no such file or folder; give a safetensors file with {KEY!r}, a text file, a "
                "folder of text files, or saved statistics"
            )
        return _token_file(path, what) if path.suffix == ".safetensors" else [_text(path, what, encode)]
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
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool or ids.dim() not in (1, 2):
        raise InputError(
            f"{what}: tokens are {str(ids.dtype).removeprefix('torch.')} {list(ids.shape)}; wanted integers "
            "[T] or [B, T]"
        )
    return list(ids.detach().cpu().to(torch.int64).reshape(-1, ids.shape[-1]))


def _token_file(path: Path, what: str) -> list[Tensor]:
    with open_safetensors(path) as file:
        keys = list(file.keys())
        if KEY not in keys:
            raise InputError(
                f"{what}: the file has no {KEY!r} (it has {', '.join(keys[:3]) or 'nothing'}"
                f"{', ...' if len(keys) > 3 else ''}); wanted integers [T] or [B, T] under that key"
            )
        return _rows(file.get_tensor(KEY), what)


def _folder(path: Path, what: str, encode: Encode | None) -> list[Tensor]:
    found = {p.relative_to(path).as_posix(): p for p in path.rglob("*") if p.is_file()}
    names = sorted(n for n in found if not any(part.startswith(".") for part in n.split("/")))
    if not names:
        raise InputError(f"{what}: the folder has no files, wanted text files; give another folder")
    return [_text(found[name], f"{what}, file {name!r}", encode) for name in names]


def _text(path: Path, what: str, encode: Encode | None) -> Tensor:
    try:
        return _encoded(path.read_bytes().decode("utf-8"), what, encode)
    except OSError as error:
        raise InputError(f"{what}: it cannot be read: {error}") from error
    except UnicodeDecodeError as error:
        raise InputError(
            f"{what}: byte {error.start} is not UTF-8 text; wanted text, or a safetensors file with {KEY!r}; "
            "convert it, or take it out of the folder"
        ) from error


def _encoded(text: str, what: str, encode: Encode | None) -> Tensor:
    if encode is None:
        raise InputError(
            f"{what}: it is text and this model comes without a tokenizer; give token ids (a safetensors file with "
            f"{KEY!r}), or put tokenizer.json beside the weights"
        )
    return torch.as_tensor(list(encode(text)), dtype=torch.int64)
