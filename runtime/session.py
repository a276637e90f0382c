"""What a compiled model runs with: its weights on the target's device, a paged cache, a step function and an engine.

On a GPU the cache is allocated once: graphs hold the addresses of pages, and growing would need room for the old and
the new ones at the same time. It takes half of the memory that weights leave free (the other half is for the work of
prompts, the graphs, and whoever shares the GPU), but no more than as many sequences as the recipe allows, each as long
as the context, could fill; `cache_bytes` says otherwise.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from llmopt.codegen.kernel import Launcher
from llmopt.compiler.errors import CacheFullError, TargetError
from llmopt.compiler.program import Program
from llmopt.compiler.recipe import Recipe
from llmopt.compiler.target import Target
from llmopt.runtime.decode_graphs import DecodeGraphs
from llmopt.runtime.decoder import DecodeState
from llmopt.runtime.engine import Engine, StepFn
from llmopt.runtime.executor import Executor, no_room
from llmopt.runtime.gpu_code import GpuCode
from llmopt.runtime.gpu_step import GpuStep
from llmopt.runtime.kv_cache import KVCache
from llmopt.runtime.loader import Regions, read_weights
from llmopt.runtime.prepared import only_prepared, prepare_weights

CACHE_SHARE = 0.5  # of the memory free once the weights are loaded


@dataclass(frozen=True)
class Session:
    """Weights by name, the cache, the step function, its decoder if it has one, and the engine over them.

    Weights are on the device, but for those that its kernels read in another form alone (`runtime.prepared`).
    """

    device: torch.device
    weights: dict[str, Tensor]
    cache: KVCache
    step: Executor | GpuStep
    decoder: DecodeGraphs | None
    engine: Engine


def absent(target: Target) -> str | None:
    """Why programs for this target do not run on this machine, or None."""
    try:
        return target.fits(Target.detect(target.kind))
    except TargetError as error:
        return str(error)


def open_session(
    program: Program,
    recipe: Recipe,
    target: Target,
    code: Regions | GpuCode,
    cache_bytes: int | None = None,
    launcher: Launcher | None = None,
    device: torch.device | str | None = None,
) -> Session:
    """Load the weights and make the rest ready. `launcher` and `device` other than the target's own are for tests.

    Raises DeviceMemoryError or CacheFullError: the GPU's memory is too small.
    """
    place = torch.device(device or _device(target))
    apart = only_prepared(program) if isinstance(code, GpuCode) else ()
    weights = read_weights(program, device=place, apart=apart)
    if isinstance(code, GpuCode):
        prepare_weights(code, weights, place)  # ahead of the cache, which is given its share of what is left
    cache = open_cache(program, recipe, place, cache_bytes)
    current = CurrentPages(cache)
    decoder: DecodeGraphs | None = None
    step: Executor | GpuStep
    if isinstance(code, GpuCode):
        step = GpuStep(code, weights, current, launcher or _cuda_launcher(code), place)
        if code.decodes:
            state = _decode_state(program, recipe, cache, place)
            decoder = DecodeGraphs(partial(step.decode, state), state, step.parts)
    else:
        step = Executor(program.graph("step"), weights, current, code, place)
    return Session(place, weights, cache, step, decoder, _engine(program, recipe, step, cache, decoder))


def _decode_state(program: Program, recipe: Recipe, cache: KVCache, device: torch.device) -> DecodeState:
    most, width = min(64, recipe.dims.sequences[1]), cache.pages_for(program.facts.context_length)
    try:
        return DecodeState(most, width, cache.page_size, device, cache.near_pages)
    except torch.OutOfMemoryError as error:
        raise no_room(f"the decoding state of {most} sequences of {width} pages", error) from error


def _engine(program: Program, recipe: Recipe, step: StepFn, cache: KVCache, decoder: DecodeGraphs | None) -> Engine:
    facts = program.facts
    return Engine(
        step,
        cache,
        vocab_size=facts.vocab_size,
        context_length=facts.context_length,
        eos_token_ids=facts.eos_token_ids,
        chunk_size=min(512 if decoder is None else 2048, recipe.dims.tokens[1]),
        max_batch=recipe.dims.sequences[1],
        decoder=decoder,
    )


def open_cache(program: Program, recipe: Recipe, device: torch.device, cache_bytes: int | None = None) -> KVCache:
    """The paged cache: growing on a CPU, of a fixed size on a GPU; see the module's docstring."""
    near = program.near_pages
    if device.type != "cuda":
        return KVCache(program.state, recipe.page_size, max_bytes=cache_bytes, device=device, near_pages=near)
    free = free_bytes(device)
    pages = fixed_pages(program, recipe, free, cache_bytes)
    each = sum(s.bytes_per_page for s in program.state)
    try:
        return KVCache(
            program.state, recipe.page_size, initial_pages=pages, max_pages=pages, device=device, near_pages=near
        )
    except torch.OutOfMemoryError as error:
        raise CacheFullError(
            f"the KV cache of {pages} pages takes {pages * each} bytes, and the GPU has {free} bytes free after the "
            "weights; give a smaller cache_bytes, or free memory on the GPU"
        ) from error


def fixed_pages(program: Program, recipe: Recipe, free: int, cache_bytes: int | None) -> int:
    """Pages of a cache that never grows, with `free` bytes left by the weights."""
    each = max(1, sum(s.bytes_per_page for s in program.state))
    near = program.near_pages
    useful = 1 + recipe.dims.sequences[1] * (-(-program.facts.context_length // recipe.page_size) + near)
    budget = int(free * CACHE_SHARE) if cache_bytes is None else cache_bytes
    pages = min(useful, budget // each)
    if pages < 2 + near:
        least = f"{2 + near} pages" if near else "two pages"
        raise CacheFullError(
            f"the KV cache may take {budget} bytes ({free} bytes of the GPU are free after the weights), and {least} "
            f"of {recipe.page_size} tokens, the least there can be, take {(2 + near) * each}; raise cache_bytes, free "
            "memory on the GPU, or compile a smaller model"
        )
    return pages


def free_bytes(device: torch.device) -> int:
    """Bytes of the GPU that this process can still get, those torch holds but does not use included."""
    held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + held


def _device(target: Target) -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if target.kind == "cuda" else torch.device("cpu")


def _cuda_launcher(code: GpuCode) -> Launcher:
    from llmopt.runtime import cuda

    return cuda.launcher(code.cubin)


class CurrentPages(Mapping[str, Tensor]):
    """The cache's tensors as they are now (growing replaces them)."""

    def __init__(self, cache: KVCache) -> None:
        self.cache = cache

    def __getitem__(self, name: str) -> Tensor:
        return self.cache.tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.cache.tensors)

    def __len__(self) -> int:
        return len(self.cache.tensors)
