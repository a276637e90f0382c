"""What near tokens mean, apart from how llmopt computes it: a transformers model whose attention sees all keys twice,
as they are and as rounded rows stand for them, and takes from each by a mask; and steps cut in any way."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from llmopt.compiler.quant.kv import packing_for
from llmopt.runtime.session import Session

Options = dict[str, Any]


def oracle(model: Any, ids: Tensor, options: Options) -> Tensor:
    """Logits [T, V] of one prompt, by masks over whole sequences."""
    kinds = {letter: options.get(name, "int4") for letter, name in (("k", "keys"), ("v", "values"))}
    skip, first, recent = (options.get(name, default) for name, default in (("skip", ()), ("sinks", 0), ("recent", 0)))

    def rounded(letter: str, x: Tensor) -> Tensor:
        how = packing_for(letter, kinds[letter], options.get("order", 0), options.get("rotate", "k"), x.shape[-1])
        return x if how is None else how.turned_back(how.unpack(how.pack(x))).to(x.dtype)

    def attention(
        module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, **settings: Any
    ) -> tuple[Tensor, None]:
        p, j = torch.arange(q.shape[2])[:, None], torch.arange(q.shape[2])[None]
        window = settings.get("sliding_window") or q.shape[2]
        near = (j < first) | (p - j < recent) | torch.tensor(module.layer_idx in skip)
        ways = [(near, k, v), (~near, rounded("k", k), rounded("v", v))]
        group = q.shape[1] // k.shape[1]
        scores = sum(torch.where(of, q @ key.repeat_interleave(group, 1).mT, 0.0) for of, key, _ in ways)
        scores = (scores * settings["scaling"]).masked_fill((j > p) | (p - j >= window), -torch.inf)
        probs = torch.softmax(scores.float(), -1)
        made = sum((probs * of).to(v.dtype) @ value.repeat_interleave(group, 1) for of, _, value in ways)
        return made.transpose(1, 2), None  # type: ignore[union-attr]

    AttentionInterface.register("near_oracle", attention)
    model.set_attn_implementation("near_oracle")
    with torch.no_grad():
        logits: Tensor = model(ids[None], use_cache=False).logits[0]
    return logits


def stepped(session: Session, prompts: Sequence[Tensor], cuts: Sequence[Sequence[int]]) -> list[Tensor]:
    """Logits [T, V] of each prompt. Step i reads of prompt n the tokens up to cuts[n][i], those of all prompts in one
    step; tokens of different prompts alternate in it."""
    cache = session.cache
    rows = [cache.open() for _ in prompts]
    made: list[list[Tensor]] = [[] for _ in prompts]
    done = [0] * len(prompts)
    for step in range(max(map(len, cuts))):
        spans = {n: (done[n], cut[step]) for n, cut in enumerate(cuts) if step < len(cut)}
        for n, (_, end) in spans.items():
            cache.reserve(rows[n], end)
        tokens = list(_alternating(spans))
        whose, at = (torch.tensor(x) for x in zip(*tokens, strict=True))
        ids = torch.tensor([int(prompts[n][t]) for n, t in tokens])
        slots = torch.tensor([cache.slots(rows[n], t, t + 1)[0] for n, t in tokens])
        given = ids[None], at[None], slots, torch.tensor(rows)[whose], cache.block_tables()
        logits = session.step(*given, torch.arange(len(tokens)))
        for n, (_, end) in spans.items():
            made[n].append(logits[whose == n])
            done[n] = end
    for row in rows:
        cache.release(row)
    return [torch.cat(parts) for parts in made]


def _alternating(spans: dict[int, tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """(prompt, position): a token of each prompt in turn."""
    for i in range(max(end - start for start, end in spans.values())):
        yield from ((n, start + i) for n, (start, end) in spans.items() if start + i < end)
