"""Paged KV cache: page tensors, the pool that hands pages out, and the block table of every live sequence.

Where some tokens are kept as they are, too, a sequence has near pages beside those of its positions, in the last
columns of its block table, the first one last: so what stands where for positions does not depend on them.

Invariants: page 0 is scratch and belongs to nobody; any other page is free or belongs to exactly one live
sequence; growth keeps page numbers and contents (Kwon et al., 2023: PagedAttention).
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from llmopt.compiler.errors import CacheError, CacheFullError, InputError
from llmopt.compiler.program import StateSpec


class PagePool:
    """Page numbers 1..size-1, free or taken; the page freed last is handed out first (it is warm)."""

    def __init__(self, size: int) -> None:
        self.size = 1
        self._free: list[int] = []
        self._taken: set[int] = set()
        self.grow(size)

    @property
    def free(self) -> int:
        """How many pages can be taken now."""
        return len(self._free)

    def grow(self, size: int) -> None:
        """Make the pool `size` pages large (page 0 included)."""
        self._free[:0] = range(size - 1, self.size - 1, -1)
        self.size = size

    def take(self, count: int) -> list[int]:
        """`count` pages, all or none."""
        if count > len(self._free):
            raise CacheFullError(f"{count} pages are wanted, {self.free} of {self.size} are free; grow the pool")
        taken = [self._free.pop() for _ in range(count)]
        self._taken.update(taken)
        return taken

    def give(self, pages: Iterable[int]) -> None:
        """Return pages, all or none; a page that is not taken (given twice, foreign, scratch) is an error."""
        pages = list(pages)
        if len(set(pages)) != len(pages) or not self._taken.issuperset(pages):
            wrong = next(p for i, p in enumerate(pages) if p not in self._taken or p in pages[:i])
            raise CacheError(f"page {wrong} was given back but is not taken; its owner gives it back once")
        self._taken.difference_update(pages)
        self._free.extend(reversed(pages))


class KVCache:
    """Paged state of many sequences.

    `tensors[name]` is [num_pages, *spec.shape] on `device`, zero at first. Whoever writes functionally puts
    the new tensor back under its name; growth replaces every tensor (`num_pages` changes exactly then), so
    read `tensors` anew at each step. The pool doubles when it is empty, up to `max_pages` or `max_bytes`,
    whichever is less (both None: until the device has no memory left). A sequence is a row of
    `block_tables()`; rows are small and reused.
    """

    def __init__(
        self,
        specs: Sequence[StateSpec],
        page_size: int = 16,
        initial_pages: int = 64,
        max_pages: int | None = None,
        max_bytes: int | None = None,
        device: torch.device | str = "cpu",
        near_pages: int = 0,
    ) -> None:
        for spec in specs:
            if len(spec.shape) < 2 or spec.shape[1] != page_size:
                raise InputError(
                    f"state {spec.name} has shape {spec.shape}; wanted (heads, {page_size}, ...), "
                    f"as the cache's pages hold {page_size} tokens; make both from one page size"
                )
        self.page_size, self.device, self.near_pages = page_size, torch.device(device), near_pages
        self.bytes_per_page = sum(s.bytes_per_page for s in specs)
        limits = [m for m in (max_pages, max_bytes and max_bytes // max(self.bytes_per_page, 1)) if m is not None]
        self.max_pages = min(limits) if limits else None
        if self.max_pages is not None and self.max_pages < 2 + near_pages:
            beside = f", a sequence has {near_pages} near pages" if near_pages else ""
            raise InputError(
                f"the cache may hold {self.max_pages} pages of {self.bytes_per_page} bytes; wanted at least "
                f"{2 + near_pages} (page 0 is scratch{beside}): raise max_pages or max_bytes"
            )
        size = max(2, initial_pages if self.max_pages is None else min(initial_pages, self.max_pages))
        self._pool = PagePool(size)
        self.tensors: dict[str, Tensor] = {
            s.name: torch.zeros(size, *s.shape, dtype=s.dtype, device=self.device) for s in specs
        }
        self._pages: dict[int, list[int]] = {}
        self._near: dict[int, list[int]] = {}  # empty until the first `reserve`
        self._free_rows: list[int] = []
        self._table = torch.zeros(8, 8, dtype=torch.int64)
        self._pending: list[tuple[int, int, int]] = []
        self._view: Tensor | None = None

    @property
    def num_pages(self) -> int:
        """Pages allocated, scratch included."""
        return self._pool.size

    @property
    def free_pages(self) -> int:
        """Pages that can be taken without growing."""
        return self._pool.free

    def pages_for(self, length: int) -> int:
        """Pages that a sequence of `length` tokens takes, its near pages included."""
        return -(-length // self.page_size) + self.near_pages

    def has_room(self, pages: int) -> bool:
        """Can `pages` more be taken, growing if need be?"""
        return self.max_pages is None or pages <= self._pool.free + self.max_pages - self._pool.size

    def open(self) -> int:
        """Begin a sequence: the lowest free row."""
        row = heapq.heappop(self._free_rows) if self._free_rows else len(self._pages)
        self._pages[row], self._near[row] = [], []
        self._view = None
        return row

    def pages(self, row: int) -> list[int]:
        """The pages of a live sequence's positions, in their order (not to be edited)."""
        if row not in self._pages:
            raise CacheError(f"row {row} is no live sequence; live rows are {sorted(self._pages)}: open() first")
        return self._pages[row]

    def reserve(self, row: int, length: int) -> int:
        """Make room for positions 0..length-1 and return how many positions there is room for now.

        Grows the pool if need be. CacheFullError: the limit is reached, and nothing was changed.
        """
        pages, near = self.pages(row), self._near[row]
        beside = self.near_pages - len(near)
        missing = max(-(-length // self.page_size) - len(pages), 0)
        if missing + beside:
            if missing + beside > self._pool.free:
                self._grow(missing + beside)
            new = self._pool.take(missing + beside)
            near.extend(new[missing:])
            self._pending.extend(_entries(row, len(pages), new[:missing], near if beside else ()))
            pages.extend(new[:missing])
            self._view = None
        return len(pages) * self.page_size

    def slots(self, row: int, start: int, stop: int) -> list[int]:
        """Where the K and V of positions start..stop-1 go: page * page_size + offset."""
        size, pages = self.page_size, self.pages(row)
        found: list[int] = []
        for at in range(start // size, -(-stop // size)):
            base = pages[at] * size
            found.extend(range(base + max(start - at * size, 0), base + min(stop - at * size, size)))
        return found

    def release(self, row: int) -> None:
        """End a sequence; its pages and its row are free at once."""
        self._pool.give([*self.pages(row), *self._near[row]])
        del self._pages[row], self._near[row]
        heapq.heappush(self._free_rows, row)
        self._pending = [entry for entry in self._pending if entry[0] != row]
        self._view = None

    def block_tables(self) -> Tensor:
        """int64 [S, P], contiguous: row r lists the pages of sequence r; S covers the live rows, P doubles.

        Near page i stands in column P - 1 - i. Entries past a sequence's pages, and rows of no sequence, are stale
        page numbers: in range, not to be read. The tensor is kept from call to call and written only where pages
        were added.
        """
        if self._view is None:
            self._write_pending()
            self._view = self._table[: max(self._pages, default=0) + 1]
        return self._view

    def _write_pending(self) -> None:
        rows, width = max(self._pages, default=0) + 1, max(map(len, self._pages.values()), default=1) + self.near_pages
        if rows > self._table.shape[0] or width > self._table.shape[1]:
            shape = [_doubled(have, want) for have, want in zip(self._table.shape, (rows, width), strict=True)]
            self._table = self._table.new_zeros(shape)
            self._pending = [
                entry for r, pages in self._pages.items() for entry in _entries(r, 0, pages, self._near[r])
            ]
        if self._pending:
            row, column, page = torch.tensor(self._pending).unbind(1)
            self._table[row, column] = page
            self._pending = []

    def _grow(self, missing: int) -> None:
        """Double the page tensors (or more, for `missing` pages), within the limit."""
        wanted = self._pool.size + missing - self._pool.free
        if not self.has_room(missing):
            raise CacheFullError(self._full(missing))
        size = _doubled(self._pool.size, wanted)
        size = size if self.max_pages is None else min(size, self.max_pages)
        try:
            for name, old in self.tensors.items():
                if old.shape[0] < size:
                    new = old.new_zeros(size, *old.shape[1:])
                    new[: old.shape[0]] = old
                    self.tensors[name] = new
        except torch.OutOfMemoryError as error:
            # tensors that did grow stay larger than the pool, which is harmless
            self.max_pages = self._pool.size
            raise CacheFullError(self._full(missing)) from error
        self._pool.grow(size)

    def _full(self, missing: int) -> str:
        return (
            f"the cache is full: {missing} pages are wanted, {self._pool.free} of {self._pool.size} are free "
            f"and it may not grow past {self.max_pages} pages of {self.bytes_per_page} bytes; raise the "
            "limit, or run fewer or shorter sequences"
        )


def _entries(row: int, column: int, pages: Sequence[int], near: Sequence[int]) -> list[tuple[int, int, int]]:
    """(row, column, page) of pages from a column of the block table on, and of near pages, which count from its end."""
    listed = [(row, column + i, page) for i, page in enumerate(pages)]
    return listed + [(row, -1 - i, page) for i, page in enumerate(near)]


def _doubled(have: int, want: int) -> int:
    """`have` doubled until it is at least `want`."""
    while have < want:
        have *= 2
    return have
