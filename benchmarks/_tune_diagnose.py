"""Where a captured step's time goes: its graph's nodes and edges, its kernels on the time line, and steps without one
region or without programmatic launches. Everything is told in lines of text and figures.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from _tune_steps import Built, Case, Turns, gpu_launcher

from llmopt.codegen.kernel import Kernel, Launch, Launcher

Event = Mapping[str, Any]


def diagnose(case: Case, configs: Mapping[str, Any], turns: Turns, rounds: int) -> tuple[list[str], dict[str, Any]]:
    """All of it for a case on a GPU: lines to print, and the same as data."""
    graphs: list[Any] = []
    make = torch.cuda.CUDAGraph

    def kept() -> Any:
        graphs.append(make(keep_graph=True))  # so that its nodes can be asked for
        return graphs[-1]

    with mock.patch.object(torch.cuda, "CUDAGraph", kept):
        built = case.build(configs)
    us = statistics.median(turns(case, [built], rounds)[0])
    launches = case.codes.launches(configs)
    head = f"{case.subject.name} {case.batch}x{case.context}: {us:.1f} us a step, {len(launches)} launches, "
    lines = [f"{head}{case.subject.layers} layers, keys in {built.parts} parts"]
    data: dict[str, Any] = {"us": us, "parts": built.parts}
    for name, part in (
        ("graph", lambda: graph_lines(_driver(), graphs[-1].raw_cuda_graph(), [k for _, k in launches])),
        ("launch", lambda: _launched(case, built, graphs[-1], turns, rounds)),
        ("timeline", lambda: timeline(_trace(case, built), launches)),
        ("without", lambda: _without(case, configs, built, turns, rounds)),
    ):
        try:
            said, data[name] = part()
        except Exception as error:  # one part of the diagnosis that fails leaves the others
            said = [f"{name}: {type(error).__name__}: {str(error)[:200]}"]
        lines += said
    return lines, data


def _driver() -> Any:
    from cuda.bindings import driver

    return driver


def _asked(driver: Any, answer: Sequence[Any]) -> list[Any]:
    result, *values = answer
    if result != driver.CUresult.CUDA_SUCCESS:
        raise RuntimeError(f"the driver said {result}")
    return values


def graph_lines(driver: Any, handle: int, order: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """Kinds of nodes, and edges that are not programmatic, each with the kernels at its ends.

    `order` are the kernels' names, to tell them by where the driver does not.
    """
    graph = driver.CUgraph(handle)
    count = _asked(driver, driver.cuGraphGetNodes(graph))[1]
    nodes = list(_asked(driver, driver.cuGraphGetNodes(graph, count))[0])[:count]
    kinds = {int(n): _asked(driver, driver.cuGraphNodeGetType(n))[0].name.removeprefix("CU_GRAPH_NODE_TYPE_").lower()
             for n in nodes}  # fmt: skip
    names = {int(n): _name(driver, n) if kinds[int(n)] == "kernel" else kinds[int(n)] for n in nodes}
    edges_of = getattr(driver, "cuGraphGetEdges_v2", driver.cuGraphGetEdges)
    count = _asked(driver, edges_of(graph))[-1]
    heads, tails, about, _ = _asked(driver, edges_of(graph, count))
    programmatic = driver.CUgraphDependencyType.CU_GRAPH_DEPENDENCY_TYPE_PROGRAMMATIC
    plain: Counter[str] = Counter()
    early = 0
    for head, tail, edge in zip(heads, tails, about, strict=True):
        if int(edge.type) == int(programmatic):
            early += 1
        else:
            plain[f"{names[int(head)]} -> {names[int(tail)]}"] += 1
    totals = Counter(kinds.values())
    lines = [f"graph: nodes {dict(totals)} ({len(order)} launches), {count} edges, {early} programmatic"]
    if plain:
        lines.append("plain edges: " + ", ".join(f"{n} x {pair}" for pair, n in plain.most_common(12)))
    return lines, {"nodes": dict(totals), "edges": count, "programmatic": early, "plain": dict(plain)}


def _name(driver: Any, node: Any) -> str:
    try:
        (params,) = _asked(driver, driver.cuGraphKernelNodeGetParams(node))
        (name,) = _asked(driver, driver.cuFuncGetName(params.func))
        return name.decode() if isinstance(name, bytes) else str(name)
    except Exception:  # an older driver tells no names
        return "kernel"


def _launched(case: Case, built: Built, graph: Any, turns: Turns, rounds: int) -> tuple[list[str], dict[str, Any]]:
    """torch's replay against the driver's own launch of the same graph (torch sets its generators' state before)."""
    driver = _driver()
    (launched,) = _asked(driver, driver.cuGraphInstantiate(driver.CUgraph(graph.raw_cuda_graph()), 0))

    def launch() -> None:
        _asked(driver, driver.cuGraphLaunch(launched, torch.cuda.current_stream().cuda_stream))

    both = [statistics.median(t) for t in turns(case, [built, launch], rounds)]
    figures = {"torch_us": both[0], "driver_us": both[1]}
    return [f"launch: torch's replay {both[0]:.1f} us, the driver's {both[1]:.1f} us"], figures


def _trace(case: Case, built: Built) -> list[Event]:
    """Device events of one replay among others."""
    case.rewind()
    for _ in range(3):
        built()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        built()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(trace))
        events: list[Event] = json.loads(trace.read_text())["traceEvents"]
    return events


def timeline(events: Sequence[Event], launches: Sequence[tuple[str, str]]) -> tuple[list[str], dict[str, Any]]:
    """Of each region's kernels, mean microseconds: their duration, from their end to the next one's start (negative
    where that began before), and from the end of the one ahead to theirs, which is what they add to the step.

    A duration holds the wait for the kernel ahead. What is no launch of the step is listed apart.
    """
    ran = sorted((e for e in events if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")), key=lambda e: e["ts"])
    known = {name for _, name in launches}
    ours = [e for e in ran if e["name"] in known]
    labels = [region for region, _ in launches]
    if [e["name"] for e in ours] != [name for _, name in launches]:
        labels = [str(e["name"]) for e in ours]  # by kernel, then
    found: dict[str, list[tuple[float, float, float]]] = {}
    ends = [e["ts"] + e["dur"] for e in ours]
    for i, (label, event) in enumerate(zip(labels, ours, strict=True)):
        gap = ours[i + 1]["ts"] - ends[i] if i + 1 < len(ours) else 0.0
        added = ends[i] - (ends[i - 1] if i else event["ts"])
        found.setdefault(label, []).append((event["dur"], gap, added))
    rows = {}
    for label, figures in found.items():
        us, gap, added = map(statistics.mean, zip(*figures, strict=True))
        rows[label] = {"launches": len(figures), "us": us, "gap_us": gap, "added_us": added}
    span = ends[-1] - ours[0]["ts"] if ours else 0.0
    lines = [f"profiled: {span:.1f} us from the first start to the last end"]
    lines += [f"  {label:<12} {r['launches']:>3} x {r['us']:8.2f} us, {r['gap_us']:7.2f} to the next, adding "
              f"{r['added_us']:8.2f}" for label, r in rows.items()]  # fmt: skip
    if others := Counter(str(e["name"])[:60] for e in ran if e["name"] not in known):
        lines.append("  besides: " + ", ".join(f"{n} x {name}" for name, n in others.most_common(6)))
    return lines, {"span_us": span, "regions": rows, "besides": dict(others)}


def _without(
    case: Case, configs: Mapping[str, Any], built: Built, turns: Turns, rounds: int
) -> tuple[list[str], dict[str, Any]]:
    """What a step takes when a region's kernels are not launched (what they cost in their place), when theirs are
    launched plainly, and when all are."""
    code = case.codes.code(configs)
    code.compile(case.codes.kernels(configs))
    plain, usual = gpu_launcher(code, pdl=False), gpu_launcher(code)
    lines, figures = [], {}
    whole, none = (statistics.median(t) for t in turns(case, [built, case.build(configs, launcher=plain)], rounds))
    lines.append(f"without programmatic launches {none:.1f} us ({none - whole:+.1f})")
    count = Counter(region for region, _ in case.codes.launches(configs))
    for region, launches in count.items():
        mine = set(case.codes.region(region, configs).kernels())
        steps = [case.build(configs, launcher=_mixed(usual, other, mine)) for other in (_left_out, plain)]
        base, out, late = (statistics.median(t) for t in turns(case, [built, *steps], rounds))
        figures[region] = {
            "launches": launches,
            "cost_us": (base - out) / launches,
            "plain_us": (late - base) / launches,
        }
        lines.append(
            f"  {region:<12} {launches:>3} x {(base - out) / launches:8.2f} us less when left out, "
            f"{(late - base) / launches:+.2f} us when launched plainly"
        )
    return lines, {"us": whole, "plain_us": none, "regions": figures}


def _left_out(kernel: Kernel) -> Launch:
    return lambda grid, args: None


def _mixed(usual: Launcher, other: Callable[[Kernel], Launch], mine: set[Kernel]) -> Launcher:
    return lambda kernel: other(kernel) if kernel in mine else usual(kernel)
