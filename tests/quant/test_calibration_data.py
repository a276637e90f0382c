"""Where calibration tokens come from, and what is said of those that are unusable."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from llmopt.compiler.calibration import Settings
from llmopt.compiler.calibration_data import digest_of, read_tokens, windows_of
from llmopt.compiler.errors import InputError


def letters(text: str) -> list[int]:
    return [ord(c) for c in text]


def lists(source: Any, **options: Any) -> list[list[int]]:
    return [s.tolist() for s in read_tokens(source, 256, **options)]


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.uint8])
def test_ids_in_every_form(tmp_path: Path, dtype: torch.dtype):
    flat, two = torch.arange(6, dtype=dtype), torch.arange(6, dtype=dtype).reshape(2, 3)
    assert lists(flat) == lists(flat.tolist()) == [[0, 1, 2, 3, 4, 5]]
    assert lists(two) == lists(two.tolist()) == lists(list(two)) == [[0, 1, 2], [3, 4, 5]]
    assert lists([[1], [2, 3], []]) == [[1], [2, 3]]
    for name, ids in (("a", flat), ("b", two)):
        save_file({"tokens": ids}, tmp_path / f"{name}.safetensors")
        assert lists(tmp_path / f"{name}.safetensors") == lists(str(tmp_path / f"{name}.safetensors")) == lists(ids)
    assert read_tokens(flat, 256)[0].dtype is torch.int64


def test_text_and_folders_of_text(tmp_path: Path):
    (tmp_path / "b").mkdir()
    (tmp_path / ".git").mkdir()
    for name, text in (
        ("b/1.py", "x"),
        ("a.txt", "héy"),
        ("c", ""),
        (".hidden", "no"),
        (".git/x", "no"),
        ("b.md", "z"),
    ):
        (tmp_path / name).write_text(text, encoding="utf-8")
    assert lists(tmp_path / "a.txt", encode=letters) == lists(["héy"], encode=letters) == [letters("héy")]
    assert lists(tmp_path, encode=letters) == [letters("héy"), letters("z"), letters("x")]  # a.txt, b.md, b/1.py


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ([], "no tokens"),
        ([[], []], "no tokens"),
        (torch.empty(0, dtype=torch.int64), "no tokens"),
        ([1, 2, 256], r"256 \(sequence 0\) is not in \[0, 256\)"),
        ([[1], [-1]], r"-1 \(sequence 1\) is not in \[0, 256\)"),
        ([1.5], "float32"),
        (torch.ones(2, 2, 2, dtype=torch.int64), r"int64 \[2, 2, 2\]"),
        (torch.tensor([True]), r"bool \[1\]"),
        ([1, [2]], "not token ids"),
        ([None], "not token ids"),
        (7, "not token ids"),
        ("nowhere/at all", "no such file or folder"),
        (["text"], "without a tokenizer"),
    ],
)
def test_unusable_sources(source: Any, said: str):
    with pytest.raises(InputError, match=said):
        read_tokens(source, 256)


def test_unusable_files(tmp_path: Path):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "binary.txt").write_bytes(b"ab\xff")
    (tmp_path / "broken.safetensors").write_bytes(b"1234567890")
    (tmp_path / "nothing").mkdir()
    save_file({"ids": torch.arange(3)}, tmp_path / "other.safetensors")
    save_file({"tokens": torch.rand(3)}, tmp_path / "floats.safetensors")
    for name, said in {
        "empty.txt": "no tokens",
        "binary.txt": "byte 2 is not UTF-8",
        "broken.safetensors": "cannot be read",
        "nothing": "no files",
        "other.safetensors": r"no 'tokens' \(it has ids\)",
        "floats.safetensors": "float32",
    }.items():
        with pytest.raises(InputError, match=said):
            read_tokens(tmp_path / name, 256, letters)
    with pytest.raises(InputError, match=r"binary\.txt"):  # of all files of a folder, the one that is wrong
        read_tokens(tmp_path, 256, letters)


def thinned(sequences: list[torch.Tensor], length: int, limit: int | None) -> list[torch.Tensor]:
    """What windows are, of all there are."""
    windows = [w for ids in sequences for w in ids.split(length)]
    total = sum(w.numel() for w in windows)
    if limit is None or total <= limit:
        return windows
    wanted = -(-len(windows) * limit // total)
    found: list[torch.Tensor] = []
    for window in [windows[at * len(windows) // wanted] for at in range(wanted)]:
        found.append(window[: limit - sum(w.numel() for w in found)])
    return [w for w in found if w.numel()]


@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=12),
    st.integers(1, 15),
    st.one_of(st.none(), st.integers(1, 200)),
)
def test_windows(sizes: list[int], length: int, limit: int | None):
    starts = [1000 * at for at in range(len(sizes))]
    sequences = [torch.arange(start, start + size) for start, size in zip(starts, sizes, strict=True)]
    windows = windows_of(sequences, length, limit)
    assert [w.tolist() for w in windows] == [w.tolist() for w in thinned(sequences, length, limit)]
    total, used = sum(sizes), [i for w in windows for i in w.tolist()]
    assert used == sorted(set(used))  # each token once, in order
    assert all(1 <= len(w) <= length for w in windows)
    assert all(int(w[-1] - w[0]) == len(w) - 1 for w in windows)  # of one sequence, without gaps
    if limit is None or limit >= total:
        assert len(used) == total
    else:
        assert 1 <= len(used) <= limit


def test_too_many_tokens_are_thinned_evenly():
    windows = windows_of([torch.arange(1000)], 10, 50)
    assert [int(w[0]) for w in windows] == [0, 200, 400, 600, 800]
    assert [len(w) for w in windows_of([torch.arange(1000)], 10, 45)] == [10, 10, 10, 10, 5]


def test_digests_tell_windows_apart():
    a, b = torch.tensor([1, 2, 3]), torch.tensor([4])
    assert digest_of([a, b]) == digest_of([a.clone(), b])
    assert len({digest_of(w) for w in ([a, b], [b, a], [torch.cat([a, b])], [a], [a, b + 1])}) == 5


@pytest.mark.parametrize(
    "wrong",
    [{"window": 0}, {"tokens": 0}, {"memory": 1.5}, {"every": -1}, {"products": "bfloat16"}, {"window": None}],
)
def test_unusable_settings(wrong: dict[str, Any]):
    with pytest.raises(InputError, match=f"calibration: {next(iter(wrong))} is "):
        Settings(**wrong)


@pytest.mark.parametrize("device", ["gpu", "meta", "cuda:", "", None, 0, torch.device("cpu"), "mps"])
def test_devices_that_there_are_not(device: Any):
    with pytest.raises(InputError, match=r"calibration: device is .*, wanted 'cpu', 'cuda', or one GPU of several"):
        Settings(device=device)


def test_gpus_that_there_are_not(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(InputError, match=r"device is 'cuda', and torch sees 0 GPUs here; use .*'cpu'"):
        Settings(device="cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for device in ("cuda", "cuda:0", "cuda:1", "cpu"):
        assert Settings(device=device).device == device
    with pytest.raises(InputError, match="device is 'cuda:2', and torch sees 2 GPUs here"):
        Settings(device="cuda:2")
