"""GPU code in an artifact: what is written reads back the same, without Triton, and only from files it names."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys

import pytest

from llmopt.codegen.cubin import Cubin
from llmopt.codegen.kernel import Buffer, Call, Kernel, RegionCode
from llmopt.compiler.errors import ArtifactError
from llmopt.compiler.target import Target
from llmopt.runtime import cubins, native
from llmopt.runtime.gpu_code import SHAPES, GpuCode
from llmopt.runtime.replace import Folder

TYPES = (("x", "*bf16"), ("N", "i32"))
ONE = Kernel("rows:rows", TYPES, (("BLOCK", 64), ("EPS", 1e-5)), (("BODY", "f"),), "def f(): ...", 8, 2, True)
TWO = dataclasses.replace(ONE, num_warps=4)
CUBIN = Cubin(b"\x7fELF\n\0binary", "rows", 2048, 8, ("*bf16", "i32"), True, "sm_90", "12.8", 40, 0)
CODE = RegionCode(
    (
        Call(("in0", "N"), ONE, ("N*2", 1)),
        Call(("tmp0", None, "out0"), op="attend", constants=(("scale", 0.5),), when="fresh"),
        Call(("tmp1", 7), TWO),
    ),
    (Buffer(("N", 64), "bfloat16", over="in0"), "tmp0"),
    (Buffer((1, "cdiv(N, 2)"), "float32"), Buffer((4,), "int32", kept=True)),
    ("torch multiplies: for a reason",),
)
TARGET = Target.parse("cuda:sm_90")


class Step:
    """A program of which only the regions are asked for."""

    class fx:
        nodes = ()

    def graph(self, name):
        return self

    def calls(self):
        return ()


def code(shapes=SHAPES):
    made = {ONE.digest(): CUBIN, TWO.digest(): dataclasses.replace(CUBIN, num_warps=4)}
    return GpuCode(Step(), TARGET, {("sample", shape): CODE for shape in shapes}, made)


def test_region_code_reads_back_from_json():
    kernels = {k.digest(): k for k in CODE.kernels()}
    assert RegionCode.from_data(json.loads(json.dumps(CODE.to_data())), kernels) == CODE
    with pytest.raises(KeyError):
        RegionCode.from_data(CODE.to_data(), {ONE.digest(): ONE})


def test_kernels_read_back_and_equal_cubins_are_stored_once(tmp_path):
    made = {ONE: CUBIN, TWO: dataclasses.replace(CUBIN, num_warps=4)}
    folder = Folder(tmp_path)
    index = json.loads(json.dumps(cubins.write_kernels(folder, made)))
    assert cubins.read_kernels(tmp_path, index) == made
    assert len(index["files"]) == 1
    assert set(folder.files) == {index["cubins"], *index["files"]}


def test_code_of_a_program_reads_back(tmp_path):
    folder = Folder(tmp_path)
    index = json.loads(json.dumps(native.write(folder, Step(), code())))
    assert native.files(index) == set(folder.files)
    found = native.read(tmp_path, index, Step(), TARGET)
    assert isinstance(found, GpuCode)
    assert found.cubins == code().cubins
    assert {key: found.codes[key] for key in found.keys()} == {key: CODE for key in code().keys()}  # noqa: SIM118


def test_code_that_is_missing_is_named(tmp_path):
    index = native.write(Folder(tmp_path), Step(), code(("1", "8")))
    with pytest.raises(ArtifactError, match="region 'sample@16' is missing"):
        native.read(tmp_path, index, Step(), TARGET)


def test_reading_needs_no_triton(tmp_path):
    index = cubins.write_kernels(Folder(tmp_path), {ONE: CUBIN})
    script = (
        "import sys, json; from pathlib import Path; from llmopt.runtime import cubins, cuda\n"
        f"cubins.read_kernels(Path({str(tmp_path)!r}), {index!r})\n"
        "sys.exit('triton' in sys.modules)"
    )
    places = os.pathsep.join(p for p in sys.path if p)
    subprocess.run([sys.executable, "-P", "-c", script], env=os.environ | {"PYTHONPATH": places}, check=True)
