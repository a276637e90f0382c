"""What stands in a cubin's machine code, for checks of what the assembler made of a kernel."""

from __future__ import annotations

import re
import subprocess
import tempfile

from llmopt.compiler.errors import BuildError

_RESULT = re.compile(r"U\w|R2UR|S2UR|CS2UR|VOTEU|REDUX|CREDUX|ELECT|LDCU")  # what may write uniform registers
# registers that a result takes, by a part of the instruction's name, the first that fits
_WIDTHS = {".256": 8, ".128": 4, ".64": 2, "WIDE": 2, "CS2UR.32": 1, "CS2UR": 2}


def instructions(cubin: bytes) -> list[str]:
    """Labels and instructions, one an element, predicates left out. Raises BuildError: there is no disassembler, or it
    cannot read this."""
    from triton import knobs

    try:
        tool = knobs.nvidia.nvdisasm.path
    except RuntimeError as error:
        raise BuildError(
            f"Triton has no disassembler ({error}), and what ptxas makes is looked at before it runs; reinstall "
            "triton, or name one in TRITON_NVDISASM_PATH"
        ) from error
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        # -ndf: without an analysis that is not printed here
        done = subprocess.run([tool, "-ndf", "-c", file.name], capture_output=True, text=True)
    found = re.findall(r"^(\.L_x_\d+:)|/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([^;]+);", done.stdout, re.MULTILINE)
    if done.returncode or not found:
        said = (done.stderr.strip().splitlines() or ["it printed no instruction"])[-1]
        raise BuildError(
            f"{tool} cannot read what ptxas made ({said}), which is looked at before it runs; name an nvdisasm of "
            "the same CUDA in TRITON_NVDISASM_PATH"
        )
    return [label or instruction.strip() for label, instruction in found]


def never_written(code: list[str]) -> list[str]:
    """Instructions that read a uniform register which no instruction writes.

    ptxas 12.8 makes such code for sm_90 of some kernels that build a second descriptor of shared memory for wgmma from
    the same address: `UIADD3 UR4, UP0, UR13, 0x20` where the address is in UR14. What is multiplied then lies wherever
    UR13 happened to point; ptxas 13.0 assembles the same PTX rightly.
    """
    written: set[int] = set()
    read: list[tuple[int, str]] = []
    for text in code:
        name, _, rest = text.partition(" ")
        operands = [operand.strip() for operand in rest.split(",")]
        result = next((i for i, o in enumerate(operands[:2]) if re.fullmatch(r"UR\d+", o)), None)
        if result is not None and _RESULT.match(name):
            first = int(operands.pop(result)[2:])
            wide = next((n for mark, n in _WIDTHS.items() if mark in name), 1)
            written.update(range(first, first + wide))
        # of a pair of descriptors, gdesc, the first is unused where that operand is in registers
        read += [(int(n), text) for o in operands if "gdesc" not in o for n in re.findall(r"\bUR(\d+)\b", o)]
    return [text for register, text in read if register not in written]
