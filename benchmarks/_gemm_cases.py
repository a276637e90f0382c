"""Shapes, hooks and launches for `gpu_gemm.py`: the products of a decoder layer and the head, a launch each."""

from __future__ import annotations

import importlib.util
import multiprocessing
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from llmopt.compiler.target import Target

H200 = Target.parse("cuda:sm_90")


@dataclass(frozen=True)
class Shape:
    """One product: w [parts * J, K]; x has `stride` elements a token; the result is added to a residual or gated."""

    name: str
    K: int
    J: int
    parts: int = 1
    norm: int = 0
    residual: bool = False
    stride: int = 0

    @property
    def nbytes(self) -> int:
        """Of the weights, in bf16."""
        return 2 * self.parts * self.J * self.K

    def sizes(self, tokens: int) -> dict[str, int]:
        """What a template's `configs` reads."""
        return {"K": self.K, "J": self.J, "PARTS": self.parts, "NORM": self.norm, "N": tokens}


def _layer(hidden: int, ffn: int, qkv: int, attended: int) -> list[Shape]:
    return [
        Shape("qkv", hidden, qkv, norm=1),
        Shape("o", attended, hidden, residual=True, stride=qkv),
        Shape("gate_up", hidden, ffn, parts=2, norm=1),
        Shape("down", ffn, hidden, residual=True),
    ]


# layers, products
MODELS = {
    "8b": (32, [*_layer(4096, 14336, 6144, 4096), Shape("head", 4096, 128256, norm=1)]),
    "1b": (16, [*_layer(2048, 8192, 3072, 2048), Shape("head", 2048, 128256, norm=1)]),
    "0.6b": (28, [*_layer(1024, 3072, 4096, 2048), Shape("head", 1024, 151936, norm=1)]),
}

_HOOKS = """
@triton.jit
def x_{s}(m, k, ok, e0, e1, e2, e3, e4, e5):
    return tl.load(e0 + m * {s} + k, mask=ok, other=0.0).to(tl.float32)

@triton.jit
def add_{s}(a, b, m, n, ok, e0, e1, e2, e3, e4, e5):
    return a + tl.load(e2 + m * {s} + n, mask=ok, other=0.0).to(tl.float32)
"""
_COMMON = """
import triton
import triton.language as tl

@triton.jit
def g(k, ok, e0, e1, e2, e3, e4, e5):
    return tl.load(e1 + k, mask=ok, other=0.0).to(tl.float32)

@triton.jit
def plain(a, b, m, n, ok, e0, e1, e2, e3, e4, e5):
    return a

@triton.jit
def gated(a, b, m, n, ok, e0, e1, e2, e3, e4, e5):
    return a * tl.sigmoid(a) * b

@triton.jit
def read(w, y, LENGTH: tl.constexpr, STEPS: tl.constexpr):
    total = tl.zeros([LENGTH], tl.int32)
    for step in range(STEPS):
        total += tl.load(w + (tl.program_id(0).to(tl.int64) * STEPS + step) * LENGTH + tl.arange(0, LENGTH))
    tl.store(y + tl.program_id(0), tl.sum(total))
"""


@cache
def hooks() -> Any:
    """The hooks as a module: Triton reads a function's text from its file."""
    strides = sorted({s for _, shapes in MODELS.values() for shape in shapes for s in (shape.K, shape.stride, shape.J)})
    path = Path(tempfile.gettempdir()) / "gemm_hooks.py"
    path.write_text(_COMMON + "".join(_HOOKS.format(s=s) for s in strides if s))
    spec = importlib.util.spec_from_file_location("gemm_hooks", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["gemm_hooks"] = module
    spec.loader.exec_module(module)
    return module


@dataclass(frozen=True)
class Variant:
    """A template with its constants, for one shape; `pdl` 0 or 1."""

    template: str
    shape: Shape
    config: tuple[tuple[str, Any], ...]
    pdl: int = 1

    def text(self) -> str:
        """Short: `8x1024 pf w4 s1`."""
        c = dict(self.config)
        flags = [n for n, k in (("pf", "PREFETCH"), ("early", "EARLY"), ("ef", "EVICT")) if c.get(k)]
        flags += [f"{n}{c[k]}" for n, k in (("sl", "SLICES"), ("split", "SPLIT_K")) if c.get(k, 1) > 1]
        flags += [] if self.pdl else ["no-pdl"]
        return " ".join([f"{c['BLOCK_J']}x{c['BLOCK_K']}", *flags, f"w{c['num_warps']} s{c['num_stages']}"])

    def launch(
        self, w: Any, x: Any, g: Any, r: Any, y: Any, tokens: int, scratch: tuple[Any, Any] = (None, None)
    ) -> None:
        """Run it on the current stream; tensors as in the template."""
        self._call(w, x, g, r, y, tokens, scratch, warmup=False)

    def compile(self) -> None:
        """Compile into Triton's cache, with no tensors and no GPU: the driver must be `FakeDriver`."""
        from triton.runtime.jit import MockTensor

        w = MockTensor(torch.bfloat16)
        pair = (MockTensor(torch.int32), MockTensor(torch.float32)) if dict(self.config).get("SPLIT_K", 1) > 1 else None
        s = self.shape
        self._call(w, w, w if s.norm else None, w if s.residual else None, w, 1, pair or (None, None), warmup=True)

    def _call(
        self, w: Any, x: Any, g: Any, r: Any, y: Any, tokens: int, scratch: tuple[Any, Any], warmup: bool
    ) -> None:
        module = importlib.import_module(f"llmopt.codegen.templates.{self.template}")
        s, h, config = self.shape, hooks(), dict(self.config)
        constants = {
            "K": s.K, "J": s.J, "OFFSET0": 0, "OFFSET1": s.J if s.parts == 2 else 0, "PARTS": s.parts, "NORM": s.norm,
            "EPS": 1e-5, "LOAD_X": getattr(h, f"x_{s.stride or s.K}"), "LOAD_G": h.g if s.norm else None,
            "EPILOGUE": h.gated if s.parts == 2 else getattr(h, f"add_{s.J}") if s.residual else h.plain,
            "PDL": self.pdl, "launch_pdl": bool(self.pdl), **config,
        }  # fmt: skip
        grid = tuple(tokens if size == "N" else size for size in module.grid(s.sizes(tokens), config))
        kernel = getattr(module, self.template)
        runtime = [w, y, x, g, r, None, None, None, tokens, *(scratch if self.template == "gemm" else ())]
        if warmup:
            kernel.warmup(*runtime, grid=grid, **constants)
        else:
            kernel[grid](*runtime, **constants)

    def scratch(self, device: str) -> tuple[Any, Any]:
        """Tickets (zeroed) and partial sums, or None twice."""
        if self.template == "gemv":
            return None, None
        module = importlib.import_module("llmopt.codegen.templates.gemm")
        tickets, partial = module.scratch(self.shape.sizes(1), dict(self.config))
        if not tickets:
            return None, None
        return torch.zeros(tickets, dtype=torch.int32, device=device), torch.empty(partial, device=device)


def variants(shape: Shape, tokens: int) -> list[Variant]:
    """What is tried for a shape: `gemv` for one token (each with and without an early start), else `gemm`."""
    template = "gemv" if tokens == 1 else "gemm"
    module = importlib.import_module(f"llmopt.codegen.templates.{template}")
    found = module.configs(shape.sizes(tokens), "bfloat16", H200)
    if template == "gemv":
        found = [{**c, "EARLY": early} for early in (0, 1) for c in found] + [
            {**c, "EVICT": "evict_first"} for c in found[:1]
        ]
    tried = [Variant(template, shape, tuple(c.items())) for c in found]
    return [*tried, Variant(template, shape, tuple(found[0].items()), pdl=0)]


class FakeDriver:
    """Says sm_90 without a GPU, so that worker processes compile what this process will launch."""

    def get_current_target(self) -> Any:
        """An H200."""
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        """The first."""
        return 0

    def get_current_stream(self, device: int) -> int:
        """The default one."""
        return 0


def _compile(variant: Variant) -> str | None:
    from triton.runtime import driver

    driver.set_active(FakeDriver())
    try:
        variant.compile()
    except Exception as error:  # a variant that does not compile is reported and left out
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return None


def compile_all(wanted: Iterable[Variant], workers: int) -> dict[Variant, str]:
    """Compile in worker processes (call before CUDA is used here); what failed, with the reason."""
    hooks()
    todo = list(dict.fromkeys(wanted))
    with multiprocessing.get_context("fork").Pool(workers) as pool:
        done = pool.map(_compile, todo, chunksize=4)
    return {v: reason for v, reason in zip(todo, done, strict=True) if reason}
