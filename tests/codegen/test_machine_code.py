"""Uniform registers that are read and never written, in listings."""

from __future__ import annotations

import pytest

from llmopt.codegen.machine_code import instructions, never_written
from llmopt.compiler.errors import BuildError

DESCRIPTOR = [
    "ULDC.64 UR16, c[0x0][0x208]",
    "LDG.E.128 R40, desc[UR16][R40.64]",
    "ULEA UR12, UR4, UR12, 0x18",
    "UMOV UR4, UR12",
    "HGMMA.64x16x16.F32.BF16 R32, R72, gdesc[UR8].tnspB, RZ, !UPT",
    ".L_x_0:",
    "UIADD3 UR6, UP0, {}, 0x20, URZ",
    "UIADD3.X UR7, URZ, -0x3ffffff0, URZ, UP0, !UPT",
    "STS.U16 [R48+UR12+0x8400], R45",
]


def test_every_register_that_is_read_is_written_somewhere() -> None:
    assert never_written([text.format("UR12") for text in DESCRIPTOR]) == []
    assert never_written([text.format("UR17") for text in DESCRIPTOR]) == []  # the upper half of 64 bits


@pytest.mark.parametrize(
    "odd", ["UIADD3 UR6, UP0, UR13, 0x20, URZ", "ISETP.LT.AND P0, PT, R0, UR13, PT", "BAR.SYNC UR13"]
)
def test_one_that_is_not_is_told(odd: str) -> None:
    assert never_written([*DESCRIPTOR[:6], odd, *DESCRIPTOR[7:]]) == [odd]


@pytest.mark.parametrize(
    ("wide", "last"),
    [("CS2UR UR4, SR_CLOCKLO", 5), ("LDCU.256 UR8, c[0x0][0x20]", 15), ("UIMAD.WIDE UR6, UR4, UR4, URZ", 7)],
)
def test_results_of_several_registers(wide: str, last: int) -> None:
    before = ["UMOV UR4, 0x1"]
    assert never_written([*before, wide, f"MOV R0, UR{last}"]) == []
    assert never_written([*before, wide, f"MOV R0, UR{last + 1}"]) == [f"MOV R0, UR{last + 1}"]


def test_what_cannot_be_disassembled_is_told() -> None:
    pytest.importorskip("triton")
    with pytest.raises(BuildError, match=r"nvdisasm cannot read what ptxas made \(.*\).*TRITON_NVDISASM_PATH"):
        instructions(b"no cubin")


def test_addresses_count_too() -> None:
    assert never_written(["STS [R1+UR5], R2", "LDG.E R0, desc[UR2][R4.64]"]) == [
        "STS [R1+UR5], R2",
        "LDG.E R0, desc[UR2][R4.64]",
    ]
