"""Into how many parts a decoding attention cuts its keys; apart from its kernel, as whoever only runs has no Triton."""

from __future__ import annotations

from llmopt.compiler.target import Target

TILE = 64  # keys that a part has at least; the kernel's own tiles are no larger where this matters
FEW = 16  # parts that the last one to arrive adds up in one go


def splits(batch: int, kv_heads: int, context: int, target: Target, packed: bool = False) -> int:
    """The most parts to split `context` keys into.

    Every multiprocessor has a program, as long as a part has a tile of keys. With four tiles a part, or two while parts
    are few, it has four programs, which keeps memory busy (measured on an H200, batches of 1 to 64); packed keys have
    eight, since a warp of theirs is at work on what it has read. A kernel makes fewer parts of a sequence that has
    fewer tiles.
    """
    pairs = batch * kv_heads
    one = min(_cdiv(target.cores, pairs), _cdiv(context, TILE))
    most = (8 if packed else 4) * target.cores // pairs
    four = min(most, max(context // (4 * TILE), min(FEW, context // (2 * TILE))))
    # whole tiles a part: no part is left without keys
    chunk = _cdiv(_cdiv(context, max(1, one, four)), TILE) * TILE
    return max(1, _cdiv(context, chunk))


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)
