"""What a quantised tensor is made of: elements, who shares a scale, and how scales are kept."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from llmopt.compiler.errors import InputError, did_you_mean
from llmopt.compiler.quant.elements import ELEMENTS, Element

SCALE_DTYPES = {
    "e4m3": torch.float8_e4m3fn,
    "e8m0": torch.uint8,  # the exponent with bias 127, as compressed-tensors stores it
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
}


@dataclass(frozen=True)
class Scheme:
    """How a matrix [N, K] is quantised: w = value(code - zero point) * scale * global scale.

    `group` neighbours along K share a scale (0: the whole row), and so do `rows` rows (0: all of them, one scale a
    tensor). `scale` names how scales are kept (a key of `SCALE_DTYPES`). `has_global`: one more float32 for the tensor.
    Schemes that are not `symmetric` have a zero point beside every scale.
    """

    name: str
    element: Element
    group: int
    scale: str
    rows: int = 1
    has_global: bool = False
    symmetric: bool = True

    @property
    def scale_dtype(self) -> torch.dtype:
        """What the scales tensor is made of."""
        return SCALE_DTYPES[self.scale]

    @property
    def bits_per_weight(self) -> float:
        """Bits that a weight takes with its share of scales and zero points (a byte each), in a matrix without end."""
        shared = self.group * self.rows
        extra = 8 * self.scale_dtype.itemsize + (0 if self.symmetric else 8)
        return self.element.bits + (extra / shared if shared else 0.0)

    def padded(self, columns: int) -> int:
        """Columns kept for K: up to the next whole group."""
        return -(-columns // self.group) * self.group if self.group else columns

    def scales_shape(self, rows: int, columns: int) -> tuple[int, int]:
        """Shape of the scales of a matrix [rows, columns]."""
        return (-(-rows // self.rows) if self.rows else 1, self.padded(columns) // self.group if self.group else 1)


def _integers(bits: int, group: int, symmetric: bool, scale: str) -> Scheme:
    name = f"int{bits}_g{group}" + "_asym" * (not symmetric) + "_f16" * (scale == "float16")
    return Scheme(name, ELEMENTS[f"int{bits}"], group, scale, symmetric=symmetric)


SCHEMES = {
    scheme.name: scheme
    for scheme in (
        Scheme("nvfp4", ELEMENTS["e2m1"], 16, "e4m3", has_global=True),
        Scheme("mxfp4", ELEMENTS["e2m1"], 32, "e8m0"),
        Scheme("mxfp6_e2m3", ELEMENTS["e2m3"], 32, "e8m0"),
        Scheme("mxfp6_e3m2", ELEMENTS["e3m2"], 32, "e8m0"),
        Scheme("mxfp8", ELEMENTS["e4m3"], 32, "e8m0"),
        Scheme("fp8", ELEMENTS["e4m3"], 0, "float32", rows=0),
        Scheme("fp8_channel", ELEMENTS["e4m3"], 0, "float32"),
        Scheme("fp8_block", ELEMENTS["e4m3"], 128, "float32", rows=128),
        Scheme("int8", ELEMENTS["int8"], 0, "float32"),
        *(
            _integers(bits, group, symmetric, scale)
            for scale in ("bfloat16", "float16")  # the latter is what packers keep beside a model in float16
            for bits, group, symmetric in (
                (8, 128, True),
                *((4, group, symmetric) for symmetric in (True, False) for group in (32, 64, 128)),
            )
        ),
    )
}

# (weights, activations) by compressed-tensors' names. Its static scales of activations (NVFP4's global one, FP8's only
# one) are taken from every token at run time here.
PRESETS: dict[str, tuple[str, str | None]] = {
    "NVFP4A16": ("nvfp4", None),
    "NVFP4": ("nvfp4", "nvfp4"),
    "MXFP4A16": ("mxfp4", None),
    "MXFP4": ("mxfp4", "mxfp4"),
    "MXFP4XFP8": ("mxfp4", "fp8_block"),
    "MXFP6A16": ("mxfp6_e2m3", None),
    "MXFP6A8": ("mxfp6_e2m3", "mxfp8"),
    "MXFP8A16": ("mxfp8", None),
    "MXFP8": ("mxfp8", "mxfp8"),
    "W4A16": ("int4_g128", None),
    "W4A16_ASYM": ("int4_g128_asym", None),
    "W4A8": ("int4_g128", "int8"),
    "W4AFP8": ("int4_g128", "fp8_channel"),
    "W8A16": ("int8_g128", None),
    "W8A8": ("int8", "int8"),
    "INT8": ("int8", "int8"),
    "FP8": ("fp8", "fp8"),
    "FP8_DYNAMIC": ("fp8_channel", "fp8_channel"),
    "FP8_BLOCK": ("fp8_block", "fp8_block"),
}


def scheme_of(name: str | Scheme) -> Scheme:
    """The scheme called `name`, in any case, or the scheme itself; raises `InputError` where there is none."""
    if isinstance(name, Scheme):
        return name
    if not isinstance(name, str):
        raise InputError(
            f"scheme is a {type(name).__name__}, {name!r}; wanted a scheme or the name of one: {', '.join(SCHEMES)}"
        )
    scheme = SCHEMES.get(name.lower())
    if scheme is None:
        raise InputError(f"no quantisation scheme is called {name!r}; {did_you_mean(name.lower(), SCHEMES)}")
    return scheme
