"""Reading prompts on one GPU against Inductor: prompts in, the first new token of each out; numerics first.

    python benchmarks/prefill.py --models llama-3.1-8b --shapes 1x2048 4x2048
    python benchmarks/prefill.py --diagnose --peers llmopt plain-max-autotune     # where the time goes; writes nothing

The peers are transformers' eager forward and the plain module under torch.compile(dynamic=False,
mode="max-autotune-no-cudagraphs"), whose attention is causal SDPA over the prompt itself. Weights, gate, turns and
result file are as in decode.py.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from _gpu_cases import (
    GateError,
    add_cases,
    add_options,
    default_out,
    each_case,
    has_device,
    measure,
    prepared,
    random_case,
    show,
)
from _gpu_models import SHAPES, Plain, Weights
from _gpu_peers import OURS, Case, Peer, compiled, ours, rows_for
from _gpu_timeline import diagnosis, show_diagnosis
from _gpu_timing import Clock
from torch import Tensor, nn


class Eager:
    """transformers' forward over the prompts, logits of the last token only."""

    note = "transformers, eager forward, sdpa, no cache kept"

    def __init__(self, case: Case) -> None:
        self.case = case

    def rewind(self) -> None:
        """Nothing is kept."""

    def step(self) -> Tensor:
        """Forward and argmax."""
        logits: Tensor = self.case.model(self.case.ids, use_cache=False, logits_to_keep=1).logits[:, -1]
        self.token = logits.argmax(-1)
        return logits


class _Prompt(nn.Module):
    def __init__(self, plain: Plain) -> None:
        super().__init__()
        self.plain = plain

    def forward(self, ids: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.plain(ids, positions)
        return logits, logits.argmax(-1)


class PlainInductor:
    """Our plain module, fused matrices, static cache written, under Inductor."""

    def __init__(self, case: Case, mode: str) -> None:
        batch, tokens = case.ids.shape
        self.note = f"plain module, static cache of {tokens}, causal SDPA, torch.compile(dynamic=False, mode={mode!r})"
        self.ids, self.positions = case.ids, torch.arange(tokens, device=case.ids.device)
        module = _Prompt(Plain(case.weights, batch, tokens))
        self.run: Callable[..., Any] = compiled(module, mode) if case.compiled else module

    def rewind(self) -> None:
        """The cache is written anew by each step."""

    def step(self) -> Tensor:
        """Forward and argmax."""
        logits, self.token = self.run(self.ids, self.positions)
        return logits  # type: ignore[no-any-return]


class Llmopt:
    """llmopt's step over all prompts at once, in the class of any tokens; pages written."""

    def __init__(self, case: Case) -> None:
        self.model = ours(case)
        self.note = f"llmopt, recipe {self.model.recipe.name}, target {self.model.target.name}, one step, paged cache"
        cache, (batch, tokens) = self.model.cache, case.ids.shape
        rows = rows_for(self.model, case, tokens)
        # on the host, as the engine hands them over; each step copies them
        slots = torch.tensor([s for row in rows for s in cache.slots(row, 0, tokens)])
        positions = torch.arange(tokens).repeat(batch)
        last = torch.arange(1, batch + 1) * tokens - 1
        seq_ids = torch.tensor(rows).repeat_interleave(tokens)
        ids = case.ids.reshape(1, -1).cpu()
        self.inputs = ids, positions[None], slots, seq_ids, cache.block_tables(), last

    def rewind(self) -> None:
        """The pages are written anew by each step."""

    def step(self) -> Tensor:
        """Step and argmax."""
        logits: Tensor = self.model.step(*self.inputs)
        self.token = logits.argmax(-1)
        return logits


PEERS: dict[str, Callable[[Case], Peer]] = {
    "hf-eager": Eager,
    "plain-default": functools.partial(PlainInductor, mode="default"),
    "plain-max-autotune": functools.partial(PlainInductor, mode="max-autotune-no-cudagraphs"),
    OURS: Llmopt,
}
DEFAULT = ("hf-eager", "plain-max-autotune", OURS)


@torch.no_grad()
def run(args: argparse.Namespace) -> None:
    """Every case, written as soon as it is there."""
    out = args.out or default_out("prefill", args.device)

    def one(model: Any, weights: Weights, about: tuple[str, int, int, dict[str, Any]]) -> None:
        name, batch, tokens, kept = about
        case = random_case(model, weights, batch, tokens, args.compile, kept)
        makers = {peer: PEERS[peer] for peer in args.peers}
        if args.diagnose:
            diagnose(makers, case, args.steps, f"{name} {batch}x{tokens}")
            return
        found = {"model": name, "batch": batch, "tokens": tokens}
        found |= measure(makers, case, case.ids, args.rounds, args.steps)
        show(found, f"prompts, {name} {args.dtype}, {batch} x {tokens}")
        if out:
            add_cases(out, [found])

    each_case(args.models, args.shapes, args, one)


def diagnose(makers: Mapping[str, Callable[[Case], Peer]], case: Case, steps: int, title: str) -> None:
    """What each peer's step consists of; no gate, no turns."""
    clock = Clock(str(case.model.device))
    peers, _, _ = prepared(makers, case, clock)
    for name, peer in peers.items():
        show_diagnosis(diagnosis(peer, clock, steps, 14), f"{title} {name}")


def shape(text: str) -> tuple[int, int]:
    """`4x2048`: four prompts of 2048 tokens."""
    batch, tokens = text.split("x")
    return int(batch), int(tokens)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=["llama-3.1-8b"], metavar="NAME")
    parser.add_argument("--shapes", type=shape, nargs="+", default=[(1, 2048), (4, 2048)], help="such as 4x2048")
    parser.add_argument("--diagnose", action="store_true", help="print where the time of the peers' steps goes")
    add_options(parser, PEERS, DEFAULT)
    parser.set_defaults(rounds=10, steps=5)
    args = parser.parse_args(argv)
    if has_device(args.device):
        try:
            run(args)
        except GateError as error:
            sys.exit(f"numerics: {error}")


if __name__ == "__main__":
    main()
