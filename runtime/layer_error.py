"""Where in a model the error comes in: its hidden state layer by layer against another program's, its weights' own, and
that of attention's scores over packed keys.

The hidden state is looked at where it alone is alive (`passes.outline.blocks`): behind the embedding, each
attention and each MLP. Both programs run `forward`, which holds the same rewrites as the step but is not cut into
regions, so every one of these values can be had.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, fx

from llmopt.compiler.emittable import argument
from llmopt.compiler.errors import InputError
from llmopt.compiler.graph import Graph, origin
from llmopt.compiler.program import Program
from llmopt.compiler.quant.kv import packing_for
from llmopt.compiler.quant.near import Near
from llmopt.passes import QuantizeKV
from llmopt.passes.outline import Region, blocks
from llmopt.runtime.executor import Executor
from llmopt.runtime.loader import read_weights
from llmopt.runtime.report import Report


class Loaded(NamedTuple):
    """A program with those of its weights that are in memory, and the device they lie on."""

    program: Program
    weights: Mapping[str, Tensor]
    device: torch.device


@dataclass(frozen=True)
class StreamError:
    """How far the hidden state is off: the mean over tokens of |x - y| / |y|, y the other program's."""

    name: str
    relative: float


@dataclass(frozen=True)
class WeightError:
    """A quantised weight, its scheme, and its signal to noise ratio in dB."""

    name: str
    scheme: str
    sqnr_db: float


@dataclass(frozen=True)
class ScoreError:
    """An attention whose keys are packed: the root mean square error of its scores, as the softmax sees them, and the
    scores' own standard deviation, each over a head's queries and the keys they see; both averaged over heads."""

    name: str
    rmse: float
    deviation: float


def weight_errors(report: Report) -> list[WeightError]:
    """The quantised weights of a program, in the order of its products; none if nothing was quantised or read yet."""
    return [
        WeightError(name, str(figures.get("scheme", "")), float(figures["sqnr_db"]))
        for entry in report.passes
        for name, figures in entry.stats.figures.items()
        if "sqnr_db" in figures
    ]


def stream_errors(ours: Loaded, theirs: Loaded, ids: Tensor) -> list[StreamError]:
    """The error at each place of the hidden state, in order; ids int64 [B, T], read from position 0.

    Raises InputError: the programs have not the same places.
    """
    mine, other = hidden_states(ours, ids), hidden_states(theirs, ids)
    if [x.shape for _, x in mine] != [y.shape for _, y in other]:
        raise InputError(
            f"the hidden state is alone at {len(mine)} places of one program and {len(other)} of the other, or has "
            "another width: they cannot be compared layer by layer; leave out --plot, or compare with the same model"
        )
    return [
        StreamError(name, _relative(x.double(), y.to(x.device, torch.float64)))
        for (name, x), (_, y) in zip(mine, other, strict=True)
    ]


def score_errors(loaded: Loaded, cache: QuantizeKV, ids: Tensor) -> list[ScoreError]:
    """The error that a packed cache makes in each attention, in order, for ids int64 [B, T] read from position 0; keys
    and queries are those of `forward`, in which nothing is packed. Empty where keys are not."""
    graph = loaded.program.graph("forward").copy()
    attentions = list(graph.calls("attention"))
    graph.fx.output_node().args = (tuple(n for node in attentions for n in node.args[:2]),)
    values = _values(loaded, graph, ids)
    found = []
    for number, node in enumerate(attentions):
        q, k = values[2 * number], values[2 * number + 1]
        how = None if number in cache.skip else packing_for("k", cache.keys, cache.order, cache.rotate, k.shape[-1])
        if how is not None:
            rounded = how.turned_back(how.unpack(how.pack(k)))
            found.append(ScoreError(origin(node).module, *_scores(q, k, rounded, cache, node)))
    return found


def _scores(q: Tensor, k: Tensor, rounded: Tensor, cache: QuantizeKV, attention: fx.Node) -> tuple[float, float]:
    scale, window, softcap = (argument(attention, name, 0) for name in ("scale", "window", "softcap"))
    at = torch.arange(q.shape[2], device=q.device)
    far = at[:, None] - at
    seen = (far >= 0) & (far < (window or len(at)))
    near = Near(cache.sinks, cache.recent).sees(at, at)
    group = q.shape[1] // k.shape[1]
    errors, deviations = [], []
    for head in range(q.shape[1]):  # one head's scores at a time: those of all may not fit
        asked, keys, kept = q[:, head].float(), k[:, head // group].float(), rounded[:, head // group].float()
        right, packed = (scale * (asked @ x.transpose(1, 2)) for x in (keys, kept))
        if softcap > 0:
            right, packed = (softcap * torch.tanh(x / softcap) for x in (right, packed))
        errors.append(torch.where(near, 0.0, packed - right)[:, seen].square().mean().sqrt())
        deviations.append(right[:, seen].std(correction=0))
    return float(torch.stack(errors).mean()), float(torch.stack(deviations).mean())


def _values(loaded: Loaded, graph: Graph, ids: Tensor) -> tuple[Tensor, ...]:
    """What a graph made of `forward` gives for ids [B, T]."""
    graph.fx.eliminate_dead_code()
    program = replace(loaded.program, graphs={"forward": graph})
    weights = read_weights(program, ("forward",), loaded.weights, loaded.device)
    run = Executor(graph, weights, device=loaded.device)
    found = run(ids, torch.arange(ids.shape[1]).expand(ids.shape).contiguous())
    return found if isinstance(found, tuple) else (found,)


def _relative(x: Tensor, y: Tensor) -> float:
    # token by token: the first one's state is often a hundred times the others', and would hide them
    lengths = y.norm(dim=-1).clamp_min(torch.finfo(torch.float64).tiny)
    return float(((x - y).norm(dim=-1) / lengths).mean())


def hidden_states(loaded: Loaded, ids: Tensor) -> list[tuple[str, Tensor]]:
    """(name, hidden state [B, T, H]) at each place, for ids int64 [B, T]."""
    graph = loaded.program.graph("forward").copy()
    found = blocks(graph)
    graph.fx.output_node().args = (tuple(block.outputs[0] for block in found),)
    return list(zip(map(_name, found), _values(loaded, graph, ids), strict=True))


def _name(block: Region) -> str:
    """The module that the block's last node but the sum itself comes from: `layers.0.mlp`."""
    own = origin(block.outputs[0]).module
    inside = [m for n in block.nodes if (m := origin(n).module).startswith(f"{own}.")]
    rest = inside[-1].removeprefix(f"{own}.").partition(".")[0] if inside else ""
    return ".".join(part for part in (own, rest) if part) or block.outputs[0].name
