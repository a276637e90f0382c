"""Where the time of a step goes on a GPU: busy, idle between kernels, and what the host takes before the first one.

Wall and busy are of the same steps of one burst: a single step after a pause runs at a higher clock than steps that
follow each other, so its kernels' times do not add up to the wall time of those.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from _gpu_timing import LEAD, Clock, Stepping, burst, summary

Event = Mapping[str, Any]


def device_events(events: Sequence[Event]) -> list[Event]:
    """Kernels, copies and fills of a chrome trace, by their start."""
    ran = [e for e in events if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    return sorted(ran, key=lambda e: e["ts"])


def traced(run: Callable[[], Any], clock: Clock) -> list[Event]:
    """What the device does while `run` runs and until it is done."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        clock.wait()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(trace))
        return device_events(json.loads(trace.read_text())["traceEvents"])


def timeline(events: Sequence[Event], steps: int, skipped: int, top: int) -> dict[str, Any]:
    """Figures a step, in us, of `steps` steps that follow each other, if they are alike without the first `skipped`.

    `wall_us` from a step's first event to the next one's; `busy_us` with something running, overlaps counted once;
    `gaps`: the (idle us, name before, name after) that are longest; `kernels`: (name, calls, us).
    """
    each = len(events) // steps
    if len(events) == each * steps:
        seen, count = events[skipped * each : (steps - 1) * each + 1], steps - 1 - skipped
    else:  # steps are not alike: all of them, from the first event to the last
        seen, count = events, steps
    busy, until, gaps = 0.0, seen[0]["ts"], []
    for before, event in zip([seen[0], *seen], seen, strict=False):
        end = event["ts"] + event["dur"]
        if event["ts"] > until:
            gaps.append((event["ts"] - until, short(before), short(event)))
        if event is not seen[-1]:
            busy += max(0.0, end - max(until, event["ts"]))
        until = max(until, end)
    calls, micros = Counter[str](), Counter[str]()
    for event in seen[:-1]:
        calls[short(event)] += 1
        micros[short(event)] += event["dur"]
    return {
        "wall_us": (seen[-1]["ts"] - seen[0]["ts"]) / count, "busy_us": busy / count, "events": each,
        "idle_us": sum(g[0] for g in gaps) / count, "gaps": sorted(gaps, reverse=True)[:top],
        "kernels": [(name, calls[name] / count, us / count) for name, us in micros.most_common(top)],
    }  # fmt: skip


def short(event: Event) -> str:
    """A kernel's name without what every one begins with, and its grid: the kernels of a template share a name."""
    grid = event.get("args", {}).get("grid")
    return event["name"].removeprefix("void ").replace("at::native::", "")[:56] + (f" {grid}" if grid else "")


def diagnosis(peer: Stepping, clock: Clock, steps: int, top: int) -> dict[str, Any]:
    """Times of one peer that is warm: bursts, lone steps with their host part, and on a GPU the timeline."""
    ms, host = burst(peer, steps, clock)
    alone, queued = [], []
    for _ in range(steps):
        clock.wait()
        started = time.perf_counter()
        peer.step()
        queued.append(1e3 * (time.perf_counter() - started))
        clock.wait()
        alone.append(1e3 * (time.perf_counter() - started))
    found: dict[str, Any] = {"ms": summary(ms), "host_ms": summary(host)}
    found |= {"alone_ms": summary(alone), "queued_ms": summary(queued)}
    if not clock.cuda:
        return found

    def run() -> None:
        for _ in range(LEAD + steps):
            peer.step()

    def one() -> None:
        torch.zeros(1, device="cuda")
        clock.wait()
        peer.step()

    traced(one, clock)  # the profiler's own first time
    marker, first, *_ = traced(one, clock)
    found["first_us"] = first["ts"] - marker["ts"] - marker["dur"]
    return found | timeline(traced(run, clock), LEAD + steps, LEAD, top)


def show_diagnosis(found: Mapping[str, Any], title: str) -> None:
    """A few lines."""
    parts = [f"{key.removesuffix('_ms')} {found[key]['median']:.3f}" for key in ("alone_ms", "queued_ms", "host_ms")]
    print(f"{title}: step {found['ms']['median']:.3f} ms (p90 {found['ms']['p90']:.3f}); {', '.join(parts)} ms")
    if "wall_us" not in found:
        return
    print(
        f"  profiled burst: step {found['wall_us']:.0f} us, busy {found['busy_us']:.0f}, idle {found['idle_us']:.0f}, "
        f"{found['events']} kernels and copies; idle device to first of them {found['first_us']:.0f} us"
    )
    for name, calls, us in found["kernels"]:
        print(f"  {us:9.0f} us {calls:6.1f} x {us / calls:8.1f}  {name}")
    for us, before, after in found["gaps"]:
        print(f"  idle {us:7.1f} us  {before} .. {after}")
