"""The cache of cubins under several processes, and compiling many kernels at once."""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest
from toy_kernels import FOLDER, toy, toys

from llmopt.codegen import cubin, cubin_parallel, hooks
from llmopt.codegen.cubin import compile_kernel
from llmopt.codegen.cubin_parallel import compile_all
from llmopt.codegen.kernel import Kernel
from llmopt.codegen.sampling import sampling_code
from llmopt.compiler import knobs
from llmopt.compiler.errors import BuildError
from llmopt.compiler.target import Target

# says what it does, waits for the lock, and tells whether it had to compile
RACER = """
import sys
from toy_kernels import toy, toys
from llmopt.codegen import cubin
from llmopt.compiler.target import Target
read = cubin._read
def said(path):
    found = read(path)
    print("looked", flush=True)
    return found
cubin._read = said
compiled, compile_ = [], cubin._compile
cubin._compile = lambda *args: compiled.append(1) or compile_(*args)
with toys():
    made = cubin.compile_kernel(toy(), Target.parse("cuda:sm_90"))
print("compiled" if compiled else "found", len(made.data), flush=True)
"""


@pytest.fixture(autouse=True)
def fresh_cache(tmp_path):
    with knobs.scope(cache=tmp_path), toys():
        yield


def target() -> Target:
    return Target.parse("cuda:sm_90")


def samplers() -> list[Kernel]:
    (kernel,) = sampling_code(5000, "float32", 16, target()).kernels()
    return [dataclasses.replace(kernel, num_warps=warps) for warps in (2, 4, 8, 16)]


def racer() -> subprocess.Popen[str]:
    places = os.pathsep.join([str(Path(__file__).parents[1]), *(p for p in sys.path if p)])
    return subprocess.Popen(
        [sys.executable, "-P", "-c", RACER], stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": places}
    )


@pytest.mark.xcompile
def test_two_processes_compile_a_kernel_once():
    path = cubin.entry_path(toy(), target())
    path.parent.mkdir(parents=True)
    with open(path.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        racers = [racer(), racer()]
        assert [r.stdout.readline() for r in racers] == ["looked\n"] * 2  # neither has it; both go for the lock
    said = sorted(r.communicate()[0].splitlines()[-1].split()[0] for r in racers)
    assert said == ["compiled", "found"]
    assert cubin.cached(toy(), target()) is not None


@pytest.mark.xcompile
def test_many_are_compiled_by_workers_and_found_again(monkeypatch):
    seen = []
    first = compile_kernel(samplers()[0], target())
    made = compile_all(samplers() * 2, target(), jobs=2, progress=lambda done, total: seen.append((done, total)))
    assert list(made) == samplers()
    assert [c.num_warps for c in made.values()] == [2, 4, 8, 16]
    assert made[samplers()[0]] == first
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
    monkeypatch.setattr(cubin, "_compile", None)
    monkeypatch.setattr(cubin_parallel, "_start", None)
    assert compile_all(samplers(), target()) == made


@pytest.mark.xcompile
def test_workers_are_used_for_more_than_a_few(monkeypatch):
    used = []
    monkeypatch.setattr(cubin_parallel, "compile_kernel", lambda kernel, target: kernel)
    monkeypatch.setattr(cubin_parallel, "fill_cache", lambda kernels, target, workers, done: used.append(workers))
    compile_all(samplers()[:2], target(), jobs=8)
    assert used == []
    compile_all(samplers(), target(), jobs=8)
    compile_all(samplers(), target(), jobs=1)
    assert used == [4]


@pytest.mark.xcompile
def test_an_error_in_a_worker_is_the_errors_own_line():
    lacking = [dataclasses.replace(k, constants=k.constants[:-1]) for k in samplers()]
    with pytest.raises(BuildError, match=r"^kernel sample:sample\(.*for sm_90: no type and no constant for PDL$"):
        compile_all(lacking, target(), jobs=2)


def test_a_worker_that_dies_is_reported_with_its_last_line(monkeypatch):
    start = subprocess.Popen
    line = "import sys; sys.stdin.readline(); sys.exit('MemoryError: out of memory')"
    monkeypatch.setattr(
        subprocess, "Popen", lambda args, **options: start([sys.executable, "-S", "-c", line], **options)
    )
    with pytest.raises(BuildError, match=r"for cuda:sm_90 ended early \(MemoryError: out of memory\)"):
        cubin_parallel.fill_cache(samplers(), target(), 2, lambda: None)


def test_a_disk_too_full_for_a_temporary_file_is_told_and_not_waited_for(monkeypatch):
    def full():
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("tempfile.TemporaryFile", full)
    with pytest.raises(BuildError, match=r"No space left on device.*set TMPDIR to a writable folder with free space"):
        cubin_parallel.fill_cache(samplers(), target(), 2, lambda: None)


def test_the_key_is_of_the_kernel_the_template_the_gpu_and_triton(tmp_path, monkeypatch):
    first = cubin.entry_path(toy(), target())
    assert cubin.entry_path(toy(), target()) == first
    others = {
        cubin.entry_path(toy(block=64), target()),
        cubin.entry_path(toy("def hook(x, z): return z"), target()),
        cubin.entry_path(toy(), Target.parse("cuda:sm_80")),
    }
    monkeypatch.setattr(cubin, "triton_version", lambda: "4.0.0")
    others.add(cubin.entry_path(toy(), target()))
    assert len(others | {first}) == 5


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("TRITON_DEFAULT_FP_FUSION", "0"),
        ("TRITON_F32_DEFAULT", "ieee"),
        ("PTXAS_OPTIONS", "--maxrregcount=64"),
        ("DISABLE_PTXAS_OPT", "1"),
        ("DISABLE_LLVM_OPT", "1"),
        ("TRITON_OVERRIDE_ARCH", "sm89"),
    ],
)
def test_the_key_is_of_the_settings_that_change_code(name, value, monkeypatch):
    first = cubin.entry_path(toy(), target())
    monkeypatch.setenv(name, value)
    assert cubin.entry_path(toy(), target()) != first


def test_the_key_is_of_the_assembler_and_of_none_that_another_gpu_uses(tmp_path, monkeypatch):
    first = cubin.entry_path(toy(), target())
    for number in (1, 2):
        ptxas = tmp_path / f"ptxas{number}"
        ptxas.write_text(f"#!/bin/sh\necho Cuda compilation tools, release 12.{number}, V12.{number}.0\n")
        ptxas.chmod(0o755)
    monkeypatch.setenv("TRITON_PTXAS_BLACKWELL_PATH", str(tmp_path / "ptxas1"))
    assert cubin.entry_path(toy(), target()) == first
    monkeypatch.setenv("TRITON_PTXAS_PATH", str(tmp_path / "ptxas1"))
    second = cubin.entry_path(toy(), target())
    monkeypatch.setenv("TRITON_PTXAS_PATH", str(tmp_path / "ptxas2"))
    assert len({first, second, cubin.entry_path(toy(), target())}) == 3


def test_the_key_follows_the_texts_of_a_template_and_of_what_it_imports(tmp_path):
    text = (FOLDER / "toy.py").read_text()
    (tmp_path / "kind.py").write_text(text + "from llmopt.codegen.templates.kin import f\n")
    (tmp_path / "kin.py").write_text("from llmopt.codegen.templates import cousin\n")
    (tmp_path / "cousin.py").write_text("import llmopt.codegen.templates.kind\n")
    (tmp_path / "other.py").write_text("")
    with toys(tmp_path):
        texts = [hooks.template_text("kind:toy")]
        for name in ("kind", "kin", "cousin", "other"):
            with open(tmp_path / f"{name}.py", "a") as file:
                file.write("# more\n")
            texts.append(hooks.template_text("kind:toy"))
    assert len(set(texts)) == 4
    assert texts[-1] == texts[-2]


def test_without_triton_the_remedy_is_said(monkeypatch):
    def absent(name):
        raise cubin.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(cubin.importlib.metadata, "version", absent)
    with pytest.raises(BuildError, match="pip install triton"):
        compile_kernel(toy(), target())
