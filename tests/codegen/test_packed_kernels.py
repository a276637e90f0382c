"""Attention over packed keys and values in Triton's interpreter: pages bit-equal to the op's, results against fp64."""

from __future__ import annotations

from collections.abc import Iterator

import attention_cases as cases
import pytest
import torch
from attention_cases import Cache, Case
from interpreted import rounding

from llmopt.codegen.templates import decode_packed as decode
from llmopt.codegen.templates import prefill_attention as prefill
from llmopt.codegen.templates import write_packed as write
from llmopt.compiler.ops.attention import attend, kv_write
from llmopt.compiler.quant.kv import Packing, pages_of
from llmopt.runtime.attend import StepLayout

pytestmark = pytest.mark.interp


@pytest.fixture(autouse=True)
def rounded() -> Iterator[None]:
    with rounding():
        yield


def packed(pages: torch.Tensor, packing: str) -> torch.Tensor:
    """Full pages of bytes from plain ones."""
    count, heads, size, channels = pages.shape
    empty = torch.zeros(count, heads, size, Packing.parse(packing).row_bytes(channels), dtype=torch.uint8)
    rows = pages.permute(1, 0, 2, 3).reshape(1, heads, count * size, channels)
    return kv_write(empty, rows, torch.arange(count * size), packing)


def decoded(case: Case, splits: int, keys: str, values: str, block: int = 32) -> None:
    make = torch.Generator().manual_seed(7)
    cache = Cache.of(case, 1, seed=3)
    (hq, hkv), (d, dv), n = case.heads, case.dims, len(case.lengths)
    q, k, v = (torch.randn(n, h, w, generator=make).to(case.dtype) for h, w in ((hq, d), (hkv, d), (hkv, dv)))
    sinks = torch.randn(hq, generator=make).to(case.dtype) if case.sinks else None
    at, rows = torch.tensor(case.lengths), torch.arange(n)
    k_pages, v_pages = packed(cache.k, keys), packed(cache.v, values)
    slots = cache.slots(rows, at)
    k_want = kv_write(k_pages, k.transpose(0, 1)[None], slots, keys)
    v_want = kv_write(v_pages, v.transpose(0, 1)[None], slots, values)
    want = attend(
        q.float().transpose(0, 1)[None], k_want, v_want, cache.tables, rows, at[None],
        None if sinks is None else sinks.float(), case.scale, case.window, case.softcap, keys, values,
    )[0].transpose(0, 1)  # fmt: skip
    out = torch.full((n, hq * dv), torch.nan, dtype=case.dtype)
    partial = torch.full((n * hq * splits * dv,), torch.nan)
    lse = torch.full((n * hq * splits * 2,), torch.nan)
    tickets = torch.zeros(n * hkv, dtype=torch.int32)
    none = torch.zeros(1)
    k_how, v_how = Packing.parse(keys), Packing.parse(values)
    decode.decode_packed[(n, hkv, splits)](
        k_pages, v_pages, cache.tables, at, slots, sinks, out, partial, lse, tickets,
        q, none, none, k, v, torch.tensor([hq, hkv, d, dv]), n, cache.tables.shape[1], splits,
        HQ=hq, HKV=hkv, D=d, DV=dv, PAGE=case.page, SCALE=case.scale, WINDOW=case.window, SOFTCAP=case.softcap,
        LOAD_Q=cases.plain_q, LOAD_K=cases.plain_k, LOAD_V=cases.plain_v, K_KIND=k_how.kind, K_ORDER=k_how.order,
        V_KIND=v_how.kind, V_ORDER=v_how.order, ORDER=0, BLOCK_T=block, LEAST=1, EARLY=0, BLOCK_S=2, PDL=False,
    )  # fmt: skip
    assert torch.equal(k_pages, k_want)
    assert torch.equal(v_pages, v_want)
    assert (out.view(n, hq, dv).float() - want).abs().max() <= 1.6e-2 * want.abs().max()
    assert not tickets.any()


BF16 = torch.bfloat16


@pytest.mark.parametrize(
    ("keys", "values", "splits"),
    [
        ("int4", "int4", 1),
        ("int4-h64", "int4", 3),
        ("int4-h16", "int4-h32", 1),
        ("int8", "int8-h64", 3),
        ("fp8-h8", "fp8", 1),
        ("nvfp4-h16", "nvfp4", 3),
    ],
)
def test_packings(keys: str, values: str, splits: int) -> None:
    decoded(Case((0, 1, 31, 70), dtype=BF16), splits, keys, values)


@pytest.mark.parametrize(
    "case",
    [
        Case((37, 5), heads=(2, 2), dtype=BF16),
        Case((37, 5), heads=(20, 1), page=16, dtype=BF16),
        Case((37, 5), dims=(80, 96), page=1, dtype=BF16),
        Case((37, 5), dims=(128, 16), dtype=BF16),
        Case((37, 5), dims=(16, 40), page=2, dtype=BF16),
        Case((60, 5, 0), window=20, softcap=2.0, sinks=True, dtype=BF16),
    ],
    ids=str,
)
def test_features(case: Case) -> None:
    decoded(case, 2, "int4-h16", "int4")
    decoded(case, 1, "int8-h8", "fp8-h8")
    if case.dims[1] % 16 == 0:
        decoded(case, 1, "nvfp4-h16", "nvfp4")


def prefilled(case: Case, counts: tuple[int, ...], keys: str, values: str) -> None:
    """Both kernels of a prompt, one behind the other."""
    make = torch.Generator().manual_seed(7)
    cache = Cache.of(case, max(counts), seed=3)
    (hq, hkv), (d, dv), n = case.heads, case.dims, sum(counts)
    rows = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    at = torch.cat([torch.arange(c) + have for c, have in zip(counts, case.lengths, strict=True)])
    q, k, v = (torch.randn(n, h, w, generator=make).to(case.dtype) for h, w in ((hq, d), (hkv, d), (hkv, dv)))
    pages = packed(cache.k, keys), packed(cache.v, values)
    slots = cache.slots(rows, at)
    k_want = kv_write(pages[0], k.transpose(0, 1)[None], slots, keys)
    v_want = kv_write(pages[1], v.transpose(0, 1)[None], slots, values)
    want = attend(
        q.float().transpose(0, 1)[None], k_want, v_want, cache.tables, rows, at[None], None, case.scale, case.window,
        case.softcap, keys, values,
    )[0].transpose(0, 1)  # fmt: skip
    k_how, v_how = Packing.parse(keys), Packing.parse(values)
    none = torch.zeros(1)
    for parts in (2 + hq // hkv, 3, 1):
        turned, k_out, v_out = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        k_pages, v_pages = (p.clone() for p in pages)
        write.write_packed[(n, hkv, parts)](
            turned, k_out, v_out, k_pages, v_pages, slots, q, none, none, k, v, torch.tensor([hq, hkv, d, dv]),
            HQ=hq, HKV=hkv, D=d, DV=dv, PAGE=case.page, LOAD_Q=cases.plain_q, LOAD_K=cases.plain_k,
            LOAD_V=cases.plain_v,
            K_KIND=k_how.kind, K_ORDER=k_how.order, V_KIND=v_how.kind, V_ORDER=v_how.order, PDL=False,
        )  # fmt: skip
        assert torch.equal(k_pages, k_want)
        assert torch.equal(v_pages, v_want)
        assert torch.equal(turned, k_how.asked(q).to(q.dtype))
        assert torch.equal(k_out, k_how.unpack(k_how.pack(k)).to(k.dtype))
        assert torch.equal(v_out, v_how.turned_back(v_how.unpack(v_how.pack(v))).to(v.dtype))
    out = torch.full((n, hq, dv), torch.nan, dtype=case.dtype)
    tiles = StepLayout.of(rows, at[None]).tiles(16)
    prefill.prefill_attention[(len(tiles), hq)](
        turned, k_pages, v_pages, cache.tables, tiles, None, out, cache.tables.shape[1], HQ=hq, HKV=hkv, D=d, DV=dv,
        PAGE=case.page, SCALE=case.scale, WINDOW=case.window, SOFTCAP=case.softcap, BLOCK_Q=16, BLOCK_T=16, DRAIN=0,
        K_KIND=k_how.kind, V_KIND=v_how.kind, V_ORDER=v_how.order,
    )  # fmt: skip
    assert (out.float() - want).abs().max() <= 1.6e-2 * want.abs().max()


def test_edge_rows_have_the_op_s_bytes() -> None:
    """All negative, all equal, zeros of both signs, one huge number, infinities, NaN."""
    rows = -torch.rand(8, 16) - 0.1
    rows[1:5] = torch.stack([torch.full((16,), 3.5), torch.zeros(16), -torch.zeros(16), torch.linspace(-1, 1, 16)])
    rows[4, 3], rows[5, 2], rows[6, 1], rows[7, 9] = 1e30, torch.inf, -torch.inf, torch.nan
    x, q = rows.bfloat16()[:, None], torch.zeros(8, 1, 16, dtype=BF16)
    none, sizes = torch.zeros(1), torch.tensor([1, 1, 16, 16])
    for keys, values in (("fp8", "int4"), ("int8", "fp8"), ("int4", "nvfp4")):
        how = Packing.parse(keys), Packing.parse(values)
        pages = [torch.zeros(2, 1, 4, h.row_bytes(16), dtype=torch.uint8) for h in how]
        want = [kv_write(p, x.transpose(0, 1)[None], torch.arange(8), str(h)) for p, h in zip(pages, how, strict=True)]
        write.write_packed[(8, 1, 1)](
            torch.empty_like(q), None, None, *pages, torch.arange(8), q, none, none, x, x, sizes, HQ=1, HKV=1, D=16,
            DV=16, PAGE=4, LOAD_Q=cases.plain_q, LOAD_K=cases.plain_k, LOAD_V=cases.plain_v, K_KIND=how[0].kind,
            K_ORDER=1, V_KIND=how[1].kind, V_ORDER=1, PDL=False,
        )  # fmt: skip
        finite = [0, 1, 2, 3, 4]  # of the others the codes mean nothing
        for got, expected, h in zip(pages, want, how, strict=True):
            mine, theirs = (h.unpack(torch.cat(pages_of(p, h), -1)).flatten(0, 2) for p in (got, expected))
            assert torch.equal(mine[finite], theirs[finite])
            assert torch.equal(got.view(2, -1)[0], expected.view(2, -1)[0])
            assert not torch.isfinite(mine[5:]).all(1).any()


@pytest.mark.parametrize(
    ("keys", "values"), [("int4-h64", "int4"), ("int4-h16", "int8-h32"), ("fp8", "nvfp4-h64"), ("nvfp4", "int4")]
)
def test_prompts(keys: str, values: str) -> None:
    prefilled(Case((0, 5, 40), dtype=BF16), (20, 1, 33), keys, values)


@pytest.mark.parametrize(
    "case",
    [
        Case((0, 37), heads=(6, 2), dims=(80, 96), page=16, dtype=BF16),
        Case((60, 0), window=20, softcap=2.0, page=1, dtype=BF16),
    ],
    ids=str,
)
def test_features_of_prompts(case: Case) -> None:
    prefilled(case, (18, 3), "int4-h16", "int4")
    prefilled(case, (18, 3), "nvfp4", "nvfp4-h16")
