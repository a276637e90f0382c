"""Which tokens are taken of a source that has more than are wanted, and how much of it is read for that."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from calibrated import WHOLE
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from llmopt.compiler.calibration import Settings, calibrate
from llmopt.compiler.calibration_data import choose_windows, digest_of, read_tokens, windows_of
from llmopt.compiler.errors import InputError
from llmopt.compiler.program import Program

VOCAB = 0x110000
LENGTH, LIMIT = 50, 1000


class Letters:
    """An encoder: a token for every `per` characters. It knows what it was given."""

    def __init__(self, per: int = 1) -> None:
        self.per = per
        self.given: list[str] = []

    def __call__(self, text: str) -> list[int]:
        self.given.append(text)
        return [ord(c) for c in text[:: self.per]]


def numbered(lines: int) -> str:
    """Lines of 40 characters, each with its number."""
    return "".join(f"{at:08d} {'abcdefghijklmnopqrstuvwxyz1234'}\n" for at in range(lines))


def texts(windows: list[torch.Tensor]) -> list[str]:
    return ["".join(map(chr, w.tolist())) for w in windows]


def chosen(source: Any, encode: Callable[[str], list[int]], limit: int | None = LIMIT) -> list[str]:
    return texts(choose_windows(source, VOCAB, encode, LENGTH, limit).windows)


@pytest.mark.parametrize("at_once", [True, False], ids=["text", "file"])
def test_a_large_text_is_met_all_over_and_read_in_small_part(tmp_path: Path, at_once: bool):
    text, encode = numbered(25_000), Letters()  # a million characters, 1,000 tokens wanted
    (tmp_path / "a.txt").write_text(text)
    source = [text] if at_once else tmp_path / "a.txt"
    found = choose_windows(source, VOCAB, encode, LENGTH, LIMIT)
    windows = texts(found.windows)
    assert max(map(len, encode.given)) <= 8 * LENGTH
    assert len(encode.given) == len(windows) == LIMIT // LENGTH
    assert all(len(w) == LENGTH and w in text for w in windows)
    lines = [int(w[:8]) for w in windows]  # each begins at a line
    steps = [b - a for a, b in itertools.pairwise([0, *lines, 25_000])]
    assert min(steps[1:-1]) > 0
    assert max(steps) < 2 * 25_000 / len(windows)
    assert found.source == f"the tokens of 1.0 {'million characters' if at_once else 'MB'} of text"
    assert digest_of(choose_windows(source, VOCAB, Letters(3), LENGTH, LIMIT).windows) != digest_of(found.windows)
    assert digest_of(choose_windows(source, VOCAB, Letters(), LENGTH, LIMIT).windows) == digest_of(found.windows)


def test_no_more_of_a_large_file_is_read_than_is_encoded(tmp_path: Path):
    """20 GB, which take no room on the disk, would take some time."""
    with open(tmp_path / "a.txt", "wb") as file:
        file.truncate(20 << 30)
    encode = Letters()
    assert len("".join(chosen(tmp_path / "a.txt", encode))) == LIMIT
    assert sum(map(len, encode.given)) <= 8 * LIMIT


def test_a_folder_is_met_in_all_its_files(tmp_path: Path):
    """Large files, small ones, an empty one, a hidden one, and a name that sorts first and holds half of all."""
    letters = "abcdefghijklmnop"
    for at, letter in enumerate(letters):
        (tmp_path / letter).mkdir()
        (tmp_path / letter / f"{at}.txt").write_text(letter * 1500)
    (tmp_path / "Large").write_text("L" * 24_000)
    (tmp_path / "empty").write_text("")
    (tmp_path / ".hidden").write_text("." * 50_000)
    encode = Letters()
    windows = chosen(tmp_path, encode)
    assert all(len(set(w)) == 1 for w in windows)  # no window of two files
    seen = [w[0] for w in windows]
    assert seen == sorted(seen)  # L is before a, in the order of paths
    assert 8 <= seen.count("L") <= 12
    assert len(set(seen)) >= 8
    assert sum(map(len, windows)) == LIMIT
    assert sum(map(len, encode.given)) < 12_000


def test_short_files_make_up_the_tokens_together(tmp_path: Path):
    """2,000 files of 30 tokens: none has a window of 50, and a beginning of them would be one author's."""
    for at in range(2000):
        (tmp_path / f"{at:05d}.txt").write_text(f"{at:030d}")
    encode = Letters()
    windows = chosen(tmp_path, encode)
    assert sum(map(len, windows)) == LIMIT
    assert sorted(len(w) for w in windows) == [10, *[30] * 33]
    numbers = [int(w) for w in windows if len(w) == 30]
    assert max(b - a for a, b in itertools.pairwise([0, *numbers, 2000])) < 4 * 2000 / 34
    assert len(encode.given) == 34


@pytest.mark.parametrize("size", [16 * LIMIT, 16 * LIMIT + 1])
def test_less_text_is_read_as_a_whole(tmp_path: Path, size: int):
    """Up to 16 bytes for each token wanted, windows are those of all tokens."""
    text, encode = numbered(1000)[:size], Letters()
    (tmp_path / "a.txt").write_text(text)
    found = choose_windows(tmp_path / "a.txt", VOCAB, encode, LENGTH, LIMIT)
    whole = windows_of(read_tokens(tmp_path / "a.txt", VOCAB, Letters()), LENGTH, LIMIT)
    assert (encode.given == [text]) == (size == 16 * LIMIT)
    assert (digest_of(found.windows) == digest_of(whole)) == (size == 16 * LIMIT)
    assert found.source == ("16000 tokens" if size == 16 * LIMIT else "the tokens of 0.0 MB of text")
    everything = choose_windows(tmp_path / "a.txt", VOCAB, Letters(), LENGTH, None).windows
    assert "".join(texts(everything)) == text


def test_long_tokens_leave_nothing_out(tmp_path: Path):
    """A token a piece is less than is wanted: all pieces are used, in order, and together they are the text."""
    text = "".join(chr(0x10000 + at) for at in range(100_000))  # 4 bytes each, no line ends
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    encode = Letters(200)
    windows = chosen(tmp_path / "a.txt", encode, 2000)
    assert len(windows) == len(encode.given) == 400_000 // (8 * LENGTH)
    assert "".join(sorted(encode.given)) == text
    assert [piece[0] for piece in sorted(encode.given)] == windows


@given(st.text(alphabet="aé世𝄞", min_size=300, max_size=900), st.integers(1, 9), st.integers(1, 5))
def test_characters_are_not_cut(tmp_path_factory: pytest.TempPathFactory, text: str, length: int, limit: int):
    file = tmp_path_factory.getbasetemp() / "cut.txt"
    file.write_text(text, encoding="utf-8")
    encode = Letters()
    windows = texts(choose_windows(file, VOCAB, encode, length, limit).windows)
    assert sum(map(len, windows)) == limit
    assert all(w in text for w in windows)
    assert all(piece in text for piece in encode.given)


def test_what_is_no_text_is_told_by_its_place(tmp_path: Path):
    (tmp_path / "a").write_bytes(b"a" * 60_000)
    (tmp_path / "b").write_bytes(b"b" * 20_000 + b"\xff" * 10_000)
    with pytest.raises(InputError, match=r"file 'b': byte 2\d{4} is not UTF-8 text; wanted text, .*convert it") as told:
        chosen(tmp_path, Letters())
    at = int(str(told.value).split("byte ")[1].split()[0])
    assert at >= 20_000
    (tmp_path / "b").unlink()
    assert len(chosen(tmp_path, Letters())) == LIMIT // LENGTH
    with pytest.raises(InputError, match="without a tokenizer"):
        choose_windows(tmp_path, VOCAB, None, LENGTH, LIMIT)
    with pytest.raises(InputError, match=r"file 'a': token id 97 is not in \[0, 96\)"):
        choose_windows(tmp_path, 96, Letters(), LENGTH, LIMIT)
    with pytest.raises(InputError, match="it has no tokens"):
        chosen(tmp_path, lambda text: [])


@given(st.integers(1, 3), st.integers(1, 90), st.integers(1, 20), st.one_of(st.none(), st.integers(1, 300)))
def test_windows_of_a_token_file(
    tmp_path_factory: pytest.TempPathFactory, rows: int, columns: int, length: int, limit: int | None
):
    """They are those of its tensor, and hold nothing but themselves."""
    file = tmp_path_factory.getbasetemp() / "ids.safetensors"
    ids = torch.arange(rows * columns, dtype=torch.int32).reshape(rows, columns)
    for tensor in [ids, ids.reshape(-1)]:
        save_file({"tokens": tensor}, file)
        found = choose_windows(file, 300, None, length, limit)
        expected = windows_of(read_tokens(tensor, 300), length, limit)
        assert [w.tolist() for w in found.windows] == [w.tolist() for w in expected]
        assert {w.dtype for w in found.windows} == {torch.int64}
        assert all(w.untyped_storage().nbytes() == w.nbytes for w in found.windows)
        assert found.source == f"{ids.numel()} tokens"
        assert choose_windows(tensor, 300, None, length, limit).source == found.source


def test_only_the_windows_of_a_token_file_are_read(tmp_path: Path):
    """What lies between them may be anything; what is taken may not."""
    ids = torch.zeros(100_000, dtype=torch.int64)
    ids[60:90] = 7_000
    save_file({"tokens": ids}, tmp_path / "t.safetensors")
    assert len(choose_windows(tmp_path / "t.safetensors", 96, None, LENGTH, LIMIT).windows) == LIMIT // LENGTH
    ids[3] = -1
    save_file({"tokens": ids}, tmp_path / "t.safetensors")
    with pytest.raises(InputError, match=r"token id -1 \(sequence 0\) is not in \[0, 96\); use ids of this model's"):
        choose_windows(tmp_path / "t.safetensors", 96, None, LENGTH, LIMIT)


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"ids": torch.arange(3)}, r"no 'tokens' \(it has ids\)"),
        ({"tokens": torch.rand(3)}, r"float32 \[3\]; wanted integers"),
        ({"tokens": torch.ones(1, 2, 3, dtype=torch.int64)}, r"int64 \[1, 2, 3\]"),
        ({"tokens": torch.empty(2, 0)}, "no tokens"),
    ],
)
def test_unusable_token_files(tmp_path: Path, tensors: dict[str, torch.Tensor], said: str):
    save_file(tensors, tmp_path / "t.safetensors")
    with pytest.raises(InputError, match=said):
        choose_windows(tmp_path / "t.safetensors", 96, None, LENGTH, LIMIT)


def test_calibration_says_what_it_was_given(small: Program, tmp_path: Path):
    (tmp_path / "a.txt").write_text("\x20!#$%" * 100_000)
    settings = Settings(window=20, tokens=100)
    made = calibrate(small, tmp_path / "a.txt", encode=Letters(), settings=settings)
    assert made.notes == ("calibrated with 100 of the tokens of 0.5 MB of text in 5 windows",)
    assert {made.tokens(name) for name in made.entries} == {100}


def test_an_empty_path_is_not_the_current_folder(small: Program, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    (tmp_path / "a.txt").write_text("some text")
    monkeypatch.chdir(tmp_path)
    for settings in (WHOLE, Settings(window=20, tokens=None)):
        with pytest.raises(InputError, match=r"calibration '': the path is empty; give .* a text file, a folder of"):
            calibrate(small, "", encode=Letters(), settings=settings)
    with pytest.raises(InputError, match="data '': the path is empty"):
        read_tokens("", VOCAB, Letters(), "data")
    assert len(read_tokens(".", VOCAB, Letters())) == 1
