"""The GPU code of an artifact: cubins with what launching them takes, and the code of each region that calls them.

    code/cubins.json   each kernel, what a launch must know of it, and its file
    code/NAME.cubin    the cubins; equal ones are stored once
    code/regions.json  the code of each region for each class of shapes

Reading needs neither Triton nor a compiler.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmopt.codegen.cubin import Cubin
from llmopt.codegen.kernel import Kernel, RegionCode
from llmopt.compiler.program import Program
from llmopt.compiler.target import Target
from llmopt.runtime.gpu_code import GpuCode
from llmopt.runtime.replace import Folder


def write_code(folder: Folder, code: GpuCode) -> dict[str, Any]:
    """Write all that has been compiled; the index that `read_code` wants."""
    kernels = dict.fromkeys(k for region in code.codes.values() for k in region.kernels())
    index = write_kernels(folder, {kernel: code.cubin(kernel) for kernel in kernels})
    regions = [{"region": name, "shape": shape, **c.to_data()} for (name, shape), c in sorted(code.codes.items())]
    return {**index, "regions": folder.add("code/regions.json", _lines(regions))}


def read_code(path: Path, index: Mapping[str, Any], program: Program, target: Target) -> GpuCode:
    """The code of an artifact at `path`. Raises KeyError, TypeError or ValueError: not in the form of `write_code`."""
    cubins = {kernel.digest(): (kernel, cubin) for kernel, cubin in read_kernels(path, index).items()}
    kernels = {digest: kernel for digest, (kernel, _) in cubins.items()}
    entries = json.loads((path / index["regions"]).read_text(encoding="utf-8"))
    codes = {(e["region"], e["shape"]): RegionCode.from_data(e, kernels) for e in entries}
    return GpuCode(program, target, codes, {digest: cubin for digest, (_, cubin) in cubins.items()})


def write_kernels(folder: Folder, cubins: Mapping[Kernel, Cubin]) -> dict[str, Any]:
    """Write cubins; the index that `read_kernels` wants."""
    files: dict[str, None] = {}
    entries = []
    for kernel, cubin in cubins.items():
        file = f"code/{cubin.entry}_{hashlib.sha256(cubin.data).hexdigest()[:20]}.cubin"
        if file not in files:
            files[folder.add(file, cubin.data)] = None
        entries.append({"file": file, "cubin": cubin.facts(), "kernel": kernel.to_data()})
    return {"cubins": folder.add("code/cubins.json", _lines(entries)), "files": list(files)}


def read_kernels(path: Path, index: Mapping[str, Any]) -> dict[Kernel, Cubin]:
    """The cubins of an artifact at `path`, and only files that the index names. Raises as `read_code` does."""
    data = {file: (path / file).read_bytes() for file in index["files"]}
    entries = json.loads((path / index["cubins"]).read_text(encoding="utf-8"))
    return {Kernel.from_data(e["kernel"]): Cubin.from_facts(e["cubin"], data[e["file"]]) for e in entries}


def _lines(entries: list[dict[str, Any]]) -> str:
    """JSON with one line for each entry."""
    return "[\n " + ",\n ".join(map(json.dumps, entries)) + "\n]\n"
