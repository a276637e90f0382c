"""CompiledModel: what `llmopt.compile` and `llmopt.load` return."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmopt.compiler.errors import InputError
from llmopt.compiler.pipeline import program_text
from llmopt.compiler.program import Program
from llmopt.compiler.recipe import Recipe
from llmopt.compiler.target import Target
from llmopt.runtime.engine import Engine, SamplingParams, TokenEvent
from llmopt.runtime.executor import Executor
from llmopt.runtime.kv_cache import KVCache
from llmopt.runtime.loader import Regions, read_weights
from llmopt.runtime.report import Report
from llmopt.runtime.tokenizer import load_tokenizer

Prompts = str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]] | Tensor


class CompiledModel:
    """A model ready to generate: a lowered program, its weights, a paged cache and an engine.

    `generate` takes text or token ids, one prompt or several of any lengths; `__call__` gives the logits of the plain
    forward; `report` says what each pass did; `save` writes an artifact that `llmopt.load` reads.
    """

    def __init__(
        self,
        program: Program,
        recipe: Recipe,
        target: Target,
        report: Report,
        regions: Regions,
        cache_bytes: int | None = None,
    ) -> None:
        self.program, self.recipe, self.target, self.report = program, recipe, target, report
        self.regions = regions
        self.weights: dict[str, Tensor] = read_weights(program)
        self.cache = KVCache(program.state, page_size=recipe.page_size, max_bytes=cache_bytes)
        self.step = Executor(program.graph("step"), self.weights, _Current(self.cache), regions)
        self._forward: Executor | None = None
        facts = program.facts
        most = recipe.dims.sequences[1]
        self.engine = Engine(
            self.step,
            self.cache,
            vocab_size=facts.vocab_size,
            context_length=facts.context_length,
            eos_token_ids=facts.eos_token_ids,
            chunk_size=min(512, recipe.dims.tokens[1]),
            max_batch=most,
        )

    @cached_property
    def tokenizer(self) -> Any:
        """The model's tokenizer, None if it has none; read when first asked for, as transformers imports slowly."""
        return load_tokenizer(self.program.facts.tokenizer)

    def __call__(self, input_ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
        """Logits [B, T, V] of the plain forward; input_ids int64 [B, T], position_ids 0..T-1 by default."""
        if input_ids.dim() != 2 or input_ids.numel() == 0:
            raise InputError(f"input_ids has shape {tuple(input_ids.shape)}; wanted [B, T] with B and T at least 1")
        worst = int(input_ids.max()), int(input_ids.min())
        if worst[0] >= self.program.facts.vocab_size or worst[1] < 0:
            raise InputError(
                f"input_ids holds {worst[0] if worst[1] >= 0 else worst[1]}; wanted ids in "
                f"[0, {self.program.facts.vocab_size})"
            )
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1]).expand(input_ids.shape).contiguous()
        if self._forward is None:
            self._forward = Executor(
                self.program.graph("forward"), read_weights(self.program, ("forward",), self.weights)
            )
        return self._forward(input_ids, position_ids)  # type: ignore[no-any-return]

    def generate(
        self,
        prompts: Prompts,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        seed: int = 0,
        stop_token_ids: Sequence[int] = (),
        ignore_eos: bool = False,
        stream: bool = False,
    ) -> Any:
        """Continue prompts: text in, text out; token ids in, new ids out; one in, one out; several in, a list out.

        With `stream`, an iterator over (prompt index, piece of text or token id). The end token is part of returned
        ids, as in transformers, and not of text. Raises InputError on a prompt that cannot be run, before any does.
        """
        texts, single, ids = self._encode(prompts)
        params = SamplingParams(max_new_tokens, temperature, top_p, top_k, seed, tuple(stop_token_ids), ignore_eos)
        if stream:
            return self._stream(ids, params, texts)
        made = self.engine.generate(ids, params)
        results: list[Any] = [self._decode(m) for m in made] if texts else made
        return results[0] if single else results

    def _stream(self, ids: list[list[int]], params: SamplingParams, texts: bool) -> Iterator[tuple[int, Any]]:
        events: Iterator[TokenEvent] = self.engine.stream(ids, params)
        made: list[list[int]] = [[] for _ in ids]
        shown = [""] * len(ids)
        for event in events:
            if not texts:
                yield event.sequence, event.token
                continue
            made[event.sequence].append(event.token)
            text = self._decode(made[event.sequence])
            # a multi-byte character may still be incomplete: wait for the rest of it
            if text.endswith("\ufffd") and event.finished is None:
                continue
            yield event.sequence, text[len(shown[event.sequence]) :]
            shown[event.sequence] = text

    def _decode(self, ids: Sequence[int]) -> str:
        eos = set(self.program.facts.eos_token_ids)
        return str(self.tokenizer.decode([i for i in ids if i not in eos], skip_special_tokens=True))

    def _encode(self, prompts: Prompts) -> tuple[bool, bool, list[list[int]]]:
        """(are they text, is it a single one, token ids)"""
        if isinstance(prompts, str):
            return True, True, [self._ids(prompts)]
        if not isinstance(prompts, Iterable):
            raise InputError(f"generate was given {prompts!r}; wanted a text, a list of token ids, or a list of either")
        listed: list[Any] = prompts.tolist() if isinstance(prompts, Tensor) else list(prompts)
        if not listed:
            raise InputError("generate was given no prompt; wanted a text, a list of token ids, or a list of either")
        if all(isinstance(p, str) for p in listed):
            return True, False, [self._ids(p) for p in listed]
        if all(isinstance(p, int) for p in listed):
            return False, True, [listed]
        if not all(isinstance(p, Iterable) and not isinstance(p, str) for p in listed):
            raise InputError("generate was given prompts of several kinds; wanted texts only, or lists of ids only")
        return False, False, [p.tolist() if isinstance(p, Tensor) else list(p) for p in listed]

    def _ids(self, text: str) -> list[int]:
        if self.tokenizer is None:
            raise InputError(
                "this model has no tokenizer, so it takes token ids only; pass a list of ids, "
                "or compile a folder with tokenizer.json"
            )
        return list(self.tokenizer.encode(text))

    def text(self, provenance: bool = True) -> str:
        """All graphs of the program as readable code."""
        return program_text(self.program, provenance)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write an artifact folder, which `llmopt.load` reads; regions not compiled yet are compiled now.

        Raises ArtifactError: the path holds something else than an artifact, the disk is full, no permission. An older
        artifact at the path is whole until the new one is.
        """
        from llmopt import __version__
        from llmopt.runtime.artifact import Parts, save

        parts = Parts(self.program, self.recipe, self.target, self.report, self.regions)
        return save(parts, Path(path), self.weights, __version__)


class _Current(dict[str, Tensor]):
    """The cache's tensors as they are now (growing replaces them)."""

    def __init__(self, cache: KVCache) -> None:
        super().__init__()
        self.cache = cache

    def __contains__(self, name: object) -> bool:
        return name in self.cache.tensors

    def __getitem__(self, name: str) -> Tensor:
        return self.cache.tensors[name]
