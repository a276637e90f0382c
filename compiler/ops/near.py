"""Attention over packed pages in which some tokens are seen as they are (`attend_near`, `near_write`).

    k_0 = kv_write(k_pages_0, k, slots, packing)        every token's packed row, near or not
    o   = attend_near(q, k_0, v_0, ..., k, v, ...)      near tokens of the step from k and v, others from the near rows
    k_1 = near_write(k_0, k, ..., o, ...)               the step's own tokens into the near rows, over older ones

`compiler.quant.near` says who is near and where rows lie. A row may be written over only when the step has read it, so
`near_write` takes what attention made of the pages: whoever orders or fuses ops sees that it comes first.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from llmopt.compiler.op import Cost, nbytes, op
from llmopt.compiler.ops.attention import attend, plain_pages, probabilities, visible, write_packed
from llmopt.compiler.quant.kv import Packing
from llmopt.compiler.quant.near import Near, NearLayout, near_rows, put_near_rows

QUERIES = 256  # whose scores are held at a time


@op
def attend_near(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    block_tables: Tensor,
    seq_ids: Tensor,
    positions: Tensor,
    sinks: Tensor | None,
    scale: float,
    window: int,
    softcap: float,
    k_packing: str,
    v_packing: str,
    k: Tensor,
    v: Tensor,
    first: int,
    recent: int,
) -> Tensor:
    """`attend` in which the query at p sees key and value j as they are if j < first or p - j < recent, and what their
    packed rows stand for otherwise, all in one softmax (KIVI, arXiv 2402.02750; StreamingLLM, arXiv 2309.17453).

    k [1, Hkv, N, D], v [1, Hkv, N, Dv]: the step's own, whose dtype the near rows have; `near_write` has not yet
    written them. One of the packings may be "": such pages hold rows as they are. `sinks` are logits, as in `attend`.
    The tokens of a sequence have consecutive positions, in any order. Scores and sums in fp32 or wider.
    """
    near, out = Near(first, recent), q.new_empty((*q.shape[:-1], v.shape[-1]))
    wide = torch.promote_types(q.dtype, torch.float32)
    for row in seq_ids.unique().tolist():
        tokens = (seq_ids == row).nonzero().squeeze(1)
        at = positions[0, tokens]
        keys, k_near = _seen(k_pages, k_packing, k[0, :, tokens], block_tables[row], at, near, wide)
        values, v_near = _seen(v_pages, v_packing, v[0, :, tokens], block_tables[row], at, near, wide)
        everyone = torch.arange(keys.shape[1], device=q.device)
        for some in torch.arange(len(tokens), device=q.device).split(QUERIES):
            asking, is_near = q[:, :, tokens[some]], near.sees(at[some], everyone)
            asked = Packing.parse(k_packing).asked(asking) if k_packing else asking
            products = torch.where(is_near, _by_head(asking.to(wide), k_near.mT), _by_head(asked.to(wide), keys.mT))
            probs = probabilities(products, visible(at[some], everyone, window), sinks, scale, softcap)
            far = _by_head(probs * ~is_near, values)
            far = Packing.parse(v_packing).turned_back(far) if v_packing else far
            out[:, :, tokens[some]] = (far + _by_head(probs * is_near, v_near)).to(q.dtype)
    return out


attend_near.traceable = False


def _by_head(x: Tensor, y: Tensor) -> Tensor:
    """x [1, Hq, T, A] times y [Hkv, A, B], which a group of heads shares and which is not copied for each."""
    return (x.reshape(y.shape[0], -1, x.shape[3]) @ y).view(*x.shape[:3], y.shape[2])


def _seen(
    pages: Tensor, packing: str, x: Tensor, table: Tensor, at: Tensor, near: Near, wide: torch.dtype
) -> tuple[Tensor, Tensor]:
    """(what packed rows stand for, near tokens as they are and others 0) [H, L, D] of one sequence, its tokens x
    [H, n, D] at positions `at` [n]."""
    size, length = pages.shape[2], int(at.max()) + 1
    used = table[: -(-length // size)]
    packed = plain_pages(pages[used], packing, wide).transpose(0, 1).flatten(1, 2)[:, :length]
    if not packing:
        return packed, packed
    before = torch.arange(int(at.min()), device=at.device)
    held = before[near.holds(before, len(before) - 1)]
    plain = torch.zeros_like(packed)
    if len(held):
        tables = table.expand(len(held), -1)
        plain[:, held] = near_rows(pages, tables, near.row(held), NearLayout.of(pages, x), x.dtype).to(wide)
    plain[:, at] = x.to(wide)
    return packed, plain


@attend_near.fake
def _attend_near_fake(*given: Any) -> Tensor:
    q, v = given[0], given[-3]
    return q.new_empty((*q.shape[:-1], v.shape[-1]))  # type: ignore[no-any-return]


@attend_near.cost
def _attend_near_cost(q: Tensor, k_pages: Tensor, v_pages: Tensor, block_tables: Tensor, *rest: Any) -> Cost:
    """As for `attend`, and the near rows of every listed sequence."""
    *_, k, v, first, recent = rest
    packed = attend.cost_fn(q, k_pages, v_pages, block_tables)  # type: ignore[misc]
    near = (first + recent) * block_tables.shape[0] * k.shape[1] * (k.shape[3] + v.shape[3]) * k.element_size()
    return Cost(packed.flops, packed.bytes + near + nbytes(k, v))


@op
def near_write(
    pages: Tensor,
    x: Tensor,
    block_tables: Tensor,
    seq_ids: Tensor,
    positions: Tensor,
    attended: Tensor,
    first: int,
    recent: int,
) -> Tensor:
    """The pages after writing, as they are, those of the step's tokens that stay near their sequences' last ones.

    pages uint8 [P, H, page, row] as `kv_write` packs them, x [1, H, N, D]; the others as for `attend_near`, which made
    `attended` of the rows as they were before: nothing of it is read.
    """
    return write_near(pages.clone(), x, block_tables, seq_ids, positions, attended, first, recent)


near_write.traceable = False  # as kv_write


@near_write.in_place
def write_near(
    pages: Tensor,
    x: Tensor,
    block_tables: Tensor,
    seq_ids: Tensor,
    positions: Tensor,
    attended: Tensor,
    first: int,
    recent: int,
) -> Tensor:
    """`near_write` in place."""
    near, at = Near(first, recent), positions[0]
    last = at.new_zeros(block_tables.shape[0]).scatter_reduce(0, seq_ids, at, "amax")
    kept = near.holds(at, last[seq_ids]).nonzero().squeeze(1)
    put_near_rows(pages, x[0, :, kept], block_tables[seq_ids[kept]], near.row(at[kept]))
    return pages


@near_write.fake
def _near_write_fake(pages: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(pages)


@near_write.cost
def _near_write_cost(pages: Tensor, x: Tensor, *rest: Any) -> Cost:
    return Cost(0, 2 * nbytes(x))


def _sampled(packing: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pages, block tables, sequences, positions: of two sequences, the second of which begins with this step."""
    tables = torch.arange(20, 0, -1).view(2, 10)
    pages = torch.zeros(21, 2, 4, Packing.parse(packing).row_bytes(16), dtype=torch.uint8)
    write_packed(pages, torch.randn(1, 2, 84, 16), torch.arange(84), packing)
    put_near_rows(pages, torch.randn(2, 4, 16), tables[[0, 0, 0, 0]], torch.arange(4))
    return pages, tables, torch.tensor([0, 0, 1]), torch.tensor([[5, 6, 0]])


@attend_near.samples
def _attend_near_samples() -> Iterable[tuple[Any, ...]]:
    q, k, v = torch.randn(1, 4, 3, 16), torch.randn(1, 2, 3, 16), torch.randn(1, 2, 3, 16)
    for keys, values, first, recent in (("int4-h8", "int8", 1, 3), ("nvfp4", "fp8-h4", 2, 0), ("int8", "int8", 0, 4)):
        k_pages, *others = _sampled(keys)
        yield q, k_pages, _sampled(values)[0], *others, None, 0.25, 0, 0.0, keys, values, k, v, first, recent
    k_pages, *others = _sampled("int4")
    plain, sinks = torch.randn(21, 2, 4, 16), torch.randn(4)
    yield q, k_pages, plain, *others, sinks, 0.25, 4, 15.0, "int4", "", k, v, 1, 2


@near_write.samples
def _near_write_samples() -> Iterable[tuple[Any, ...]]:
    x, attended = torch.randn(1, 2, 3, 16), torch.randn(1, 4, 3, 16)
    for packing, first, recent in (("int4", 1, 2), ("fp8", 0, 1), ("nvfp4", 4, 0)):
        pages, *others = _sampled(packing)
        yield pages, x, *others, attended, first, recent
