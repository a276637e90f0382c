"""Tokens whose keys and values are read as they are although the cache is packed: a sequence's first and last ones.

The last tokens are KIVI's residual window (Liu et al., 2024, arXiv 2402.02750), the first ones StreamingLLM's sinks
(Xiao et al., 2023, arXiv 2309.17453): queries look at both far more than at what lies between. Which keys are near is
said for each query, so it does not matter in which steps a prompt was read.

A sequence keeps its near tokens beside its packed rows, which are complete: in `near_rows` of plain numbers, first the
first tokens, then a ring of the last ones. They lie in pages of the sequence's own, the last columns of its block table
counted from the end, so that where a position's packed row lies is not touched by them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Near:
    """A query at position p sees the key at j as it is if j < `first` or p - j < `recent` (from 1 on: its own)."""

    first: int
    recent: int

    @property
    def rows(self) -> int:
        """How many tokens a sequence keeps as they are."""
        return self.first + self.recent

    def row(self, at: Tensor) -> Tensor:
        """Where the tokens at these positions lie, as long as they are kept."""
        ring = self.first + (at - self.first) % max(self.recent, 1)
        return torch.where(at < self.first, at, ring)

    def holds(self, at: Tensor, last: Tensor | int) -> Tensor:
        """Which of the tokens at these positions are kept once the sequence's token at `last` is."""
        return (at < self.first) | (at > last - self.recent)

    def sees(self, q_at: Tensor, k_at: Tensor) -> Tensor:
        """bool [T, S]: which keys at k_at [S] the queries at q_at [T] see as they are."""
        return (k_at < self.first)[None] | (q_at[:, None] - k_at[None] < self.recent)


def why_not_near(sinks: int, recent: int) -> str | None:
    """What is wrong with so many near tokens, or None."""
    for option, count in (("sinks", sinks), ("recent", recent)):
        if type(count) is not int or count < 0:
            return f"{option} is {count!r}; wanted a number of tokens from 0 on"
    return None


@dataclass(frozen=True)
class NearLayout:
    """Where rows of `channels` numbers of `size` bytes lie in pages of which a head has `page_bytes` each.

    A page holds as many whole rows as it can, or where it cannot hold one, a row takes several pages.
    """

    page_bytes: int
    channels: int
    size: int

    @classmethod
    def of(cls, pages: Tensor, x: Tensor) -> NearLayout:
        """For packed pages [P, H, page, row] and vectors [..., D] as they are."""
        return cls(pages.shape[2] * pages.shape[3], x.shape[-1], x.element_size())

    @property
    def rows_per_page(self) -> int:
        """Whole rows of a page; 0: a row takes `pages_per_row` pages."""
        return self.page_bytes // self.size // self.channels

    @property
    def pages_per_row(self) -> int:
        """1 where a page holds a row."""
        return -(-self.channels // (self.page_bytes // self.size))

    def pages(self, rows: int) -> int:
        """Pages that so many rows take."""
        each = self.rows_per_page
        return -(-rows // each) if each else rows * self.pages_per_row

    def places(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """(number of the page, byte of a head's part of it), int64 [R, bytes of a row], for rows int64 [R]."""
        byte, each = torch.arange(self.channels * self.size, device=rows.device)[None], self.rows_per_page
        if each:
            page, first = rows[:, None] // each, rows[:, None] % each * byte.shape[1]
            return page.expand(-1, byte.shape[1]), first + byte
        whole = self.page_bytes // self.size * self.size
        return rows[:, None] * self.pages_per_row + byte // whole, (byte % whole).expand(len(rows), -1)


def near_rows(pages: Tensor, tables: Tensor, rows: Tensor, layout: NearLayout, dtype: torch.dtype) -> Tensor:
    """Rows [H, R, D] of `dtype` that lie in packed pages; tables int64 [R, M] of their sequences, rows int64 [R]."""
    number, byte = layout.places(rows)
    page = tables.gather(1, tables.shape[1] - 1 - number)
    found = pages.flatten(2)[page, :, byte].permute(2, 0, 1).flatten().view(dtype)
    return found.view(pages.shape[1], len(rows), -1)


def put_near_rows(pages: Tensor, x: Tensor, tables: Tensor, rows: Tensor) -> None:
    """Write x [H, R, D] as it is where `near_rows` reads it."""
    number, byte = NearLayout.of(pages, x).places(rows)
    page = tables.gather(1, tables.shape[1] - 1 - number)
    pages.view(*pages.shape[:2], -1)[page, :, byte] = x.contiguous().view(torch.uint8).permute(1, 2, 0)
