"""Low-bit weights laid out for the kernels and read back, and the assembly that takes them out of words, run here."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

from llmopt.codegen.lowbit_layout import _gathered, codes_of, lay, side
from llmopt.codegen.templates.lowbit_bits import BITS, CONSTANTS, SPREADS, TAKES_OUT
from llmopt.compiler.quant.elements import ELEMENTS
from llmopt.compiler.quant.packing import pack
from llmopt.compiler.quant.quantize import dequantize, quantize
from llmopt.compiler.quant.schemes import SCHEMES

FULL = 0xFFFFFFFF


def run_ptx(text: str, inputs: dict[int, Tensor]) -> dict[int, Tensor]:
    """The few instructions of PTX that the kernels' assembly uses, on int64 tensors; outputs by number."""
    values = {f"${number}": tensor & FULL for number, tensor in inputs.items()}
    text = re.sub(r"\.reg .b32 [^;]*;", "", text.strip().removeprefix("{").removesuffix("}"))
    for line in filter(None, (part.strip() for part in text.split(";"))):
        name, _, rest = line.partition(" ")
        if split := re.match(r"\{(\$\d+), (\$\d+)\}, (\w+)", rest):
            word = values[split[3]]
            values[split[1]], values[split[2]] = word & 0xFFFF, word >> 16
            continue
        to, *sources = [part.strip() for part in rest.split(",")]
        values[to] = _executed(name, [_value(source, values) for source in sources]) & FULL
    return {int(name[1:]): value for name, value in values.items() if name[0] == "$"}


def _value(source: str, values: dict[str, Tensor]) -> Tensor:
    return torch.tensor(int(source, 0)) if source[0].isdigit() else values[source]


def _executed(name: str, s: list[Tensor]) -> Tensor:
    if name == "lop3.b32":
        assert int(s[3]) == 0xEA
        return (s[0] & s[1]) | s[2]
    if name == "prmt.b32":
        assert int(s[2]) >> 4 == 0x444
        return (s[0] >> (8 * (int(s[2]) & 3))) & 255
    if name == "fma.rn.bf16x2":
        low, high = (_fma(*((t >> shift) & 0xFFFF for t in s)) for shift in (0, 16))
        return low | high << 16
    plain = {"mov.b32": lambda a: a, "and.b32": lambda a, b: a & b, "shl.b32": lambda a, b: a << b,
             "shr.b32": lambda a, b: a >> b, "mad.lo.u32": lambda a, b, c: a * b + c}  # fmt: skip
    return plain[name](*s)


def _bf16(half: Tensor) -> Tensor:
    return (half << 16).to(torch.int32).view(torch.float32).double()


def _fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    result = _bf16(a) * _bf16(b) + _bf16(c)
    rounded = result.float().bfloat16()
    assert torch.equal(rounded.double(), result), "rounded, where all is meant to be exact"
    return rounded.view(torch.int16).long() & 0xFFFF


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(("rows", "columns"), [(16, 256), (40, 300), (3, 5 * 128)])
def test_codes_come_back(scheme: str, rows: int, columns: int) -> None:
    make = torch.Generator().manual_seed(1)
    q = quantize(torch.randn(rows, columns, generator=make), scheme)
    laid = lay(q.packed(), q.scales, q.global_scale, q.zero_points, scheme, columns)
    assert torch.equal(codes_of(laid), q.codes[:, :columns])
    assert laid.words.dtype == torch.int32
    assert laid.words.numel() * 32 == -(-rows // 16) * 16 * -(-columns // 256) * 256 * q.scheme.element.bits


@pytest.mark.parametrize("name", BITS)
def test_every_bit_of_a_word_is_one_of_a_code(name: str) -> None:
    bits = BITS[name]
    codes = torch.full((bits.values,), (1 << bits.width) - 1, dtype=torch.uint8)
    assert _gathered(codes, name).tolist() == [-1] * bits.planes
    for value in range(bits.values):
        alone = torch.zeros_like(codes)
        alone[value] = (1 << bits.width) - 1
        assert sum(bin(word & FULL).count("1") for word in _gathered(alone, name).tolist()) == bits.width


@pytest.mark.parametrize("name", BITS)
def test_the_assembly_gives_the_values_of_all_codes(name: str) -> None:
    bits, element = BITS[name], ELEMENTS[name]
    codes = torch.arange(1 << bits.width, dtype=torch.uint8).repeat(bits.values, 1).T.contiguous()
    for value in range(bits.values):  # each place has another code
        codes[:, value] = codes[:, value].roll(value)
    if name == "e4m3":
        codes[(codes & 127) == 127] = 0  # not a number
    planes = dict(enumerate(_gathered(codes, name).long(), bits.values))
    got = run_ptx(TAKES_OUT[name][0], {**planes, bits.values + bits.planes: torch.tensor(CONSTANTS[name])})
    values = torch.stack([_bf16(got[i]) for i in range(bits.values)], -1)
    assert torch.equal(values, element.decode(codes).double())


@pytest.mark.parametrize("scheme", [s for s in SCHEMES if side(SCHEMES[s]) == "weights"])
def test_scales_and_weights_multiply_exactly(scheme: str) -> None:
    """All E4M3 scales there are, subnormal ones too; powers of two far apart."""
    kind = SCHEMES[scheme]
    make = torch.Generator().manual_seed(2)
    codes = torch.randint(0, 1 << kind.element.bits, (126, 8 * kind.group), generator=make).to(torch.uint8)
    if kind.element.name == "e4m3":
        codes[(codes & 127) == 127] = 0
    if kind.scale == "e4m3":
        scales = torch.arange(1, 127, dtype=torch.uint8).view(torch.float8_e4m3fn)[:, None].expand(126, 8)
    else:
        scales = torch.randint(60, 170, (126, 8), generator=make).to(torch.uint8)
    whole = torch.tensor(0.25) if kind.has_global else None
    packed = pack(codes, kind.element.bits)
    want = dequantize(packed, scales, whole, None, kind, codes.shape[1]).double()
    laid = lay(packed, scales, whole, None, kind, codes.shape[1])
    assert laid.scales is not None
    assert laid.factor is not None
    pairs = run_ptx(SPREADS[kind.scale, 4], {4: laid.scales.long()})
    scale = torch.stack([_bf16(pairs[byte] & 0xFFFF) for byte in range(4)], -1)  # [stripe, block, g, t, 2 * half + rr]
    spread = _by_row(scale)
    values = kind.element.decode(codes).double() * 2.0 ** (BITS[kind.element.name].bias - 127)
    got = values * spread[:126, :8].repeat_interleave(kind.group, 1) * laid.factor.double()
    assert torch.equal(got, want)


def _by_row(scale: Tensor) -> Tensor:
    """[stripe, block, g, t, (half, row of the pair)] as [rows, groups]."""
    s, n = scale.shape[:2]
    return scale.unflatten(-1, (2, 2)).permute(0, 5, 2, 1, 4, 3).reshape(s * 16, n * 8)


def test_blocks_of_scale_0_are_0() -> None:
    q = quantize(torch.zeros(16, 256), "nvfp4")
    codes = torch.full_like(q.codes, 7)
    laid = lay(pack(codes, 4), torch.zeros(16, 16).to(torch.float8_e4m3fn), torch.tensor(1.0), None, "nvfp4", 256)
    assert not codes_of(laid).any()
