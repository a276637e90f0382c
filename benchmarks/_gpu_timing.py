"""Clocks, turns and counts of the GPU benchmarks: interleaved bursts, events a step, kernels from the profiler.

On a CPU the same code runs with the wall clock and counts nothing, for tests.
"""

from __future__ import annotations

import itertools
import json
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

LEAD = 2  # untimed steps at the head of a burst: they put the host ahead of the device


class Stepping(Protocol):
    """What is timed."""

    def rewind(self) -> None:
        """Back to the first step."""

    def step(self) -> Any:
        """What the clock sees."""


class Clock:
    """Times between steps that follow each other: CUDA events, or the wall clock on a CPU."""

    def __init__(self, device: str) -> None:
        self.cuda = torch.device(device).type == "cuda"

    def mark(self) -> Any:
        """A moment, on the device's own time line."""
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, marks: Sequence[Any]) -> list[float]:
        """Milliseconds from mark to mark; call `wait` first."""
        return [a.elapsed_time(b) if self.cuda else 1e3 * (b - a) for a, b in itertools.pairwise(marks)]

    def wait(self) -> None:
        """Until the device is done."""
        if self.cuda:
            torch.cuda.synchronize()


def burst(peer: Stepping, steps: int, clock: Clock) -> tuple[list[float], list[float]]:
    """Milliseconds of each of `steps` steps that follow each other, and of the host's part in each."""
    peer.rewind()
    for _ in range(LEAD):
        peer.step()
    marks, host = [clock.mark()], []
    for _ in range(steps):
        started = time.perf_counter()
        peer.step()
        host.append(1e3 * (time.perf_counter() - started))
        marks.append(clock.mark())
    clock.wait()
    return clock.between(marks), host


def interleaved(
    peers: Mapping[str, Stepping], rounds: int, steps: int, clock: Clock, between: Callable[[], Any] = lambda: None
) -> dict[str, dict[str, list[float]]]:
    """Steps and host times of every peer: `rounds` rounds in which each has one burst, another one first each time.

    `between` is called at the head of each round (the bandwidth, measured in the same minutes).
    """
    names = list(peers)
    found: dict[str, dict[str, list[float]]] = {name: {"ms": [], "host_ms": []} for name in names}
    for index in range(rounds):
        between()
        first = index % len(names)
        for name in names[first:] + names[:first]:
            ms, host = burst(peers[name], steps, clock)
            found[name]["ms"] += ms
            found[name]["host_ms"] += host
    return found


def summary(values: Sequence[float]) -> dict[str, float]:
    """Median, 90th percentile, minimum and count."""
    ordered = sorted(values)
    p90 = ordered[max(0, -(-len(ordered) * 9 // 10) - 1)]
    return {"median": statistics.median(ordered), "p90": p90, "min": ordered[0], "steps": len(ordered)}


def kernels(peer: Stepping, clock: Clock, top: int = 12) -> dict[str, Any]:
    """What one step launches: kernels, copies, microseconds the device is busy, and the kernels that take longest."""
    if not clock.cuda:
        return {}
    peer.rewind()
    peer.step()
    clock.wait()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        peer.step()
        clock.wait()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(trace))
        return counted(json.loads(trace.read_text())["traceEvents"], top)


def counted(events: Sequence[Mapping[str, Any]], top: int) -> dict[str, Any]:
    """Figures of a chrome trace's device events."""
    ran = [e for e in events if e.get("cat") == "kernel"]
    copies = [e for e in events if e.get("cat") in ("gpu_memcpy", "gpu_memset")]
    calls, micros = Counter[str](), Counter[str]()
    for event in ran:
        calls[event["name"][:80]] += 1
        micros[event["name"][:80]] += event["dur"]
    return {
        "kernels": len(ran),
        "copies": len(copies),
        "busy_us": sum(e["dur"] for e in [*ran, *copies]),
        "longest": [{"name": n, "calls": calls[n], "us": us} for n, us in micros.most_common(top)],
    }


def relative_error(got: Tensor, want: Tensor) -> float:
    """|got - want| / |want| over all elements, in fp64."""
    wide = want.double()
    return float((got.double() - wide).norm() / wide.norm())


class Denominators:
    """Copy and read bandwidth and bf16 matmul rate of a GPU, in this process and these minutes (nothing on a CPU)."""

    def __init__(self, device: str, gigabytes: float = 2.0) -> None:
        self.clock = Clock(device)
        self.read: list[float] = []
        self.copied: list[float] = []
        if self.clock.cuda:
            count = int(gigabytes * 2**30) // 4
            self.source = torch.randint(-9, 9, (count,), dtype=torch.int32, device=device)
            self.target = torch.empty_like(self.source)

    def __call__(self) -> None:
        """One measurement of reading and copying: the best form of each."""
        if not self.clock.cuda:
            return
        from _gpu_read import READERS

        size = self.source.nbytes
        self.read.append(max(size / self._seconds(lambda r=r: r(self.source)) for r in READERS.values()))
        self.copied.append(2 * size / self._seconds(lambda: self.target.copy_(self.source)))

    def _seconds(self, run: Callable[[], Any], repeats: int = 5) -> float:
        run()
        marks = [self.clock.mark()]
        for _ in range(repeats):
            run()
            marks.append(self.clock.mark())
        self.clock.wait()
        return min(self.clock.between(marks)) / 1e3

    def to_dict(self) -> dict[str, Any]:
        """Medians over the calls, bytes a second, and bf16 FLOP a second of an 8192-cubed product."""
        if not self.clock.cuda:
            return {}
        n = 8192
        a, b = (torch.randn(n, n, dtype=torch.bfloat16, device=self.source.device) for _ in range(2))
        return {
            "read_bytes_per_s": statistics.median(self.read),
            "copy_bytes_per_s": statistics.median(self.copied),
            "matmul_bf16_flop_per_s": 2 * n**3 / self._seconds(lambda: a @ b),
        }
