"""Keys and values of a cache kept in 8 or 4 bits by numbers that are known beforehand, as other runtimes want them."""

from __future__ import annotations

from torch import Tensor

from llmopt.compiler.calibration_statistics import Statistics
from llmopt.compiler.errors import InputError
from llmopt.compiler.program import Program
from llmopt.runtime.build import Calibration

KINDS = {"int8": 127.0, "int4": 7.0, "fp8": 448.0}  # and the number that the largest magnitude becomes


# of each attention, in order, what one unit of keys and of values is worth: float32 [D], of the channels of all heads
KVSteps = tuple[tuple[Tensor, Tensor], ...]


def kv_steps(program: Program, kind: str, calibration: Calibration | None) -> KVSteps:
    """Steps by the largest magnitudes that the plain forward makes of the calibration tokens.

    Raises InputError: an unknown kind, no calibration data, statistics instead of them.
    """
    if kind not in KINDS:
        raise InputError(f"--kv-cache {kind!r} is unknown; wanted one of {', '.join(KINDS)}")
    if calibration is None:
        raise InputError(
            f"--kv-cache {kind} keeps keys and values by numbers that are learned beforehand; give --calibration (a "
            "text, a folder of texts, or token ids)"
        )
    nodes = list(program.graph("forward").calls("attention"))
    watched = {
        f"{name} {at}": (node.args[i],) for at, node in enumerate(nodes) for i, name in ((1, "keys"), (2, "values"))
    }
    seen = calibration(program, False, watched)  # type: ignore[arg-type]
    return tuple((_steps(seen, f"keys {at}", kind), _steps(seen, f"values {at}", kind)) for at in range(len(nodes)))


def _steps(seen: Statistics, name: str, kind: str) -> Tensor:
    return (seen.amax(name) / KINDS[kind]).clamp(min=2.0**-100)
