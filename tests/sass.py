"""What stands in a loop of machine code, what its instructions cost, and registers written too early."""

from __future__ import annotations

import re
from collections import Counter

from llmopt.codegen.cubin import Cubin
from llmopt.codegen.machine_code import instructions

# what moves data between lanes or to memory that only registers should hold
MOVES = ("SHFL", "STS", "STSM", "LDL", "STL")


def loop(code: list[str]) -> list[str]:
    """The longest stretch that is repeated: from a label that a later branch goes back to, up to that branch."""
    found = []
    for end, text in enumerate(code):
        back = re.fullmatch(r"BRA.*\((\.L_x_\d+)\)", text)
        if back and f"{back[1]}:" in code[:end]:
            found.append(code[code.index(f"{back[1]}:") : end + 1])
    return [text for text in max(found, key=len) if not text.startswith(".L")]


def undisturbed(made: Cubin, what: object = "") -> list[str]:
    """The loop of a kernel that makes operands in registers: checked for what would move these out of the way (spills)
    and for what would change them while a product reads them."""
    repeated = loop(instructions(made.data))
    count = names(repeated)
    assert made.spills == 0, what
    assert not count["LDL"] + count["STL"], what
    assert not overwritten(repeated), what
    return repeated


def names(code: list[str]) -> Counter[str]:
    """How often each instruction stands there, modifiers left out."""
    return Counter(re.split(r"[. ]", text)[0] for text in code)


def overwritten(code: list[str]) -> list[str]:
    """Instructions of a loop that write registers which a wgmma may still be reading: two turns of it are walked.

    A wgmma that takes its left operand from registers reads them while the code behind it runs already. They are free
    once WARPGROUP.DEPBAR has waited for the group it belongs to; a group ends with the product that counts (gsb0).
    """
    found: list[str] = []
    groups: list[set[str]] = []
    current: set[str] = set()
    for text in [*code, *code]:
        if left := re.search(r"^HGMMA\S* R\d+, R(\d+), gdesc", text):
            current |= {f"R{int(left[1]) + i}" for i in range(4)}
            if "gsb0" in text:
                groups, current = [*groups, current], set()
        elif wait := re.match(r"WARPGROUP\.DEPBAR\S* gsb0, (0x[0-9a-f]+)", text):
            left_over = int(wait[1], 16)
            groups = groups[len(groups) - left_over :] if left_over else []
        elif current.union(*groups) & _written(text):
            found.append(text)
    return found


def _written(text: str) -> set[str]:
    """Registers that an instruction writes."""
    written = re.match(r"(?!ST|RED|BAR|BRA|HGMMA)(\S+) R(\d+)", text)
    if written is None:
        return set()
    four, two = re.search(r"\.128|^LDSM", written[1]), re.search(r"\.64|WIDE", written[1])
    wide = 4 if four else 2 if two else 1
    return {f"R{int(written[2]) + i}" for i in range(wide)}
