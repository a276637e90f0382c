"""The compiled code of an artifact, and what it asks of the machine that loads it."""

from __future__ import annotations

import hashlib
import platform
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from llmopt.codegen import cpp
from llmopt.codegen.regions import CompiledRegion
from llmopt.compiler.errors import ArtifactError, TargetError
from llmopt.compiler.program import Program
from llmopt.compiler.target import Target
from llmopt.runtime import cubins
from llmopt.runtime.gpu_code import GpuCode
from llmopt.runtime.loader import Regions
from llmopt.runtime.replace import Folder

Code = TypeVar("Code", Regions, GpuCode)

# flags of /proc/cpuinfo that a compiler told to build for this very CPU makes use of
_INSTRUCTIONS = re.compile(
    "avx|sse|ssse|amx|fma|f16c|bmi|abm|popcnt|movbe|aes|vaes|pclmul|vpclmul|sha|gfni|adx|cldemote|sve|asimd|fp|crc"
)


def write(folder: Folder, program: Program, code: Regions | GpuCode) -> dict[str, Any]:
    """Write code/ and return its index: the files of each region, and what they need; empty if nothing is compiled."""
    if isinstance(code, GpuCode):
        return {"gpu": cubins.write_code(folder, code)}
    providers = {n.meta.get("provider") for g in program.graphs.values() for n in g.calls()}
    kernels = cpp.load_library() if "cpp" in providers else None
    if kernels is not None:
        folder.add(f"code/{kernels.name}", kernels.read_bytes())
    regions = {}
    for number, (key, region) in enumerate(sorted(code.compiled.items())):
        libraries = {name: f"code/{_short(data)}.so" for name, data in region.libraries.items()}
        for name, file in libraries.items():
            if file not in folder.files:
                folder.add(file, region.libraries[name])
        regions[key] = {"source": folder.add(f"code/region_{number}.py", region.source), "libraries": libraries}
    if not regions and kernels is None:
        return {}
    return {"kernels": kernels and kernels.name, "regions": regions, "needs": _machine()}


def read(path: Path, code: Mapping[str, Any], program: Program, target: Target) -> Regions | GpuCode:
    """The code of a program; the kernel library goes to the cache, unless one for here is there, and is loaded.

    Raises ArtifactError: the code of a region is missing.
    """
    if "gpu" in code:
        found = cubins.read_code(path, code["gpu"], program, target)
        missing = [f"{name}@{shape}" for name, shape in found.keys() if (name, shape) not in found.codes]  # noqa: SIM118
        return _whole(path, found, missing)
    if code.get("kernels"):
        cpp.install_library(code["kernels"], (path / "code" / code["kernels"]).read_bytes())
        cpp.load_library()
    regions = Regions(program, {key: _region(path, entry) for key, entry in code.get("regions", {}).items()})
    wanted = {regions.key(name, (single, single)) for name in regions.names() for single in (True, False)}
    return _whole(path, regions, sorted(wanted - regions.compiled.keys()))


def files(code: Mapping[str, Any]) -> set[str]:
    """Every file that `read` reads."""
    gpu = code.get("gpu")
    used = {gpu["cubins"], gpu["regions"], *gpu["files"]} if gpu else set()
    used |= {f"code/{code['kernels']}"} if code.get("kernels") else set()
    for region in code.get("regions", {}).values():
        used |= {region["source"], *region["libraries"].values()}
    return used


def _whole(path: Path, code: Code, missing: Sequence[str]) -> Code:
    if missing:
        raise ArtifactError(f"{path}: the code of region {missing[0]!r} is missing; save the artifact again")
    return code


def _machine() -> dict[str, Any]:
    """What compiled code relies on: torch's and Python's interfaces, and the instructions of the CPU."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    found = re.search(r"^(?:flags|Features)\s*:(.*)$", text, flags=re.MULTILINE)
    flags = sorted(f for f in (found.group(1).split() if found else ()) if _INSTRUCTIONS.match(f))
    return {
        "torch": torch.__version__.split("+")[0],
        "python": f"{sys.version_info.major}.{sys.version_info.minor}",
        "machine": platform.machine(),
        "instructions": flags,
    }


def check_machine(path: Path, target: Target, code: Mapping[str, Any]) -> None:
    """Raise TargetError or ArtifactError if what `write` returned does not run here."""
    reason = _mismatch(target)
    here, needs = _machine(), code.get("needs", {})
    lacking = sorted(set(needs.get("instructions", ())) - set(here["instructions"]))
    if reason is None and needs.get("machine", here["machine"]) != here["machine"]:
        reason = f"its code is for {needs['machine']} and this machine is {here['machine']}"
    if reason is None and lacking:
        reason = f"its code uses instructions this CPU lacks ({', '.join(lacking[:4])})"
    if reason is not None:
        raise TargetError(f"artifact {str(path)!r} does not run here: {reason}; compile the model for this machine")
    for name in ("torch", "python"):
        if needs.get(name, here[name]) != here[name]:
            raise ArtifactError(
                f"artifact {str(path)!r} holds code for {name} {needs[name]} and this is {name} {here[name]}; "
                f"use {name} {needs[name]}, or compile the model again"
            )


def _mismatch(target: Target) -> str | None:
    try:
        return target.fits(Target.detect(target.kind))
    except TargetError as error:
        return f"it was compiled for {target.name}; {error}"


def _region(path: Path, entry: Mapping[str, Any]) -> CompiledRegion:
    libraries = {name: (path / file).read_bytes() for name, file in entry["libraries"].items()}
    return CompiledRegion((path / entry["source"]).read_text(encoding="utf-8"), libraries)


def _short(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:20]
