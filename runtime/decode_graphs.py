"""Decoding by CUDA graphs: one graph for each number of rows and of parts that keys are split into.

A graph holds a whole step: embedding to logits, sampling, and moving the state on. A token then costs the host one
launch of a graph, one copy of the tokens, and a small write when a sequence begins a page. As the next step needs
nothing of the host, it is launched before the tokens of this one are waited for; what it computed is forgotten where
a sequence turns out to have ended. Up to 8 sequences have a graph for each number of them, since there every row
counts; beyond, rows are padded to 16, 32 or 64, the widths of the kernels' tiles. On other devices the step is simply
run anew, which is what tests without a GPU do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from llmopt.compiler.errors import DeviceMemoryError
from llmopt.runtime.decoder import Batch, DecodeState, NewPage
from llmopt.runtime.executor import no_room
from llmopt.runtime.sampler import SampleRows, sample

BUCKETS = (*range(1, 9), 16, 32, 64)

# run(rows, parts): a step over the state's first `rows` rows, its tokens stored, the rows moved on; logits [rows, V]
Run = Callable[[int, int], Tensor]


def bucket(rows: int) -> int:
    """The number of rows that run for so many sequences, at most BUCKETS[-1]."""
    return next(b for b in BUCKETS if b >= rows)


class DecodeGraphs:
    """A decoder over `state`; `parts(rows, length)` says how many parts the keys of `length` tokens are split into.

    Graphs are captured when first needed, and kept: ahead, each would cost the same time, and the compiling of kernels
    for numbers of rows that may never come. Who wants them ahead generates once with as many prompts. All share one
    pool of memory, as only one runs at a time.
    """

    def __init__(self, run: Run, state: DecodeState, parts: Callable[[int, int], int]) -> None:
        self.run, self.state, self.parts = run, state, parts
        self.limit = min(state.rows, BUCKETS[-1])
        self._replays: dict[tuple[int, int], Callable[[], Tensor]] = {}
        self._pool = torch.cuda.graph_pool_handle() if state.device.type == "cuda" else None
        self._count = self._length = 0
        self._ahead = False  # the next step has been launched
        self._late: Exception | None = None  # why it could not be
        self._queued = torch.cuda.Event() if state.device.type == "cuda" else None  # behind all that was launched
        self._sampling: SampleRows | None = None  # where the graph's own sampling is not enough

    def start(self, batch: Batch) -> None:
        """Take over a batch of at most `limit` sequences."""
        self._follow()
        self.state.load(batch)
        self._count, self._length, self._ahead, self._late = len(batch.ids), batch.length, False, None
        cut = batch.sampling.max_k > 0 or batch.sampling.nucleus
        self._sampling = batch.sampling if cut else None

    def step(self, pages: Sequence[NewPage], upcoming: Sequence[NewPage] | None = None) -> list[int]:
        """One token of every sequence; `pages` begin with this step's tokens, `upcoming` with the next step's.

        Where memory runs out for the next step, in the capture of its graph, the call that wants its tokens says so;
        then the batch is to be started anew.
        """
        if self._late is not None:
            raise self._late
        self._follow()
        if not self._ahead:
            self._launch(pages)
        self._ahead = False
        tokens = self.state.read(self._count)
        if upcoming is not None:
            try:
                self._launch(upcoming)
                self._ahead = True
            except (torch.OutOfMemoryError, DeviceMemoryError) as error:
                self._late = error
        if self._queued is not None:
            self._queued.record()
        return tokens()

    def _follow(self) -> None:
        """Whatever stream is current now runs after what was launched, perhaps on another."""
        if self._queued is not None:
            self._queued.wait()

    def _launch(self, pages: Sequence[NewPage]) -> None:
        if pages:
            self.state.add(pages)
        count = self._count
        logits = self.replay(min(bucket(count), self.limit), self._length)()
        self._length += 1
        if self._sampling is not None:  # top-k and top-p: torch's sampler on the graph's logits
            made = sample(logits[:count], self._sampling, self.state.positions[:count])
            self.state.tokens[:count].copy_(made)

    def replay(self, rows: int, length: int) -> Callable[[], Tensor]:
        """The step for so many rows and the longest sequence's length; captured if it is new."""
        key = rows, self.parts(rows, length)
        if key not in self._replays:
            try:
                self._replays[key] = self._record(*key) if self._pool is not None else lambda: self.run(*key)
            except torch.OutOfMemoryError as error:
                raise no_room(f"the graph of a step of {rows} sequences", error) from error
        return self._replays[key]

    @property
    def captured(self) -> int:
        """How many graphs there are."""
        return len(self._replays)

    def _record(self, rows: int, parts: int) -> Callable[[], Tensor]:
        """Capture a step. It is run once before, which loads kernels and makes the buffers that are kept."""
        state = self.state.words.clone()
        side = torch.cuda.Stream(self.state.device)
        side.wait_stream(torch.cuda.current_stream(self.state.device))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(side):
            self.run(rows, parts)
            self.state.words.copy_(state)
        torch.cuda.current_stream(self.state.device).wait_stream(side)
        with torch.cuda.graph(graph, pool=self._pool, stream=side, capture_error_mode="thread_local"):
            logits = self.run(rows, parts)

        def replay() -> Tensor:
            graph.replay()
            return logits

        return replay
