"""Caches of packed keys and values, and launches over them, for `kv_attention.py`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from _attention_cases import Decode, Heads, constants
from _gemm_cases import H200
from torch import Tensor

from llmopt.codegen.kernel import evaluate
from llmopt.codegen.templates import decode_packed, write_packed
from llmopt.compiler.ops.attention import attend
from llmopt.compiler.ops.attention import write_packed as write_by_torch
from llmopt.compiler.quant.kv import Packing, pages_of

PACK_TOKENS = 65536  # packed in one go by torch


def kinds(keys: Packing, values: Packing) -> dict[str, Any]:
    """The constants of both."""
    return {"K_KIND": keys.kind, "K_ORDER": keys.order, "V_KIND": values.kind, "V_ORDER": values.order}


@dataclass(frozen=True)
class Compiled:
    """A decoding kernel to be compiled without tensors and without a GPU, for `_gemm_cases.compile_all`."""

    heads: Heads
    page: int
    packing: str
    config: tuple[tuple[str, Any], ...]

    def compile(self) -> None:
        """Into Triton's cache, where a launch with the same constants finds it."""
        from triton.runtime.jit import MockTensor

        x, i, f, p = (MockTensor(dtype) for dtype in (torch.bfloat16, torch.int64, torch.float32, torch.uint8))
        how = kinds(*map(Packing.parse, self.packing.split("/")))
        decode_packed.decode_packed.warmup(
            p, p, i, i, i, None, x, f, f, MockTensor(torch.int32), x, x, x, None, None, None, 1, 1, 1, grid=(1, 1, 1),
            **constants(self.heads, self.page, dict(self.config)), **how,
        )  # fmt: skip


class PackedDecode:
    """A `Decode` whose keys and values are packed."""

    def __init__(self, plain: Decode, keys: str, values: str) -> None:
        self.plain, self.how = plain, (Packing.parse(keys), Packing.parse(values))
        self.k, self.v = (packed(p[0], how) for p, how in zip((plain.k, plain.v), self.how, strict=True))
        self.out, self.tickets = torch.zeros_like(plain.out), torch.zeros_like(plain.tickets)
        self.partial = self.lse = torch.empty(0, device="cuda")

    @property
    def bytes(self) -> int:
        """Of codes and scales, read once."""
        heads = self.plain.heads
        row = sum(how.row_bytes(heads.D) for how in self.how)
        return self.plain.batch * self.plain.context * heads.HKV * row

    def launch(self, config: Mapping[str, Any], splits: int) -> None:
        """The attention, with the token's own key and value."""
        case, heads = self.plain, self.plain.heads
        rows = case.batch * heads.HQ
        if self.lse.numel() < rows * splits * 2:
            self.partial = torch.empty(rows * splits * heads.D, device="cuda")
            self.lse = torch.empty(rows * splits * 2, device="cuda")
        decode_packed.decode_packed[(case.batch, heads.HKV, splits)](
            self.k, self.v, case.tables, case.positions, case.slots, None, self.out, self.partial, self.lse,
            self.tickets, case.qkv, case.cos, case.sin, *case.norms, None, case.batch, case.tables.shape[1], splits,
            **constants(heads, case.page, config), **kinds(*self.how),
        )  # fmt: skip

    def write(self, plain: bool, parts: int | None = None) -> None:
        """The tokens' queries, keys and values prepared and stored: packed, or as they are; by `parts` programs for
        each key/value head, or by as many as the template has for so many tokens."""
        case, heads = self.plain, self.plain.heads
        config = write_packed.configs({**heads.shape, "PAGE": case.page}, "bfloat16", H200)[0]
        made = constants(heads, case.page, config)
        left = {name: made[name] for name in made if name not in ("SCALE", "WINDOW", "SOFTCAP", "ORDER")}
        how = {"K_KIND": "", "K_ORDER": 1, "V_KIND": "", "V_ORDER": 1} if plain else kinds(*self.how)
        pages = (case.k[0], case.v[0]) if plain else (self.k, self.v)
        grid = tuple(evaluate(size, {"N": case.batch}) for size in write_packed.grid(heads.shape, config))
        grid = *grid[:2], parts or grid[2]
        write_packed.write_packed[grid](
            self.out, None, None, *pages, case.slots, case.qkv, case.cos, case.sin, *case.norms, None, **left, **how
        )

    def stored(self) -> float:
        """The share of the tokens' own bytes that differ from the op's; rotated angles may end beside a step."""
        _, k, v = self.plain.made()
        unlike = total = 0
        for pages, x, how in zip((self.k, self.v), (k, v), self.how, strict=True):
            want = write_by_torch(pages.clone(), x.transpose(0, 1)[None], self.plain.slots, str(how))
            unlike += int((pages != want).sum())
            total += self.plain.batch * self.plain.heads.HKV * how.row_bytes(self.plain.heads.D)
        return unlike / total

    def error(self, tokens: int = 2) -> float:
        """Largest error of `out` against fp64 over what the pages hold, relative to the largest value."""
        worst, case = 0.0, self.plain
        q = case.made()[0]
        asked = self.how[0].asked(q).bfloat16() if self.how[0].order > 1 else q
        for n in sorted({0, case.batch - 1, *range(0, case.batch, -(-case.batch // tokens))}):
            pages = case.tables[n]
            near, row = torch.arange(len(pages), device="cuda")[None], torch.zeros(1, device="cuda", dtype=torch.int64)
            k, v = (unpacked(p[pages], how).double() for p, how in zip((self.k, self.v), self.how, strict=True))
            want = attend(asked[n].double()[None, :, None], k, v, near, row, case.positions[n].view(1, 1), None,
                          case.heads.D**-0.5, 0, 0.0)[0, :, 0]  # fmt: skip
            want = self.how[1].turned_back(want).double()
            worst = max(worst, float((self.out[n].view(*want.shape) - want).abs().max() / want.abs().max()))
        return worst


def packed(pages: Tensor, how: Packing) -> Tensor:
    """uint8 pages of plain ones [P, H, page, D]."""
    count, heads, size, channels = pages.shape
    made = torch.zeros(count, heads, size, how.row_bytes(channels), dtype=torch.uint8, device=pages.device)
    some = max(1, PACK_TOKENS // size)
    for first in range(0, count, some):
        rows, at = how.pack(pages[first : first + some]), 0
        for part in pages_of(made[first : first + some], how):
            part.copy_(rows[..., at : at + part.shape[-1]])
            at += part.shape[-1]
    return made


def unpacked(pages: Tensor, how: Packing) -> Tensor:
    """fp32 [P, H, page, D] of uint8 pages, still rotated."""
    return how.unpack(torch.cat(pages_of(pages, how), -1))
