"""Perplexity of what a compiled program computes, and how far its distributions are from another program's.

Windows of W tokens are disjoint and each is read by itself, from position 0. All W positions are predicted, the last
one's target being the token behind the window, so a text of n tokens has (n - 1) // W windows and what is left over is
not read. Logits come from the step function that also generates: its kernels, its paged cache, its rounded
activations. They exist for one batch of windows at a time; softmax is taken in fp64, a few rows at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from llmopt.compiler.errors import InputError, NumericsError
from llmopt.runtime.session import Session

SLICE = 1 << 22  # logits widened to fp64 at a time

# int64 ids [B, W] -> logits of successive positions: pieces [B, n, V], the n adding up to W
LogitsFn = Callable[[Tensor], Iterator[Tensor]]


@dataclass
class Mean:
    """A streaming mean in fp64, and how sure of it one can be (Welford, 1962)."""

    count: int = 0
    value: float = 0.0
    _squares: float = field(default=0.0, repr=False)

    def add(self, sample: float) -> None:
        """Take in one more sample."""
        self.count += 1
        apart = sample - self.value
        self.value += apart / self.count
        self._squares += apart * (sample - self.value)

    @property
    def error(self) -> float | None:
        """The mean's standard error; None for fewer than two samples."""
        return math.sqrt(self._squares / (self.count - 1) / self.count) if self.count > 1 else None


@dataclass
class Closeness:
    """How near a program is to the one it is compared with, over the same positions.

    `nll` is the other program's; `difference` ours less theirs, window by window; `kl` is KL(theirs || ours) in nats;
    `top1` the share of positions with the same most likely token; `worst` the largest KL of a position.
    """

    nll: Mean = field(default_factory=Mean)
    difference: Mean = field(default_factory=Mean)
    kl: Mean = field(default_factory=Mean)
    top1: Mean = field(default_factory=Mean)
    worst: float = 0.0


@dataclass
class Quality:
    """Means over windows (each of as many tokens, so over tokens, too): `nll` in nats a token."""

    tokens: int = 0
    nll: Mean = field(default_factory=Mean)
    against: Closeness | None = None

    @property
    def perplexity(self) -> float:
        """exp of the mean negative log-likelihood."""
        return math.exp(self.nll.value)


@dataclass
class _Sums:
    """Over the positions of a window."""

    nll: float = 0.0
    nll_other: float = 0.0
    kl: float = 0.0
    same: int = 0
    worst: float = 0.0


def measure(
    logits: LogitsFn,
    batches: Iterable[Tensor],
    other: LogitsFn | None = None,
    progress: Callable[[Quality, int], None] = lambda quality, windows: None,
) -> Quality:
    """Read batches of windows, int64 [B, W + 1] each; with `other`, compare the two distributions at every position.

    Both functions must cut windows into the same pieces. `progress` is told what is known so far and how many windows
    it took. Raises NumericsError: a likelihood is no finite number.
    """
    quality = Quality(against=Closeness() if other is not None else None)
    for batch in batches:
        size = batch.shape[1] - 1
        sums = [_Sums() for _ in batch]
        for piece, theirs, targets in _pieces(logits, other, batch):
            for row, total in enumerate(sums):
                _score(piece[row], None if theirs is None else theirs[row], targets[row], total)
        for total in sums:
            _take_in(quality, total, size)
        progress(quality, len(sums))
    return quality


def _pieces(logits: LogitsFn, other: LogitsFn | None, batch: Tensor) -> Iterator[tuple[Tensor, Tensor | None, Tensor]]:
    """(our logits [B, n, V], theirs, targets [B, n]) along the windows."""
    ids, at = batch[:, :-1], 1
    others = iter(()) if other is None else other(ids)
    for piece in logits(ids):
        yield piece, next(others, None), batch[:, at : at + piece.shape[1]]
        at += piece.shape[1]


def _score(logits: Tensor, other: Tensor | None, targets: Tensor, total: _Sums) -> None:
    """Add up a run of positions: logits [n, V], targets [n]."""
    rows = max(1, SLICE // logits.shape[1])
    for at in range(0, len(logits), rows):
        ours = logits[at : at + rows].double().log_softmax(-1)
        wanted = targets[at : at + rows, None].to(ours.device)
        total.nll -= float(ours.gather(1, wanted).sum())
        if other is None:
            continue
        theirs = other[at : at + rows].to(ours.device).double().log_softmax(-1)
        total.nll_other -= float(theirs.gather(1, wanted).sum())
        total.same += int((ours.argmax(-1) == theirs.argmax(-1)).sum())
        chance = theirs.exp()
        # what never happens adds nothing, however unlikely the other takes it to be
        kl = torch.where(chance > 0, chance * (theirs - ours), 0).sum(-1)
        total.kl += float(kl.sum())
        total.worst = max(total.worst, float(kl.max()))


def _take_in(quality: Quality, total: _Sums, size: int) -> None:
    if not math.isfinite(total.nll):
        raise NumericsError(
            f"window {quality.nll.count}: the negative log-likelihood of its {size} tokens adds up to {total.nll}; "
            "wanted a finite number: the program computes inf or nan, so use a wider dtype (--dtype float32), or find "
            "the pass to blame with `llmopt bisect`"
        )
    quality.tokens += size
    quality.nll.add(total.nll / size)
    found = quality.against
    if found is not None:
        found.nll.add(total.nll_other / size)
        found.difference.add((total.nll - total.nll_other) / size)
        found.kl.add(total.kl / size)
        found.top1.add(total.same / size)
        found.worst = max(found.worst, total.worst)


def step_logits(session: Session, ids: Tensor, most: int) -> Iterator[Tensor]:
    """Logits [B, n, V] of successive positions of B sequences, ids int64 [B, W], by the session's step function.

    A step holds `most` tokens at most, at least one of each sequence; longer windows are read in chunks through the
    cache. Raises CacheFullError, DeviceMemoryError.
    """
    cache, (count, length) = session.cache, ids.shape
    chunk = max(1, min(length, most // count))
    rows = [cache.open() for _ in range(count)]
    try:
        for row in rows:
            cache.reserve(row, length)
        for at in range(0, length, chunk):
            end = min(at + chunk, length)
            flat = ids[:, at:end].reshape(1, -1)
            positions = torch.arange(at, end).repeat(count)[None]
            slots = torch.tensor([slot for row in rows for slot in cache.slots(row, at, end)])
            numbers = torch.tensor(rows).repeat_interleave(end - at)
            wanted = torch.arange(flat.shape[1])
            logits = session.step(flat, positions, slots, numbers, cache.block_tables(), wanted)
            yield logits.view(count, end - at, -1)
    finally:
        for row in rows:
            cache.release(row)


def windows(sequences: Iterable[Tensor], size: int, most: int | None = None) -> list[Tensor]:
    """The disjoint windows of texts [T], each [size + 1] with the token behind it, `most` at most; they are views.

    Raises InputError: no text is long enough for one.
    """
    texts = list(sequences)
    found = [w for text in texts for w in (text.unfold(0, size + 1, size) if len(text) > size else ())]
    if not found:
        longest = max(map(len, texts), default=0)
        raise InputError(
            f"the data's longest text has {longest} tokens; wanted at least {size + 1}, a window and the token behind "
            "it: give more data, or a smaller --window"
        )
    return found[:most]


def batched(windows: Sequence[Tensor], size: int) -> Iterator[Tensor]:
    """Windows [W + 1] as batches [B, W + 1] of `size` or fewer."""
    for at in range(0, len(windows), size):
        yield torch.stack(list(windows[at : at + size]))
