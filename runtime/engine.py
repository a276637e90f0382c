"""Continuous batching: sequences join and leave a running batch, prompts are read in chunks.

Tokens of all sequences lie side by side in one flat step. While nothing joins or leaves, every running
sequence puts in one token and the step's tensors are only advanced in place. When pages run out the newest
sequence gives its pages back and is read again later, so the oldest always gets on. Where there is a decoder,
it runs the batches that only decode. One thread drives an engine.
"""

from __future__ import annotations

import operator
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from llmopt.compiler.errors import CacheFullError, InputError
from llmopt.runtime.decoder import Batch, Decoder, NewPage
from llmopt.runtime.executor import no_room
from llmopt.runtime.kv_cache import KVCache
from llmopt.runtime.sampler import SampleRows, SamplingParams, sample

__all__ = ["Engine", "SamplingParams", "StepFn", "TokenEvent"]

_GREEDY = SamplingParams()


class StepFn(Protocol):
    """One forward over N tokens of any sequences; K and V go to and come from the cache behind it.

    int64 in, on the host: input_ids [1, N], position_ids [1, N], slots [N], seq_ids [N], block_tables [S, P], rows [R];
    logits [R, V] out where the model is, R at least 1. The tensors are the engine's and change in place after the call.
    """

    def __call__(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        slots: Tensor,
        seq_ids: Tensor,
        block_tables: Tensor,
        rows: Tensor,
        /,
    ) -> Tensor: ...


class TokenEvent(NamedTuple):
    """A new token: its sequence's handle, its absolute position, and why it is the last one, if it is.

    `sequence` is the noise's sequence number: in `generate` and `stream`, the prompt's index.
    """

    handle: int
    token: int
    position: int
    finished: Literal["stop", "length"] | None
    sequence: int


@dataclass(slots=True, eq=False)
class _Sequence:
    tokens: list[int]
    params: SamplingParams
    key: int
    limit: int  # tokens, the prompt's included
    stops: frozenset[int]
    events: deque[TokenEvent]
    handle: int = -1
    row: int = -1  # in the cache; -1 while waiting and when over
    cached: int = 0  # tokens whose K and V are in the cache
    room: int = 0  # tokens there are pages for


class Engine:
    """Runs sequences through `step`.

    `chunk_size` bounds the tokens of a step, though every decoding sequence (of at most `max_batch`) always
    has its token in it, and the oldest unread prompt at least one. Generated ids include the end token, as
    transformers' do. A sequence that reaches `context_length` tokens ends there with "length".
    """

    def __init__(
        self,
        step: StepFn,
        cache: KVCache,
        *,
        vocab_size: int,
        context_length: int,
        eos_token_ids: tuple[int, ...] = (),
        chunk_size: int = 512,
        max_batch: int = 256,
        decoder: Decoder | None = None,
    ) -> None:
        for name, value in (("chunk_size", chunk_size), ("max_batch", max_batch)):
            if value < 1:
                raise InputError(f"engine: {name} is {value}; wanted at least 1")
        self.cache, self.vocab_size, self.context_length = cache, vocab_size, context_length
        self._forward, self._eos, self._decoder = step, frozenset(eos_token_ids), decoder
        self._chunk_size, self._max_batch = chunk_size, max_batch
        self._live: dict[int, _Sequence] = {}
        self._waiting: deque[_Sequence] = deque()  # every one of them is newer than every running one
        self._running: list[_Sequence] = []  # oldest first
        self._full: list[_Sequence] = []  # running, with no page for their next token
        self._events: deque[TokenEvent] = deque()  # of sequences that came by `submit`
        self._handles = 0
        self._steady = False  # the next batch is this one, one token later
        self._handed = False  # this batch is with the decoder
        self._batch: list[_Sequence] = []  # the sequences that get a token, in the order of `rows`
        self._parts: list[tuple[_Sequence, int]] = []  # prompts read in part, with their new `cached`

    @property
    def unfinished(self) -> int:
        """Sequences that wait or run."""
        return len(self._live)

    def submit(self, prompt_ids: Sequence[int], params: SamplingParams = _GREEDY, sequence: int = 0) -> int:
        """Queue a prompt and return its handle; InputError or CacheFullError if it can never run.

        `sequence` in [0, 2**32) tells apart the noise of sequences with one seed: equal prompts with equal parameters
        and `sequence` have equal noise, whenever and with whomever they run, and on a CPU equal text. On a GPU the
        number of neighbours chooses the kernels, whose logits differ in their last bits.
        """
        return self._enqueue(self._admissible(prompt_ids, params, sequence, "the prompt"))

    def cancel(self, handle: int) -> None:
        """Take a sequence out at once and free its pages; nothing happens if it is over already."""
        if not 0 <= handle < self._handles:
            raise InputError(f"handle {handle} was never given; this engine has given 0..{self._handles - 1}")
        sequence = self._live.get(handle)
        if sequence is None:
            return
        if sequence.row < 0:
            self._waiting.remove(sequence)
        self._retire(sequence)

    def step(self) -> list[TokenEvent]:
        """One forward; the tokens it made for sequences that came by `submit` (perhaps none)."""
        self._run()
        events = list(self._events)
        self._events.clear()
        return events

    def generate(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams | Sequence[SamplingParams] = _GREEDY
    ) -> list[list[int]]:
        """The generated ids of every prompt (without the prompt, with the end token)."""
        made: list[list[int]] = [[] for _ in prompts]
        for event in self.stream(prompts, params):
            made[event.sequence].append(event.token)
        return made

    def stream(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams | Sequence[SamplingParams] = _GREEDY
    ) -> Iterator[TokenEvent]:
        """Tokens as they are made, `event.sequence` = the prompt's index.

        Inputs are checked here and now; the prompts join the batch at the first `next`. Closing or dropping
        the iterator takes what is unfinished out of the batch.
        """
        each = [params] * len(prompts) if isinstance(params, SamplingParams) else params
        if len(each) != len(prompts):
            raise InputError(f"{len(each)} sampling parameters for {len(prompts)} prompts; give one or one each")
        checked = [
            self._admissible(prompt, own, index, f"prompt {index}")
            for index, (prompt, own) in enumerate(zip(prompts, each, strict=True))
        ]
        return self._stream(checked)

    def _stream(self, sequences: list[_Sequence]) -> Iterator[TokenEvent]:
        inbox: deque[TokenEvent] = deque()
        left = len(sequences)
        try:
            for sequence in sequences:
                sequence.events = inbox
                self._enqueue(sequence)
            while left:
                while not inbox:
                    self._run()
                event = inbox.popleft()
                left -= event.finished is not None
                yield event
        finally:
            for sequence in sequences:
                if sequence.handle in self._live:
                    self.cancel(sequence.handle)

    def _admissible(self, prompt: Sequence[int], params: SamplingParams, key: int, name: str) -> _Sequence:
        """The prompt as a sequence that can run to its end, or an error that calls it `name`."""
        try:
            tokens = [operator.index(t) for t in prompt]
        except TypeError as error:
            raise InputError(f"{name} is no sequence of token ids ({error}); tokenize it first") from error
        if not tokens:
            raise InputError(f"{name} is empty; give at least one token, such as the model's BOS token")
        if min(tokens) < 0 or max(tokens) >= self.vocab_size:
            at = next(i for i, t in enumerate(tokens) if not 0 <= t < self.vocab_size)
            raise InputError(
                f"{name} has token id {tokens[at]} at index {at}, the vocabulary has {self.vocab_size}; "
                "use this model's tokenizer"
            )
        if len(tokens) >= self.context_length:
            raise InputError(
                f"{name} has {len(tokens)} tokens, the model's context is {self.context_length}; shorten it "
                f"to {self.context_length - 1}, which leaves room for one new token"
            )
        if not 0 <= key < 2**32:
            raise InputError(f"{name} has sequence number {key}; wanted one in [0, 2**32)")
        limit = min(len(tokens) + params.max_new_tokens, self.context_length)
        pages, most = self.cache.pages_for(limit - 1), self.cache.max_pages
        if most is not None and pages > most - 1:
            raise CacheFullError(
                f"{name} with its new tokens takes {pages} pages of {self.cache.page_size} tokens, the cache "
                f"holds {most - 1}; shorten it, lower max_new_tokens or raise the cache's limit"
            )
        stops = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else self._eos)
        return _Sequence(tokens, params, key, limit, stops, self._events)

    def _enqueue(self, sequence: _Sequence) -> int:
        sequence.handle = self._handles
        self._handles += 1
        self._live[sequence.handle] = sequence
        self._waiting.append(sequence)
        self._steady = False
        return sequence.handle

    def _release(self, sequence: _Sequence) -> None:
        if sequence.row >= 0:
            self.cache.release(sequence.row)
            self._running.remove(sequence)
            sequence.row, sequence.cached, sequence.room = -1, 0, 0
        self._steady = False

    def _retire(self, sequence: _Sequence) -> None:
        self._release(sequence)
        del self._live[sequence.handle]

    def _run(self) -> None:
        """One forward, if there is anything to run; after one that raised, the next repeats it."""
        try:
            self._run_once()
        except torch.OutOfMemoryError as error:  # the forward says its own
            raise no_room(f"a step of {len(self._running)} sequences with the choice of their tokens", error) from error

    @torch.no_grad()
    def _run_once(self) -> None:
        self._make_room()
        if not self._steady:
            self._plan()
        elif not self._handed:
            self._advance()
        if not self._running:
            return
        again, self._steady = self._steady, False
        if self._handed:
            self._commit(self._decode(again))
            return
        logits = self._forward(
            self._ids, self._positions, self._slots, self._seq_ids, self.cache.block_tables(), self._rows
        )
        for sequence, cached in self._parts:
            sequence.cached = cached
        if self._batch:
            warm = self._sampling.sampled
            position = (self._positions[0, self._rows] + 1).to(logits.device) if warm else None
            self._next = sample(logits, self._sampling, position)
            self._commit(self._next.tolist())

    def _decode(self, again: bool) -> list[int]:
        """The next tokens by the decoder, which has the batch already (`again`) or is given it now."""
        assert self._decoder is not None
        begun = [NewPage(*page) for page in self._turned()] if again else []
        if not again:
            length = max(len(s.tokens) for s in self._batch)
            vectors = self._ids[0], self._positions[0], self._slots, self._seq_ids
            self._decoder.start(Batch(*vectors, self.cache.block_tables(), self._sampling, length))
        return self._decoder.step(begun, self._upcoming())

    def _upcoming(self) -> list[NewPage] | None:
        """Pages that begin with the tokens after the ones being read; None if the batch is over before."""
        if any(len(s.tokens) + 1 >= s.limit for s in self._batch):
            return None
        try:
            for sequence in self._batch:
                if len(sequence.tokens) >= sequence.room:
                    sequence.room = self.cache.reserve(sequence.row, len(sequence.tokens) + 1)
        except CacheFullError:
            return None
        return [NewPage(*page) for page in self._turned(1)]

    def _turned(self, later: int = 0) -> Iterator[tuple[int, int, int]]:
        """Who begins a page with the token to be read, or one `later`: index in the batch, number of the page in the
        sequence, page."""
        size = self.cache.page_size
        for index, sequence in enumerate(self._batch):
            number, rest = divmod(sequence.cached + later, size)
            if not rest:
                yield index, number, self.cache.pages(sequence.row)[number]

    def _commit(self, tokens: list[int]) -> None:
        """Append the new tokens, tell the consumers, retire what is over."""
        self._steady = len(self._batch) == len(self._running) == self._slots.shape[0]
        for sequence, token in zip(self._batch, tokens, strict=True):
            position = sequence.cached = len(sequence.tokens)
            sequence.tokens.append(token)
            finished: Literal["stop", "length"] | None = None
            if token in sequence.stops:
                finished = "stop"
            elif position + 1 >= sequence.limit:
                finished = "length"
            if finished:
                self._retire(sequence)
            elif position >= sequence.room:
                self._full.append(sequence)
            sequence.events.append(TokenEvent(sequence.handle, token, position, finished, sequence.key))

    def _make_room(self) -> None:
        """A page for every running sequence that needs one, the oldest first, if need be from the newest."""
        for sequence in self._full:
            while sequence.row >= 0:
                try:
                    sequence.room = self.cache.reserve(sequence.row, len(sequence.tokens))
                    break
                except CacheFullError:
                    if len(self._running) == 1:
                        raise
                    newest = self._running[-1]
                    self._release(newest)
                    self._waiting.appendleft(newest)
        self._full.clear()

    def _advance(self) -> None:
        """The same batch, one token later."""
        self._ids[0].copy_(self._next)
        self._positions.add_(1)
        self._slots.add_(1)
        starts = [(i, page * self.cache.page_size) for i, _, page in self._turned()]
        if starts:
            index, slot = torch.tensor(starts).unbind(1)
            self._slots[index] = slot

    def _admit(self) -> None:
        """Move waiting sequences into the batch, first come first served.

        Each must leave a free page for every running one, or it would soon be put out again.
        """
        while self._waiting and len(self._running) < self._max_batch:
            sequence = self._waiting[0]
            pages = self.cache.pages_for(len(sequence.tokens))
            if self._running and not self.cache.has_room(pages + len(self._running)):
                return
            row = self.cache.open()
            try:
                sequence.room = self.cache.reserve(row, len(sequence.tokens))
            except CacheFullError:
                self.cache.release(row)
                if not self._running:
                    raise
                return
            sequence.row = row
            self._running.append(self._waiting.popleft())

    def _plan(self) -> None:
        """Lay out a new batch: one token of every sequence that decodes, then prompts up to the budget."""
        self._admit()
        flat: tuple[list[int], ...] = [], [], [], []
        ids, positions, slots, seq_ids = flat
        rows: list[int] = []
        self._batch, self._parts = [], []
        budget = max(1, self._chunk_size - sum(s.cached + 1 == len(s.tokens) for s in self._running))
        for sequence in self._running:
            start, stop = sequence.cached, len(sequence.tokens)
            if stop - start > 1:
                stop = min(stop, start + budget)
                budget -= stop - start
            if stop == start:
                continue
            if stop - start > 1 and self.cache.near_pages:
                sequence.cached = 0  # until the step is done, as it writes over near rows that it reads
            ids += sequence.tokens[start:stop]
            positions += range(start, stop)
            slots += self.cache.slots(sequence.row, start, stop)
            seq_ids += [sequence.row] * (stop - start)
            if stop == len(sequence.tokens):
                rows.append(len(ids) - 1)
                self._batch.append(sequence)
            else:
                self._parts.append((sequence, stop))
        if ids:
            tokens = torch.tensor(flat)
            self._ids, self._positions, self._slots, self._seq_ids = tokens[:1], tokens[1:2], *tokens[2:]
            # a step without rows would be a shape of its own to every kernel, so one unused row is asked for
            self._rows = torch.tensor(rows or [len(ids) - 1])
            batch = self._batch
            self._sampling = SampleRows.of([s.params for s in batch], [s.key for s in batch], self.cache.device)
        limit = 0 if self._decoder is None else self._decoder.limit
        self._handed = len(self._batch) == len(self._running) == len(ids) <= limit
