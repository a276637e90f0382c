"""The templates `rotated` and `rotated_codes` in Triton's interpreter: turned as the op says, codes bit for bit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from interpreted import rounding
from rotated_cases import Case
from torch import Tensor

from llmopt.codegen.kernel import Prepared
from llmopt.codegen.lowbit_layout import in_order
from llmopt.codegen.rotation_layout import lay_signs
from llmopt.codegen.templates import rotated, rotated_codes
from llmopt.compiler.errors import BuildError
from llmopt.compiler.hadamard import Rotation
from llmopt.compiler.quant.quantize import quantize
from llmopt.compiler.quant.schemes import SCHEMES
from llmopt.compiler.target import Target
from llmopt.runtime.prepared import prepared

pytestmark = pytest.mark.interp

TARGET = Target.parse("cuda:sm_90")
# one matrix a block: 1, 24, 128; two: 240 = 12 * 20, 560 = 20 * 28, 256 = 16 * 16
CASES = [Case(1, 8), Case(24, 4), Case(128, 3), Case(240, 2), Case(560), Case(256, 2, gated=True)]


def data(case: Case, tokens: int) -> Tensor:
    """Tokens of different sizes, one with an element a thousand times the others."""
    make = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, case.K * (1 + case.gated), generator=make) * torch.logspace(-2, 2, tokens)[:, None]
    x[0, 3] = 1000
    return x.to(case.dtype)


def wanted(case: Case, x: Tensor) -> Tensor:
    """In fp64 of what the kernel is given."""
    if case.gated:
        gate, up = x.double().chunk(2, -1)
        x = (F.silu(gate) * up).to(case.dtype)
    return case.rotation.turned(x)


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        *((case, torch.bfloat16) for case in CASES),
        *((case, torch.float32) for case in CASES[2:]),
        (CASES[3], torch.float16),
    ],
    ids=lambda given: f"{given.order}x{given.blocks}" if isinstance(given, Case) else None,
)
def test_each_result_is_rounded_once(case: Case, dtype: torch.dtype) -> None:
    case = replace(case, dtype=dtype)
    x = data(case, 5)
    with rounding():
        y = case.run(x, rotated.configs(case.sizes(5), NAMES[dtype], TARGET)[0])
    want = wanted(case, x)
    # half a last place; sums of up to 128 numbers in fp32, and of which two bf16 numbers hold 16 bits, as large as
    # the block's; and a gate may be rounded the other way
    blocks = want.unflatten(-1, (-1, case.order))
    size = (blocks.norm(dim=-1, keepdim=True) / case.order**0.5).expand_as(blocks).flatten(-2)
    eps = torch.finfo(dtype).eps
    sums = 2.0**-16 if dtype == torch.bfloat16 else 2.0**-18
    room = eps / 2 * want.abs() * 1.001 + sums * size + (eps * size if case.gated else 0)
    assert ((y.double() - want).abs() <= room).all()


NAMES = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}


@pytest.mark.parametrize("tokens", [3, 100])
@pytest.mark.parametrize("case", [Case(24, 4), Case(5376)], ids=lambda c: str(c.order))
def test_all_choices_of_constants_give_the_same(case: Case, tokens: int) -> None:
    x = data(case, 11)
    configs = rotated.configs(case.sizes(tokens), "bfloat16", TARGET)
    assert len(configs) > 1
    with rounding():
        first, *others = (case.run(x, config) for config in configs)
    assert all(other.equal(first) for other in others)


def test_columns_in_the_order_that_products_read() -> None:
    case, kind = Case(256), SCHEMES["nvfp4"]
    x = data(case, 3)
    parts, axes = in_order(kind)
    config = rotated.configs(case.sizes(3), "bfloat16", TARGET)[0]
    with rounding():
        plain, ordered = case.run(x, config), case.run(x, config, order=16)
    assert ordered.equal(plain.unflatten(-1, (-1, *parts)).permute(0, 1, *(2 + a for a in axes)).flatten(1))


@pytest.mark.parametrize("scheme", ["nvfp4", "mxfp4", "mxfp8"])
@pytest.mark.parametrize("case", [Case(64, 8), Case(1024), Case(4096)], ids=lambda c: f"{c.order}x{c.blocks}")
def test_codes_and_scales_are_the_reference_s_bit_for_bit(case: Case, scheme: str) -> None:
    """Of whole numbers, whose rotation by an order that is a power of four is exact."""
    make = torch.Generator().manual_seed(1)
    x = torch.randint(-9, 10, (6, case.K), generator=make).bfloat16()
    x[1] *= 2.0**-18
    x[2] = 0
    x[3, 5] = 250
    kind, whole = SCHEMES[scheme], case.rotation.turned(x).bfloat16()
    config = rotated_codes.configs(case.codes_sizes(scheme, 6), scheme, TARGET)[0]
    with rounding():
        codes, scales, factor = case.run_codes(scheme, x, config)
    found = [quantize(row[None], kind) for row in whole]
    assert codes.equal(torch.cat([q.packed() for q in found]))
    assert scales.equal(torch.cat([q.scales.view(torch.uint8) for q in found]))
    if factor is not None:
        assert factor.equal(torch.stack([q.global_scale for q in found]))


@pytest.mark.parametrize(
    ("case", "scheme", "why"),
    [
        (Case(256, 2), "nvfp4", "2 blocks share a token's global scale"),
        (Case(240, 16), "mxfp4", "groups of 32 do not divide rows of 20"),
        (Case(120), "mxfp8", "120 columns are padded to 128"),
        (Case(28672), "nvfp4", "a tile has 32768 elements"),
    ],
)
def test_what_the_kernel_that_rounds_does_not_take(case: Case, scheme: str, why: str) -> None:
    assert why in str(rotated_codes.supports(case.codes_sizes(scheme, 1), scheme, TARGET))


def test_matrices_of_other_elements_are_refused() -> None:
    left, right = (factor.float() for factor in Rotation(32).factors)
    right[1, 2] *= 1.01
    with pytest.raises(BuildError, match=r"right factor \[8, 8\] have sizes from 0\.3536 to 0\.3571; wanted 0\.3536"):
        lay_signs(left, right)


def test_signs_are_kept_for_both_matrices_and_not_for_the_first_alone() -> None:
    left, right = (factor.float() for factor in Rotation(240).factors)
    item = Prepared("rotation", ("in0", "in1"), (), ("left", "right"))
    first, other = (prepared(item, [left, r], torch.device("cpu")) for r in (right, -right))
    assert other[1].equal(-first[1])
    assert prepared(item, [left, right], torch.device("cpu"))[1] is first[1]
