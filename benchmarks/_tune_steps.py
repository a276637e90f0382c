"""What `tune_step.py` compares: decoding steps of one model that differ in the constants of their kernels.

A model has random weights and a cache filled with random keys and values, so nothing but decoding steps is compiled.
Steps are built and captured as a session's own are: GpuStep, DecodeState, DecodeGraphs.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
import torch.nn.functional as F
from _gpu_models import SHAPES, Layer, Weights, finish, plain_weights, project, random_model, rms_norm
from _gpu_timing import Clock, relative_error
from torch import Tensor
from transformers import AutoModelForCausalLM

from llmopt.codegen import tuning
from llmopt.codegen.kernel import Kernel, Launcher, RegionCode
from llmopt.codegen.sampling import REGION as SAMPLE
from llmopt.compiler.program import Program
from llmopt.compiler.recipe import Recipe
from llmopt.compiler.target import Target
from llmopt.runtime.build import build
from llmopt.runtime.decode_graphs import DecodeGraphs, bucket
from llmopt.runtime.decoder import Batch
from llmopt.runtime.engine import SamplingParams
from llmopt.runtime.gpu_code import GpuCode, decode_shape
from llmopt.runtime.gpu_step import GpuStep
from llmopt.runtime.sampler import SampleRows
from llmopt.runtime.session import Session, open_session

SPARE = 64  # positions behind the context that timed steps may fill
COMPARED = 4  # sequences of a case that are evaluated in fp64

Config = dict[str, Any]
Configs = Mapping[str, Mapping[str, Any]]  # constants by `tuning.key`; the tables' where there are none


class Codes:
    """Region code of a program for a class of shapes under given constants, each made once."""

    def __init__(self, program: Program, target: Target, shape: str) -> None:
        self.program, self.target, self.shape = program, target, shape
        self._made: dict[tuple[str, str], RegionCode] = {}
        self._asked: dict[str, dict[str, tuning.Choice]] = {}
        base = GpuCode(program, target)
        self.names = base.names()
        self.cubins = base.cubins  # of all constants tried
        for name in self.names:
            with tuning.trial({}) as asked:
                self._made[name, "{}"] = base.code(name, shape)
            self._asked[name] = asked

    @property
    def choices(self) -> dict[str, tuning.Choice]:
        """What is chosen for this class by the tables, by key."""
        return {key: choice for asked in self._asked.values() for key, choice in asked.items()}

    def regions(self, key: str) -> list[str]:
        """The regions that a key's constants are for."""
        return [name for name, asked in self._asked.items() if key in asked]

    def region(self, name: str, configs: Configs) -> RegionCode:
        """A region's code. Raises BuildError."""
        mine = {k: dict(c) for k, c in configs.items() if k in self._asked[name]}
        at = name, json.dumps(mine, sort_keys=True)
        if at not in self._made:
            with tuning.trial(mine):
                self._made[at] = GpuCode(self.program, self.target).code(name, self.shape)
        return self._made[at]

    def code(self, configs: Configs) -> GpuCode:
        """The code of all regions. Raises BuildError."""
        codes = {(name, self.shape): self.region(name, configs) for name in self.names}
        return GpuCode(self.program, self.target, codes, self.cubins)

    def kernels(self, configs: Configs, key: str | None = None) -> list[Kernel]:
        """The kernels of all regions, or of those that a key's constants are for."""
        names = self.names if key is None else self.regions(key)
        return [kernel for name in names for kernel in self.region(name, configs).kernels()]

    def launches(self, configs: Configs) -> list[tuple[str, str]]:
        """(region, kernel's name) of every launch of a step, in order."""
        called = [str(n.target) for n in self.program.graph("step").fx.nodes if n.op == "call_module"]
        return [
            (name, call.kernel.template.partition(":")[2])
            for name in [*called, SAMPLE] for call in self.region(name, configs).calls if call.kernel is not None
        ]  # fmt: skip


@dataclass(frozen=True)
class Built:
    """A step ready to run; `step` owns buffers that a captured graph writes, so it must live as long."""

    replay: Callable[[], Tensor]
    step: GpuStep
    configs: Configs
    parts: int

    def __call__(self) -> Tensor:
        """One token of every sequence; logits."""
        return self.replay()


class Subject:
    """A model lowered for a GPU and, except on device `compile`, loaded where it runs."""

    def __init__(self, name: str, device: str, dtype: torch.dtype, layers: int | None) -> None:
        self.name, self.device = name, device
        model = _model(name, device, dtype, layers)
        self.recipe = Recipe.parse("default")
        wanted = "cuda" if device == "cuda" else "cuda:sm_90"
        self.program, _, context = build(model, self.recipe, wanted)
        self.target = context.target
        self.layers = model.config.num_hidden_layers
        self.weights: Weights | None = plain_weights(model) if device != "compile" else None
        self._codes: dict[str, Codes] = {}

    def codes(self, rows: int) -> Codes:
        """What makes code for steps of so many rows."""
        shape = decode_shape(rows)
        if shape not in self._codes:
            self._codes[shape] = Codes(self.program, self.target, shape)
        return self._codes[shape]

    def open(self, cases: Iterable[tuple[int, int]]) -> dict[tuple[int, int], Case]:
        """Weights and a cache with room for all these (batch, context) at once, filled with random numbers."""
        cases = list(cases)
        size = self.recipe.page_size
        pages = 1 + sum(batch * -(-(context + SPARE) // size) for batch, context in cases)
        room = pages * sum(s.bytes_per_page for s in self.program.state)
        code = GpuCode(self.program, self.target)
        if self.device == "cuda":
            session = open_session(self.program, self.recipe, self.target, code, room)
        else:
            session = open_session(
                self.program, self.recipe, self.target, code, room, launcher=interpreted(), device="cpu"
            )
        if session.decoder is None:
            raise SystemExit(f"{self.name}: its step is not captured, as attention was left to torch")
        opened = {(batch, context): Case(self, session, batch, context) for batch, context in cases}
        generator = torch.Generator(session.device).manual_seed(11)
        for tensor in session.cache.tensors.values():
            tensor.normal_(generator=generator)
        return opened


def _model(name: str, device: str, dtype: torch.dtype, layers: int | None) -> Any:
    if device != "compile":
        return random_model(name, "cuda" if device == "cuda" else "cpu", dtype, layers)
    make, settings = SHAPES[name]
    with torch.device("meta"):  # kernels are made from shapes alone
        config = make(**(settings if layers is None else {**settings, "num_hidden_layers": layers}))
        return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa").eval()


def interpreted() -> Launcher:
    """Triton's interpreter. Exits unless python was started for it."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        raise SystemExit("--device interpret: start python with TRITON_INTERPRET=1, which Triton reads at import")
    from llmopt.codegen.interpret import launcher

    return launcher


class Case:
    """`batch` sequences of `context` tokens in the cache, and the step that reads their next token."""

    def __init__(self, subject: Subject, session: Session, batch: int, context: int) -> None:
        assert session.decoder is not None
        self.subject, self.session, self.batch, self.context = subject, session, batch, context
        self.codes, self.state = subject.codes(batch), session.decoder.state
        self.rows = min(bucket(batch), session.decoder.limit)
        cache = session.cache
        self.places = [cache.open() for _ in range(batch)]
        for place in self.places:
            cache.reserve(place, context + SPARE)
        generator = torch.Generator().manual_seed(context)
        ids = torch.randint(subject.program.facts.vocab_size, (batch,), generator=generator)
        self.ids = ids.to(session.device)

    @cached_property
    def _words(self) -> Tensor:
        """The state's words before the step."""
        device, cache = self.session.device, self.session.cache
        slots = [cache.slots(place, self.context, self.context + 1)[0] for place in self.places]
        greedy = SampleRows.of([SamplingParams()] * self.batch, list(range(self.batch)), device)
        positions = torch.full_like(self.ids, self.context)
        at, rows = torch.tensor(slots, device=device), torch.tensor(self.places, device=device)
        self.state.load(Batch(self.ids, positions, at, rows, cache.block_tables(), greedy, self.context + 1))
        return self.state.words.clone()

    def rewind(self) -> None:
        """Back to the first step, whatever was run before."""
        self.state.words.copy_(self._words)

    def build(self, configs: Configs, parts: int | None = None, launcher: Launcher | None = None) -> Built:
        """The step with these constants, captured on a GPU; keys in `parts` parts if given. Raises BuildError."""
        code = self.codes.code(configs)
        step = GpuStep(code, self.session.weights, _step(self.session).state, launcher or self._launcher(code),
                       self.session.device)  # fmt: skip
        graphs = DecodeGraphs(
            partial(step.decode, self.state), self.state, step.parts if parts is None else lambda rows, length: parts
        )
        self.rewind()
        replay = graphs.replay(self.rows, self.context + 1)
        self.codes.cubins.update(code.cubins)
        return Built(replay, step, configs, graphs.parts(self.rows, self.context + 1))

    def _launcher(self, code: GpuCode) -> Launcher:
        return gpu_launcher(code) if self.session.device.type == "cuda" else interpreted()

    @cached_property
    def _exact(self) -> Tensor:
        """fp64 logits of the first sequences."""
        assert self.subject.weights is not None
        cache, count = self.session.cache, min(self.batch, COMPARED)
        pages = torch.tensor([cache.pages(place) for place in self.places[:count]], device=self.session.device)
        names = [s.name for s in self.subject.program.state]
        read = [(_rows(cache.tensors[k], pages, self.context), _rows(cache.tensors[v], pages, self.context))
                for k, v in zip(names[::2], names[1::2], strict=True)]  # fmt: skip
        return exact_logits(self.subject.weights, self.ids[:count], self.context, read)

    @torch.inference_mode()
    def error(self, built: Built) -> float:
        """Relative error of a step's logits against fp64."""
        self.rewind()
        return relative_error(built()[: min(self.batch, COMPARED)], self._exact)


def gpu_launcher(code: GpuCode, pdl: bool = True) -> Launcher:
    """What launches compiled kernels; without `pdl` each after the end of the one ahead."""
    from dataclasses import replace

    from llmopt.runtime import cuda

    return cuda.launcher(code.cubin if pdl else lambda kernel: replace(code.cubin(kernel), pdl=False))


def _step(session: Session) -> GpuStep:
    assert isinstance(session.step, GpuStep)
    return session.step


def _rows(pages: Tensor, tables: Tensor, length: int) -> Tensor:
    """[B, H, length, D] of pages [P, H, size, D] listed by tables [B, M]."""
    return pages[tables].permute(0, 2, 1, 3, 4).flatten(2, 3)[:, :, :length]


@torch.no_grad()
def exact_logits(weights: Weights, ids: Tensor, position: int, cached: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """fp64 logits [B, V] of tokens ids [B] at `position`, behind keys and values [B, Hkv, position, D] a layer."""
    dtype = torch.float64
    angles = position * weights.frequencies.double()[None]
    cos, sin = angles.cos(), angles.sin()
    x = F.embedding(ids[:, None], weights.embedding).to(dtype)
    for layer, (keys, values) in zip(weights.layers, cached, strict=True):
        wide = Layer(*(None if t is None else t.to(dtype) for t in layer))
        q, k, v = project(wide, x, cos, sin, weights.heads, weights.eps)
        keys, values = torch.cat([keys.to(dtype), k], 2), torch.cat([values.to(dtype), v], 2)
        attended = F.scaled_dot_product_attention(q, keys, values, enable_gqa=True)
        x = finish(wide, x, attended, weights.eps)
    return F.linear(rms_norm(x[:, -1], weights.norm.to(dtype), weights.eps), weights.head.to(dtype))


class Turns:
    """Times steps against each other: bursts of `steps` replays, in turns, another one first in each round."""

    def __init__(self, device: str, steps: int, lead: int = 2) -> None:
        self.clock, self.steps, self.lead = Clock("cuda" if device == "cuda" else "cpu"), steps, lead

    @torch.inference_mode()
    def __call__(self, case: Case, runs: Sequence[Callable[[], Any]], rounds: int) -> list[list[float]]:
        """Microseconds a replay, of each run in each round."""
        marks: list[list[tuple[Any, Any]]] = [[] for _ in runs]
        for index in range(rounds):
            for number in sorted(range(len(runs)), key=lambda i: (i + index) % len(runs)):
                case.rewind()
                for _ in range(self.lead):
                    runs[number]()
                start = self.clock.mark()
                for _ in range(self.steps):
                    runs[number]()
                marks[number].append((start, self.clock.mark()))
        self.clock.wait()
        return [[1e3 * self.clock.between(pair)[0] / self.steps for pair in pairs] for pairs in marks]
