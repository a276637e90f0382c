"""Shapes, kernels and random weights for `lowbit_gemm.py`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llmopt.codegen.kernel import Kernel
from llmopt.codegen.lowbit_layout import Laid, constants, in_order, lay
from llmopt.codegen.templates import lowbit
from llmopt.compiler.quant.packing import pack
from llmopt.compiler.quant.quantize import dequantize
from llmopt.compiler.quant.schemes import SCHEMES, Scheme
from llmopt.compiler.target import Target

H200 = Target.parse("cuda:sm_90")
COPIED = 400e6  # bytes of rotating weights, more than any cache holds
FEWEST = 6  # copies, at least
SHAPES = ("gate_up", "down", "o", "qkv")


@dataclass(frozen=True)
class Shape:
    """One product: w [parts * J, K]; x has `stride` elements a token; the result is added to a residual or gated.

    `ordered`: the kernel is given x in wgmma's order, behind its norm, as what comes before it in a step writes it.
    """

    model: str
    name: str
    K: int
    J: int
    parts: int = 1
    norm: int = 0
    residual: bool = False
    stride: int = 0
    ordered: int = 0

    @property
    def weights(self) -> int:
        """How many."""
        return self.parts * self.J * self.K

    def sizes(self, tokens: int) -> dict[str, int]:
        """What the template's `configs` reads."""
        sizes = {"K": self.K, "J": self.J, "PARTS": self.parts, "NORM": int(self.norm and not self.ordered)}
        return {**sizes, "ORDERED": self.ordered, "N": tokens}

    def given_order(self) -> Shape:
        """The same, of x in order."""
        return replace(self, ordered=1)

    def plain(self) -> Shape:
        """The product alone: no norm, no residual, halves one after the other."""
        name = f"{self.name.removesuffix('-alone')}-alone"
        return replace(self, name=name, J=self.parts * self.J, parts=1, norm=0, residual=False, stride=0, ordered=0)


def _layer(model: str, hidden: int, ffn: int, qkv: int, attended: int) -> dict[str, Shape]:
    shapes = (
        Shape(model, "qkv", hidden, qkv, norm=1),
        Shape(model, "o", attended, hidden, residual=True, stride=qkv),
        Shape(model, "gate_up", hidden, ffn, parts=2, norm=1),
        Shape(model, "down", ffn, hidden, residual=True),
    )
    return {shape.name: shape for shape in shapes}


MODELS = {
    "8b": _layer("8b", 4096, 14336, 6144, 4096),
    "70b-tp8": _layer("70b-tp8", 8192, 3584, 1280, 1024),
    "tiny": _layer("tiny", 256, 256, 512, 256),
}

_HOOKS = """
import triton
import triton.language as tl

@triton.jit
def x(m, k, ok, e0, e1, e2, e3, e4, e5):
    return tl.load(e0 + m * {stride} + k, mask=ok, other=0.0).to(tl.float32)

@triton.jit
def g(k, ok, e0, e1, e2, e3, e4, e5):
    return tl.load(e1 + k, mask=ok, other=0.0).to(tl.float32)

@triton.jit
def plain(a, b, m, n, ok, e0, e1, e2, e3, e4, e5):
    return a

@triton.jit
def added(a, b, m, n, ok, e0, e1, e2, e3, e4, e5):
    return a + tl.load(e2 + m * {J} + n, mask=ok, other=0.0).to(tl.float32)

@triton.jit
def gated(a, b, m, n, ok, e0, e1, e2, e3, e4, e5):
    return a * tl.sigmoid(a) * b
"""


@dataclass(frozen=True)
class Variant:
    """The template's kernel for a scheme and shape under some constants; `pdl` 0 or 1."""

    scheme: str
    shape: Shape
    config: tuple[tuple[str, Any], ...]
    pdl: int = 1

    def text(self) -> str:
        """`32x256 sl4 w4 s3 m8`."""
        c = dict(self.config)
        flags = [f"{n}{c[k]}" for n, k in (("sl", "SLICES"), ("un", "UNROLL"), ("split", "SPLIT_K")) if c[k] > 1]
        flags += ["wide"] * c["WIDE"] + ["no-pdl"] * (1 - self.pdl)
        where = f"{self.shape.parts * c['BLOCK_J']}x{c['BLOCK_K']}"
        return " ".join([where, *flags, f"w{c['num_warps']} s{c['num_stages']}"])

    def kernel(self) -> Kernel:
        """To compile and launch."""
        s, told, config = self.shape, constants(SCHEMES[self.scheme]), dict(self.config)
        types = [("w", "*i32")]
        types += [("scales", "*i32")] * (told["SIDE"] != "rows")
        types += [("factor", "*fp32")] * (told["FACTORS"] != 0) + [("y", "*bf16"), ("e0", "*bf16")]
        norm = s.sizes(0)["NORM"]
        types += [("e1", "*bf16")] * norm + [("e2", "*bf16")] * s.residual + [("N", "i32")]
        types += [("tickets", "*i32"), ("partial", "*fp32")] * (config["SPLIT_K"] > 1)
        optional = ("scales", "factor", "e1", "e2", "e3", "e4", "e5", "tickets", "partial")
        absent = [name for name in optional if name not in dict(types)]
        hooks = {"LOAD_X": "x", "EPILOGUE": "gated" if s.parts == 2 else "added" if s.residual else "plain"}
        if norm:
            hooks["LOAD_G"] = "g"
        else:
            absent.append("LOAD_G")
        launch = {name: config.pop(name) for name in ("num_warps", "num_stages")}
        fixed = {
            **dict.fromkeys(absent), **told, "K": s.K, "J": s.J, "OFFSET0": 0, "OFFSET1": s.J if s.parts == 2 else 0,
            "PARTS": s.parts, "NORM": norm, "ORDERED": s.ordered, "ORDER": 0, "EPS": 1e-5, **config,
            "PDL": self.pdl,
        }  # fmt: skip
        source = _HOOKS.format(stride=s.K if s.ordered else s.stride or s.K, J=s.J)
        return Kernel("lowbit:lowbit", tuple(types), tuple(fixed.items()), tuple(hooks.items()), source,
                      pdl=bool(self.pdl), **launch)  # fmt: skip

    def grid(self) -> tuple[int, ...]:
        """Programs."""
        return tuple(int(size) for size in lowbit.grid(self.shape.sizes(1), dict(self.config)))

    def scratch(self, device: str) -> list[Tensor]:
        """Tickets (zeroed) and partial sums, if any."""
        tickets, partial = lowbit.scratch(self.shape.sizes(1), dict(self.config))
        if not tickets:
            return []
        return [torch.zeros(tickets, dtype=torch.int32, device=device), torch.empty(partial, device=device)]


def variants(scheme: str, shape: Shape, tokens: int) -> list[Variant]:
    """What the template would try, and its first choice without an early start."""
    found = lowbit.configs(shape.sizes(tokens), scheme, H200)
    tried = [Variant(scheme, shape, tuple(c.items())) for c in found]
    return [*tried, Variant(scheme, shape, tuple(found[0].items()), pdl=0)] if found else []


class Weights:
    """Random low-bit weights of a shape on a device: `copies` of them, and the bf16 matrix they stand for."""

    def __init__(self, scheme: str, shape: Shape, device: str, copied: float = COPIED) -> None:
        torch.manual_seed(1)
        self.scheme, self.shape = SCHEMES[scheme], shape
        rows, K = shape.parts * shape.J, shape.K
        codes = _codes(self.scheme, rows, K, device)
        scales, factor, zeros = _scales(self.scheme, rows, K, device)
        self.parts = pack(codes, self.scheme.element.bits), scales, factor, zeros
        first = lay(*self.parts, self.scheme, K)
        count = max(FEWEST, -(-int(copied) // first.nbytes))
        self.copies: Sequence[Laid] = [first, *(clone(first) for _ in range(count - 1))]

    def matrix(self, dtype: torch.dtype) -> Tensor:
        """[rows, K], exact in fp32 and fp64."""
        return dequantize(*self.parts, self.scheme, self.shape.K, torch.float32).to(dtype)

    @property
    def nbytes(self) -> int:
        """Of one copy."""
        return self.copies[0].nbytes


def tensors(laid: Laid) -> list[Tensor]:
    """As the kernel takes them."""
    return [t for t in (laid.words, laid.scales, laid.factor) if t is not None]


def clone(laid: Laid) -> Laid:
    """The same weights elsewhere in memory."""
    return replace(
        laid, words=laid.words.clone(), scales=None if laid.scales is None else laid.scales.clone(), factor=laid.factor
    )


def _codes(scheme: Scheme, rows: int, K: int, device: str) -> Tensor:
    bits = scheme.element.bits
    codes = torch.randint(0, 1 << bits, (rows, K), dtype=torch.uint8, device=device)
    if scheme.element.name == "e4m3":
        codes = torch.where((codes & 127) == 127, codes - 1, codes)  # not a number
    return codes


def _scales(scheme: Scheme, rows: int, K: int, device: str) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Scales around K**-0.5 / 4, of which some are 100 times as large or small; the global scale; zero points."""
    shape = scheme.scales_shape(rows, K)
    size = K**-0.5 / 4 * torch.exp2(torch.rand(shape, device=device) * 2 - 1) * (6 / scheme.element.max)
    if shape[1] > 1:
        size *= 10.0 ** (2 * torch.randint(-300, 301, shape, device=device).div(300, rounding_mode="trunc"))
    zeros = None
    if not scheme.symmetric:
        zeros = torch.randint(0, 1 << scheme.element.bits, shape, dtype=torch.uint8, device=device)
    if scheme.scale == "e4m3":
        whole = torch.tensor(K**-0.5 / 32, device=device)
        return (size / whole).clamp(2.0**-9, 448).to(torch.float8_e4m3fn), whole, zeros
    if scheme.scale == "e8m0":
        return (torch.floor(torch.log2(size)) + 127).to(torch.uint8), None, zeros
    return size.to(scheme.scale_dtype), None, zeros


class Operands:
    """64 tokens and what else a shape's product reads, and its meaning in torch."""

    def __init__(self, shape: Shape, device: str) -> None:
        torch.manual_seed(0)
        self.shape = shape
        self.x = torch.randn(64, shape.stride or shape.K, device=device).mul_(2).bfloat16()
        self.g = torch.rand(shape.K, device=device).add_(0.5).bfloat16() if shape.norm else None
        self.r = torch.randn(64, shape.J, device=device).bfloat16() if shape.residual else None

    def beside(self, x: Tensor | None = None, r: Tensor | None = None) -> list[Tensor]:
        """x, g, residual: those there are."""
        given = self.x if x is None else x, self.g, self.r if r is None else r
        return [t for t in given if t is not None]

    def normed(self, scheme: Scheme) -> list[Tensor]:
        """x behind its norm and in order, residual if there is one."""
        x = self.x[:, : self.shape.K].float()
        if self.g is not None:
            x = F.rms_norm(x, (self.shape.K,), self.g.float(), 1e-5)
        parts, axes = in_order(scheme)
        x = x.bfloat16().unflatten(-1, (-1, *parts)).permute(0, 1, *(2 + axis for axis in axes)).flatten(1)
        return [x.contiguous(), *([] if self.r is None else [self.r])]

    def plain(self, w: Tensor, tokens: int) -> Tensor:
        """In w's dtype."""
        s, dtype = self.shape, w.dtype
        x = self.x[:tokens, : s.K].to(dtype)
        if s.norm:
            x = F.rms_norm(x, (s.K,), None if self.g is None else self.g.to(dtype), 1e-5)
        y = F.linear(x, w)
        if s.parts == 2:
            gate, up = y.chunk(2, -1)
            return F.silu(gate) * up
        return y if self.r is None else y + self.r[:tokens].to(dtype)


def summary(variant: Variant) -> Mapping[str, Any]:
    """JSON."""
    from llmopt.codegen.tuning import source_hash

    return {
        "scheme": variant.scheme, "model": variant.shape.model, "name": variant.shape.name,
        "shape": variant.shape.sizes(0), "config": dict(variant.config), "pdl": variant.pdl, "text": variant.text(),
        "source": source_hash("lowbit"),
    }  # fmt: skip
