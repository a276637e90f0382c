"""GPUs as targets, on machines that are made up: nothing here needs a GPU, or minds one."""

from __future__ import annotations

import dataclasses
import logging
import subprocess
import sys
import types
from typing import Any

import pytest
import torch

from llmopt import codegen
from llmopt.compiler import gpus, target
from llmopt.compiler.errors import TargetError
from llmopt.compiler.gpus import GPUS, Seen
from llmopt.compiler.target import ISAS, Target

H200 = {
    "name": "NVIDIA H200", "major": 9, "minor": 0, "multi_processor_count": 132, "L2_cache_size": 60 << 20,
    "shared_memory_per_block_optin": 232448, "memory_clock_rate": 3201000, "memory_bus_width": 6144,
}  # fmt: skip
A10 = {
    "name": "NVIDIA A10", "major": 8, "minor": 6, "multi_processor_count": 72, "L2_cache_size": 6 << 20,
    "shared_memory_per_block_optin": 101376, "memory_clock_rate": 6251000, "memory_bus_width": 384,
}  # fmt: skip
CUDA = Seen("2.13.0+cu130", "13.0", "580.82.07", True)


def device(base: dict[str, Any] = H200, **changes: Any) -> Seen:
    return dataclasses.replace(CUDA, properties=types.SimpleNamespace(**base | changes))


def broken(**changes: Any) -> Seen:
    return dataclasses.replace(CUDA, **changes)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch):
    """Call it with what shall be seen of this machine."""
    target._say_once.cache_clear()
    return lambda seen: monkeypatch.setattr(gpus, "look", lambda: seen)


@pytest.mark.parametrize("isa", GPUS)
def test_a_named_gpu_is_its_row_on_any_machine(isa: str, machine):
    made = []
    for seen in (device(), Seen("2.13.0+cpu", None)):
        machine(seen)
        made.append(Target.parse(f"cuda:{isa}"))
    first, second = made
    assert first == second
    assert first.name == f"cuda:{isa}"
    assert {"cuda", isa, "bf16"} <= first.facts
    assert first.shared_bytes == GPUS[isa].shared_bytes
    assert Target.from_json(first.to_json()) == first


def test_rows_hold_the_documented_sizes():
    """What CUDA's programming guide gives for a block's shared memory, and features by generation."""
    kib = {isa: gpu.shared_bytes / 1024 for isa, gpu in GPUS.items()}
    assert kib == {"sm_80": 163, "sm_89": 99, "sm_90": 227, "sm_100": 227, "sm_120": 99}
    assert [isa for isa, gpu in GPUS.items() if "pdl" in gpu.features] == ["sm_90", "sm_100", "sm_120"]
    assert [isa for isa, gpu in GPUS.items() if "wgmma" in gpu.features] == ["sm_90"]
    for isa, gpu in GPUS.items():
        assert isa == "sm_{}{}".format(*gpu.runs_on[0])
        assert len({tuple(row.runs_on) for row in GPUS.values()}) == len(GPUS)
        assert 5e11 < gpu.bandwidth < 1e13


def test_a_gpu_that_is_there_gives_its_own_facts(machine):
    machine(device())
    found = Target.detect()
    assert found == Target.parse("cuda") == Target.detect("cuda")
    assert (found.name, found.cores, found.shared_bytes, found.l2_bytes) == ("cuda:sm_90", 132, 232448, 60 << 20)
    assert found.bandwidth == pytest.approx(4.8e12, rel=0.03)
    assert found.features - {"triton"} == GPUS["sm_90"].features
    assert Target.detect("cpu").kind == Target.parse("cpu").kind == "cpu"


def test_a_slice_of_a_gpu_has_fewer_multiprocessors(machine):
    machine(device(name="NVIDIA H200 MIG 1g.18gb", multi_processor_count=16, L2_cache_size=7 << 20))
    found = Target.detect()
    assert (found.name, found.cores, found.l2_bytes) == ("cuda:sm_90", 16, 7 << 20)
    assert Target.parse("cuda:sm_90").fits(found) is None


def test_bandwidth_is_the_rows_where_the_driver_tells_none(machine):
    machine(device(memory_clock_rate=0))
    assert Target.detect().bandwidth == GPUS["sm_90"].bandwidth


def test_capability_without_a_row_takes_the_best_whose_code_it_runs(machine):
    machine(device(A10))
    found = Target.detect()
    assert (found.name, found.cores, found.shared_bytes) == ("cuda:sm_80", 72, 101376)
    assert "fp8" not in found.facts


@pytest.mark.parametrize(
    ("capability", "isa"),
    [
        ((8, 0), "sm_80"), ((8, 6), "sm_80"), ((8, 9), "sm_89"), ((9, 0), "sm_90"), ((10, 0), "sm_100"),
        ((12, 0), "sm_120"), ((7, 5), None), ((8, 7), None), ((10, 3), None), ((12, 1), None), ((13, 0), None),
    ],
)  # fmt: skip
def test_code_by_capability(capability: tuple[int, int], isa: str | None):
    """Minor versions upwards until 8.9, not on Tegra (8.7); Triton's later binaries are for one capability each."""
    assert gpus.isa_for(capability) == isa


@pytest.mark.parametrize("isa", [isa for isa in GPUS if isa != "sm_80"])
def test_triton_makes_binaries_for_one_capability_from_sm_90_on(isa: str):
    """`sm_90a` and the like are why a row runs on its own capability alone."""
    nvidia = pytest.importorskip("triton.backends.nvidia.compiler")
    named = nvidia.sm_arch_from_capability(int(isa.removeprefix("sm_")))
    assert len(GPUS[isa].runs_on) == 1
    assert named == (isa if isa == "sm_89" else f"{isa}a")


@pytest.mark.parametrize(
    ("built", "on", "said"),
    [
        ("sm_90", "sm_90", None),
        ("sm_90", "sm_100", "runs only sm_100"),
        ("sm_100", "sm_90", "runs only sm_90"),
        ("sm_80", "sm_90", "compiled for sm_80"),
        ("sm_89", "sm_80", "runs only sm_80"),
        ("sm_80", "sm_89", "166912 bytes of shared memory a block and this machine's GPU has 101376"),
    ],
)
def test_fits(built: str, on: str, said: str | None):
    reason = Target.parse(f"cuda:{built}").fits(Target.parse(f"cuda:{on}"))
    assert reason == said or (said is not None and said in reason)


def test_code_within_the_shared_memory_runs_on_a_later_minor_version(machine):
    machine(device(A10))
    assert Target.detect().fits(Target.parse("cuda:sm_89")) is None
    assert "sm_80" in ISAS["cuda"]["sm_89"]


def test_a_cpu_is_no_gpu(machine):
    machine(device())
    assert "compiled for cuda:sm_90" in Target.detect().fits(Target.detect("cpu"))
    assert "compiled for cpu:" in Target.detect("cpu").fits(Target.detect())


UNUSABLE = [
    (Seen("2.13.0+cpu", None), ("torch 2.13.0+cpu is built without CUDA", "install a CUDA build", "cuda:sm_90")),
    (
        device(name="Tesla V100-SXM2-16GB", major=7, minor=0),
        ("'Tesla V100-SXM2-16GB' has compute capability 7.0", "wanted 8.0", "CUDA_VISIBLE_DEVICES"),
    ),
    (
        device(name="NVIDIA B300", major=10, minor=3),
        ("'NVIDIA B300' has compute capability 10.3", "code for sm_100 does not run on it", "target cpu"),
    ),
    (device(name="R100", major=13, minor=0), ("capability 13.0", "no code for (it has sm_80, ", "target cpu")),
    (device(name="Orin", major=8, minor=7), ("capability 8.7", "code for sm_80 does not run on it")),
    (
        broken(
            driver="470.82.01",
            error="The NVIDIA driver on your system is too old (found version 11040). Please update your GPU driver",
        ),
        ("NVIDIA driver is 470.82.01", "CUDA up to 11.4", "built for CUDA 13.0", "wanted 580.65.06 or newer", "older"),
    ),
    (
        broken(cuda="12.8", driver=None, error="Found no NVIDIA driver on your system. Please check"),
        ("no NVIDIA driver is loaded", "wanted 525.60.13 or newer"),
    ),
    (
        broken(driver=None, nodes=False, error="Found no NVIDIA driver on your system. Please check"),
        ("no NVIDIA GPU or driver was found", "cuda:sm_90"),
    ),
    (
        broken(error="Found no NVIDIA driver on your system. Please check that you have an NVIDIA GPU"),
        ("driver 580.82.07 is loaded", "libcuda.so.1 is not visible"),
    ),
    (broken(visible="", error="No CUDA GPUs are available"), ("CUDA_VISIBLE_DEVICES is ''", "unset it")),
    (broken(nodes=False, error="No CUDA GPUs are available"), ("no NVIDIA GPU is visible", "No CUDA GPUs")),
    (broken(error="CUDA error: out of memory"), ("torch cannot use CUDA (it says: CUDA error: out of memory)",)),
]


@pytest.mark.parametrize(("seen", "said"), UNUSABLE)
def test_gpus_that_cannot_be_used(seen: Seen, said: tuple[str, ...], machine):
    machine(seen)
    with pytest.raises(TargetError) as caught:
        Target.parse("cuda")
    message = str(caught.value)
    assert "\n" not in message
    assert [part for part in said if part not in message] == []


def test_the_cpu_stands_in_and_says_so_once(machine, caplog: pytest.LogCaptureFixture):
    machine(device(name="Tesla T4", major=7, minor=5))
    with caplog.at_level(logging.WARNING, "llmopt"):
        assert Target.detect() == Target.detect() == Target.detect("cpu")
    (line,) = caplog.messages
    assert line.startswith(
        "llmopt: the GPU is left alone and the CPU is used: GPU 'Tesla T4' has compute capability 7.5"
    )


def test_without_a_gpu_nothing_is_said(machine, caplog: pytest.LogCaptureFixture):
    machine(Seen("2.13.0+cpu", None))
    with caplog.at_level(logging.WARNING, "llmopt"):
        assert Target.detect().kind == "cpu"
    assert not caplog.messages


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("gpu", "did you mean 'cuda'?"),
        ("cuda:", "did you mean 'cuda'?"),
        ("cuda:0", "did you mean 'cuda'? CUDA_VISIBLE_DEVICES"),
        ("sm_90", "did you mean 'cuda:sm_90'?"),
        ("cuda:90", "did you mean 'cuda:sm_90'?"),
        ("cuda:9.0", "did you mean 'cuda:sm_90'?"),
        ("cuda:sm_90a", "did you mean 'cuda:sm_90'?"),
        ("H100", "did you mean 'cuda:sm_90'?"),
        ("cuda:rtx 5090", "did you mean 'cuda:sm_120'?"),
        ("cuda:sm_9O", "did you mean 'cuda:sm_90'?"),
        ("cuda:sm_86", "on a machine with such a GPU, 'cuda' compiles code of sm_80 for it"),
        ("cuda:sm_75", "is too old, wanted 8.0 or newer"),
        ("cuda:sm_103", "code for sm_100 does not run on it"),
        ("cuda:sm_130", "has no code for: use one of cuda:sm_80, "),
        ("cuda:sm_99", "run on it: use one of cuda:sm_80, cuda:sm_89, cuda:sm_90, cuda:sm_100, cuda:sm_120, or cpu."),
        ("cudaa", "did you mean 'cuda'?"),
    ],
)
def test_names_that_are_no_targets(text: str, said: str):
    with pytest.raises(TargetError) as caught:
        Target.parse(text)
    assert str(caught.value).startswith(f"target {text!r} is unknown; ")
    assert said in str(caught.value)


def test_a_gpu_needs_its_sizes():
    with pytest.raises(TargetError, match="cuda:sm_90: shared_bytes is 0, wanted a whole number >= 1"):
        Target("cuda", "sm_90", 132)


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.86.15  Thu Jan 23 03:24:25 UTC 2025\nGCC", "570.86.15"),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.82.07  Release Build", "580.82.07"),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for aarch64  560.35.03  Release", "560.35.03"),
        ("something else", None),
    ],
)
def test_driver_version(text: str, version: str | None, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(gpus.Path, "read_text", lambda self: text)
    assert gpus._driver() == version


@pytest.mark.parametrize(
    "error", [RuntimeError("no GPUs\nTraceback"), AssertionError("Torch not compiled with CUDA enabled")]
)
def test_what_torch_raises_is_a_reason(error: Exception, monkeypatch: pytest.MonkeyPatch):
    def fail() -> int:
        raise error

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "current_device", fail)
    seen = gpus.look()
    assert seen.properties is None
    assert seen.error == str(error).split("\n")[0]
    assert gpus.fault(seen) is not None


def test_without_triton_one_line_and_no_fact(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    codegen._say_once.cache_clear()
    wanted = Target.parse("cuda:sm_90")
    wanted = dataclasses.replace(wanted, features=wanted.features | {"triton"})
    monkeypatch.setitem(sys.modules, "triton", None)  # its import fails
    with caplog.at_level(logging.WARNING, "llmopt"):
        for _ in range(2):
            assert codegen.usable(wanted, ("triton", "reference")).features == wanted.features - {"triton"}
        assert codegen.usable(wanted, ("reference",)) == wanted
    (line,) = caplog.messages
    assert line.startswith("llmopt: Triton cannot be imported")


def test_naming_a_gpu_imports_neither_torch_nor_triton():
    code = (
        "import sys; from llmopt.compiler.target import Target; Target.parse('cuda:sm_90');"
        "assert not {'torch', 'triton'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-P", "-c", code], check=True)
