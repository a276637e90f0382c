"""Decoding speed against peers, in one process, turn and turn about, numerics first.

Every round runs every peer once, so that a slow minute of the machine is everybody's. Before anything is timed, the
tokens of all peers are compared with those of transformers' eager `generate`; in fp32, with a recipe whose passes are
all exact, a difference of llmopt's ends the benchmark. Memory is that of a process of its own for each peer.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, CompileConfig, PreTrainedModel

from llmopt.commands.model import Wanted, compiled, notes_to_say, uncompressed
from llmopt.compiler._torch import compiled_graphs
from llmopt.compiler.errors import InputError, VerifyError, did_you_mean
from llmopt.compiler.graph import target_name
from llmopt.compiler.program import Program
from llmopt.runtime.measure import ReadBandwidth, environment


@dataclass(frozen=True)
class Settings:
    """What is measured: every batch size makes `new_tokens` greedy tokens a sequence from random prompts."""

    model: str
    recipe: str = "default"
    dtype: str = "float32"
    batches: tuple[int, ...] = (1, 8)
    new_tokens: int = 128
    prompt_tokens: int = 48
    rounds: int = 5
    peers: tuple[str, ...] = ("hf-eager", "hf-inductor")
    calibration: str | None = None
    statistics: Path | None = None
    bits: float | None = None

    @property
    def wanted(self) -> Wanted:
        """What llmopt compiles."""
        return Wanted(self.recipe, None, self.dtype, self.calibration, self.statistics, self.bits)

    def to_dict(self) -> dict[str, Any]:
        """As JSON types; of files, the names, and none of where statistics are kept."""
        known = {**asdict(self), "model": Path(self.model).name}
        del known["statistics"]
        return {**known, "calibration": self.calibration and Path(self.calibration).name}

    def __post_init__(self) -> None:
        for name, value, least in (
            ("--batch", min(self.batches, default=0), 1),
            ("--new-tokens", self.new_tokens, 2),
            ("--prompt-tokens", self.prompt_tokens, 1),
            ("--rounds", self.rounds, 1),
        ):
            if value < least:
                raise InputError(f"bench: {name} is {value}; wanted at least {least}")
        for peer in self.peers:
            if peer not in PEERS:
                raise InputError(f"bench: peer {peer!r} is unknown; {did_you_mean(peer, PEERS)}")


@dataclass(frozen=True)
class Timing:
    """One generation: new ids [B, new_tokens], seconds to the first token, and in all."""

    ids: list[list[int]]
    first: float
    total: float


class Peer(Protocol):
    """Something that generates; `note` says how it was set up."""

    note: str

    def generate(self, prompts: Tensor, new_tokens: int) -> Timing:
        """Greedy tokens for prompts int64 [B, T], end tokens ignored."""


class Llmopt:
    """llmopt with the recipe under test."""

    def __init__(self, settings: Settings, progress: Callable[[str], None] = lambda stage: None) -> None:
        self.model = compiled(settings.model, settings.wanted, progress)
        learned = f", learned from {Path(settings.calibration).name}" if settings.calibration else ""
        self.note = f"recipe {self.model.recipe.name}{learned}, target {self.model.target.name}"

    def generate(self, prompts: Tensor, new_tokens: int) -> Timing:
        """Through the public `generate`, streamed."""
        made: list[list[int]] = [[] for _ in prompts]
        started, first = time.perf_counter(), 0.0
        for index, token in self.model.generate(prompts.tolist(), new_tokens, ignore_eos=True, stream=True):
            first = first or time.perf_counter() - started
            made[index].append(token)
        return Timing(made, first, time.perf_counter() - started)


class _FirstToken:
    """A transformers streamer that only notes when the first new token came."""

    def __init__(self) -> None:
        self.calls = 0
        self.at = 0.0

    def put(self, value: Tensor) -> None:
        """The prompt comes first, then the tokens."""
        self.calls += 1
        if self.calls == 2:
            self.at = time.perf_counter()

    def end(self) -> None:
        """Nothing to flush."""


class Eager:
    """transformers' `generate` as a user calls it: eager, with a growing cache."""

    note = "generate(), DynamicCache, eager"

    def __init__(self, settings: Settings, progress: Callable[[str], None] = lambda stage: None) -> None:
        progress("loading")
        dtype = getattr(torch, settings.dtype)
        self.model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(settings.model, dtype=dtype).eval()
        self.model.generation_config.eos_token_id = None  # all peers make the same number of tokens
        self.options: dict[str, Any] = {"do_sample": False, "pad_token_id": 0}

    @torch.no_grad()
    def generate(self, prompts: Tensor, new_tokens: int) -> Timing:
        """Greedy, without end tokens."""
        streamer = _FirstToken()
        started = time.perf_counter()
        made = self.model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=new_tokens,
            streamer=streamer,
            **self.options,
        )
        total = time.perf_counter() - started
        return Timing(made[:, prompts.shape[1] :].tolist(), streamer.at - started, total)


class Inductor(Eager):
    """transformers' `generate` with a static cache and its decoding step compiled by torch.compile, one whole graph."""

    note = "generate(), StaticCache, decoding step under torch.compile(fullgraph=True, dynamic=False)"
    compiling: ClassVar[dict[str, Any]] = {"mode": None}

    def __init__(self, settings: Settings, progress: Callable[[str], None] = lambda stage: None) -> None:
        super().__init__(settings, progress)
        config = CompileConfig(fullgraph=True, dynamic=False, **self.compiling)
        config._compile_all_devices = True  # by itself generate() compiles on GPUs only
        self.options |= {"cache_implementation": "static", "compile_config": config}
        self.graphs = compiled_graphs()

    def generate(self, prompts: Tensor, new_tokens: int) -> Timing:
        """As Eager, and an error if torch.compile compiled nothing."""
        made = super().generate(prompts, new_tokens)
        if compiled_graphs() == self.graphs:
            raise VerifyError("hf-inductor: torch.compile compiled no graph, so this peer would be an eager one")
        return made


class TunedInductor(Inductor):
    """Inductor with weights frozen (packed at compile time) and matrix kernels autotuned."""

    note = Inductor.note + " with freezing and max_autotune"
    compiling: ClassVar[dict[str, Any]] = {"mode": None, "options": {"freezing": True, "max_autotune": True}}


PEERS: dict[str, Callable[..., Peer]] = {
    "hf-eager": Eager, "hf-inductor": Inductor, "hf-inductor-tuned": TunedInductor,
}  # fmt: skip
OURS = "llmopt"


@dataclass
class Figures:
    """One peer at one batch size; seconds of each round, and whether its tokens are those of transformers' eager."""

    peer: str
    batch: int
    identical: bool
    total: list[float] = field(default_factory=list)
    first: list[float] = field(default_factory=list)

    def to_dict(self, settings: Settings, step_bytes: int, bandwidth: float) -> dict[str, Any]:
        """Medians, the best and the 90th percentile of seconds, tokens per second, and the share of read bandwidth.

        Decoding is what comes after the first token; `step_bytes` is what each of its steps must read.
        """
        made = self.batch * settings.new_tokens
        decoding = [t - f for t, f in zip(self.total, self.first, strict=True)]
        steps = (settings.new_tokens - 1) / statistics.median(decoding)
        return {
            "peer": self.peer,
            "batch": self.batch,
            "identical_tokens": self.identical,
            "tokens_per_s": made / statistics.median(self.total),
            "decode_tokens_per_s": self.batch * steps,
            "first_token_ms": 1e3 * statistics.median(self.first),
            "seconds": {"median": statistics.median(self.total), "min": min(self.total), "p90": _p90(self.total)},
            "bytes_per_step": step_bytes,
            "bytes_per_token": step_bytes / self.batch,
            "read_bandwidth_share": step_bytes * steps / bandwidth,
            "rounds": {"total_s": self.total, "first_token_s": self.first},
        }


def _p90(values: Sequence[float]) -> float:
    return sorted(values)[max(0, -(-len(values) * 9 // 10) - 1)]


def step_bytes(program: Program, batch: int, context: float) -> int:
    """Bytes a decoding step must read: all weights but the embedding table, and K and V of `context` tokens.

    A table that is the output projection, too, counts once.
    """
    read = {
        str(n.target)
        for n in program.graph("forward").fx.nodes
        if n.op == "get_attr" and any(target_name(user) != "aten.embedding" for user in n.users)
    }
    weights = sum(program.weights[name].nbytes for name in read)
    cached = sum(spec.bytes_per_page / spec.shape[1] for spec in program.state)
    return int(weights + batch * context * cached)


def prompts_for(vocab: int, batch: int, length: int) -> Tensor:
    """Fixed random ids [B, T]."""
    generator = torch.Generator().manual_seed(batch)
    return torch.randint(3, vocab, (batch, length), generator=generator)


def measure(
    settings: Settings,
    progress: Callable[[str], None] = lambda stage: None,
    memory: bool = True,
    ours: Llmopt | None = None,
) -> dict[str, Any]:
    """All figures as JSON types. Raises InputError, or VerifyError where llmopt's tokens are wrong.

    `memory` also runs each peer in a process of its own; `ours` is a model compiled already. What llmopt learns is
    learned once: statistics that are not to be kept are in a folder that is gone in the end.
    """
    if settings.calibration is None or settings.statistics is not None:
        return _measured(settings, progress, memory, ours)
    with tempfile.TemporaryDirectory(prefix="llmopt-bench-") as folder:
        kept = replace(settings, statistics=Path(folder) / "statistics.safetensors")
        return _measured(kept, progress, memory, ours)


def _measured(settings: Settings, progress: Callable[[str], None], memory: bool, ours: Llmopt | None) -> dict[str, Any]:
    ours = ours or Llmopt(settings, progress)
    vocab = ours.model.program.facts.vocab_size
    _check_length(settings, ours.model.program.facts.context_length)
    peers: dict[str, Peer] = {OURS: ours}
    for name in settings.peers:
        peers[name] = PEERS[name](settings, lambda stage, name=name: progress(f"{name}: {stage}"))
    reference = peers.get("hf-eager") or Eager(settings)
    exact = settings.dtype == "float32" and uncompressed(ours.model.recipe) == ours.model.recipe
    bandwidths: list[float] = []
    results = []
    for batch in settings.batches:
        prompts = prompts_for(vocab, batch, settings.prompt_tokens)
        found = _warm_up(peers, reference, prompts, settings, exact, progress)
        reading = ReadBandwidth()
        for index in range(settings.rounds):
            reading()
            for name, peer in peers.items():
                progress(f"batch {batch}, round {index + 1} of {settings.rounds}: {name}")
                timing = peer.generate(prompts, settings.new_tokens)
                found[name].total.append(timing.total)
                found[name].first.append(timing.first)
        context = settings.prompt_tokens + settings.new_tokens / 2
        needed = step_bytes(ours.model.program, batch, context)
        results += [f.to_dict(settings, needed, reading.median()) for f in found.values()]
        bandwidths += reading.seen
    peaks = {name: peak_memory(name, settings, progress) for name in peers} if memory else {}
    return {
        **environment(),
        "settings": settings.to_dict(),
        "read_bandwidth_bytes_per_s": statistics.median(bandwidths),
        "read_bandwidth_rounds": bandwidths,
        "peers": {name: peer.note for name, peer in peers.items()},
        "peak_rss_bytes": peaks,
        "load_average": os.getloadavg()[0],
        "compile_seconds": ours.model.report.seconds,
        "notes": notes_to_say(ours.model.report.passes),
        "results": results,
    }


def _check_length(settings: Settings, context: int) -> None:
    if settings.prompt_tokens + settings.new_tokens > context:
        raise InputError(
            f"bench: {settings.prompt_tokens} + {settings.new_tokens} tokens do not fit the model's context of "
            f"{context}; lower --prompt-tokens or --new-tokens"
        )


def _warm_up(
    peers: dict[str, Peer],
    reference: Peer,
    prompts: Tensor,
    settings: Settings,
    exact: bool,
    progress: Callable[[str], None],
) -> dict[str, Figures]:
    """Run everybody twice before the clock counts (torch.compile included), and compare tokens: ours `exact`ly."""
    batch = prompts.shape[0]
    progress(f"batch {batch}: reference tokens")
    want = reference.generate(prompts, settings.new_tokens).ids
    found = {}
    for name, peer in peers.items():
        progress(f"batch {batch}: warming up {name}")
        got = peer.generate(prompts, settings.new_tokens).ids
        peer.generate(prompts, settings.new_tokens)
        found[name] = Figures(name, batch, got == want)
        if name == OURS and got != want and exact:
            raise VerifyError(_difference(got, want))
    return found


def _difference(got: list[list[int]], want: list[list[int]]) -> str:
    row = next(b for b, pair in enumerate(zip(got, want, strict=True)) if pair[0] != pair[1])
    column = next(t for t, token in enumerate(want[row]) if got[row][t : t + 1] != [token])
    return (
        f"bench: token {column} of sequence {row} is {got[row][column : column + 1]}, transformers' eager generate "
        f"makes [{want[row][column]}]; nothing was timed; find the cause with `llmopt bisect`"
    )


def peak_memory(name: str, settings: Settings, progress: Callable[[str], None] = lambda stage: None) -> int:
    """Peak resident bytes of a fresh process in which this peer alone generates once, at the largest batch."""
    progress(f"memory of {name}")
    spawning = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawning) as pool:
        return pool.submit(_peak, name, settings).result()


def _peak(name: str, settings: Settings) -> int:
    peer = Llmopt(settings) if name == OURS else PEERS[name](settings)
    peer.generate(prompts_for(256, max(settings.batches), settings.prompt_tokens), settings.new_tokens)
    return peak_rss()


def peak_rss() -> int:
    """Peak resident bytes of this process. getrusage would count the parent's, too, which exec hands down."""
    status = Path("/proc/self/status")
    if status.exists():
        return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def ratios(results: list[dict[str, Any]]) -> list[str]:
    """`batch 1: 3.1x the decoding speed of hf-eager`, one line for each peer and batch size."""
    lines = []
    for batch in dict.fromkeys(r["batch"] for r in results):
        rows = {r["peer"]: r["decode_tokens_per_s"] for r in results if r["batch"] == batch}
        for peer, speed in rows.items():
            if peer != OURS:
                lines.append(f"batch {batch}: {OURS} decodes {rows[OURS] / speed:.2f}x as fast as {peer}")
    return lines
