"""CompiledModel: what `llmopt.compile` and `llmopt.load` return."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from numbers import Integral
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmopt.compiler.errors import DeviceError, InputError, TargetError
from llmopt.compiler.pipeline import program_text
from llmopt.compiler.program import Program
from llmopt.compiler.recipe import Recipe
from llmopt.compiler.target import Target
from llmopt.runtime.engine import Engine, SamplingParams, TokenEvent
from llmopt.runtime.executor import Executor
from llmopt.runtime.gpu_code import GpuCode
from llmopt.runtime.gpu_step import GpuStep
from llmopt.runtime.kv_cache import KVCache
from llmopt.runtime.loader import Regions, read_weights
from llmopt.runtime.report import Report
from llmopt.runtime.session import Session, absent, open_session
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
        regions: Regions | GpuCode,
        cache_bytes: int | None = None,
    ) -> None:
        self.program, self.recipe, self.target, self.report = program, recipe, target, report
        self.regions = regions
        self._absent = absent(target)  # such a model can be saved and shown
        self._session = None if self._absent else open_session(program, recipe, target, regions, cache_bytes)
        self._forward: Executor | None = None

    @property
    def session(self) -> Session:
        """What the model runs with. Raises TargetError on a machine that its target is not."""
        if self._session is None:
            raise TargetError(
                f"this model was compiled for {self.target.name} and cannot run here: {self._absent}; save it and load "
                "it on a machine that has one, or compile it for this machine"
            )
        return self._session

    @property
    def weights(self) -> dict[str, Tensor]:
        """The weights in memory, on the target's device."""
        return self.session.weights

    @property
    def cache(self) -> KVCache:
        """The paged KV cache."""
        return self.session.cache

    @property
    def step(self) -> Executor | GpuStep:
        """The step function, as the engine calls it."""
        return self.session.step

    @property
    def engine(self) -> Engine:
        """The engine that `generate` runs on. Raises DeviceError where this thread uses another GPU than the model."""
        own = self.session.device
        if own.type == "cuda" and (seen := torch.cuda.current_device()) != own.index:
            raise DeviceError(
                f"this model lies on {own} and the current device of this thread is cuda:{seen}; call "
                f"torch.cuda.set_device({own.index}) before it runs, or load the model with that device current"
            )
        return self.session.engine

    @cached_property
    def tokenizer(self) -> Any:
        """The model's tokenizer, None if it has none; read when first asked for, as transformers imports slowly."""
        return load_tokenizer(self.program.facts.tokenizer)

    def __call__(self, input_ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
        """Logits [B, T, V] of the plain forward; input_ids int64 [B, T], position_ids 0..T-1 by default.

        Inputs are moved to the target's device, where the logits stay.
        """
        if input_ids.dim() != 2 or input_ids.numel() == 0:
            raise InputError(f"input_ids has shape {tuple(input_ids.shape)}; wanted [B, T] with B and T at least 1")
        worst = int(input_ids.max()), int(input_ids.min())
        if worst[0] >= self.program.facts.vocab_size or worst[1] < 0:
            raise InputError(
                f"input_ids holds {worst[0] if worst[1] >= 0 else worst[1]}; wanted ids in "
                f"[0, {self.program.facts.vocab_size})"
            )
        if input_ids.is_floating_point() or input_ids.shape[1] > self.program.facts.context_length:
            raise InputError(
                f"input_ids is {input_ids.dtype} {tuple(input_ids.shape)}; wanted whole numbers [B, T], T at most "
                f"the model's context of {self.program.facts.context_length}"
            )
        if position_ids is not None and not _in_order(position_ids, input_ids, self.program.facts.context_length):
            raise InputError(
                f"position_ids {tuple(position_ids.shape)} for input_ids {tuple(input_ids.shape)}; wanted the same "
                "shape and, in each row, consecutive positions within the context; one row a sequence"
            )
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1]).expand(input_ids.shape).contiguous()
        device = self.session.device
        if self._forward is None:
            weights = read_weights(self.program, ("forward",), self.weights, device)
            self._forward = Executor(self.program.graph("forward"), weights, device=device)
        return self._forward(input_ids.to(device), position_ids.to(device))  # type: ignore[no-any-return]

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
        stops = tuple(stop_token_ids) if isinstance(stop_token_ids, Iterable) else stop_token_ids
        params = SamplingParams(max_new_tokens, temperature, top_p, top_k, seed, stops, ignore_eos)
        if stream:
            return self._stream(ids, params, texts)
        made = self.engine.generate(ids, params)
        results: list[Any] = [self._decode(m, params) for m in made] if texts else made
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
            text = self._decode(made[event.sequence], params)
            # a multi-byte character may still be incomplete: wait for the rest of it
            if text.endswith("\ufffd") and event.finished is None:
                continue
            yield event.sequence, text[len(shown[event.sequence]) :]
            shown[event.sequence] = text

    def _decode(self, ids: Sequence[int], params: SamplingParams) -> str:
        ends = {*self.program.facts.eos_token_ids, *params.stop_token_ids}
        kept = ids[:-1] if ids and ids[-1] in ends else ids
        return str(self.tokenizer.decode(kept, skip_special_tokens=True))

    def _encode(self, prompts: Prompts) -> tuple[bool, bool, list[list[int]]]:
        """(are they text, is it a single one, token ids)"""
        if isinstance(prompts, str):
            return True, True, [self._ids(prompts)]
        if not isinstance(prompts, Iterable) or isinstance(prompts, (bytes, dict)):
            raise InputError(f"generate was given {prompts!r}; wanted a text, a list of token ids, or a list of either")
        listed: list[Any] = _whole(prompts) if isinstance(prompts, Tensor) else list(prompts)
        if not listed:
            raise InputError("generate was given no prompt; wanted a text, a list of token ids, or a list of either")
        if all(isinstance(p, str) for p in listed):
            return True, False, [self._ids(p) for p in listed]
        if all(_is_id(p) for p in listed):
            return False, True, [[int(p) for p in listed]]
        rows = [_whole(p) if isinstance(p, Tensor) else p for p in listed]
        if not all(isinstance(p, (list, tuple)) and all(_is_id(i) for i in p) for p in rows):
            raise InputError(
                "generate was given prompts of several kinds, or ids that are no whole numbers; wanted texts only, or "
                "lists of ids only"
            )
        return False, False, [[int(i) for i in p] for p in rows]

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
        return save(parts, Path(path), self._session.weights if self._session else {}, __version__)

    def export(self, path: str | os.PathLike[str], to: str, calibration: Any = None, **settings: Any) -> Path:
        """Write the model for other runtimes, to a folder: `onnx`, `genai` (onnxruntime-genai), `compressed-tensors`
        (vLLM, SGLang, transformers) or `modelopt` (TensorRT-LLM, vLLM, SGLang). What leaves is the plain forward behind
        the recipe's passes.

        `settings` of ONNX are `weights` (`portable`, `standard`, `function`), `attention` (`standard`, `gqa`), `cache`
        and `accuracy_level`, as `docs/export.md` says; `kv_cache` (`int8` or `int4` of ONNX with gqa, `fp8` of a
        checkpoint) needs `calibration`, which is as for `llmopt.compile`.

        Raises InputError (an unknown format or setting, what the format cannot say, a package that is missing) and
        ArtifactError: something that no export wrote is there, the disk is full, no permission.
        """
        from llmopt.runtime.build import Calibration
        from llmopt.runtime.export import export

        if calibration is not None and not settings.get("kv_cache"):
            raise InputError("export was given calibration data, which only a kv_cache learns from; leave them out")
        data = None if calibration is None else Calibration(calibration)
        export(self.program, self.recipe, to, Path(path), settings, data)
        return Path(path)


def _in_order(positions: Tensor, ids: Tensor, context: int) -> bool:
    """Attention goes by index and rotation by position, so the two must run alike."""
    if positions.shape != ids.shape or positions.is_floating_point():
        return False
    steps = positions[:, 1:] - positions[:, :-1]
    return bool((steps == 1).all()) and int(positions.min()) >= 0 and int(positions.max()) < context


def _is_id(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _whole(ids: Tensor) -> list[Any]:
    """The ids of a tensor [T] or [B, T]."""
    if ids.is_floating_point() or ids.dtype == torch.bool or ids.dim() not in (1, 2):
        raise InputError(f"a prompt is a tensor {ids.dtype} {tuple(ids.shape)}; wanted whole numbers [T] or [B, T]")
    return ids.tolist()
