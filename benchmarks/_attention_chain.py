"""What attention costs in a decoding step, between the product that makes its queries and the one that reads it.

A chain has every layer's qkv product, attention and output product, each reading what the last one wrote, with weights
and caches of its own, in one CUDA graph, where a kernel may start before the one ahead has ended. The same chain
without attention is the zero of the scale.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from _attention_cases import MODELS, Compiled, Decode, Heads, hooks
from _attention_turns import times
from _gemm_cases import MODELS as PRODUCTS
from _gemm_cases import Variant
from torch import Tensor

from llmopt.codegen import tuning
from llmopt.codegen.splits import splits as splits_for
from llmopt.codegen.templates import decode_attention as decode
from llmopt.compiler.target import Target
from llmopt.runtime.gpu_code import decode_shape

PAGE = 16  # tokens, as the cache has by default
Tried = tuple[Mapping[str, Any], int]  # constants, parts


def begun(heads: Heads, target: Target, tiles: int | None) -> list[dict[str, Any]]:
    """The first `tiles` tiles of a model's configurations, with every way to begin."""
    listed = decode.configs({**heads.shape, "PAGE": PAGE}, "bfloat16", target)
    plain = [c for c in listed if not c["PEEL"] and not c["AHEAD"]][:tiles]
    return [c for tile in plain for c in decode.starts(tile)]


def to_compile(models: Iterable[str], page: int, target: Target, tiles: int | None) -> list[Compiled]:
    """Every kernel that these models launch over pages of so many tokens."""
    hooks()  # its file is written here, before processes read it
    return [Compiled(MODELS[m], page, tuple(c.items())) for m in models for c in begun(MODELS[m], target, tiles)]


def name_of(config: Mapping[str, Any]) -> str:
    """swap/tile/warps/stages, and what differs in how it begins."""
    name = "/".join(str(config[key]) for key in ("SWAP", "BLOCK_T", "num_warps", "num_stages"))
    least = config["LEAST"] * config["BLOCK_T"]  # keys a part
    flags = [
        (f"least{least}", least < 64),
        ("peel", config["PEEL"]),
        (f"ahead{config['AHEAD']}", config["AHEAD"]),
        ("early", config["EARLY"]),
    ]
    return " ".join([name, *(flag for flag, there in flags if there)])


class Chain:
    """The three kernels of every layer of a model, for `batch` sequences with `context` tokens in the cache."""

    def __init__(self, model: str, batch: int, context: int, target: Target) -> None:
        self.layers, shapes = PRODUCTS[model]
        bucket = int(decode_shape(batch))
        # o reads attention's own result, in both chains
        self.qkv, self.o = (self._product(s, bucket, target) for s in (shapes[0], replace(shapes[1], stride=0)))
        self.case = Decode(MODELS[model], batch, context + 1, PAGE, self.layers)
        torch.manual_seed(0)
        self.weights = [[self._weight(v) for v in (self.qkv, self.o)] for _ in range(self.layers)]
        hidden = self.qkv.shape.K
        self.g = torch.ones(hidden, device="cuda", dtype=torch.bfloat16)
        self.start = torch.randn(batch, hidden, device="cuda").bfloat16()
        self.hidden = [torch.empty_like(self.start) for _ in "ab"]
        self.scratch = [v.scratch("cuda") for v in (self.qkv, self.o)]

    @staticmethod
    def _product(shape: Any, bucket: int, target: Target) -> Variant:
        template = "gemv" if bucket == 1 else "gemm"
        config = tuning.pick(f"{template}:{template}", shape.sizes(bucket), "bfloat16", target)
        return Variant(template, shape, tuple(config.items()))

    @staticmethod
    def _weight(product: Variant) -> Tensor:
        s = product.shape
        return torch.randn(s.J, s.K, device="cuda").mul_(s.K**-0.5).bfloat16()

    def run(self, tried: Tried | None, after: Callable[[], Any] = lambda: None) -> Tensor:
        """All layers once, with attention unless `tried` is None; the last result [batch, hidden]."""
        x, batch, case = self.start, self.case.batch, self.case
        for layer, (qkv, o) in enumerate(self.weights):
            self.qkv.launch(qkv, x, self.g, None, case.qkv, batch, self.scratch[0])
            after()
            if tried is not None:
                case.launch(*tried, layer)
                after()
            y = self.hidden[layer % 2]
            self.o.launch(o, case.out, None, x, y, batch, self.scratch[1])
            after()
            x = y
        return x

    def fault(self, tried: Tried, replays: int = 30) -> str | None:
        """None if replays of the graph give what kernels one by one give, bit for bit, and that is right.

        The last layer's cache and result are looked at, which every layer before has gone into.
        """
        want = self.run(tried, torch.cuda.synchronize).clone()
        error, stored = self.case.error(layer=self.layers - 1), self.case.stored(self.layers - 1)
        graph, unlike = torch.cuda.CUDAGraph(), torch.zeros((), device="cuda", dtype=torch.int64)
        with torch.cuda.graph(graph):
            made = self.run(tried)
        for _ in range(replays):
            graph.replay()
            unlike += (made != want).any()
        if not error <= 0.01 or not stored:
            return f"error {error:.2e}, own key and value {'there' if stored else 'wrong'}"
        if int(unlike) or self.case.tickets.any():
            return f"{int(unlike)} of {replays} replays differ, tickets {'left' if self.case.tickets.any() else 'zero'}"
        return None


def cost(model: str, batch: int, context: int, target: Target, tiles: int | None) -> dict[str, Any]:
    """Microseconds a layer that attention adds to the chain: all configurations and numbers of parts once, then the
    fastest few, the default among them, in turns with the chain without attention."""
    chain, heads = Chain(model, batch, context, target), MODELS[model]
    rounded = 1 << context.bit_length()  # as the runtime rounds the length, so that graphs are few
    usual = splits_for(batch, heads.HKV, rounded, target)
    configs = begun(heads, target, tiles)
    tried: dict[str, Tried] = {}
    for config in configs:
        for parts in dict.fromkeys((usual, max(1, usual // 2), 2 * usual)):
            tried[f"{name_of(config)} x{parts}"] = config, parts
    zero = _us(chain, {"": None}, 9)[""]
    failed: dict[str, str] = {}
    seen: dict[str, float] = {}
    for name, one in tried.items():
        try:
            seen[name] = _us(chain, {name: one}, 6)[name] - zero
        except Exception as error:  # one that does not launch must not end the run
            failed[name] = f"{type(error).__name__}: {error}"[:160]
    default = f"{name_of(configs[0])} x{usual}"
    few = dict.fromkeys([*sorted(seen, key=seen.__getitem__)[:8], default])
    for name in list(few):
        if fault := chain.fault(tried[name]):
            failed[name] = fault
            del few[name]
    best = _us(chain, {"": None, **{name: tried[name] for name in few}}, 30)
    zero = best.pop("")
    final = {name: us - zero for name, us in sorted(best.items(), key=lambda item: item[1])}
    return {
        "model": model, "batch": batch, "context": context, "page": PAGE, "parts": usual, "layers": chain.layers,
        "without_us": zero, "default": default, "us": final, "tried": seen, "failed": failed,
        "configs": {name_of(config): config for config in configs}, "bytes": chain.case.bytes,
        "products": [v.text() for v in (chain.qkv, chain.o)],
    }  # fmt: skip


def _us(chain: Chain, tried: Mapping[str, Tried | None], rounds: int) -> dict[str, float]:
    runs = {name: (lambda one=one: chain.run(one)) for name, one in tried.items()}
    return times(runs, chain.layers, rounds)
