"""Targets: the machine a program is compiled for, as plain data; providers name the facts that they need."""

from __future__ import annotations

import functools
import importlib.util
import json
import logging
import os
import platform
import shlex
import shutil
from dataclasses import dataclass
from typing import Any

from llmopt.compiler import gpus, plain
from llmopt.compiler.errors import TargetError, did_you_mean

VERSION = 2
_SIZES = ("shared_bytes", "l2_bytes", "bandwidth")

# what each instruction set can run, itself included: of CPUs by extension, of GPUs by binary compatibility
ISAS: dict[str, dict[str, frozenset[str]]] = {
    "cpu": {
        "avx512": frozenset({"avx512", "avx2", "generic"}),
        "avx2": frozenset({"avx2", "generic"}),
        "neon": frozenset({"neon", "generic"}),
        "generic": frozenset({"generic"}),
    },
    "cuda": {isa: gpus.included(isa) for isa in gpus.GPUS},
}

TARGETS: dict[str, str] = {
    "cpu": "this machine's CPU",
    "cpu:avx512": "x86-64 with AVX-512",
    "cpu:avx2": "x86-64 with AVX2",
    "cpu:neon": "64-bit Arm",
    "cpu:generic": "any CPU, no vector extension assumed",
    "cuda": "this machine's GPU",
    **{f"cuda:{isa}": f"NVIDIA {', '.join(gpu.products)}" for isa, gpu in gpus.GPUS.items()},
}

_log = logging.getLogger("llmopt")


@dataclass(frozen=True)
class Target:
    """A CPU or a GPU: its instruction set, how many cores (of a GPU: multiprocessors) to use, and what else it has.

    Features of a CPU are the tools found beside it (`cpp`: a C++ compiler); of a GPU what its hardware can do (`bf16`,
    `fp8`, `pdl`, `tma`, ...) and `triton`, if it is installed. The sizes are a GPU's: `shared_bytes` of shared memory a
    block may have, `l2_bytes`, and `bandwidth`, bytes a second from memory.
    """

    kind: str
    isa: str
    cores: int
    features: frozenset[str] = frozenset()
    shared_bytes: int = 0
    l2_bytes: int = 0
    bandwidth: int = 0

    def __post_init__(self) -> None:
        if self.kind not in ISAS:
            raise TargetError(f"target kind {self.kind!r} is unknown; {did_you_mean(str(self.kind), ISAS)}")
        isas = ISAS[self.kind]
        if self.isa not in isas:
            raise TargetError(f"target isa {self.isa!r} is unknown; {did_you_mean(str(self.isa), isas)}")
        lowest = {"cores": 1} | dict.fromkeys(_SIZES, 1 if self.kind == "cuda" else 0)
        for key, least in lowest.items():
            value = getattr(self, key)
            if not plain.is_int(value) or value < least:
                raise TargetError(f"target {self.name}: {key} is {value!r}, wanted a whole number >= {least}")

    @property
    def name(self) -> str:
        """`cpu:avx512`, `cuda:sm_90`: what `parse` reads."""
        return f"{self.kind}:{self.isa}"

    @property
    def facts(self) -> frozenset[str]:
        """What a provider's `needs` may name: the kind, each instruction set it runs, its features."""
        return frozenset({self.kind}) | ISAS[self.kind][self.isa] | self.features

    @classmethod
    def detect(cls, kind: str | None = None) -> Target:
        """This machine's GPU (torch's current CUDA device) if it has one that can be used, else its CPU.

        With `kind`, that one; raises TargetError with the reason if there is no such GPU. A GPU that cannot be used is
        passed over with one line in the log. torch judges the CPU's vector extensions, so ATEN_CPU_CAPABILITY counts.
        """
        if kind not in (None, *ISAS):
            raise TargetError(f"target kind {kind!r} is unknown; {did_you_mean(str(kind), ISAS)}")
        if kind != "cpu":
            seen = gpus.look()
            fault = gpus.fault(seen)
            if fault is None:
                return _gpu(seen.properties)
            if kind == "cuda":
                raise TargetError(f"this machine has no GPU to use: {fault}")
            if seen.nodes:
                _say_once(f"the GPU is left alone and the CPU is used: {fault}")
        return cls("cpu", _isa(), _cores(), frozenset({"cpp"} if cxx() else ()))

    @classmethod
    def parse(cls, text: str) -> Target:
        """A name of `TARGETS`. Raises TargetError.

        `cpu` and `cuda` are this machine's. `cpu:ISA` has this machine's cores and compiler; `cuda:ISA` is the same on
        every machine, GPU or none, but for the feature `triton`.
        """
        if text not in TARGETS:
            raise TargetError(f"target {text!r} is unknown; {gpus.meant(text) or did_you_mean(text, TARGETS)}")
        kind, _, isa = text.partition(":")
        if text == "cuda":
            return _this_gpu()
        if text == "cpu":
            return cls.detect(text)
        if kind == "cuda":
            gpu = gpus.GPUS[isa]
            features = gpu.features | _triton()
            return cls(kind, isa, gpu.cores, features, gpu.shared_bytes, gpu.l2_bytes, gpu.bandwidth)
        here = cls.detect(kind)
        return cls(kind, isa, here.cores, here.features)

    def fits(self, machine: Target) -> str | None:
        """None if a program compiled for this target runs on `machine`, else the reason why not.

        Cores, caches and features are left out: they shape speed and compile time, not what the program may execute.
        A GPU's shared memory counts: a block that asks for more than there is cannot start.
        """
        if self.kind != machine.kind:
            return f"it was compiled for {self.name} and this machine is {machine.name}"
        if self.isa not in ISAS[self.kind][machine.isa]:
            able = ", ".join(sorted(ISAS[self.kind][machine.isa]))
            return f"it was compiled for {self.isa} and this machine runs only {able}"
        if self.shared_bytes > machine.shared_bytes:
            return (
                f"it was compiled for {self.shared_bytes} bytes of shared memory a block and this machine's GPU has "
                f"{machine.shared_bytes}"
            )
        return None

    def to_dict(self) -> dict[str, Any]:
        """JSON types only; `from_dict` reads it back."""
        return {
            "version": VERSION,
            "kind": self.kind,
            "isa": self.isa,
            "cores": self.cores,
            "features": sorted(self.features),
            **{key: getattr(self, key) for key in _SIZES},
        }

    def to_json(self) -> str:
        """One JSON object, keys in a fixed order."""
        return json.dumps(self.to_dict())

    @classmethod
    def from_dict(cls, data: Any) -> Target:
        """Read `to_dict`'s form. Raises TargetError."""
        known = {"version", "kind", "isa", "cores", "features", *_SIZES}
        version = data.get("version", VERSION) if isinstance(data, dict) else VERSION
        if version != VERSION:  # whose keys may be others
            raise TargetError(f"target: version {version!r}, this llmopt reads {VERSION}: compile the model again")
        data = plain.mapping(data, "target", TargetError, known, wanted=known)
        kind, isa = (plain.text(data[key], f"target: {key}", TargetError) for key in ("kind", "isa"))
        features = plain.items(data["features"], "target: features", TargetError)
        names = (plain.text(name, "target: features", TargetError) for name in features)
        return cls(kind, isa, data["cores"], frozenset(names), *(data[key] for key in _SIZES))

    @classmethod
    def from_json(cls, text: str) -> Target:
        """Read `to_json`'s form. Raises TargetError."""
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise TargetError(f"target: not JSON: {error}") from error
        return cls.from_dict(data)


def cxx() -> tuple[str, ...] | None:
    """The C++ compiler's command: CXX if set (and only that), else c++, g++ or clang++; None if absent."""
    wanted = os.environ.get("CXX", "").strip()
    for command in [shlex.split(wanted)] if wanted else [["c++"], ["g++"], ["clang++"]]:
        if shutil.which(command[0]):
            return tuple(command)
    return None


def _isa() -> str:
    import torch  # here, so that the command line and its help come without the seconds torch takes to import

    seen = torch.backends.cpu.get_cpu_capability()
    if seen in ("AVX512", "AVX2"):
        return seen.lower()
    return "neon" if platform.machine() in ("aarch64", "arm64") else "generic"


def _cores() -> int:
    # a container's share may be smaller than the machine
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _this_gpu() -> Target:
    try:
        return Target.detect("cuda")
    except TargetError as error:
        raise TargetError(
            f"target 'cuda': {error}; to compile for another machine, name its GPU, such as cuda:sm_90"
        ) from error


def _gpu(properties: Any) -> Target:
    isa = gpus.isa_for((properties.major, properties.minor))
    assert isa is not None  # as `gpus.fault` found
    return Target(
        "cuda",
        isa,
        int(properties.multi_processor_count),
        gpus.GPUS[isa].features | _triton(),
        int(properties.shared_memory_per_block_optin),
        int(properties.L2_cache_size),
        gpus.bandwidth(properties) or gpus.GPUS[isa].bandwidth,
    )


def _triton() -> frozenset[str]:
    # looked up, not imported: that would take a second, and codegen tries it before anything relies on it
    return frozenset({"triton"} if importlib.util.find_spec("triton") else ())


@functools.cache
def _say_once(line: str) -> None:
    _log.warning("llmopt: %s", line)
