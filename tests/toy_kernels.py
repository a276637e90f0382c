"""Kernels of the toy templates, which lie among llmopt's own for as long as a test runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llmopt.codegen import templates
from llmopt.codegen.kernel import Kernel

FOLDER = Path(__file__).parent / "toy_templates"
HEAD = "import triton\nimport triton.language as tl\n\n\n@triton.jit\ndef hook(x, z):\n    "
DOUBLE = HEAD + "return x + x\n"
SQUARE = HEAD + "return x * x\n"
PLUS_Z = HEAD + "return x + tl.load(z)\n"


@contextmanager
def toys(folder: Path = FOLDER) -> Iterator[None]:
    """Templates are looked for in `folder`, too."""
    templates.__path__.append(str(folder))
    try:
        yield
    finally:
        templates.__path__.remove(str(folder))


def toy(source: str = DOUBLE, pdl: bool = False, block: int = 128, warps: int = 4) -> Kernel:
    types = (("x", "*fp32"), ("z", "*fp32"), ("y", "*fp32"), ("N", "i32"), ("C", "i64"), ("S", "fp32"))
    return Kernel(
        "toy:toy", types, (("BLOCK", block), ("PDL", pdl)), (("HOOK", "hook"),), source, num_warps=warps, pdl=pdl
    )


def product(k: int = 512, block: int = 128, step: int = 64, stages: int = 3) -> Kernel:
    types = (("a", "*fp16"), ("b", "*fp16"), ("c", "*fp32"))
    constants = (("K", k), ("BLOCK", block), ("STEP", step))
    return Kernel("toy:product", types, constants, num_warps=8, num_stages=stages)
