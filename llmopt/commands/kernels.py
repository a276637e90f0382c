"""`llmopt kernels`: what a model's regions are on a GPU, and what each kernel was compiled to."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from rich.table import Table

from llmopt.codegen.cubin import Cubin
from llmopt.codegen.kernel import Call, Kernel
from llmopt.commands.model import Wanted
from llmopt.compiler.errors import InputError
from llmopt.console import Progress, is_artifact, stages, write_json, write_table
from llmopt.runtime import artifact
from llmopt.runtime.gpu_code import GpuCode, code_for

_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?!NOP|\s)[^;]+;")  # nvdisasm: an address, an instruction


def list_kernels(model: str, wanted: Wanted, as_json: bool) -> None:
    """Every call of every region, with the classes of steps it is for; a model is compiled, an artifact only read."""
    with stages(f"kernels of {model}") as progress:
        code = _code(model, wanted, progress)
        progress("disassembling")
        counts = instruction_counts(code.cubin(k) for region in code.codes.values() for k in region.kernels())
    rows = [_row(*found, code, counts) for found in _calls(code)]
    notes = code_notes(code)
    if as_json:
        write_json({"target": code.target.to_dict(), "calls": rows, "notes": notes})
        return
    table = Table(
        "region", "classes", "kernel", "constants", "registers", "spills", "shared", "cubin", "instructions",
        title=f"{len({k.digest() for r in code.codes.values() for k in r.kernels()})} kernels for {code.target.name}",
    )  # fmt: skip
    for row in rows:
        constants = " ".join(f"{name}={value}" for name, value in row["constants"].items())
        sizes = [row[key] for key in ("registers", "spills", "shared_bytes", "cubin_bytes", "instructions")]
        shown = ["" if size is None else str(size) for size in sizes]
        classes = " ".join(row["classes"]) + (f" ({row['when']})" if row["when"] else "")
        table.add_row(row["region"], classes, row["kernel"] or f"torch: {row['op']}", constants, *shown)
    write_table(table)
    for note in notes:
        print(note)


def code_notes(code: GpuCode) -> list[str]:
    """`gemm_2, classes 1 8: why no single kernel does it`, for each region and reason."""
    classes: dict[tuple[str, str], list[str]] = {}
    for (name, shape), region in code.codes.items():
        for note in region.notes:
            classes.setdefault((name, note), []).append(shape)
    return [f"{name}, classes {' '.join(shapes)}: {note}" for (name, note), shapes in classes.items()]


def instruction_counts(cubins: Iterable[Cubin]) -> dict[Cubin, int]:
    """Machine instructions of each cubin, padding left out; none where Triton came without a disassembler."""
    found = importlib.util.find_spec("triton")
    tool = Path(str(found.origin)).parent / "backends" / "nvidia" / "bin" / "nvdisasm" if found else None
    if tool is None or not tool.is_file():
        return {}
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:

        def count(numbered: tuple[int, Cubin]) -> tuple[Cubin, int]:
            file = Path(folder) / f"{numbered[0]}.cubin"
            file.write_bytes(numbered[1].data)
            text = subprocess.run([str(tool), "-c", str(file)], capture_output=True, text=True, check=False).stdout
            return numbered[1], len(_INSTRUCTION.findall(text))

        return {cubin: number for cubin, number in pool.map(count, enumerate(dict.fromkeys(cubins))) if number}


def _code(model: str, wanted: Wanted, progress: Progress) -> GpuCode:
    if is_artifact(model):
        wanted.check_artifact(model)
        parts = artifact.load(Path(model), runs_here=False)
        code, made, choices = parts.regions, parts.target, parts.program.choices
    else:
        program, _, context = wanted.build(model, progress)
        code, made, choices = code_for(program, context.target), context.target, program.choices
    if not isinstance(code, GpuCode):
        why = choices.get("without_kernels", "no GPU kernels; give a GPU's target, such as --target cuda:sm_90")
        raise InputError(f"{model!r} for target {made.name} has {why}")
    code.compile_all(progress)
    return code


def _calls(code: GpuCode) -> Iterator[tuple[str, Call, list[str]]]:
    """(region, call, classes of steps) with equal calls of a region's classes as one."""
    classes: dict[tuple[str, Call], list[str]] = {}
    for name in code.names():
        for _, shape in (key for key in code.keys() if key[0] == name):  # noqa: SIM118
            for call in code.code(name, shape).calls:
                classes.setdefault((name, call), []).append(shape)
    yield from ((name, call, shapes) for (name, call), shapes in classes.items())


def _row(region: str, call: Call, classes: list[str], code: GpuCode, counts: dict[Cubin, int]) -> dict[str, Any]:
    kernel = call.kernel
    cubin = None if kernel is None else code.cubin(kernel)
    return {
        "region": region,
        "classes": list(dict.fromkeys(classes)),
        "kernel": kernel and kernel.template,
        "op": call.op,
        "grid": list(call.grid) if kernel else None,
        "constants": _constants(kernel) if kernel else dict(call.constants),
        "when": call.when,
        "registers": cubin and cubin.registers,
        "spills": cubin and cubin.spills,
        "shared_bytes": cubin and cubin.shared,
        "cubin_bytes": cubin and len(cubin.data),
        "instructions": counts.get(cubin) if cubin else None,
    }


def _constants(kernel: Kernel) -> dict[str, Any]:
    """Without the arguments that the kernel goes without."""
    given = {name: value for name, value in kernel.constants if value is not None}
    return {**given, "num_warps": kernel.num_warps, "num_stages": kernel.num_stages}
