"""How keys and values become bytes: errors as published, bytes as documented, edge vectors."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmopt.compiler.errors import InputError
from llmopt.compiler.quant.kv import Packing, hadamard_blocks, pages_of, signs_of

KINDS = ("int4", "int8", "fp8", "nvfp4")


def rounded(x: torch.Tensor, packing: str) -> torch.Tensor:
    how = Packing.parse(packing)
    return how.turned_back(how.unpack(how.pack(x)))


@pytest.mark.parametrize(
    ("packing", "error"), [("int4", 0.0100), ("int4-h128", 0.0100), ("nvfp4", 0.00903), ("fp8", 0.00066)]
)
def test_relative_errors_of_normal_vectors(packing: str, error: float) -> None:
    """SAW-INT4's token-wise INT4 has .0100; NVFP4 and E4M3 by the largest element as for weights."""
    x = torch.randn(20000, 128, generator=torch.Generator().manual_seed(0))
    got = float((rounded(x, packing) - x).square().sum() / x.square().sum())
    assert abs(got - error) < 0.015 * error


@pytest.mark.parametrize(("packing", "rmse"), [("int4", 0.431), ("int4-h16", 0.200), ("int4-h128", 0.172)])
def test_logits_of_keys_with_outliers(packing: str, rmse: float) -> None:
    """Four of 128 channels ten times as large, queries 0.2 there: SAW-INT4's setting, to the spread between draws."""
    found = []
    for seed in range(8):
        make = torch.Generator().manual_seed(seed)
        k, q = torch.randn(2048, 128, generator=make), torch.randn(64, 128, generator=make)
        at = torch.randperm(128, generator=make)[:4]
        k[:, at] *= 10
        q[:, at] *= 0.2
        found.append(((rounded(k, packing) - k) @ q.T / 128**0.5).square().mean().sqrt())
    assert abs(float(torch.stack(found).mean()) - rmse) < 0.05 * rmse


def test_an_offset_of_all_channels_does_not_become_one_large_number() -> None:
    """Without signs Hadamard's first row gathers it."""
    x = torch.randn(4096, 128, generator=torch.Generator().manual_seed(0)) + 3
    plain = hadamard_blocks(x, 128) / 128**0.5
    without = hadamard_blocks(rounded(plain, "int4"), 128) / 128**0.5
    with_signs = rounded(x, "int4-h128")
    assert (with_signs - x).norm() < 0.5 * (without - x).norm()
    assert abs(sum(signs_of(128))) < 32


def test_a_sylvester_matrix_in_blocks() -> None:
    matrix = hadamard_blocks(torch.eye(16), 8)
    assert torch.equal(matrix @ matrix.T, 8 * torch.eye(16))
    assert torch.equal(
        matrix[:8, :8], torch.tensor([[(-1.0) ** (i & j).bit_count() for j in range(8)] for i in range(8)])
    )
    assert not matrix[:8, 8:].any()


@pytest.mark.parametrize("order", [2, 16, 32, 64, 128])
def test_scores_stay_what_they_were(order: int) -> None:
    how = Packing("int4", order)
    make = torch.Generator().manual_seed(1)
    q, k = torch.randn(7, 128, generator=make), torch.randn(9, 128, generator=make)
    torch.testing.assert_close(how.asked(q) @ how.rotated(k).T, q @ k.T, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(how.turned_back(how.rotated(k)), k, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("order", [1, 16])
def test_edge_vectors(kind: str, order: int) -> None:
    """All equal, zero, one huge number among small ones, numbers at bf16's end: finite, and in range."""
    huge = torch.full((32,), 1e-2)
    huge[5] = 1e4
    rows = torch.stack([torch.zeros(32), torch.full((32,), -7.25), huge, torch.linspace(-3e37, 3e37, 32)])
    got = rounded(rows, f"{kind}-h{order}" if order > 1 else kind)
    assert torch.isfinite(got).all()
    assert not got[0].any()
    assert (got - rows).abs().amax(1).le(0.2 * rows.abs().amax(1) + 1e-30).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_stays_visible(kind: str, bad: float) -> None:
    x = torch.randn(3, 32)
    x[1, 7] = bad
    got = rounded(x, kind)
    assert not torch.isfinite(got[1]).all()
    assert torch.isfinite(got[[0, 2]]).all()


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(KINDS), st.sampled_from((16, 64, 80, 96)), st.integers(0, 1000))
def test_codes_lie_where_the_documentation_says(kind: str, channels: int, seed: int) -> None:
    """Of a word of 32 bits, neighbours 16 bits apart."""
    how = Packing(kind)
    x = torch.randn(2, channels, generator=torch.Generator().manual_seed(seed))
    row = how.pack(x)
    assert row.shape == (2, how.row_bytes(channels))
    assert how.channels(row.shape[-1]) == channels
    words = row[:, : how.code_bytes(channels)].contiguous().view(torch.int32).long() & 0xFFFFFFFF
    each = 32 // how.bits
    at = {2 * (n % (each // 2)) + n // (each // 2): n * how.bits for n in range(each)}
    codes = torch.stack([words[:, c // each] >> at[c % each] & (1 << how.bits) - 1 for c in range(channels)], 1)
    if kind.startswith("int"):
        scale, offset = row[:, how.code_bytes(channels) :].contiguous().view(torch.bfloat16).float().unbind(1)
        torch.testing.assert_close(codes * scale[:, None] + offset[:, None], how.unpack(row), atol=0, rtol=0)
        assert codes.amin(1).le(how.bits == 8).all()  # offset and scale are rounded: half a step of 255
        assert codes.amax(1).ge((1 << how.bits) - 2).all()


def test_pages_keep_codes_together() -> None:
    how = Packing.parse("int4")
    pages = torch.zeros(3, 2, 16, how.row_bytes(64), dtype=torch.uint8)
    codes, rest = pages_of(pages, how)
    assert codes.shape == (3, 2, 16, 32)
    assert rest.shape == (3, 2, 16, 4)
    codes[1, 1, 3] = 255
    assert torch.equal(pages[1, 1].flatten().nonzero()[:, 0], torch.arange(96, 128))


@pytest.mark.parametrize(("channels", "words"), [(16, 4), (32, 6), (48, 8), (64, 10), (80, 13), (128, 19)])
def test_rows_of_nvfp4_are_whole_words(channels: int, words: int) -> None:
    how, x = Packing.parse("nvfp4"), torch.randn(2, channels)
    assert how.row_bytes(channels) == 4 * words
    assert how.channels(4 * words) == channels
    rows = how.pack(x)
    assert not rows[:, channels // 2 + 4 + channels // 16 :].any()
    assert torch.equal(how.unpack(rows)[:1], how.unpack(how.pack(x[:1])))


def test_pages_of_nvfp4_keep_words_and_scales_together() -> None:
    how = Packing.parse("nvfp4")
    pages = torch.zeros(3, 2, 16, how.row_bytes(80), dtype=torch.uint8)
    parts = pages_of(pages, how)
    assert [p.shape[3] for p in parts] == [40, 4, 8]
    parts[2][1, 1, 3] = 255
    first = 16 * (40 + 4) + 3 * 8
    assert torch.equal(pages[1, 1].flatten().nonzero()[:, 0], torch.arange(first, first + 8))


@pytest.mark.parametrize("text", ["int3", "int4-h", "int4-h12", "int4-h0", "h16", ""])
def test_names_that_are_none(text: str) -> None:
    with pytest.raises(InputError, match="no packing of keys and values"):
        Packing.parse(text)


@pytest.mark.parametrize(("packing", "channels"), [("int4", 20), ("nvfp4", 40), ("int4-h32", 80)])
def test_heads_that_cannot_be_cut_so(packing: str, channels: int) -> None:
    with pytest.raises(InputError, match=f"heads of {channels} channels cannot be packed as {packing}"):
        Packing.parse(packing).row_bytes(channels)
