"""32 layers of four products one after the other, each reading what the last wrote: the chain of `lowbit_gemm.py`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from _lowbit_cases import MODELS, Shape, Variant, clone

from llmopt.codegen.lowbit_layout import Laid

if TYPE_CHECKING:
    from lowbit_gemm import Bench

LAYERS = 32
ORDER = ("qkv", "o", "gate_up", "down")  # of a layer


class Chain:
    """LAYERS layers' four products with weights of their own, each reading what the one before wrote."""

    def __init__(self, bench: Bench, model: str, scheme: str, tokens: int) -> None:
        self.bench, self.shapes, self.tokens = bench, MODELS[model], tokens
        self.laid = {name: self._copies(scheme, name) for name in ORDER}
        hidden = self.shapes["qkv"].K
        self.start = torch.randn(tokens, hidden, device=bench.device).bfloat16()
        self.g = torch.ones(hidden, device=bench.device, dtype=torch.bfloat16)
        self.out = {n: torch.empty(tokens, self.shapes[n].J, device=bench.device).bfloat16() for n in ORDER}
        self.dense = {n: self._dense(self.shapes[n]) for n in ORDER}

    def _copies(self, scheme: str, name: str) -> list[Laid]:
        copies = list(self.bench.of(scheme, self.shapes[name])[0].copies)[:LAYERS]
        return [*copies, *(clone(copies[0]) for _ in range(LAYERS - len(copies)))]

    def _dense(self, shape: Shape) -> torch.Tensor:
        size = LAYERS, shape.parts * shape.J, shape.K
        return torch.randn(size, device=self.bench.device, dtype=torch.bfloat16).mul_(shape.K**-0.5)

    def ours(self, best: Mapping[str, Variant], pdl: int) -> Callable[[Any], None]:
        """The template's kernels."""
        calls = {n: self.bench.launch(replace(best[n], pdl=pdl)) for n in ORDER}
        out, g, tokens = self.out, self.g, self.tokens

        def run(_: Any) -> None:
            h = self.start
            for qkv, o, gate_up, down in zip(*(self.laid[n] for n in ORDER), strict=True):
                calls["qkv"](qkv, out["qkv"], [h, g], tokens)
                calls["o"](o, out["o"], [out["qkv"], h], tokens)
                calls["gate_up"](gate_up, out["gate_up"], [out["o"], g], tokens)
                calls["down"](down, out["down"], [out["gate_up"], out["o"]], tokens)
                h = out["down"]

        return run

    def torchs(self, _: Any) -> None:
        """The same in bf16 by torch's own kernels."""
        h, hidden = self.start, self.shapes["qkv"].K
        for qkv, o, gate_up, down in zip(*(self.dense[n] for n in ORDER), strict=True):
            a = F.linear(F.rms_norm(h, (hidden,), self.g, 1e-5), qkv)
            h = h + F.linear(a[:, : o.shape[1]], o)
            gate, up = F.linear(F.rms_norm(h, (hidden,), self.g, 1e-5), gate_up).chunk(2, -1)
            h = h + F.linear(F.silu(gate) * up, down)

    def products(self, _: Any) -> None:
        """cuBLAS alone: the four products and nothing between them."""
        h = self.start
        for qkv, o, gate_up, down in zip(*(self.dense[n] for n in ORDER), strict=True):
            h = F.linear(F.linear(h, qkv)[:, : o.shape[1]], o)
            h = F.linear(F.linear(h, gate_up)[:, : down.shape[1]], down)


def chain(bench: Bench, model: str, scheme: str, tokens: int, best: dict[str, Variant]) -> dict[str, Any]:
    """Microseconds a layer: ours with and without PDL, and torch's in bf16."""
    built = Chain(bench, model, scheme, tokens)
    runs = {"pdl": built.ours(best, 1), "no_pdl": built.ours(best, 0), "torch": built.torchs, "cublas": built.products}
    graphs = {name: replace(bench.graph(run, [None], 1), launches=LAYERS) for name, run in runs.items()}
    us = bench.in_turns(graphs)
    nbytes = sum(copies[0].nbytes for copies in built.laid.values())
    chosen = {n: v.text() for n, v in best.items()}
    found = {"model": model, "scheme": scheme, "tokens": tokens, "bytes": nbytes, "us": us, "chosen": chosen}
    rates = ", ".join(f"{name} {value:.2f}" for name, value in us.items())
    print(f"chain {model} {scheme} N={tokens} us a layer: {rates}; {nbytes / us['pdl'] / 1e6:.2f} TB/s", flush=True)
    return found
