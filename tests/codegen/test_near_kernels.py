"""Decoding over packed pages with near tokens by Triton's interpreter, against the ops: bytes, and results."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import attention_cases as cases
import pytest
import torch
from attention_cases import Cache, Case
from interpreted import rounding
from torch import Tensor

from llmopt.codegen.templates import decode_packed as decode
from llmopt.compiler.ops.attention import kv_write, write_packed
from llmopt.compiler.ops.near import attend_near, near_write
from llmopt.compiler.quant.kv import Packing
from llmopt.compiler.quant.near import NearLayout

pytestmark = pytest.mark.interp
BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def rounded() -> Iterator[None]:
    with rounding():
        yield


def earlier(case: Case, cache: Cache, packing: str, plain: Tensor, near: tuple[int, int]) -> Tensor:
    """Pages that hold all tokens before, packed, and those of them that are near; any other byte is set."""
    size = case.page
    rows = torch.arange(len(case.lengths)).repeat_interleave(torch.tensor(case.lengths))
    at = torch.cat([torch.arange(n) for n in case.lengths])
    x = plain[cache.tables[rows, at // size], :, at % size].transpose(0, 1)[None]
    channels = plain.shape[-1]
    shape = (int(cache.tables.max()) + 1, plain.shape[1], size, Packing.parse(packing).row_bytes(channels))
    pages = write_packed(torch.full(shape, 255, dtype=torch.uint8), x, cache.slots(rows, at), packing)
    return near_write(pages, x, cache.tables, rows, at[None], x, *near)


def decoded(case: Case, near: tuple[int, int], splits: int, keys: str = "int4-h16", values: str = "int4") -> Tensor:
    case, make = replace(case, dtype=BF16), torch.Generator().manual_seed(7)
    (hq, hkv), (d, dv), n = case.heads, case.dims, len(case.lengths)
    how = Packing.parse(keys), Packing.parse(values)
    beside = max(
        NearLayout(case.page * p.row_bytes(w), w, 2).pages(sum(near)) for p, w in zip(how, (d, dv), strict=True)
    )
    cache = Cache.of(case, 1, seed=3)
    more = cache.tables.max() + 1 + torch.randperm(n * beside, generator=make).view(n, beside)
    cache.tables = torch.cat((cache.tables, more), 1)
    q, k, v = (torch.randn(n, h, w, generator=make).to(BF16) for h, w in ((hq, d), (hkv, d), (hkv, dv)))
    sinks = torch.randn(hq, generator=make).to(BF16) if case.sinks else None
    at, rows = torch.tensor(case.lengths), torch.arange(n)
    k_pages, v_pages = earlier(case, cache, keys, cache.k, near), earlier(case, cache, values, cache.v, near)
    slots, x, y = cache.slots(rows, at), k.transpose(0, 1)[None], v.transpose(0, 1)[None]
    k_want, v_want = kv_write(k_pages, x, slots, keys), kv_write(v_pages, y, slots, values)
    given = cache.tables, rows, at[None]
    want = attend_near(
        q.float().transpose(0, 1)[None], k_want, v_want, *given, None if sinks is None else sinks.float(), case.scale,
        case.window, case.softcap, keys, values, x, y, *near,
    )  # fmt: skip
    k_want, v_want = near_write(k_want, x, *given, want, *near), near_write(v_want, y, *given, want, *near)
    out = torch.full((n, hq * dv), torch.nan, dtype=BF16)
    partial, lse = torch.full((n * hq * splits * dv,), torch.nan), torch.full((n * hq * splits * 2,), torch.nan)
    tickets, none = torch.zeros(n * hkv, dtype=torch.int32), torch.zeros(1)
    decode.decode_packed[(n, hkv, splits)](
        k_pages, v_pages, cache.tables, at, slots, sinks, out, partial, lse, tickets,
        q, none, none, k, v, torch.tensor([hq, hkv, d, dv]), n, cache.tables.shape[1], splits,
        HQ=hq, HKV=hkv, D=d, DV=dv, PAGE=case.page, SCALE=case.scale, WINDOW=case.window, SOFTCAP=case.softcap,
        LOAD_Q=cases.plain_q, LOAD_K=cases.plain_k, LOAD_V=cases.plain_v, K_KIND=how[0].kind, K_ORDER=how[0].order,
        V_KIND=how[1].kind, V_ORDER=how[1].order, ORDER=0, BLOCK_T=32, LEAST=1, EARLY=0, BLOCK_S=2, PDL=False,
        FIRST=near[0], RECENT=near[1],
    )  # fmt: skip
    assert torch.equal(k_pages, k_want)
    assert torch.equal(v_pages, v_want)
    assert not tickets.any()
    want = want[0].transpose(0, 1)
    assert (out.view(n, hq, dv).float() - want).abs().max() <= 1.6e-2 * want.abs().max()
    return out


@pytest.mark.parametrize(
    ("first", "recent"), [(4, 0), (0, 1), (2, 17), (40, 3), (0, 200)], ids=lambda value: str(value)
)
def test_near_tokens(first: int, recent: int) -> None:
    """Of sequences shorter and longer than both; with 40 first ones whole parts see no packed row."""
    decoded(Case((0, 1, 3, 31, 70), page=16), (first, recent), splits=3)


@pytest.mark.parametrize(("keys", "values"), [("int4-h64", "int4-h32"), ("int8", "int8-h64"), ("fp8-h8", "nvfp4-h16")])
def test_packings(keys: str, values: str) -> None:
    decoded(Case((2, 45), page=16), (1, 6), 2, keys, values)


@pytest.mark.parametrize(
    "case",
    [
        Case((37, 5), heads=(2, 2), page=8),
        Case((37, 5), heads=(20, 1), page=16),
        Case((37, 5), dims=(80, 96), page=16),
        Case((60, 5, 0), page=16, window=5, softcap=2.0, sinks=True),
        Case((60, 5, 0), page=4, dims=(16, 40), window=20, sinks=True),
    ],
    ids=str,
)
def test_features(case: Case) -> None:
    decoded(case, (2, 7), 2, "int4-h16" if case.dims != (16, 40) else "int8", "int8")


def test_what_is_near_is_not_rounded() -> None:
    """So that what passes above is not within its tolerance by chance: values of two bits' difference."""
    case = Case((20,), page=16)
    near, far = decoded(case, (0, 64), 1, "int4", "int4"), decoded(case, (0, 1), 1, "int4", "int4")
    assert (near - far).abs().max() > 0.05 * near.abs().max()
