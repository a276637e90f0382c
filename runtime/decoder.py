"""The decoding state: what a step of one token a sequence reads and the step before it wrote, kept on the device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from llmopt.runtime.sampler import SampleRows
from llmopt.runtime.transfer import to_device


class NewPage(NamedTuple):
    """A page that was added to a running sequence: its place in the batch, the table's column, the page."""

    place: int
    column: int
    page: int


class Batch(NamedTuple):
    """A batch of one token a sequence, as the engine lays it out on the host: int64 [n] tensors, and the block table.

    `cache_rows` are the sequences' rows in `block_tables` [S, P]; `length` is the longest sequence's length, the token
    of this step included.
    """

    ids: Tensor
    positions: Tensor
    slots: Tensor
    cache_rows: Tensor
    block_tables: Tensor
    sampling: SampleRows
    length: int


class Decoder(Protocol):
    """Runs a batch that only decodes, keeping its state itself. `limit`: the most sequences it takes."""

    limit: int

    def start(self, batch: Batch) -> None:
        """Take over a batch; whatever was decoded before is forgotten."""
        ...

    def step(self, pages: Sequence[NewPage], upcoming: Sequence[NewPage] | None = None) -> list[int]:
        """One token of every sequence, in the batch's order; `pages` begin with the tokens that this step reads.

        `upcoming` are those of the step after, which may then be run before this one's tokens are looked at; None: the
        batch ends here, or there is no page for the step after.
        """
        ...


class DecodeState:
    """Device tensors for up to `rows` sequences of up to `width` pages, at addresses that never change.

    The last `near_pages` of them are near pages, as in `KVCache.block_tables`.

    int64 [rows]: tokens, positions, slots (of the token to be read next), moves (1, or 0 for padding), seeds,
    sequences, numbers (0, 1, ...); int64 tables [rows, width]; fp32 temperature [rows]. Padding rows read and write
    the scratch page at position 0, so they harm nobody.
    """

    _VECTORS = ("tokens", "positions", "slots", "moves", "seeds", "sequences")

    def __init__(
        self, rows: int, width: int, page_size: int, device: torch.device | str = "cpu", near_pages: int = 0
    ) -> None:
        rows += rows % 2  # every vector begins at a multiple of 16 bytes, as kernels want
        self.rows, self.width, self.page_size, self.device = rows, width, page_size, torch.device(device)
        self.near_pages = near_pages
        # one allocation, so that a patch of slots and tables is one write
        self.words = torch.zeros(rows * (len(self._VECTORS) + width), dtype=torch.int64, device=self.device)
        vectors = self.words[: rows * len(self._VECTORS)].view(len(self._VECTORS), rows)
        self.tokens, self.positions, self.slots, self.moves, self.seeds, self.sequences = vectors
        self.tables = self.words[rows * len(self._VECTORS) :].view(rows, width)
        self.temperature = torch.zeros(rows, dtype=torch.float32, device=self.device)
        self.numbers = torch.arange(rows, device=self.device)
        pinned = self.device.type == "cuda"
        self._host = torch.zeros(rows, dtype=torch.int64, pin_memory=pinned)
        self._read = torch.cuda.Event() if pinned else None

    def load(self, batch: Batch) -> None:
        """Take over a batch of at most `rows` sequences; every other row becomes padding."""
        count, near, columns = len(batch.ids), self.near_pages, batch.block_tables.shape[1]
        width = min(self.width, columns) - near
        self.words[: self.rows * len(self._VECTORS)].zero_()
        self.tables[:, 0].zero_()
        self.tables[:, self.width - near :].zero_()
        self.temperature.zero_()
        for name, value in (
            ("tokens", batch.ids),
            ("positions", batch.positions),
            ("slots", batch.slots),
            ("seeds", batch.sampling.seed),
            ("sequences", batch.sampling.sequence),
            ("temperature", batch.sampling.temperature),
        ):
            getattr(self, name)[:count].copy_(value)
        self.moves[:count].fill_(1)
        rows = batch.cache_rows.to(batch.block_tables.device)
        self.tables[:count, :width].copy_(batch.block_tables[rows, :width])
        if near:
            self.tables[:count, -near:].copy_(batch.block_tables[rows, columns - near :])

    def add(self, pages: Sequence[NewPage]) -> None:
        """Enter new pages, and the slots of the tokens that come first in them."""
        slots, tables = 2 * self.rows, len(self._VECTORS) * self.rows
        pairs = [(slots + p.place, p.page * self.page_size) for p in pages]
        pairs += [(tables + p.place * self.width + p.column, p.page) for p in pages]
        index, value = to_device(torch.tensor(pairs).T.contiguous(), self.device)
        self.words.index_copy_(0, index, value)

    def read(self, count: int) -> Callable[[], list[int]]:
        """Begin to copy the tokens made last to the host: call what comes back to wait for them, once and before the
        next reading; steps queued meanwhile do not change them."""
        read = self._read
        if read is None:
            tokens: list[int] = self.tokens[:count].tolist()
            return lambda: tokens
        self._host[:count].copy_(self.tokens[:count], non_blocking=True)
        read.record()

        def wait() -> list[int]:
            read.synchronize()
            return self._host[:count].tolist()

        return wait
