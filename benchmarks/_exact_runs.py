"""Steps and tokens of a compiled model, on a GPU, a CPU, or a CPU that interprets the GPU's kernels."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llmopt.compiler.recipe import Recipe
from llmopt.runtime.build import build
from llmopt.runtime.decode_graphs import bucket
from llmopt.runtime.decoder import Batch
from llmopt.runtime.engine import Engine, SamplingParams
from llmopt.runtime.gpu_code import MANY, GpuCode, code_for
from llmopt.runtime.sampler import SampleRows
from llmopt.runtime.session import Session, open_session

CACHE_BYTES = 256 << 20


def opened(model: PreTrainedModel, device: str, recipe: str = "default") -> Session:
    """The model compiled for `device`: cuda, cpu, or interpret (kernels for sm_90, run by Triton's interpreter)."""
    wanted = Recipe.parse(recipe)
    if device != "interpret":
        program, _, context = build(model, wanted, device)
        code = code_for(program, context.target)
        if isinstance(code, GpuCode):
            compile_few(code)
        return open_session(program, wanted, context.target, code, CACHE_BYTES)
    if os.environ.get("TRITON_INTERPRET") != "1":
        raise SystemExit("--device interpret: start python with TRITON_INTERPRET=1, which Triton reads at import")
    from llmopt.codegen.interpret import launcher

    program, _, context = build(model, wanted, "cuda:sm_90")
    code = code_for(program, context.target)
    return open_session(program, wanted, context.target, code, CACHE_BYTES, launcher=launcher, device="cpu")


def compile_few(code: GpuCode) -> None:
    """Compile at once what batches of up to 8 need, by as many processes as torch has threads: the cores are shared
    with other models' checks."""
    from llmopt.codegen.cubin_parallel import compile_all

    kernels = dict.fromkeys(k for key in code.keys((MANY, "1", "8")) for k in code.code(*key).kernels())
    made = compile_all(kernels, code.target, max(2, torch.get_num_threads()))
    code.cubins.update((kernel.digest(), cubin) for kernel, cubin in made.items())


def engine(session: Session, chunk_size: int) -> Engine:
    """Another engine over the session's step, decoder and cache, which reads prompts in such chunks."""
    own = session.engine
    return Engine(
        session.step, session.cache, vocab_size=own.vocab_size, context_length=own.context_length,
        chunk_size=chunk_size, decoder=session.decoder,
    )  # fmt: skip


def greedy(count: int) -> SamplingParams:
    """`count` tokens, end tokens or not."""
    return SamplingParams(max_new_tokens=count, ignore_eos=True)


def first_difference(got: Sequence[Sequence[int]], want: Sequence[Sequence[int]]) -> list[int | None]:
    """For each prompt the first place that differs, None if there is none."""
    return [
        next((at for at, (a, b) in enumerate(zip(mine, theirs, strict=True)) if a != b), None)
        for mine, theirs in zip(got, want, strict=True)
    ]


class Sequences:
    """Sequences of given tokens, read by the session's own step and decoder. Close it to free their pages."""

    def __init__(self, session: Session, ids: Sequence[Sequence[int]], prompts: Sequence[int]) -> None:
        self.session, self.ids, self.at = session, ids, list(prompts)
        self.rows = [session.cache.open() for _ in ids]
        for row, tokens in zip(self.rows, ids, strict=True):
            session.cache.reserve(row, len(tokens))

    def __enter__(self) -> Sequences:
        return self

    def __exit__(self, *_: object) -> None:
        for row in self.rows:
            self.session.cache.release(row)

    def _on_device(self, values: Sequence[int]) -> Tensor:
        return torch.tensor(values, device=self.session.device)

    def prompts(self) -> list[Tensor]:
        """Read all prompts in one step; logits [its length, V] of each."""
        cache = self.session.cache
        vectors: tuple[list[int], ...] = ([], [], [], [])
        for row, tokens, length in zip(self.rows, self.ids, self.at, strict=True):
            new = tokens[:length], range(length), cache.slots(row, 0, length), [row] * length
            for vector, values in zip(vectors, new, strict=True):
                vector += values
        ids, positions, slots, rows = map(self._on_device, vectors)
        wanted = torch.arange(len(ids), device=self.session.device)
        logits = self.session.step(ids[None], positions[None], slots, rows, cache.block_tables(), wanted)
        return list(logits.split(self.at))

    def decode(self) -> Tensor:
        """Read the next token of every sequence; logits [sequences, V]."""
        session, cache, count = self.session, self.session.cache, len(self.ids)
        ids = self._on_device([tokens[at] for tokens, at in zip(self.ids, self.at, strict=True)])
        slots = self._on_device([cache.slots(r, at, at + 1)[0] for r, at in zip(self.rows, self.at, strict=True)])
        positions, rows = self._on_device(self.at), self._on_device(self.rows)
        self.at = [at + 1 for at in self.at]
        if session.decoder is None:
            each = torch.arange(count, device=session.device)
            return session.step(ids[None], positions[None], slots, rows, cache.block_tables(), each)  # type: ignore[no-any-return]
        sampling = SampleRows.of([greedy(1)] * count, list(range(count)), session.device)
        length = max(self.at)
        session.decoder.start(Batch(ids, positions, slots, rows, cache.block_tables(), sampling, length))
        replay: Callable[[], Tensor] = session.decoder.replay(min(bucket(count), session.decoder.limit), length)
        return replay()[:count].clone()


@torch.no_grad()
def forced(session: Session, ids: Sequence[Sequence[int]], prompts: Sequence[int]) -> tuple[list[Tensor], list[Tensor]]:
    """Logits of each sequence, teacher forced: of its prompt, and of the tokens behind it, as many for each."""
    with Sequences(session, ids, prompts) as running:
        first = running.prompts()
        steps = torch.stack([running.decode() for _ in range(len(ids[0]) - prompts[0])], 1)
    return first, list(steps)
