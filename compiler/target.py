"""Targets: the machine a program is compiled for, as plain data; providers name the facts that they need."""

from __future__ import annotations

import json
import os
import platform
import shlex
import shutil
from dataclasses import dataclass
from typing import Any

from llmopt.compiler import plain
from llmopt.compiler.errors import TargetError, did_you_mean

VERSION = 1

# what each instruction set can run, itself included
ISAS: dict[str, frozenset[str]] = {
    "avx512": frozenset({"avx512", "avx2", "generic"}),
    "avx2": frozenset({"avx2", "generic"}),
    "neon": frozenset({"neon", "generic"}),
    "generic": frozenset({"generic"}),
}

TARGETS: dict[str, str] = {
    "cpu": "this machine's CPU",
    "cpu:avx512": "x86-64 with AVX-512",
    "cpu:avx2": "x86-64 with AVX2",
    "cpu:neon": "64-bit Arm",
    "cpu:generic": "any CPU, no vector extension assumed",
}


@dataclass(frozen=True)
class Target:
    """A CPU: its instruction set, the cores to use, and the tools found beside it (`cpp`: a C++ compiler)."""

    kind: str
    isa: str
    cores: int
    features: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        if self.kind != "cpu":
            raise TargetError(_unknown(self.kind))
        if self.isa not in ISAS:
            raise TargetError(f"target isa {self.isa!r} is unknown; {did_you_mean(str(self.isa), ISAS)}")
        if not plain.is_int(self.cores) or self.cores < 1:
            raise TargetError(f"target {self.name}: cores is {self.cores!r}, wanted a whole number >= 1")

    @property
    def name(self) -> str:
        """`cpu:avx512`: what `parse` reads."""
        return f"{self.kind}:{self.isa}"

    @property
    def facts(self) -> frozenset[str]:
        """What a provider's `needs` may name: the kind, each instruction set it runs, its features."""
        return frozenset({self.kind}) | ISAS[self.isa] | self.features

    @classmethod
    def detect(cls) -> Target:
        """The CPU of this process; torch judges its vector extensions, so ATEN_CPU_CAPABILITY counts."""
        return cls("cpu", _isa(), _cores(), frozenset({"cpp"} if cxx() else ()))

    @classmethod
    def parse(cls, text: str) -> Target:
        """`cpu` (this machine) or `cpu:ISA`; cores and features are this machine's. Raises TargetError."""
        if text not in TARGETS:
            raise TargetError(_unknown(text))
        here = cls.detect()
        return here if text == "cpu" else cls("cpu", text.split(":")[1], here.cores, here.features)

    def fits(self, machine: Target) -> str | None:
        """None if a program compiled for this target runs on `machine`, else the reason why not.

        Cores and features are left out: they shape speed and compile time, not what the program may execute.
        """
        if self.kind != machine.kind:
            return f"it was compiled for {self.name} and this machine is {machine.name}"
        if self.isa not in ISAS[machine.isa]:
            able = ", ".join(sorted(ISAS[machine.isa]))
            return f"it was compiled for {self.isa} and this machine runs only {able}"
        return None

    def to_dict(self) -> dict[str, Any]:
        """JSON types only; `from_dict` reads it back."""
        return {
            "version": VERSION,
            "kind": self.kind,
            "isa": self.isa,
            "cores": self.cores,
            "features": sorted(self.features),
        }

    def to_json(self) -> str:
        """One JSON object, keys in a fixed order."""
        return json.dumps(self.to_dict())

    @classmethod
    def from_dict(cls, data: Any) -> Target:
        """Read `to_dict`'s form. Raises TargetError."""
        known = {"version", "kind", "isa", "cores", "features"}
        data = plain.mapping(data, "target", TargetError, known, wanted=known)
        if data["version"] != VERSION:
            raise TargetError(
                f"target: version {data['version']!r}, this llmopt reads {VERSION}: compile the model again"
            )
        kind, isa = (plain.text(data[key], f"target: {key}", TargetError) for key in ("kind", "isa"))
        features = plain.items(data["features"], "target: features", TargetError)
        names = (plain.text(name, "target: features", TargetError) for name in features)
        return cls(kind, isa, data["cores"], frozenset(names))

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


def _unknown(text: str) -> str:
    if text.split(":")[0] in ("cuda", "gpu", "sm"):
        known = ", ".join(TARGETS)
        return f"target {text!r} is a GPU, and this version of llmopt runs on CPU only: use one of {known}"
    return f"target {text!r} is unknown; {did_you_mean(text, TARGETS)}"
