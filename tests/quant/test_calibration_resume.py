"""Statistics in files: runs that stop and go on, groups of values, and files that are not what they should be."""

from __future__ import annotations

import gc
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from calibrated import GROUPS, IDS, WHOLE, WINDOWS, bits, raised, stopped
from passes_common import llama
from safetensors import safe_open
from safetensors.torch import save_file

import llmopt.runtime.build as building
from llmopt.compiler.calibration import Settings, calibrate
from llmopt.compiler.calibration_file import StoredTensors
from llmopt.compiler.calibration_fingerprint import Fingerprint
from llmopt.compiler.calibration_statistics import Origin, Statistics, is_statistics
from llmopt.compiler.errors import InputError
from llmopt.compiler.program import Program


@pytest.mark.parametrize("settings", [WHOLE, GROUPS], ids=["whole", "groups"])
@pytest.mark.parametrize("stops", [(1,), (40,), (25, 26, 89)])
def test_a_stopped_run_goes_on_with_the_same_bits(
    small: Program, tmp_path: Path, settings: Settings, stops: tuple[int, ...]
):
    path = tmp_path / "s.safetensors"
    for stop in stops:
        stopped(small, path, settings, stop)
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
    stopped(small, path, at=7 * 9 + 1)
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
    stopped(small, path, GROUPS, ids=IDS[:100])
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"s.safetensors.part{n}" for n in range(3)]
    made = calibrate(small, IDS, path=path, settings=WHOLE)
    assert "s.safetensors.part0 is of another run (other tokens): begun anew" in made.notes
    assert [p.name for p in tmp_path.iterdir()] == ["s.safetensors"]
    assert bits(made) == bits(calibrate(small, IDS, settings=WHOLE))


def test_another_bound_of_memory_is_said(small: Program, tmp_path: Path):
    """Sums in other groups are no beginning of these; the result, which is the same, is taken by either."""
    path = tmp_path / "s.safetensors"
    stopped(small, path, GROUPS)
    made = calibrate(small, IDS, path=path, settings=WHOLE)
    said = "s.safetensors.part0 sums up other values, as the bound of memory was another: begun anew"
    assert said in made.notes
    assert [p.name for p in tmp_path.iterdir()] == ["s.safetensors"]
    assert bits(made) == bits(calibrate(small, IDS, settings=WHOLE))


@pytest.mark.parametrize("memory", [30_000, 60_000])
def test_finished_statistics_serve_under_any_bound_of_memory(small: Program, tmp_path: Path, memory: int):
    path, told = tmp_path / "s.safetensors", []
    made = calibrate(small, IDS, path=path, settings=GROUPS)
    for settings in (WHOLE, replace(GROUPS, memory=memory, every=1)):
        again = calibrate(small, IDS, path=path, settings=settings, progress=lambda *at: told.append(at))
        assert again.digest == made.digest == calibrate(small, IDS, settings=WHOLE).digest
        assert bits(again) == bits(made)
    assert told == []


def test_the_bound_on_a_gpu_does_not_follow_every_megabyte(monkeypatch: pytest.MonkeyPatch, small: Program):
    total, bounds = 140 << 30, []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(building, "calibrate", lambda *args, settings, **options: bounds.append(settings.memory))
    for free in (138 << 30, (138 << 30) - (700 << 20), 70 << 30, 3 << 30):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda free=free: (free, total))
        building.Calibration(IDS)(small, True)
        assert free // 4 < bounds[-1] <= free // 2
    assert bounds[0] == bounds[1] > bounds[2] > bounds[3]


def shortened(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:5000])


def zeroed(file: Path) -> None:
    """4,000 bytes of sums are lost; it is as long as before and reads well."""
    content = bytearray(file.read_bytes())
    middle = len(content) // 2
    assert any(content[middle : middle + 4000])
    content[middle : middle + 4000] = bytes(4000)
    file.write_bytes(content)


def miscounted(file: Path) -> None:
    """One digit of what the file says of itself, how many windows or tokens it has seen."""
    content = file.read_bytes()
    found = re.search(rb'("done": "|tokens\\": )(?=\d)', content)
    assert found is not None
    digit = content[found.end()]
    file.write_bytes(content[: found.end()] + bytes([digit ^ 1]) + content[found.end() + 1 :])


@pytest.mark.parametrize("settings", [WHOLE, GROUPS], ids=["whole", "groups"])
@pytest.mark.parametrize("damage", [shortened, zeroed, miscounted])
def test_a_damaged_part_is_begun_anew(
    small: Program, tmp_path: Path, damage: Callable[[Path], None], settings: Settings
):
    path = tmp_path / "s.safetensors"
    stopped(small, path, settings, at=70)
    damage(tmp_path / "s.safetensors.part0")
    made = calibrate(small, IDS, path=path, settings=settings)
    assert "s.safetensors.part0 is damaged: begun anew" in made.notes
    assert ("went on after 10 windows" in made.notes) == (settings is GROUPS)  # the next part is whole
    assert bits(made) == bits(calibrate(small, IDS, settings=WHOLE))


def test_damage_to_finished_statistics_is_told_when_it_is_met(small: Program, tmp_path: Path):
    path = tmp_path / "s.safetensors"
    made = calibrate(small, IDS, path=path, settings=WHOLE)
    whole = {name: made.second_moment(name) for name in made.entries}
    zeroed(path)
    with safe_open(path, "pt") as file:
        hurt = [name for name in whole if not torch.equal(file.get_tensor(f"{name}.second"), whole[name])]
    assert len(hurt) in (1, 2)
    for read in (Statistics.load(path), calibrate(small, path), calibrate(small, IDS, path=path, settings=WHOLE)):
        for name in hurt:
            said = f"file {str(path)!r} is damaged.*the SHA-256 of '{name}.second' is .*remove it and calibrate again"
            with pytest.raises(InputError, match=said):
                read.diagonal(name)
        assert all(torch.equal(read.second_moment(name), whole[name]) for name in whole if name not in hurt)


def test_damage_to_what_statistics_say_of_themselves_is_told(small: Program, tmp_path: Path):
    path = tmp_path / "s.safetensors"
    calibrate(small, IDS, path=path, settings=WHOLE)
    miscounted(path)
    for source, kept in ((path, None), (IDS, path)):
        with pytest.raises(InputError, match=r"s\.safetensors' is damaged.* of its metadata is .*calibrate again"):
            calibrate(small, source, path=kept, settings=WHOLE)


def test_statistics_of_another_version_are_told(small: Program, tmp_path: Path):
    path = tmp_path / "s.safetensors"
    save_file({"x.second": torch.ones(2, 2)}, path, {"format": "llmopt statistics 1", "statistics": "{}"})
    for source, kept in ((path, None), (IDS, path)):
        with pytest.raises(InputError, match=r"holds 'llmopt statistics 1', wanted .*another version"):
            calibrate(small, source, path=kept, settings=WHOLE)


def test_finished_statistics_are_not_overwritten(small: Program, tmp_path: Path):
    path = tmp_path / "s.safetensors"
    calibrate(small, IDS, path=path, settings=WHOLE)
    before = path.read_bytes()
    with pytest.raises(InputError, match="made otherwise: other tokens; give another name"):
        calibrate(small, IDS[1:], path=path, settings=WHOLE)
    with pytest.raises(InputError, match="made otherwise: second_moments True, wanted False; give another name"):
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
        calibrate(raised(llama(bias=True)), tmp_path / "s.safetensors")


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
        Statistics(Origin(Fingerprint({}, {}), {}), {}, {}, True).save(tmp_path / "missing" / "s.safetensors")
    with pytest.raises(InputError, match="holds no statistics"):
        StoredTensors(tmp_path / "t.safetensors")
