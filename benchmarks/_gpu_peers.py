"""The peers of the GPU decoding benchmark: transformers, our plain module under Inductor, and llmopt.

A peer is made for one (model, batch, context) case. It reads the prompt for real; `rewind` puts it back to the end of
the prompt, and `step` makes one greedy token of each sequence from the one before, token in, token out.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from _gpu_models import Plain, Weights
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel, StaticCache

from llmopt.compiler.recipe import Recipe

OURS = "llmopt"
SPARE = 64  # positions a static cache has beyond the prompt
ROOM = 8 << 30  # bytes of llmopt's cache, which several recipes have beside each other


@dataclass(frozen=True)
class Case:
    """What is decoded: ids int64 [B, context + 1], the last of which is the first decoding step's input."""

    model: PreTrainedModel
    weights: Weights
    ids: Tensor
    compiled: bool = True  # False: nothing goes through torch.compile (for tests)
    kept: dict[str, Any] = field(default_factory=dict)  # what all cases of a model share

    @property
    def batch(self) -> int:
        """Sequences."""
        return self.ids.shape[0]

    @property
    def context(self) -> int:
        """Tokens in the cache before the first decoding step."""
        return self.ids.shape[1] - 1


class Peer(Protocol):
    """Something that decodes; `note` says how it was set up."""

    note: str

    def rewind(self) -> None:
        """Back to the end of the prompt, the last id of the case as the next input; not timed."""

    def step(self) -> Tensor:
        """One token of each sequence; logits [B, V], good until the next step."""


class Eager:
    """transformers as a user runs it: eager forward, a cache that grows."""

    note = "transformers, eager forward, DynamicCache, sdpa"

    def __init__(self, case: Case) -> None:
        self.model, self.ids = case.model, case.ids
        self.cache = DynamicCache(config=case.model.config)
        case.model(case.ids[:, :-1], past_key_values=self.cache, logits_to_keep=1)
        self.read = [(layer.keys, layer.values) for layer in self.cache.layers]

    def rewind(self) -> None:
        """The prompt's keys and values again (growing makes new tensors)."""
        for layer, (keys, values) in zip(self.cache.layers, self.read, strict=True):
            layer.keys, layer.values = keys, values
        self.token = self.ids[:, -1:]

    def step(self) -> Tensor:
        """Forward and argmax."""
        logits: Tensor = self.model(self.token, past_key_values=self.cache).logits[:, -1]
        self.token = logits.argmax(-1, keepdim=True)
        return logits


class _HfStep(nn.Module):
    """Forward, argmax and the token fed back, as one graph; the token is a buffer, so nothing is copied into it."""

    def __init__(self, model: PreTrainedModel, cache: StaticCache, batch: int) -> None:
        super().__init__()
        self.model, self.cache = model, cache
        self.register_buffer("token", torch.zeros(batch, 1, dtype=torch.int64, device=model.device), persistent=False)

    def forward(self) -> Tensor:
        logits: Tensor = self.model(self.token, past_key_values=self.cache).logits[:, -1]
        self.token.copy_(logits.argmax(-1, keepdim=True))
        return logits


class HfStatic:
    """transformers' forward with its StaticCache under torch.compile, one graph; prompt read by the eager forward."""

    def __init__(self, case: Case, mode: str) -> None:
        length = case.context + SPARE
        self.note = f"transformers, StaticCache of {length}, sdpa, torch.compile(fullgraph=True, mode={mode!r})"
        self.ids = case.ids
        cache = StaticCache(config=case.model.config, max_cache_len=length)
        case.model(case.ids[:, :-1], past_key_values=cache, logits_to_keep=1)
        self.module = _HfStep(case.model, cache, case.batch)
        self.lengths = [layer.cumulative_length for layer in cache.layers]
        self.run = compiled(self.module, mode) if case.compiled else self.module

    def rewind(self) -> None:
        """The cache's own lengths and the token."""
        for length in self.lengths:
            length.fill_(self.ids.shape[1] - 1)
        self.module.token.copy_(self.ids[:, -1:])

    def step(self) -> Tensor:
        """One replay."""
        torch.compiler.cudagraph_mark_step_begin()
        return self.run()  # type: ignore[no-any-return]


class _PlainStep(nn.Module):
    def __init__(self, plain: Plain) -> None:
        super().__init__()
        self.plain = plain

    def forward(self) -> Tensor:
        return self.plain.step()


class PlainInductor:
    """Our plain module under torch.compile: the strongest case for Inductor."""

    def __init__(self, case: Case, mode: str, attention: str = "sdpa") -> None:
        length = case.context + SPARE
        self.note = f"plain module, static cache of {length}, attention {attention}, torch.compile(mode={mode!r})"
        self.ids = case.ids
        self.plain = Plain(case.weights, case.batch, length, attention)
        self.plain(case.ids[:, :-1], torch.arange(case.context, device=case.ids.device))
        module = _PlainStep(self.plain)
        self.run = compiled(module, mode) if case.compiled else module

    def rewind(self) -> None:
        """The token and its position."""
        self.plain.token.copy_(self.ids[:, -1:])
        self.plain.position.fill_(self.ids.shape[1] - 1)

    def step(self) -> Tensor:
        """One replay."""
        torch.compiler.cudagraph_mark_step_begin()
        return self.run()  # type: ignore[no-any-return]


def compiled(module: nn.Module, mode: str) -> Callable[..., Any]:
    """One graph or an error; CUDA graphs where the mode brings them."""

    def run(*args: Tensor) -> Any:
        return module(*args)

    # Dynamo keeps its graphs by code object: with one of its own, a peer's guards are not checked before another's
    code = run.__code__.replace(co_name=f"run_{id(module)}")
    own = types.FunctionType(code, run.__globals__, run.__name__, None, run.__closure__)
    return torch.compile(own, fullgraph=True, dynamic=False, mode=mode)


def ours(case: Case, recipe: str | Recipe = "default", room: int = ROOM) -> Any:
    """The case's model compiled by llmopt for the machine it is on, with a cache of at most `room` bytes; once for all
    cases of a model."""
    import llmopt

    key = OURS, recipe
    if key not in case.kept:
        weight = case.model.lm_head.weight
        name = str(weight.dtype).removeprefix("torch.")
        most = room if weight.device.type == "cuda" else None
        case.kept[key] = llmopt.compile(case.model, recipe, target=weight.device.type, dtype=name, cache_bytes=most)
    return case.kept[key]


def rows_for(model: Any, case: Case, length: int) -> list[int]:
    """Rows of llmopt's cache with room for `length` tokens, one a sequence; those of the last case are freed."""
    key = "rows", id(model)
    for row in case.kept.pop(key, []):
        model.cache.release(row)
    rows = case.kept[key] = [model.cache.open() for _ in range(case.batch)]
    for row in rows:
        model.cache.reserve(row, length)
    return rows


class Llmopt:
    """llmopt: compiled for the machine after a recipe, its paged cache, greedy.

    `scheme` and `scale` are how the recipe rounds the layers' matrices ("" if it does not), `saved_bytes` what a step
    need not read for it.
    """

    def __init__(self, case: Case, recipe: str | Recipe = "default", room: int = ROOM) -> None:
        self.model = ours(case, recipe, room)
        options = {k: v for spec in self.model.recipe.passes if spec.name == "quantize" for k, v in spec.options}
        self.scheme, self.scale = str(options.get("weights", "")), str(options.get("scale", "search"))
        figures = [f for p in self.model.report.passes for f in p.stats.figures.values()]
        self.saved_bytes = sum(f["bytes_before"] - f["bytes"] for f in figures)
        self.decoder: Any = self.model.session.decoder
        how = "the step and argmax" if self.decoder is None else "decoding graphs"
        self.note = f"llmopt, recipe {self.model.recipe.name}, target {self.model.target.name}, paged cache, {how}"
        self.ids, self.device = case.ids, self.model.cache.device
        cache, end = self.model.cache, case.context + SPARE
        self.rows = rows_for(self.model, case, end)
        for row, ids in zip(self.rows, case.ids, strict=True):
            self._read(row, ids[:-1])
        at = [cache.slots(row, case.context, end) for row in self.rows]
        self.slots = torch.tensor(at, device=self.device).T.contiguous()  # [steps, B]
        self.numbers = torch.arange(case.batch, device=self.device)
        self.seq_ids = torch.tensor(self.rows, device=self.device)

    def _read(self, row: int, ids: Tensor) -> None:
        """One prompt, in one step."""
        cache, n = self.model.cache, len(ids)
        slots = torch.tensor(cache.slots(row, 0, n), device=self.device)
        positions = torch.arange(n, device=self.device)
        self.model.step(
            ids[None].contiguous(), positions[None], slots, torch.full_like(slots, row), cache.block_tables(),
            positions[-1:],
        )  # fmt: skip

    def rewind(self) -> None:
        """Position and token; the pages beyond the prompt are written anew."""
        self.token, self.made = self.ids[:, -1].clone(), 0
        self.positions = torch.full_like(self.token, self.ids.shape[1] - 1)
        if self.decoder is not None:
            self.decoder.start(self._batch())

    def _batch(self) -> Any:
        from llmopt.runtime.decoder import Batch
        from llmopt.runtime.sampler import SampleRows, SamplingParams

        greedy = SampleRows.of([SamplingParams()] * len(self.rows), list(range(len(self.rows))), self.device)
        tables = self.model.cache.block_tables()
        return Batch(self.token, self.positions, self.slots[0], self.seq_ids, tables, greedy, self.ids.shape[1])

    def step(self) -> Tensor:
        """A replay of the decoding graph; on a target without graphs the step and argmax."""
        made, self.made = self.made, self.made + 1
        return self._eager(made) if self.decoder is None else self._replay(made)

    def _replay(self, made: int) -> Tensor:
        from llmopt.runtime.decode_graphs import bucket
        from llmopt.runtime.decoder import NewPage

        count, at, cache = len(self.rows), self.ids.shape[1] - 1 + made, self.model.cache
        if made and at % cache.page_size == 0:
            column = at // cache.page_size
            self.decoder.state.add([NewPage(i, column, cache.pages(r)[column]) for i, r in enumerate(self.rows)])
        return self.decoder.replay(min(bucket(count), self.decoder.limit), at + 1)()[:count]

    def _eager(self, made: int) -> Tensor:
        logits: Tensor = self.model.step(
            self.token[None], self.positions[None], self.slots[made], self.seq_ids,
            self.model.cache.block_tables(), self.numbers,
        )  # fmt: skip
        self.token = logits.argmax(-1)
        self.positions += 1
        return logits


PEERS: dict[str, Callable[[Case], Peer]] = {
    "hf-eager": Eager,
    "hf-reduce-overhead": functools.partial(HfStatic, mode="reduce-overhead"),
    "hf-max-autotune": functools.partial(HfStatic, mode="max-autotune"),
    "plain-reduce-overhead": functools.partial(PlainInductor, mode="reduce-overhead"),
    "plain-max-autotune": functools.partial(PlainInductor, mode="max-autotune"),
    "plain-flex-max-autotune": functools.partial(PlainInductor, mode="max-autotune", attention="flex"),
    "plain-grouped-max-autotune": functools.partial(PlainInductor, mode="max-autotune", attention="grouped"),
    OURS: Llmopt,
    **{f"{OURS}-{recipe}": functools.partial(Llmopt, recipe=recipe) for recipe in ("nvfp4", "mxfp4", "int4", "fp8")},
}
