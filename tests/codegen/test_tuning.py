"""The choice of a kernel's constants: tables, defaults, the knob."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from toy_kernels import toys

from llmopt.codegen import hooks, tuning
from llmopt.compiler import knobs
from llmopt.compiler.target import Target

pytest.importorskip("triton")

TARGET = Target("cuda", "sm_90", 132, frozenset({"triton", "pdl"}), 232448, 1, 1)
SHAPE = {"K": 4096, "J": 6144, "PARTS": 1, "NORM": 1, "N": 1}


@pytest.fixture
def tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(tuning, "TABLES", tmp_path)
    monkeypatch.setattr(tuning, "_WARNED", set())
    tuning.table.cache_clear()
    yield tmp_path
    tuning.table.cache_clear()


def entry(**changes: Any) -> dict[str, Any]:
    known = {"template": "gemv", "source": tuning.source_hash("gemv"), "shape": SHAPE, "dtype": "bfloat16"}
    return {**known, "config": {"BLOCK_J": 2}, "us": 12.5, "device": "none", "date": "2026-01-01", **changes}


def picked(shape: dict[str, int] = SHAPE, dtype: str = "bfloat16") -> dict[str, Any]:
    tuning.table.cache_clear()
    return tuning.pick("gemv:gemv", shape, dtype, TARGET)


def test_an_entry_is_picked_for_its_shape_and_dtype_only(tables: Path) -> None:
    default = picked()
    assert default["BLOCK_J"] != 2
    tuning.write("sm_90", [entry()], tables)
    assert picked() == {"BLOCK_J": 2}
    assert picked(dtype="float16")["BLOCK_J"] != 2
    assert picked({**SHAPE, "J": 4096})["BLOCK_J"] != 2
    with knobs.scope(tune="off"):
        assert picked() == default


def test_an_entry_of_other_kernels_is_passed_over_and_said_once(tables: Path, caplog: pytest.LogCaptureFixture) -> None:
    other = {**SHAPE, "J": 4096}
    tuning.write("sm_90", [entry(source="0" * 16), entry(source="0" * 16, shape=other)], tables)
    with caplog.at_level(logging.WARNING, "llmopt"):
        assert picked(dtype="float16")["BLOCK_J"] != 2  # there is no entry
        assert not caplog.records
        assert picked()["BLOCK_J"] != 2
        assert picked(other)["BLOCK_J"] != 2
    (record,) = caplog.records
    assert str(tables / "sm_90.json") in record.getMessage()
    assert "'gemv'" in record.getMessage()


KERNEL = """
import triton
from llmopt.codegen.templates import beside
from llmopt.codegen.templates.beside import helper
from llmopt.compiler.quant.elements import ELEMENTS

WIDTH = 2 * SIZE
SIZE: int = 8
OTHER = 1
TEXTS = {"a": spelt(1)}

def spelt(number):
    "Text."
    return "add" * number

@triton.constexpr_function
def asm(name):
    return TEXTS[name] + ELEMENTS["e2m1"].name

@triton.jit
def kernel(x):
    "What it does."
    # why
    return helper(x) + WIDTH + beside.LIMIT

def configs():
    return [OTHER]
"""
BESIDE = "import triton\nLIMIT = 3\nLAST = 4\n\n@triton.jit\ndef helper(x):\n    return x\n"


def test_the_hash_is_of_all_that_a_kernel_calls_and_reads_and_of_nothing_else(tmp_path: Path) -> None:
    def hashed(name: str = "made", old: str = "", new: str = "") -> str:
        tuning.source_hash.cache_clear()
        for file, text in (("made", KERNEL), ("beside", BESIDE)):
            assert file != name or old in text
            (tmp_path / f"{file}.py").write_text(text.replace(old, new) if file == name else text)
        return tuning.source_hash("made")

    with toys(tmp_path):
        first = hashed()
        for change in (
            ("What it does.", "Else."),
            ('"Text."', '"Else."'),
            ("# why", "# how"),
            ("OTHER = 1", "OTHER = 2"),
            ("[OTHER]", "[]"),
        ):
            assert hashed("made", *change) == first, change
        assert hashed("beside", "LAST = 4", "LAST = 5") == first
        others = [
            hashed("made", *change)
            for change in (("WIDTH = 2", "WIDTH = 3"), ("= 8", "= 16"), ("helper(x) +", "helper(x) -"),
                           ('"add" *', '"sub" *'), ("TEXTS[name] +", "TEXTS[name][1:] +"), ("e2m1", "e4m3"))
        ]  # fmt: skip
        others += [hashed("beside", "return x", "return -x"), hashed("beside", "LIMIT = 3", "LIMIT = 4")]
    tuning.source_hash.cache_clear()
    assert len({first, *others}) == 9


def test_the_hash_is_the_same_under_every_python(tmp_path: Path) -> None:
    """Tables are made under one version and read under others: f-strings and empty fields count alike."""
    text = """import triton\nSIZES = {'a': 1}\nTEXT = f"{SIZES['a']:#x} 'of' {SIZES['a']}" "and"\n
@triton.jit
def kernel(x, N=1):
    return [x[0, 1:2], -x, TEXT, None]
"""
    (tmp_path / "made.py").write_text(text)
    tuning.source_hash.cache_clear()
    with toys(tmp_path):
        assert tuning.source_hash("made") == "d57f6140b1db3dcc"
    tuning.source_hash.cache_clear()


def test_what_kernels_read_of_other_modules_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The numbers of small floats are not a template's own."""
    elements = "llmopt.compiler.quant.elements"
    assert elements in hooks.template_texts("rounded")
    assert elements not in hooks.template_texts("gemm")
    read, before = hooks._text, (hooks.template_text("rounded"), tuning.source_hash("rounded"))
    changed = 'Element("e2m1", 4, 6.0', 'Element("e2m1", 4, 7.0'
    monkeypatch.setattr(hooks, "_text", lambda name: read(name).replace(*changed))
    tuning.source_hash.cache_clear()
    after = hooks.template_text("rounded"), tuning.source_hash("rounded")
    tuning.source_hash.cache_clear()
    assert before[0] != after[0]
    assert before[1] != after[1]


def test_writing_replaces_the_entry_of_the_same_key(tables: Path) -> None:
    tuning.write("sm_90", [entry(), entry(shape={**SHAPE, "J": 8})], tables)
    tuning.write("sm_90", [entry(config={"BLOCK_J": 4})], tables)
    assert [e["config"]["BLOCK_J"] for e in json.loads((tables / "sm_90.json").read_text())["entries"]] == [4, 2]


def test_writing_drops_what_was_measured_on_other_kernels(tables: Path) -> None:
    old, other = "0" * 16, {**SHAPE, "J": 8}
    tuning.write(
        "sm_90", [entry(source=old), entry(source=old, shape=other), entry(template="gemm", source=old)], tables
    )
    tuning.write("sm_90", [entry()], tables)
    left = json.loads((tables / "sm_90.json").read_text())["entries"]
    assert [(e["template"], e["source"] == old) for e in left] == [("gemm", True), ("gemv", False)]


def test_a_trial_gives_its_constants_and_says_what_was_asked_for(tables: Path) -> None:
    tuning.write("sm_90", [entry()], tables)
    name, other = tuning.key("gemv", SHAPE, "bfloat16"), {**SHAPE, "J": 4096}
    with tuning.trial({name: {"BLOCK_J": 16}}) as asked, knobs.scope(tune="off"):
        assert picked() == {"BLOCK_J": 16}
        default = picked(other)
    assert picked() == {"BLOCK_J": 2}
    assert asked[name] == tuning.Choice("gemv", SHAPE, "bfloat16", {"BLOCK_J": 16})
    assert asked[tuning.key("gemv", other, "bfloat16")].config == default


@pytest.mark.parametrize("template", ["gemv", "gemm"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("isa", ["sm_80", "sm_90", "sm_120"])
@pytest.mark.parametrize(("K", "J", "parts"), [(4096, 6144, 1), (1000, 1024, 1), (64, 40, 2), (4096, 14336, 2)])
def test_there_is_a_default_for_every_shape(template: str, dtype: str, isa: str, K: int, J: int, parts: int) -> None:
    shared = {"sm_80": 166912, "sm_90": 232448, "sm_120": 101376}[isa]
    target = Target("cuda", isa, 108, frozenset({"triton"}), shared, 1, 1)
    for tokens in (1,) if template == "gemv" else (8, 64):
        default = tuning.pick(template, {"K": K, "J": J, "PARTS": parts, "NORM": 1, "N": tokens}, dtype, target)
        assert default["num_stages"] >= 1
        assert default["BLOCK_J"] >= 1


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_vector_s_block_is_one_load_at_least(dtype: str) -> None:
    from llmopt.codegen.templates import gemv

    load = 16 // getattr(torch, dtype).itemsize
    for columns in (1, 2, 3, 4, 7):
        tried = gemv.configs({**SHAPE, "K": columns}, dtype, TARGET)
        assert {config["BLOCK_K"] for config in tried} == {max(load, 1 << (columns - 1).bit_length())}
    assert gemv.configs(SHAPE, dtype, TARGET)[0]["BLOCK_K"] == 128 * load
