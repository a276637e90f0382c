"""Into how many parts a decoding attention cuts its keys; apart from its kernel, as whoever only runs has no Triton."""

from __future__ import annotations

from llmopt.compiler.target import Target


def splits(batch: int, kv_heads: int, context: int, target: Target) -> int:
    """Parts to split `context` keys into: every multiprocessor has a program, with 64 keys or more; with 256 keys or
    more it has four, which keeps memory busy."""
    pairs = batch * kv_heads
    few = min(_cdiv(target.cores, pairs), _cdiv(context, 64))
    many = min(4 * target.cores // pairs, context // 256)
    # whole tiles a part: no part is left without keys
    chunk = _cdiv(_cdiv(context, max(1, few, many)), 64) * 64
    return max(1, _cdiv(context, chunk))


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)
