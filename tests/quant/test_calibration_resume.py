"""Statistics in files: runs that stop and go on, groups of values, and files that are not what they should be."""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from passes_common import llama, run
from safetensors import safe_open
from safetensors.torch import save_file

from llmopt.compiler.calibration import Settings, calibrate
from llmopt.compiler.calibration_statistics import Statistics, is_statistics
from llmopt.compiler.errors import InputError
from llmopt.compiler.program import Program
from llmopt.passes.canonicalize import Canonicalize
from llmopt.passes.raise_aten import RaiseAten

IDS = (torch.arange(200) * 7 % 96).tolist()
WINDOWS = 10
WHOLE = Settings(window=20, every=3)
# K = 32 and 48: 8320 and 18624 bytes a value, 7 + 2 values
GROUPS = Settings(window=20, every=3, memory=30_000)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def small() -> Program:
    return run(llama(), RaiseAten(), Canonicalize())[0]


class Stopped(Exception):
    """Someone pulled the plug."""


def stop_at(count: int) -> Callable[[str, int, int], None]:
    def tell(name: str, done: int, total: int) -> None:
        if done == count:
            raise Stopped

    return tell


def bits(made: Statistics) -> dict[str, str]:
    return {key: hashlib.sha256(made.tensors[key].numpy().tobytes()).hexdigest() for key in made.tensors}


@pytest.mark.parametrize("settings", [WHOLE, GROUPS], ids=["whole", "groups"])
@pytest.mark.parametrize("stops", [(1,), (40,), (25, 26, 89)])
def test_a_stopped_run_goes_on_with_the_same_bits(
    small: Program, tmp_path: Path, settings: Settings, stops: tuple[int, ...]
):
    path = tmp_path / "s.safetensors"
    for stop in stops:
        with pytest.raises(Stopped):
            calibrate(small, IDS, path=path, settings=settings, progress=stop_at(stop))
        assert not path.exists()
    told: list[int] = []
    made = calibrate(small, IDS, path=path, settings=settings, progress=lambda name, done, total: told.append(done))
    again = WHOLE.every * 9 + 9  # at most the windows since the last writing, and the one that was stopped in
    assert told[0] > stops[-1] - again
    assert told == list(range(told[0], WINDOWS * 9 + 1))
    assert bits(made) == bits(calibrate(small, IDS, settings=WHOLE))
    assert [p.name for p in tmp_path.iterdir()] == ["s.safetensors"]


def test_work_that_was_written_is_not_done_again(small: Program, tmp_path: Path):
    path = tmp_path / "s.safetensors"
    with pytest.raises(Stopped):
        calibrate(small, IDS, path=path, settings=WHOLE, progress=stop_at(7 * 9 + 1))
    told: list[int] = []
    made = calibrate(small, IDS, path=path, settings=WHOLE, progress=lambda name, done, total: told.append(done))
    assert told[0] == 6 * 9 + 1
    assert "went on after 6 windows" in made.notes
    told.clear()
    same = calibrate(small, IDS, path=path, settings=WHOLE, progress=lambda name, done, total: told.append(done))
    assert told == []
    assert bits(same) == bits(made)


def test_groups_stay_within_their_bound(small: Program, tmp_path: Path):
    held: list[int] = []

    def squares() -> dict[int, int]:
        found = (o for o in gc.get_objects() if type(o) is torch.Tensor and o.dtype is torch.float64)
        return {o.data_ptr(): o.nbytes for o in found if o.dim() == 2 and o.shape[0] == o.shape[1]}

    others = squares()  # what earlier tests hold

    def weigh(name: str, done: int, total: int) -> None:
        if done % 19 == 0:  # looking at every object takes a while
            held.append(sum(nbytes for at, nbytes in squares().items() if at not in others))

    made = calibrate(small, IDS, path=tmp_path / "s.safetensors", settings=GROUPS, progress=weigh)
    assert 8 * 48 * 48 <= max(held) <= GROUPS.memory
    assert any("read 4 times" in note for note in made.notes)
    held.clear()
    calibrate(small, IDS, settings=WHOLE, progress=weigh)
    assert max(held) == 8 * (7 * 32 * 32 + 2 * 48 * 48)


def test_a_bound_too_small_says_what_to_do(small: Program):
    with pytest.raises(InputError, match="give a path"):
        calibrate(small, IDS, settings=GROUPS)
    with pytest.raises(InputError, match="second_moments=False"):
        calibrate(small, IDS, settings=Settings(memory=10_000))
    calibrate(small, IDS, settings=Settings(memory=10_000, second_moments=False))


def test_other_work_in_progress_is_begun_anew(small: Program, tmp_path: Path):
    path = tmp_path / "s.safetensors"
    with pytest.raises(Stopped):
        calibrate(small, IDS[:100], path=path, settings=GROUPS, progress=stop_at(40))
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"s.safetensors.part{n}" for n in range(3)]
    made = calibrate(small, IDS, path=path, settings=WHOLE)
    assert "s.safetensors.part0 is of another run: begun anew" in made.notes
    assert [p.name for p in tmp_path.iterdir()] == ["s.safetensors"]
    assert bits(made) == bits(calibrate(small, IDS, settings=WHOLE))


def test_a_damaged_part_is_begun_anew(small: Program, tmp_path: Path):
    path, part = tmp_path / "s.safetensors", tmp_path / "s.safetensors.part0"
    with pytest.raises(Stopped):
        calibrate(small, IDS, path=path, settings=WHOLE, progress=stop_at(40))
    part.write_bytes(part.read_bytes()[:5000])
    made = calibrate(small, IDS, path=path, settings=WHOLE)
    assert bits(made) == bits(calibrate(small, IDS, settings=WHOLE))


def test_finished_statistics_are_not_overwritten(small: Program, tmp_path: Path):
    path = tmp_path / "s.safetensors"
    calibrate(small, IDS, path=path, settings=WHOLE)
    before = path.read_bytes()
    with pytest.raises(InputError, match="other tokens, settings or values"):
        calibrate(small, IDS[1:], path=path, settings=WHOLE)
    with pytest.raises(InputError, match="other tokens, settings or values"):
        calibrate(small, IDS, path=path, settings=Settings(window=20, second_moments=False))
    assert path.read_bytes() == before
    save_file({"a": torch.ones(3)}, tmp_path / "t.safetensors")
    with pytest.raises(InputError, match="holds no statistics"):
        calibrate(small, IDS, path=tmp_path / "t.safetensors")


def test_saved_statistics_are_a_source(small: Program, tmp_path: Path):
    made = calibrate(small, IDS, settings=WHOLE)
    made.save(tmp_path / "s.safetensors")
    read = calibrate(small, tmp_path / "s.safetensors")
    assert (read.entries, read.notes, read.digest) == (made.entries, made.notes, made.digest)
    assert bits(read) == bits(made)
    read.save(tmp_path / "s.safetensors")  # onto the file it reads from
    assert bits(Statistics.load(str(tmp_path / "s.safetensors"))) == bits(made)
    with safe_open(tmp_path / "s.safetensors", "pt") as file:
        name = "model.layers.0.mlp.down_proj.weight"
        assert torch.equal(file.get_tensor(f"{name}.second"), made.second_moment(name))
    with pytest.raises(InputError, match="another model"):
        calibrate(run(llama(bias=True), RaiseAten(), Canonicalize())[0], tmp_path / "s.safetensors")


@pytest.mark.parametrize("name", ["s.bin", "missing/s.safetensors", "folder.safetensors"])
def test_a_place_that_cannot_be_written_is_said_before_the_work(small: Program, tmp_path: Path, name: str):
    (tmp_path / "folder.safetensors").mkdir()
    told: list[int] = []
    with pytest.raises(InputError, match=r"ends in \.safetensors, in a folder that exists"):
        calibrate(small, IDS, path=tmp_path / name, progress=lambda name, done, total: told.append(done))
    assert told == []


def test_files_that_are_no_statistics(tmp_path: Path):
    save_file({"tokens": torch.arange(5)}, tmp_path / "t.safetensors")
    (tmp_path / "d.safetensors").write_bytes(b"no header")
    for name in ("t.safetensors", "d.safetensors", "none.safetensors"):
        assert not is_statistics(tmp_path / name)
        with pytest.raises(InputError, match="no finished statistics"):
            Statistics.load(tmp_path / name)
    with pytest.raises(InputError, match="cannot be written"):
        Statistics("", "", {}, {}, True).save(tmp_path / "missing" / "s.safetensors")
