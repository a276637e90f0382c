"""Schemes and packing: names, shapes, bits, bytes."""

from __future__ import annotations

import pytest
import torch

from llmopt.compiler.errors import InputError
from llmopt.compiler.quant import PRESETS, SCHEMES, pack, quantize, scheme_of, unpack

BITS = {
    "nvfp4": 4.5, "mxfp4": 4.25, "mxfp6_e2m3": 6.25, "mxfp6_e3m2": 6.25, "mxfp8": 8.25, "fp8": 8.0, "fp8_channel": 8.0,
    "fp8_block": 8 + 32 / 16384, "int8": 8.0, "int8_g128": 8.125, "int4_g32": 4.5, "int4_g64": 4.25, "int4_g128": 4.125,
    "int4_g32_asym": 4.75, "int4_g64_asym": 4.375, "int4_g128_asym": 4.1875,
    "int8_g128_f16": 8.125, "int4_g32_f16": 4.5, "int4_g64_f16": 4.25, "int4_g128_f16": 4.125,
    "int4_g32_asym_f16": 4.75, "int4_g64_asym_f16": 4.375, "int4_g128_asym_f16": 4.1875,
}  # fmt: skip


def test_bits_per_weight():
    assert {name: scheme.bits_per_weight for name, scheme in SCHEMES.items()} == BITS


@pytest.mark.parametrize("name", SCHEMES)
def test_bytes_are_the_bits_per_weight(name: str):
    quantized = quantize(torch.ones(256, 2048), name)
    per_row = 32 / 2048 if SCHEMES[name].group == 0 else 0.0
    extra = 32 / quantized.codes.numel() if SCHEMES[name].has_global else 0.0
    if SCHEMES[name].rows == 0:
        per_row = 32 / quantized.codes.numel()
    assert quantized.nbytes * 8 / quantized.codes.numel() == BITS[name] + per_row + extra
    assert quantized.packed().nbytes == 256 * 2048 * SCHEMES[name].element.bits // 8


@pytest.mark.parametrize("name", SCHEMES)
def test_shapes(name: str):
    scheme = SCHEMES[name]
    quantized = quantize(torch.ones(130, 200), name)
    padded = {0: 200, 16: 208, 32: 224, 64: 256, 128: 256}[scheme.group]
    groups = padded // scheme.group if scheme.group else 1
    rows = {0: 1, 1: 130, 128: 2}[scheme.rows]
    assert quantized.codes.shape == (130, padded)
    assert quantized.codes.dtype == torch.uint8
    assert quantized.scales.shape == scheme.scales_shape(130, 200) == (rows, groups)
    assert quantized.scales.dtype == scheme.scale_dtype
    assert (quantized.zero_points is None) == scheme.symmetric
    assert (quantized.global_scale is None) == (not scheme.has_global)
    assert quantized.dequantize().shape == quantized.shape == (130, 200)
    assert quantized.dequantize(torch.bfloat16).dtype == torch.bfloat16


def test_names_in_any_case():
    assert scheme_of("NVFP4") is scheme_of("nvfp4") is SCHEMES["nvfp4"]
    with pytest.raises(InputError, match="did you mean 'mxfp4'"):
        scheme_of("mxpf4")


def test_presets_name_schemes():
    for weights, activations in PRESETS.values():
        assert weights in SCHEMES
        assert activations is None or activations in SCHEMES


@pytest.mark.parametrize(("bits", "columns"), [(4, 2), (4, 62), (6, 4), (6, 96), (8, 1), (8, 33)])
def test_packing_keeps_every_code(bits: int, columns: int):
    codes = torch.randint(0, 1 << bits, (300, columns), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    packed = pack(codes, bits)
    assert packed.shape == (300, columns * bits // 8)
    assert torch.equal(unpack(packed, bits, columns), codes)
    assert torch.equal(unpack(packed, bits, columns - 1), codes[:, :-1])


def test_six_bits_are_little_endian():
    codes = torch.tensor([[0b000001, 0b100011, 0b010101, 0b111000]], dtype=torch.uint8)
    word = sum(int(code) << (6 * at) for at, code in enumerate(codes[0]))
    assert bytes(pack(codes, 6)[0].tolist()) == word.to_bytes(3, "little")


def test_every_place_of_every_code_of_six_bits():
    codes = torch.stack([torch.arange(64).roll(at) for at in (0, 1, 17, 40)], 1).to(torch.uint8)
    assert torch.equal(unpack(pack(codes, 6), 6, 4), codes)


def test_packed_columns_need_not_be_contiguous():
    codes = torch.arange(64, dtype=torch.uint8).reshape(8, 8) % 16
    assert torch.equal(unpack(pack(codes.t(), 4), 4, 8), codes.t())


@pytest.mark.parametrize(
    ("bits", "columns", "remedy"), [(4, 3, "multiple of 2"), (6, 6, "multiple of 4"), (5, 8, "4, 6")]
)
def test_what_cannot_be_packed(bits: int, columns: int, remedy: str):
    with pytest.raises(InputError, match=remedy):
        pack(torch.zeros(2, columns, dtype=torch.uint8), bits)


def test_what_cannot_be_unpacked():
    with pytest.raises(InputError, match="codes of 3 bits"):
        unpack(torch.zeros(2, 6, dtype=torch.uint8), 3, 16)
