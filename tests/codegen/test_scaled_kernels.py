"""The templates `rounded` and `scaled` in Triton's interpreter: codes bit for bit, products against fp64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from scaled_cases import Case, Codes, Data, run_rounded, tiled

from llmopt.codegen.scaled_layout import lay_scaled
from llmopt.codegen.templates import rounded, scaled
from llmopt.compiler.errors import BuildError
from llmopt.compiler.ops.quantized import quantized_linear
from llmopt.compiler.quant.elements import ELEMENTS
from llmopt.compiler.quant.packing import unpack
from llmopt.compiler.quant.quantize import fake_quantize, quantize
from llmopt.compiler.quant.schemes import SCHEMES
from llmopt.compiler.target import Target

pytestmark = pytest.mark.interp

TAKEN = ("nvfp4", "mxfp4", "mxfp8")
BASE = {"BLOCK_J": 128, "BLOCK_M": 16, "SPLIT_K": 1, "num_warps": 4, "num_stages": 2}


def config(case: Case, **changed: Any) -> dict[str, Any]:
    """Steps of 128 bytes, where nothing else is said."""
    return {**BASE, "BLOCK_K": 1024 // case.kind.element.bits, **changed}


def hard(scheme: str, columns: int) -> torch.Tensor:
    """Tokens of numbers that round badly: ties of every code in every binade, their neighbours, zeros of both signs,
    the smallest normal and the largest there are, a lone outlier, groups of different sizes."""
    kind = SCHEMES[scheme]
    codes = torch.arange(1 << (kind.element.bits - 1), dtype=torch.uint8)
    values = kind.element.decode(codes)
    values = values[values.isfinite()]
    ties = (values[1:] + values[:-1]) / 2
    points = torch.cat([values, ties, ties * (1 + 2**-8), ties * (1 - 2**-8)])
    make = torch.Generator().manual_seed(3)
    signs = torch.randint(2, (8, columns), generator=make) * 2.0 - 1
    rows = points[torch.randint(len(points), (8, columns), generator=make)] * signs
    rows[:, ::16] = kind.element.max  # so that steps are powers of two, and ties are met
    rows[1] *= torch.logspace(-4, 4, columns)
    rows[2] = 0
    rows[2, ::2] = -0.0
    rows[3] *= 2.0**-116  # bf16's subnormals are left out: the interpreter misreads them
    rows[3, 64:96] = 2.0**-126
    rows[4] *= 3e35
    rows[5, 7] = 3e38
    rows[6] *= 2.0 ** -(torch.arange(columns) // 32 % 30)
    rows[7, : columns // 2] = 0
    return rows.bfloat16()


@pytest.mark.parametrize("block", [64, 512])
@pytest.mark.parametrize("columns", [256, 400])
@pytest.mark.parametrize("scheme", TAKEN)
def test_codes_and_scales_are_the_reference_s_bit_for_bit(scheme: str, columns: int, block: int) -> None:
    case = Case(scheme, columns, 128)
    x = torch.cat([hard(scheme, columns), Data.of(case, 6).x])
    made, want = run_rounded(case, x, x[0], {"BLOCK": block, "num_warps": 4, "num_stages": 1}), Codes.of(x, case)
    groups = -(-columns // case.kind.group)
    assert made.scales[:, :groups].equal(want.scales[:, :groups])
    assert made.codes.equal(want.codes)
    if made.factor is not None:
        assert want.factor is not None
        assert made.factor.equal(want.factor)
    fake = fake_quantize(x.float(), case.kind)
    held = fake.abs() <= torch.finfo(torch.bfloat16).max  # beyond, codes are those of less, and fake values are cut
    assert held.sum() >= held.numel() - 1
    assert values(made, case)[held].equal(fake[held])


def values(made: Codes, case: Case) -> torch.Tensor:
    """What the codes stand for, in fp32."""
    kind = case.kind
    codes = kind.element.decode(unpack(made.codes, kind.element.bits, case.K))
    if kind.scale == "e4m3":
        steps = ELEMENTS["e4m3"].decode(made.scales)
    else:
        steps = torch.where(made.scales > 0, (made.scales.int() << 23).view(torch.float32), 2.0**-127)
    if made.factor is not None:
        steps = steps * made.factor[:, None]
    return codes * steps.repeat_interleave(kind.group, 1)[:, : case.K]


@pytest.mark.parametrize("scheme", TAKEN)
def test_numbers_that_are_not_finite_get_scales_of_nan(scheme: str) -> None:
    case = Case(scheme, 256, 128)
    x = Data.of(case, 3).x
    x[0, 40], x[1, 41] = torch.nan, -torch.inf
    made = run_rounded(case, x, x[0], {"BLOCK": 256, "num_warps": 4, "num_stages": 1})
    nan = {"e4m3": 0x7F, "e8m0": 0xFF}[case.kind.scale]
    group = 40 // case.kind.group
    assert made.scales[:2, group].tolist() == [nan, nan]
    assert made.scales[2].ne(nan).all()


@pytest.mark.parametrize("scheme", TAKEN)
def test_scales_of_many_tokens_lie_as_a_weight_s(scheme: str) -> None:
    case = Case(scheme, 256, 128)
    x = Data.of(case, 130).x
    rows = {"BLOCK": 128, "num_warps": 4, "num_stages": 1}
    plain = run_rounded(case, x, x[0], rows)
    found = run_rounded(replace(case, many=True), x, x[0], rows)
    assert found.codes.equal(plain.codes)
    whole = torch.zeros((256, plain.scales.shape[1]), dtype=torch.uint8)
    whole[:130] = plain.scales
    assert found.scales.reshape(-1).equal(tiled(whole).reshape(-1))


def right(data: Data, y: torch.Tensor) -> None:
    """As near to fp64 as a result in bf16 is, element by element; a gate's exponential adds to it."""
    got, want = y.double(), data.want
    room = 2.0**-8 * want.abs() * (1.01 if data.case.parts == 1 else 1.1) + 2.0**-16 * want.abs().mean()
    assert torch.all((got - want).abs() <= room)


@pytest.mark.parametrize(("tokens", "width"), [(1, 16), (3, 16), (20, 32), (64, 64)])
@pytest.mark.parametrize("scheme", TAKEN)
def test_the_product_is_that_of_the_rounded_operands(scheme: str, tokens: int, width: int) -> None:
    """A rest of columns and of rows."""
    data = Data.of(Case(scheme, 400, 200), tokens)
    right(data, data.run(config(data.case, BLOCK_M=width)))


@pytest.mark.parametrize("scheme", TAKEN)
def test_any_number_of_tokens_in_tiles(scheme: str) -> None:
    data = Data.of(Case(scheme, 512, 128, added=True, many=True), 150)
    right(data, data.run(config(data.case, BLOCK_M=128), block=512))


@pytest.mark.parametrize("scheme", TAKEN)
def test_halves_are_gated(scheme: str) -> None:
    data = Data.of(Case(scheme, 256, 128, parts=2, skip=128), 5)
    right(data, data.run(config(data.case)))


@pytest.mark.parametrize("scheme", TAKEN)
@pytest.mark.parametrize("split", [2, 4])
def test_k_is_shared_among_programs(scheme: str, split: int) -> None:
    data = Data.of(Case(scheme, 1024, 160, added=True), 9)
    right(data, data.run(config(data.case, SPLIT_K=split), calls=2))


@pytest.mark.parametrize("scheme", TAKEN)
def test_a_norm_is_taken_before_x_is_rounded(scheme: str) -> None:
    """Its sums may differ in the last bit, and so may codes: no farther from fp64 than such a change brings."""
    data = Data.of(Case(scheme, 400, 128, norm=1), 6)
    assert data.error(data.run(config(data.case))) <= 2.0**-8


@pytest.mark.parametrize("scheme", TAKEN)
def test_it_is_the_op_s_meaning_within_bf16(scheme: str) -> None:
    """quantized_linear rounds both operands to bf16 once more, which the kernels need not do."""
    data = Data.of(Case(scheme, 256, 128), 7)
    q = data.weight
    want = quantized_linear.fn(data.x, q.packed(), q.scales, q.global_scale, None, None, scheme, scheme)
    assert data.error(data.run(config(data.case))) <= 1.1 * data.error(want)


@pytest.mark.parametrize("isa", ["sm_100", "sm_120"])
@pytest.mark.parametrize("scheme", TAKEN)
def test_the_first_choices_are_right(scheme: str, isa: str) -> None:
    target = Target.parse(f"cuda:{isa}")
    for case, tokens in ((Case(scheme, 1024, 128, norm=1), 1), (Case(scheme, 512, 128, parts=2), 70)):
        case = replace(case, many=scaled.tiled(tokens, target))
        data = Data.of(case, tokens)
        first = scaled.configs(case.sizes(tokens), scheme, target)[0]
        rows = rounded.configs(case.rows_sizes(tokens), scheme, target)[0]
        assert data.error(data.run(first, block=rows["BLOCK"])) <= 2.0**-8


def test_what_is_not_taken_has_a_reason() -> None:
    target = Target.parse("cuda:sm_100")
    sizes = Case("nvfp4", 256, 128, parts=2).sizes(8)
    assert scaled.supports(sizes, "nvfp4", target) is None
    assert "halves" in (scaled.supports({**sizes, "J": 24}, "nvfp4", target) or "")
    assert "int4" in (scaled.supports(sizes, "int4_g128", target) or "")
    assert "Triton" in (scaled.supports(sizes, "nvfp4", replace(target, features=frozenset())) or "")
    assert "cuda:sm_90 has no scaled" in (scaled.supports(sizes, "nvfp4", Target.parse("cuda:sm_90")) or "")
    q = quantize(torch.randn(8, 128), "int4_g128")
    with pytest.raises(BuildError, match="int4_g128"):
        lay_scaled(q.packed(), q.scales, q.global_scale, q.zero_points, q.scheme, 128)
