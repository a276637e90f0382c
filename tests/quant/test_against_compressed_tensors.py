"""Codes and scales bit for bit as compressed-tensors writes them, by its own rules for scales and its own packers.

Where bits cannot be compared:
- The sign of what rounds to zero: it keeps it (nibble 8), here zero has one code. Its codes are read with that undone.
- Blocks whose scale rounds to zero: it takes 0.125 (e4m3) or an epsilon (floats), here the smallest scale that there
  is, so that such a block loses less. Blocks of zeros differ in the scale alone, in every format but e8m0.
- Its arithmetic is that of the tensor's dtype: with bfloat16 weights it rounds amax / 6 and, where scales are bfloat16,
  x / scale to bfloat16 before it rounds to codes, so that what lies just above a tie falls onto it (its Triton kernel
  for FP4 did so for all dtypes). Here it gets float32, with scales rounded as they are stored.
- NVFP4's global scale is a divisor there and a multiplier here: unless it is a power of two, steps differ in their last
  bit, and elements at ties go either way.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compressed_tensors.compressors.base import BaseCompressor
from compressed_tensors.compressors.mxfp6.helpers import kE2M3ToFloat
from compressed_tensors.compressors.nvfp4.helpers import kE2M1ToFloat
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.lifecycle.forward import quantize as ct_quantize
from compressed_tensors.quantization.quant_scheme import PRESET_SCHEMES
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from torch import Tensor

from llmopt.compiler.quant import ELEMENTS, PRESETS, SCHEMES, QuantizedTensor, Scheme, pack, quantize, unpack
from llmopt.compiler.quant.compressed_tensors import tensors_of
from llmopt.compiler.quant.storage import parts_of

FORMATS = {
    "nvfp4": "nvfp4-pack-quantized",
    "mxfp4": "mxfp4-pack-quantized",
    "mxfp6_e2m3": "mxfp6-pack-quantized",
    "mxfp8": "mxfp8-quantized",
    "int4_g32": "pack-quantized",
    "int4_g128": "pack-quantized",
    "int4_g128_asym": "pack-quantized",
    "int8": "int-quantized",
    "int8_g128": "pack-quantized",
    "int8_g128_f16": "pack-quantized",
    "int4_g64_f16": "pack-quantized",
    "int4_g128_asym_f16": "pack-quantized",
    "fp8": "float-quantized",
    "fp8_channel": "float-quantized",
    "fp8_block": "float-quantized",
}


def arguments(scheme: Scheme) -> QuantizationArgs:
    """compressed-tensors' description of a scheme."""
    strategy = {
        (0, 0): "tensor", (0, 1): "channel", (128, 128): "block", (16, 1): "tensor_group",
    }.get((scheme.group, scheme.rows), "group")  # fmt: skip
    return QuantizationArgs(
        num_bits=scheme.element.bits,
        type="float" if scheme.element.is_float else "int",
        symmetric=scheme.symmetric,
        strategy=strategy,
        group_size=scheme.group if "group" in strategy else None,
        block_structure=[128, 128] if strategy == "block" else None,
        scale_dtype=scheme.scale_dtype,
    )


def blocks_of(x: Tensor, scheme: Scheme) -> Tensor:
    """[rows of scales, scales a row, elements], by slices."""
    rows, group = scheme.rows or x.shape[0], scheme.group or x.shape[1]
    tiles = [[t.reshape(-1) for t in row.split(group, 1)] for row in x.split(rows, 0)]
    return torch.stack([torch.stack(row) for row in tiles])


def written(x: Tensor, scheme: Scheme) -> dict[str, Tensor]:
    """What compressed-tensors stores of a float32 matrix whose sizes are whole blocks."""
    args = arguments(scheme)
    blocks = blocks_of(x, scheme)
    state = {"weight": x}
    divisor = None
    if scheme.has_global:
        divisor = state["weight_global_scale"] = generate_gparam(x.min(), x.max())
    scales, zero_points = calculate_qparams(blocks.amin(-1), blocks.amax(-1), args, global_scale=divisor)
    state["weight_scale"] = scales.reshape(-1) if scheme.rows == 0 else scales
    if not scheme.symmetric:
        state["weight_zero_point"] = zero_points
    compressor: Any = BaseCompressor.get_value_from_registry(FORMATS[scheme.name])
    return compressor.compress(state, QuantizationScheme(targets=["Linear"], weights=args))


def codes_of(state: dict[str, Tensor], scheme: Scheme, columns: int) -> Tensor:
    """Its codes as they are numbered here; negative zero as zero."""
    half = 1 << (scheme.element.bits - 1)
    if "weight" in state:
        weight = state["weight"]
        codes = weight.view(torch.uint8) if scheme.element.is_float else (weight.int() + half).to(torch.uint8)
    elif scheme.element.is_float:
        codes = unpack(state["weight_packed"], scheme.element.bits, columns)
    else:
        shape = torch.Size(state["weight_shape"].tolist())
        codes = (unpack_from_int32(state["weight_packed"], scheme.element.bits, shape).int() + half).to(torch.uint8)
    return torch.where(codes == half, 0, codes) if scheme.element.is_float else codes


def same(made: QuantizedTensor, state: dict[str, Tensor]) -> None:
    assert torch.equal(made.codes, codes_of(state, made.scheme, made.shape[1]))
    scales = state["weight_scale"].reshape(made.scales.shape)
    assert torch.equal(made.scales.float(), scales.float())


def matrix(kind: str) -> Tensor:
    """[256, 256]; its largest magnitude is 21 * 2**k, so that NVFP4's global scale is a power of two."""
    source = torch.Generator().manual_seed(7)
    normal = torch.randn(256, 256, generator=source)
    x = {
        "normal": normal,
        "ties": torch.randint(-48, 49, (256, 256), generator=source) / 8,
        "bfloat16": normal.bfloat16().float(),
        "steep": normal * torch.exp2(torch.randint(-6, 1, (256, 16), generator=source)).repeat_interleave(16, 1),
        "tails": normal / torch.rand(256, 256, generator=source).clamp(min=1e-3),
        "half": normal * 1e3,  # some restored beyond the range of float16
    }[kind]
    x = x.clamp(-1000, 1000) if kind != "half" else x
    x[0, 0] = 21 * 2.0 ** (x.abs().amax() / 21).log2().ceil()
    return x


KINDS = ["normal", "ties", "bfloat16", "steep", "tails", "half"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FORMATS)
def test_codes_and_scales(name: str, kind: str):
    x = matrix(kind)
    made = quantize(x, name)
    state = written(x, SCHEMES[name])
    same(made, state)
    if made.global_scale is not None:
        assert made.global_scale * state["weight_global_scale"] == 1
    if made.zero_points is not None:
        packed = pack_to_int32((made.zero_points.int() - 8).to(torch.int8), 4, packed_dim=0)
        assert torch.equal(packed, state["weight_zero_point"])


@pytest.mark.parametrize("name", FORMATS)
def test_tensors_of_a_module(name: str) -> None:
    """Names, shapes, types and, where nothing rounds to negative zero, bytes; a scale of all is no matrix there."""
    x, scheme = matrix("normal").abs(), SCHEMES[name]
    got, want = tensors_of(parts_of(quantize(x, name)), scheme, x.shape[1]), written(x, scheme)
    assert {n: (tuple(t.shape), t.dtype) for n, t in got.items()} == {
        n: (tuple(t.shape), scheme.scale_dtype if n == "weight_scale" else t.dtype) for n, t in want.items()
    }
    for tensor, theirs in ((got[n], want[n]) for n in got):
        assert torch.equal(tensor.float(), theirs.float())


@pytest.mark.parametrize("name", ["nvfp4", "mxfp4", "mxfp6_e2m3"])
def test_packed_bytes(name: str):
    """Byte for byte, where nothing rounds to negative zero."""
    x = matrix("normal").abs()
    assert torch.equal(quantize(x, name).packed(), written(x, SCHEMES[name])["weight_packed"])


@pytest.mark.parametrize("name", ["nvfp4", "mxfp4", "mxfp6_e2m3", "mxfp8"])
def test_its_decompressor_restores_the_same_numbers(name: str):
    """It restores to bfloat16, as its scales are by then."""
    x = matrix("normal")
    made, scheme = quantize(x, name), SCHEMES[name]
    packed = made.codes.view(torch.float8_e4m3fn) if name == "mxfp8" else made.packed()
    state = {"weight" if name == "mxfp8" else "weight_packed": packed, "weight_scale": made.scales}
    if made.global_scale is not None:
        state["weight_global_scale"] = 1 / made.global_scale.reshape(1)
    compressor: Any = BaseCompressor.get_value_from_registry(FORMATS[name])
    restored = compressor.decompress(state, QuantizationScheme(targets=["Linear"], weights=arguments(scheme)))
    assert torch.equal(restored["weight"], made.dequantize(torch.bfloat16))


@pytest.mark.parametrize("name", ["mxfp4", "mxfp6_e2m3", "mxfp8"])
def test_powers_of_two_for_every_mantissa(name: str):
    """Every bfloat16 as the largest element of a block, down to where the exponent ends."""
    amax = torch.arange(0x0200, 0x7E00, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()
    x = torch.nn.functional.pad(amax[:, None], (0, 31))
    scales, _ = calculate_qparams(torch.zeros(len(x), 1), amax[:, None], arguments(SCHEMES[name]))
    exponents = scales.log2().round().int() + 127
    ours = quantize(x, name).scales.int()
    assert torch.equal(ours, exponents.clamp(min=0))


def test_any_global_scale_differs_only_at_ties():
    """Without a power of two: scales whose quotient is a tie of e4m3, elements whose quotient is one of e2m1."""
    x = matrix("normal")[:, :128]
    x[0, 0] = 5.3
    made = quantize(x, "nvfp4")
    state = written(x, SCHEMES["nvfp4"])
    assert made.global_scale is not None
    moved = made.scales.float() != state["weight_scale"].float()
    assert moved.float().mean() < 1e-3
    differ = (made.codes != codes_of(state, made.scheme, 128)) & ~moved.repeat_interleave(16, 1)
    units = (
        x.double().unflatten(1, (-1, 16)) / (made.scales.double() * made.global_scale.double())[..., None]
    ).flatten(1)
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0], dtype=torch.float64)
    off = ((units.abs()[..., None] - ties) / ties).abs().amin(-1)
    assert (off[differ] < 1e-6).all()
    assert differ.float().mean() < 1e-3


def test_tables_of_values():
    assert torch.equal(ELEMENTS["e2m1"].decode(torch.arange(8).to(torch.uint8)), kE2M1ToFloat)
    assert torch.equal(ELEMENTS["e2m3"].decode(torch.arange(32).to(torch.uint8)), kE2M3ToFloat)


def test_int4_golden_word():
    """Eight codes of 4 bits are one of its words, the first in the lowest bits."""
    values = torch.tensor([[-8, -7, -1, 0, 1, 2, 6, 7]], dtype=torch.int8)
    codes = ELEMENTS["int4"].encode(values.float())
    assert pack(codes, 4).view(torch.int32).tolist() == pack_to_int32(values, 4).tolist() == [[-22444272]]


@pytest.mark.parametrize("name", ["nvfp4", "mxfp4", "int4_g128", "int4_g128_asym", "fp8_channel", "int8"])
def test_blocks_of_zeros_and_outliers(name: str):
    """Blocks of zeros, and ones a million times smaller than the largest element: codes where scales do not vanish."""
    x = matrix("normal")
    x[:, 128:] *= 1e-6 if name not in ("int8", "fp8_channel") else 1
    x[5] = 0
    made, state = quantize(x, name), written(x, SCHEMES[name])
    theirs = codes_of(state, made.scheme, 256)
    scales = state["weight_scale"].float()
    width = 256 // scales.shape[1]
    vanished = (blocks_of(x, made.scheme).abs().amax(-1) == 0) | (made.scales.float() != scales)
    assert vanished.any()
    kept = ~vanished.repeat_interleave(width, 1)
    assert torch.equal(made.codes[kept], theirs[kept])
    assert (made.dequantize()[5] == 0).all()
    if name == "nvfp4":
        assert (made.scales.float()[vanished] == 2.0**-9).all()
        assert (scales[vanished] == 0.125).all()


def test_presets_are_its_presets():
    for name, (weights, activations) in PRESETS.items():
        theirs = PRESET_SCHEMES[name]
        described(theirs["weights"], SCHEMES[weights], per_token=False)
        inputs = theirs.get("input_activations")
        assert (inputs is None) == (activations is None)
        if inputs is not None and activations is not None:
            described(inputs, SCHEMES[activations], per_token=True)


def described(theirs: QuantizationArgs, ours: Scheme, per_token: bool) -> None:
    wanted = arguments(ours)
    assert (theirs.num_bits, theirs.type, theirs.symmetric) == (wanted.num_bits, wanted.type, wanted.symmetric)
    if not per_token:
        assert theirs.strategy == wanted.strategy
        assert theirs.block_structure == wanted.block_structure
    group = theirs.group_size if theirs.group_size and theirs.group_size > 0 else 0
    assert group == (0 if theirs.strategy == "block" else ours.group)
    if theirs.scale_dtype is not None:
        assert theirs.scale_dtype == ours.scale_dtype


def test_its_rounding_in_bfloat16_is_not_ours():
    """Just above a tie: two roundings there, one here."""
    x = torch.full((1, 128), 2.5078125)  # a bfloat16 above 2.5; the scale is one, but for its amax
    x[0, 0] = 7.5
    args = arguments(SCHEMES["int4_g128"])
    x[0, 1] = 2.5078125 * (1 - 2**-9)
    wide = ct_quantize(x, torch.ones(1, 1), None, args)
    narrow = ct_quantize(x.bfloat16(), torch.ones(1, 1, dtype=torch.bfloat16), None, args)
    assert wide[0, 1] != narrow[0, 1]
    assert quantize(x, "int4_g128").codes[0, 1] - 8 == wide[0, 1]
