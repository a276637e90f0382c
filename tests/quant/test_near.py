"""Where near rows lie, and that what a query sees as it is, is there when it is asked for."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmopt.compiler.quant.kv import Packing
from llmopt.compiler.quant.near import Near, NearLayout, near_rows, put_near_rows


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from(("int4", "int8", "fp8", "nvfp4")),
    st.sampled_from((16, 48, 128)),
    st.sampled_from((1, 2, 4, 16)),
    st.sampled_from((torch.bfloat16, torch.float32, torch.float64)),
    st.integers(1, 9),
)
def test_rows_are_read_as_they_were_written(kind: str, channels: int, page: int, dtype: torch.dtype, rows: int) -> None:
    """Those of two sequences, from pages that they fill, and that nothing else is written."""
    row = Packing(kind).row_bytes(channels)
    layout = NearLayout(page * row, channels, dtype.itemsize)
    count = layout.pages(rows)
    pages = torch.full((2 * count + 1, 3, page, row), 170, dtype=torch.uint8)
    tables = 1 + torch.randperm(2 * count, generator=torch.Generator().manual_seed(rows)).view(2, count)
    tables = torch.cat((torch.zeros(2, 2, dtype=torch.int64), tables), 1)  # columns of positions
    x = torch.randn(3, 2 * rows, channels).to(dtype)
    sequence, number = torch.arange(2).repeat_interleave(rows), torch.arange(rows).repeat(2)
    put_near_rows(pages, x, tables[sequence], number)
    got = near_rows(pages, tables[sequence], number, layout, dtype)
    assert torch.equal(got, x)
    assert pages[0].eq(170).all()
    assert layout.pages(rows - 1) < count or layout.rows_per_page > 1


def test_pages_that_rows_take() -> None:
    """INT4 of 128 channels: 4 bfloat16 rows in a page of 16 tokens, none in a page of 2."""
    row = Packing("int4").row_bytes(128)
    assert [NearLayout(16 * row, 128, 2).pages(n) for n in (0, 1, 4, 5, 68)] == [0, 1, 1, 2, 17]
    assert [NearLayout(2 * row, 128, 2).pages(n) for n in (1, 5)] == [2, 10]


@pytest.mark.parametrize("first", [0, 1, 5])
@pytest.mark.parametrize("recent", [0, 1, 4])
def test_what_is_seen_as_it_is_is_kept_or_of_the_step(first: int, recent: int) -> None:
    """However 20 tokens are cut into two steps, and rows are none's twice."""
    near, at = Near(first, recent), torch.arange(20)
    for begin in range(20):
        kept = at[:begin][near.holds(at[:begin], begin - 1)]
        assert near.row(kept).unique().numel() == kept.numel() <= near.rows
        assert (near.row(kept) < near.rows).all()
        for query in range(begin, 20):
            seen = {j for j in range(query + 1) if j < first or query - j < recent}
            assert set(at[: query + 1][near.sees(at[[query]], at[: query + 1])[0]].tolist()) == seen
            assert seen <= {*kept.tolist(), *range(begin, query + 1)}
