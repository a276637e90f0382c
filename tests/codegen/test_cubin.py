"""Kernels compiled for GPUs that are not there: what a cubin depends on and says, and what is said of a failure."""

from __future__ import annotations

import dataclasses
import errno
import os
import re

import pytest
from toy_kernels import DOUBLE, HEAD, SQUARE, product, toy, toys

from llmopt.codegen import cubin
from llmopt.codegen.cubin import Cubin, compile_kernel
from llmopt.codegen.kernel import Kernel
from llmopt.compiler import knobs
from llmopt.compiler.errors import BuildError
from llmopt.compiler.target import Target

pytestmark = pytest.mark.xcompile

ISAS = ["sm_80", "sm_89", "sm_90", "sm_100", "sm_120"]


@pytest.fixture(autouse=True)
def fresh_cache(tmp_path):
    with knobs.scope(cache=tmp_path), toys():
        yield tmp_path


def target(isa: str = "sm_90") -> Target:
    return Target.parse(f"cuda:{isa}")


def refusal(kernel: Kernel, isa: str = "sm_90") -> str:
    with pytest.raises(BuildError) as caught:
        compile_kernel(kernel, target(isa))
    text = str(caught.value)
    assert "\n" not in text
    assert len(text) < 800
    return text


@pytest.mark.parametrize("isa", ISAS)
def test_compiles_for_every_gpu(isa):
    made = compile_kernel(toy(pdl=isa >= "sm_90" or len(isa) > 5), target(isa))
    assert made.data[:4] == b"\x7fELF"
    assert (made.entry, made.isa, made.num_warps) == ("toy", isa, 4)
    assert made.params == ("*fp32", "*fp32", "*fp32", "i32", "i64", "fp32")
    assert made.pdl == (isa in ("sm_90", "sm_100", "sm_120"))
    assert 0 < made.registers <= 255
    assert made.spills == 0
    assert made.toolkit.startswith(("12.", "13."))


def test_facts_read_back():
    made = compile_kernel(toy(), target())
    assert Cubin.from_facts(made.facts(), made.data) == made


def test_shared_memory_and_warps_are_reported():
    made = compile_kernel(product(), target())
    assert made.shared > 48 * 1024
    assert made.num_warps == 8


def test_spills_are_counted():
    one_warp = dataclasses.replace(product(k=16, step=16, stages=1), num_warps=1)
    assert compile_kernel(one_warp, target("sm_80")).spills > 0


def test_kernels_that_differ_in_a_hooks_body_differ():
    made = [compile_kernel(toy(source), target()) for source in (DOUBLE, SQUARE, DOUBLE)]
    assert made[0].data != made[1].data
    assert made[0] == made[2]


def test_no_compiler_of_the_machine_is_needed(monkeypatch):
    for name in ("CC", "CXX", "TRITON_PTXAS_PATH", "CUDA_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", "")
    assert compile_kernel(toy(), target()).data[:4] == b"\x7fELF"


def test_a_triton_without_its_assembler_is_said(monkeypatch):
    def absent(*_):
        raise RuntimeError("Cannot find ptxas")

    monkeypatch.setattr("triton.backends.nvidia.compiler.get_ptxas", absent)
    text = "for sm_90: Triton has no assembler (Cannot find ptxas); reinstall triton, or name one in TRITON_PTXAS_PATH"
    assert refusal(toy()).endswith(text)


def test_triton_keeps_nothing_of_its_own(fresh_cache, monkeypatch):
    home = fresh_cache / "home"
    monkeypatch.setenv("TRITON_HOME", str(home))
    compile_kernel(toy(), target())
    assert not home.exists()
    assert list((fresh_cache / "triton").iterdir()) == []


def test_second_time_compiles_nothing(monkeypatch):
    made = compile_kernel(toy(), target())
    monkeypatch.setattr(cubin, "_compile", None)
    assert compile_kernel(toy(), target()) == made
    assert cubin.cached(toy(), target()) == made
    assert cubin.cached(toy(), target("sm_80")) is None
    assert cubin.cached(toy(block=64), target()) is None


@pytest.mark.parametrize("harm", ["cut", "flip", "head", "empty"])
def test_damaged_entry_is_built_anew(harm):
    made = compile_kernel(toy(), target())
    path = cubin.entry_path(toy(), target())
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    harmed = {"cut": data[:-100], "flip": data, "head": b"[1]\n" + made.data, "empty": b""}
    path.write_bytes(harmed[harm])
    assert cubin.cached(toy(), target()) is None
    assert compile_kernel(toy(), target()) == made
    assert cubin.cached(toy(), target()) == made


def test_too_much_shared_memory_is_refused_with_both_figures():
    kernel = product(stages=6, step=128, k=1024)
    text = refusal(kernel)
    assert f"and cuda:sm_90 has {target().shared_bytes} for a block" in text
    assert int(re.search(r"it uses (\d+) bytes", text)[1]) > target().shared_bytes
    assert "toy:product(K=1024, BLOCK=128, STEP=128, num_warps=8, num_stages=6) for sm_90" in text
    assert refusal(kernel) == text, "an entry of the cache is refused, too"


def test_ptxas_errors_are_one_line_and_nothing_is_printed(capfd):
    call = (
        "return tl.inline_asm_elementwise('nonsense.f32 $0, $1;', '=f,f', [x], dtype=tl.float32, is_pure=True, pack=1)"
    )
    text = refusal(toy(HEAD + call + "\n"))
    assert "ptxas" in text
    assert "nonsense" in text
    assert "toy:toy(BLOCK=128, PDL=False" in text
    out, err = capfd.readouterr()
    assert out + err == ""


def test_errors_in_a_hook_name_it():
    text = refusal(toy(HEAD + "return x + tl.nothing(x)\n"))
    assert "nothing" in text


def test_hooks_that_do_not_import_or_are_missing():
    assert "SyntaxError" in refusal(toy("def hook(:\n"))
    assert "which its source lacks" in refusal(toy(DOUBLE.replace("hook", "other")))


def test_kernels_that_do_not_fit_their_template():
    good = toy()
    swapped = dataclasses.replace(good, types=(good.types[1], good.types[0], *good.types[2:]))
    assert "wanted the order x, z, y" in refusal(swapped)
    assert "no constant for PDL" in refusal(dataclasses.replace(good, constants=good.constants[:1]))
    extra = dataclasses.replace(good, constants=(*good.constants, ("BLOCKS", 1)))
    assert "BLOCKS is no constant parameter" in refusal(extra)
    halves = dataclasses.replace(good, types=(*good.types[:-1], ("S", "fp16")))
    assert "of type fp16, wanted a pointer or i32" in refusal(halves)
    assert "has no 'tot'" in refusal(dataclasses.replace(good, template="toy:tot"))
    assert "'tyo' does not exist" in refusal(dataclasses.replace(good, template="tyo:toy"))


def test_targets_that_cannot():
    assert "needs sm_90 or newer" in refusal(toy(pdl=True), "sm_89")
    with pytest.raises(BuildError, match="is no GPU"):
        compile_kernel(toy(), Target.parse("cpu:generic"))


def test_scratch_memory_is_refused(monkeypatch):
    import triton

    compile_ = triton.compile

    def with_scratch(*args, **kwargs):
        made = compile_(*args, **kwargs)
        made.metadata = made.metadata._replace(global_scratch_size=128)
        return made

    monkeypatch.setattr(triton, "compile", with_scratch)
    assert "needs scratch memory" in refusal(toy())


@pytest.mark.parametrize("place", ["tempfile.TemporaryDirectory", "triton.compile", "llmopt.codegen.hooks.write_new"])
def test_a_full_disk_is_one_line_with_the_remedy(fresh_cache, monkeypatch, place):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(place, full)
    assert refusal(toy()) == (
        f"cache {fresh_cache} cannot be written (No space left on device); set LLMOPT_CACHE to a writable folder with "
        "free space"
    )


def test_a_cache_in_a_folder_that_takes_none_is_told(fresh_cache, monkeypatch):
    def refuse(path, *_, **__):
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))

    monkeypatch.setattr("pathlib.Path.mkdir", refuse)
    assert refusal(toy()).startswith(f"cache {fresh_cache}/cubin cannot be written (No such file or directory); set ")
