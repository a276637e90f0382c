"""CUDA graphs of contenders, replayed in turns."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping

import torch


def graphed(run: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """`run` warmed up and captured."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


def times(runs: Mapping[str, Callable[[], object]], per: int, rounds: int) -> dict[str, float]:
    """Median microseconds of a `per`-th of each run, replayed in turns."""
    graphs, seen = {name: graphed(run) for name, run in runs.items()}, {name: list[float]() for name in runs}
    for _ in range(rounds):
        for name, graph in graphs.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            seen[name].append(start.elapsed_time(end) * 1e3 / per)
    return {name: statistics.median(us[1:]) for name, us in seen.items()}
