"""The attention kernels in Triton's interpreter, against the op's meaning in fp64."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import attention_cases as cases
import pytest
import torch
from attention_cases import Cache, Case, attention_entries
from interpreted import rounding
from torch import Tensor

from llmopt.codegen.templates import decode_attention as decode
from llmopt.codegen.templates import prefill_attention as prefill
from llmopt.runtime.attend import StepLayout

pytestmark = pytest.mark.interp

# of the largest value: both halves round softmax's weights and the result, at 2^-11 and 2^-8
TOLERANCE = {torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


@pytest.fixture(autouse=True)
def rounded() -> Iterator[None]:
    with rounding():
        yield


def decoded(
    case: Case, splits: int, swap: int = 0, peel: int = 0, ahead: int = 0, config: Mapping[str, Any] | None = None
) -> None:
    used = {
        "BLOCK_T": 16, "LEAST": 1 + ahead % 2, "SWAP": swap, "PEEL": peel, "AHEAD": ahead, "EARLY": 0,
        "WIDE": ahead % 2, "DRAIN": 0, "BLOCK_S": 2, **(config or {}),
    }  # fmt: skip
    make = torch.Generator().manual_seed(7)
    cache = Cache.of(case, 1, seed=3)
    (hq, hkv), (d, dv), n = case.heads, case.dims, len(case.lengths)
    q, k, v = (torch.randn(n, h, w, generator=make).to(case.dtype) for h, w in ((hq, d), (hkv, d), (hkv, dv)))
    cos, sin = (torch.randn(n, 1, d, generator=make).to(case.dtype) for _ in range(2))
    sinks = torch.randn(hq, generator=make).to(case.dtype) if case.sinks else None
    at, rows = torch.tensor(case.lengths), torch.arange(n)
    turned_q, turned_k = (_rope(x, cos, sin) if case.rope else x for x in (q, k))
    k_want, v_want, want = cases.expected(case, cache, turned_q, turned_k, v, rows, at, sinks)

    out = torch.full((n, hq * dv), torch.nan, dtype=case.dtype)
    partial = torch.full((n * hq * splits * dv,), torch.nan)
    lse = torch.full((n * hq * splits * 2,), torch.nan)
    tickets = torch.zeros(n * hkv, dtype=torch.int32)
    hooks = (cases.rope_q, cases.rope_k) if case.rope else (cases.plain_q, cases.plain_k)
    decode.decode_attention[(n, hkv, splits)](
        cache.k, cache.v, cache.tables, at, cache.slots(rows, at), sinks, out, partial, lse, tickets,
        q, cos, sin, k, v, torch.tensor([hq, hkv, d, dv]), n, cache.tables.shape[1], splits,
        HQ=hq, HKV=hkv, D=d, DV=dv, PAGE=case.page, SCALE=case.scale, WINDOW=case.window, SOFTCAP=case.softcap,
        LOAD_Q=hooks[0], LOAD_K=hooks[1], LOAD_V=cases.plain_v, ORDER=0, PDL=False, **used,
    )  # fmt: skip
    tolerance = TOLERANCE[case.dtype]
    assert (out.view(n, hq, dv).double() - want).abs().max() <= tolerance * want.abs().max()
    torch.testing.assert_close(cache.k, k_want, atol=1e-6 if case.rope else 0, rtol=0)
    assert torch.equal(cache.v, v_want)
    assert not tickets.any()


def _rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    low, high = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-high, low), dim=-1) * sin


@pytest.mark.parametrize("splits", [1, 3, 8])
@pytest.mark.parametrize(("swap", "peel"), [(0, 0), (1, 0), (0, 1), (1, 1)])
def test_ragged_lengths_and_splits(splits: int, swap: int, peel: int) -> None:
    decoded(Case((0, 1, 15, 16, 17, 70)), splits, swap, peel, ahead=splits % 3)


@pytest.mark.parametrize("swap", [0, 1])
@pytest.mark.parametrize(
    "case",
    [
        Case((37, 5), heads=(2, 2)),
        Case((37, 5), heads=(8, 1)),
        Case((37, 5), heads=(6, 2), page=16),
        Case((37, 5), heads=(20, 1)),
        Case((37, 5), dims=(80, 80)),
        Case((37, 5), dims=(24, 40)),
        Case((60, 5, 0), window=20),
        Case((60, 5, 0), window=1),
        Case((37, 5), softcap=2.0),
        Case((37, 0), sinks=True),
        Case((60, 5), window=20, softcap=2.0, sinks=True, page=16),
        Case((37, 0), rope=True),
        Case((37, 5), dtype=torch.float16),
        Case((37, 5), dtype=torch.bfloat16),
    ],
    ids=str,
)
def test_features(case: Case, swap: int) -> None:
    decoded(case, 3, swap, peel=swap)


@pytest.mark.parametrize("entry", attention_entries(), ids=lambda e: f"{e['shape']} {e['config']}")
def test_configs_of_the_tables(entry: Mapping[str, Any]) -> None:
    shape, config = entry["shape"], entry["config"]
    heads, dims = (shape["HQ"], shape["HKV"]), (shape["D"], shape["DV"])
    tile = config["BLOCK_T"]
    lengths, dtype = (0, tile - 1, 3 * tile * config["LEAST"] + 1), getattr(torch, entry["dtype"])
    case = Case(lengths, heads, dims, shape["PAGE"], dtype=dtype)
    decoded(case, 3, config=config)


def prefilled(case: Case, counts: tuple[int, ...], block_q: int = 16, block_t: int = 16) -> None:
    make = torch.Generator().manual_seed(7)
    cache = Cache.of(case, max(counts), seed=3)
    (hq, hkv), (d, dv) = case.heads, case.dims
    rows = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    at = torch.cat([torch.arange(n) + have for n, have in zip(counts, case.lengths, strict=True)])
    q = torch.randn(len(rows), hq, d, generator=make).to(case.dtype)
    k, v = (torch.randn(len(rows), hkv, w, generator=make).to(case.dtype) for w in (d, dv))
    sinks = torch.randn(hq, generator=make).to(case.dtype) if case.sinks else None
    k_pages, v_pages, want = cases.expected(case, cache, q, k, v, rows, at, sinks)

    tiles = StepLayout.of(rows, at[None]).tiles(block_q)
    out = torch.full((len(rows), hq, dv), torch.nan, dtype=case.dtype)
    prefill.prefill_attention[(len(tiles), hq)](
        q, k_pages, v_pages, cache.tables, tiles, sinks, out, cache.tables.shape[1],
        HQ=hq, HKV=hkv, D=d, DV=dv, PAGE=case.page, SCALE=case.scale, WINDOW=case.window, SOFTCAP=case.softcap,
        K_KIND="", V_KIND="", V_ORDER=1, BLOCK_Q=block_q, BLOCK_T=block_t, DRAIN=0,
    )  # fmt: skip
    tolerance = TOLERANCE[case.dtype]
    assert (out.double() - want).abs().max() <= tolerance * want.abs().max()


@pytest.mark.parametrize(
    ("case", "counts"),
    [
        (Case((0, 0, 0)), (40, 1, 16)),
        (Case((5, 33, 0, 16)), (20, 1, 3, 17)),
        (Case((5, 33), heads=(6, 2), page=16), (20, 1)),
        (Case((5, 33), dims=(24, 40)), (20, 1)),
        (Case((0, 50, 9), window=20), (45, 30, 1)),
        (Case((0, 50), window=3), (20, 18)),
        (Case((5, 33), softcap=2.0), (20, 1)),
        (Case((5, 0), sinks=True), (20, 1)),
        (Case((50, 0), window=40, softcap=2.0, sinks=True), (20, 20)),
        (Case((5, 33), dtype=torch.float16), (20, 1)),
        (Case((5, 33), dtype=torch.bfloat16), (20, 1)),
    ],
    ids=str,
)
def test_tiles_of_prompts(case: Case, counts: tuple[int, ...]) -> None:
    prefilled(case, counts)
