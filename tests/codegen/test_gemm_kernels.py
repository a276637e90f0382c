"""The `gemv` and `gemm` templates in Triton's interpreter, against fp64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from gemm_cases import Case, Data

pytestmark = pytest.mark.interp

VECTOR = {
    "BLOCK_J": 8, "BLOCK_K": 64, "PREFETCH": 0, "EARLY": 0, "EVICT": "", "ASK": 0, "num_warps": 4, "num_stages": 1,
}  # fmt: skip
MATRIX = {
    "BLOCK_J": 16, "BLOCK_K": 32, "BLOCK_M": 8, "SLICES": 1, "SPLIT_K": 1, "EARLY": 0, "ASK": 0, "num_warps": 4,
    "num_stages": 3,
}  # fmt: skip

# whole blocks, a rest of K, a rest of J, both; weights that begin inside w
CASES = [
    Case(128, 32),
    Case(128, 32, norm=1),
    Case(200, 21, norm=1, dtype=torch.float16),
    Case(72, 19, added=True, skip=5),
    Case(128, 24, parts=2, norm=1, skip=3),
    Case(136, 21, parts=2, dtype=torch.float32),
    Case(192, 40, norm=1, added=True, dtype=torch.float32),
]


def right(data: Data, y: torch.Tensor) -> None:
    """About as near to fp64 as torch in the same dtype."""
    assert data.error(y) <= 1.5 * data.error(data.plain(data.case.dtype))


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("prefetch", [0, 1])
def test_gemv_is_the_product(case: Case, prefetch: int) -> None:
    data = Data.of(case, 1)
    right(data, data.run("gemv", {**VECTOR, "PREFETCH": prefetch}))


@pytest.mark.parametrize("prefetch", [0, 1])
def test_gemv_in_one_step(prefetch: int) -> None:
    data = Data.of(Case(100, 16, norm=1, added=True), 1)
    right(data, data.run("gemv", {**VECTOR, "BLOCK_K": 128, "PREFETCH": prefetch}))


def test_gemv_takes_more_tokens() -> None:
    data = Data.of(Case(128, 32, norm=1), 3)
    right(data, data.run("gemv", VECTOR))


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize(("slices", "split"), [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_gemm_is_the_product(case: Case, slices: int, split: int) -> None:
    data = Data.of(case, 5)
    y = data.run("gemm", {**MATRIX, "SLICES": slices, "SPLIT_K": split}, calls=split)
    right(data, y)


@pytest.mark.parametrize(("tokens", "width"), [(1, 8), (8, 8), (9, 16), (31, 32), (64, 64)])
def test_gemm_of_any_number_of_tokens(tokens: int, width: int) -> None:
    data = Data.of(Case(96, 20, norm=1, added=True), tokens)
    right(data, data.run("gemm", {**MATRIX, "BLOCK_M": width, "SPLIT_K": 3}))


def test_gemm_splits_that_do_not_divide() -> None:
    data = Data.of(Case(7 * 32, 16), 2)
    right(data, data.run("gemm", {**MATRIX, "SPLIT_K": 4}))


@pytest.mark.parametrize(("slices", "split"), [(1, 1), (2, 1), (1, 2), (2, 3)])
@pytest.mark.parametrize(("size", "weight"), [(1e4, 20.0), (3e-4, 0.02), (1.0, 1.0)])
def test_a_norm_in_fp16_neither_overflows_nor_loses_bits(size: float, weight: float, slices: int, split: int) -> None:
    for case in (Case(128, 32, norm=1, dtype=torch.float16), Case(200, 21, parts=2, norm=1, dtype=torch.float16)):
        data = Data.of(case, 3)
        x = data.x.double() / data.x.double().abs().amax() * size
        data = replace(data, x=x.to(case.dtype), g=torch.full_like(data.g, weight))
        right(data, data.run("gemm", {**MATRIX, "SLICES": slices, "SPLIT_K": split}, calls=2))
        right(replace(data, x=data.x[:1]), replace(data, x=data.x[:1]).run("gemv", VECTOR))
