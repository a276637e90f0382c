"""The search for constants within a decoding step, without a GPU: what is tried, what is taken, what is told."""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llmopt.codegen import tuning
from llmopt.codegen.kernel import Kernel
from llmopt.compiler import knobs
from llmopt.compiler.errors import BuildError
from llmopt.compiler.target import Target

ROOT = Path(__file__).resolve().parents[1]
TARGET = Target("cuda", "sm_90", 132, frozenset({"triton", "pdl"}), 232448, 1, 1)
SHAPE = {"K": 4096, "J": 6144, "PARTS": 1, "NORM": 1, "N": 1}
Steps = dict[str, dict[str, int]]

pytest.importorskip("triton")


@pytest.fixture(scope="module")
def tune() -> SimpleNamespace:
    """The script's modules."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        import _gpu_models as models
        import _tune_diagnose as diagnose
        import _tune_search as search
        import _tune_steps as steps
        import tune_step as script
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))
    return SimpleNamespace(models=models, diagnose=diagnose, search=search, steps=steps, script=script)


@pytest.fixture
def tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Tables that a test may write."""
    monkeypatch.setattr(tuning, "TABLES", tmp_path)
    tuning.table.cache_clear()
    yield tmp_path
    tuning.table.cache_clear()


def choice(module: str, shape: Mapping[str, int]) -> tuning.Choice:
    with knobs.scope(tune="off"), tuning.trial({}) as asked:
        tuning.pick(module, shape, "bfloat16", TARGET)
    (found,) = asked.values()
    return found


ATTENTION = {"HQ": 32, "HKV": 8, "D": 128, "DV": 128, "PAGE": 16, "N": 1}


@pytest.mark.parametrize(
    ("module", "shape"), [("gemv", SHAPE), ("gemm", {**SHAPE, "N": 16}), ("decode_attention", ATTENTION)]
)
def test_what_is_tried_differs_from_the_choice_and_from_each_other(
    tune: SimpleNamespace, module: str, shape: dict[str, int]
) -> None:
    mine = choice(module, shape)
    found = tune.search.candidates(mine, TARGET, 8, {})
    assert len(found) == 8
    assert len({tune.search.spelled(c) for c in [mine.config, *found]}) == 9
    assert all(c.keys() == mine.config.keys() for c in found)


def test_switches_are_turned_first(tune: SimpleNamespace) -> None:
    mine = choice("gemv", SHAPE).config
    found = tune.search.candidates(choice("gemv", SHAPE), TARGET, 5, {})
    assert [{k: v for k, v in c.items() if v != mine[k]} for c in found] == [
        {"ASK": 1}, {"EARLY": 1}, {"EARLY": 1, "ASK": 1}, {"PREFETCH": 1 - mine["PREFETCH"]}, {"EVICT": "evict_first"}
    ]  # fmt: skip


def test_what_was_fast_alone_comes_next_and_what_was_slow_not_at_all(tune: SimpleNamespace) -> None:
    mine, search = choice("gemv", SHAPE), tune.search
    others = search.candidates(mine, TARGET, 99, {})
    fast, slow = others[-1], others[7]
    older = {k: v for k, v in slow.items() if k != "ASK"}  # timed before there was such a constant
    assert slow["ASK"] == 0
    alone = {tuning.key("gemv", SHAPE, "bfloat16"): {search.spelled(fast): 10.0, search.spelled(older): 11.6}}
    found = search.candidates(mine, TARGET, 99, alone)
    assert slow not in found
    assert found.index(fast) == 5


def test_times_alone_are_read_by_key(tune: SimpleNamespace) -> None:
    def row(config: dict[str, int], pdl: int = 1) -> dict[str, Any]:
        variant = {"template": "gemv", "source": "", "shape": {**SHAPE, "N": 0}, "config": config, "pdl": pdl}
        return {"us": 5.0, "variant": variant}

    data = {"sweep": [{"tokens": 1, "rows": [row({"A": 1}), row({"A": 2}, 0)]}]}
    assert tune.search.read_alone(data) == {tuning.key("gemv", SHAPE, "bfloat16"): {'{"A": 1}': 5.0}}


class World:
    """Steps are their constants; `cost` says what one adds to 100 us, `noise` what a single comparison adds."""

    def __init__(self, cost: Mapping[int, float], noise: Sequence[float] = (), wrong: Sequence[int] = ()) -> None:
        self.cost, self.noise, self.wrong, self.compared = cost, iter(noise), wrong, 0

    def build(self, configs: Steps) -> Steps:
        if any(c["X"] < 0 for c in configs.values()):
            raise BuildError("no")
        return configs

    def times(self, a: Steps, b: Steps, rounds: int) -> list[tuple[list[float], list[float]]]:
        self.compared += 1
        off = next(self.noise, 0.0)
        return [([self.us(a, i)] * rounds, [self.us(b, i) + off] * rounds) for i in range(2)]

    def us(self, step: Steps, context: int) -> float:
        return 100 + sum(self.cost[c["X"]] * (1 if c["X"] < 90 or context else -1) for c in step.values())

    def fault(self, step: Steps) -> str | None:
        return "wrong" if any(c["X"] in self.wrong for c in step.values()) else None

    def descent(self, tune: SimpleNamespace, most: int = 99) -> Any:
        return tune.search.Descent(self.build, self.times, self.fault, lambda: self.compared >= most, 0.003, 3)


def verdicts(descent: Any, key: str = "a") -> list[str]:
    return [t.verdict for t in descent.tried[key]]


def test_descent_takes_what_is_faster_twice_and_right(tune: SimpleNamespace) -> None:
    world = World({1: -1.0, 2: -5.0, 3: 4.0, 4: -3.0, 5: -9.0}, wrong=[5])
    descent = world.descent(tune)
    last = descent.run({}, {"a": [{"X": 3}, {"X": 1}, {"X": -1}, {"X": 5}], "b": [{"X": 2}, {"X": 4}]})
    assert last == {"a": {"X": 1}, "b": {"X": 2}} == descent.chosen
    assert verdicts(descent)[:4] == ["slower", "chosen", "does not build: no", "wrong"]
    assert 3 not in [t.config["X"] for t in descent.tried["a"][4:]]  # too slow to be tried again


def test_descent_leaves_noise_and_what_is_slower_in_one_context(tune: SimpleNamespace) -> None:
    descent = World({1: 0.0, 95: 4.0}, noise=[-2.0, 0.0]).descent(tune)
    assert descent.run({}, {"a": [{"X": 1}, {"X": 95}]}, passes=1) == {}
    assert verdicts(descent) == ["noise", "slower"]


def test_descent_ends_when_time_is_up(tune: SimpleNamespace) -> None:
    descent = World(dict.fromkeys(range(9), 1.0)).descent(tune, most=3)
    descent.run({}, {"a": [{"X": x} for x in range(9)]})
    assert verdicts(descent) == ["slower"] * 3


def test_choices_are_merged_into_the_table(tune: SimpleNamespace, tables: Path, tmp_path: Path) -> None:
    def row(shape: dict[str, int], chosen: dict[str, int], source: str | None = None) -> dict[str, Any]:
        known = {"template": "gemv", "source": source or tuning.source_hash("gemv"), "shape": shape}
        return {**known, "dtype": "bfloat16", "incumbent": {"X": 1}, "chosen": chosen}

    other, third = {**SHAPE, "J": 8}, {**SHAPE, "J": 16}
    rows = [row(SHAPE, {"X": 2}), row(other, {"X": 1}), row(third, {"X": 3}, "0" * 16)]
    path = tmp_path / "tune.json"
    path.write_text(json.dumps({"device": "d", "date": "2026-01-01", "cases": [{"kernels": rows}]}))
    tune.script.main(["--accept", str(path)])
    (entry,) = json.loads((tables / "sm_90.json").read_text())["entries"]
    assert (entry["shape"], entry["config"], entry["us"]) == (SHAPE, {"X": 2}, None)
    assert tuning.pick("gemv", SHAPE, "bfloat16", TARGET) == {"X": 2}


def test_the_time_line_is_told_by_region(tune: SimpleNamespace) -> None:
    def event(name: str, start: float, us: float, cat: str = "kernel") -> dict[str, Any]:
        return {"cat": cat, "name": name, "ts": start, "dur": us}

    launches = [("rows", "rows"), ("gemm", "gemv"), ("gemm_1", "gemv")]
    events = [event("gemv", 3, 4), event("rows", 0, 2), event("gemv", 6, 2), event("fill", -5, 1), {"ph": "M"}]
    lines, data = tune.diagnose.timeline(events, launches)
    figures = {name: (r["us"], r["gap_us"], r["added_us"]) for name, r in data["regions"].items()}
    assert figures == {"rows": (2, 1, 2), "gemm": (4, -1, 5), "gemm_1": (2, 0, 1)}
    assert data["span_us"] == 8
    assert data["besides"] == {"fill": 1}
    _, data = tune.diagnose.timeline(events, launches[:2])  # not the kernels that were launched: told by their names
    assert data["regions"]["gemv"]["launches"] == 2
    assert len(lines) == 5


def test_nodes_and_edges_of_a_graph_are_told(tune: SimpleNamespace) -> None:
    kinds, edges = ["KERNEL", "KERNEL", "MEMSET", "KERNEL"], [(0, 1, 1), (1, 2, 0), (2, 3, 0)]
    ok = 0
    driver = SimpleNamespace(
        CUgraph=int, CUresult=SimpleNamespace(CUDA_SUCCESS=ok),
        CUgraphDependencyType=SimpleNamespace(CU_GRAPH_DEPENDENCY_TYPE_PROGRAMMATIC=1),
        cuGraphGetNodes=lambda graph, count=0: (ok, list(range(count)), len(kinds)),
        cuGraphNodeGetType=lambda node: (ok, SimpleNamespace(name=f"CU_GRAPH_NODE_TYPE_{kinds[node]}")),
        cuGraphKernelNodeGetParams=lambda node: (ok, SimpleNamespace(func=node)),
        cuFuncGetName=lambda func: (ok, f"k{func}".encode()),
        cuGraphGetEdges=lambda graph, count=0: (
            ok, *[[e[i] for e in edges[:count]] for i in (0, 1)], [SimpleNamespace(type=e[2]) for e in edges[:count]],
            len(edges),
        ),
    )  # fmt: skip
    lines, data = tune.diagnose.graph_lines(driver, 7, ["k0", "k1", "k3"])
    assert data["nodes"] == {"kernel": 3, "memset": 1}
    assert (data["edges"], data["programmatic"]) == (3, 1)
    assert data["plain"] == {"k1 -> memset": 1, "memset -> k3": 1}
    assert "k1 -> memset" in lines[1]
    driver.cuGraphGetNodes = lambda graph, count=0: (1, [], 0)
    with pytest.raises(RuntimeError, match="said 1"):
        tune.diagnose.graph_lines(driver, 7, [])


@torch.no_grad()
def test_fp64_logits_behind_a_cache_are_those_of_the_whole_forward(tune: SimpleNamespace) -> None:
    models = tune.models
    for shape in ("tiny-llama", "tiny-qwen3"):
        model = models.random_model(shape, "cpu", torch.float64)
        weights, ids = models.plain_weights(model), torch.randint(256, (2, 9))
        plain = models.Plain(weights, 2, 16)
        plain(ids[:, :-1], torch.arange(8))
        cached = [tuple(getattr(plain, f"{n}_cache_{i}")[:, :, :8] for n in "kv") for i in range(len(weights.layers))]
        got = tune.steps.exact_logits(weights, ids[:, -1], 8, cached)
        torch.testing.assert_close(got, models.reference_logits(weights, ids), rtol=0, atol=1e-12)


def test_codes_change_only_the_kernels_of_a_key(tune: SimpleNamespace) -> None:
    subject = tune.steps.Subject("tiny-llama", "compile", torch.bfloat16, 1)
    codes = subject.codes(1)
    assert len(codes.choices) == 6  # q|k|v, out, gate|up, down, head, attention
    for key, found in codes.choices.items():
        (config,) = tune.search.candidates(found, TARGET, 1, {})
        (region,) = codes.regions(key)
        for name in codes.names:
            same = codes.region(name, {}).kernels() == codes.region(name, {key: config}).kernels()
            assert same == (name != region)
    order = [name for name, _ in codes.launches({})]
    assert order[-7:] == ["gemm", "attention", "gemm_1", "gemm_2", "gemm_3", "gemm_4", "sample"]


def test_kernels_that_do_not_compile_or_are_late_are_not_tried(
    tune: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llmopt.codegen import cubin, cubin_parallel

    subject = tune.steps.Subject("tiny-qwen3", "compile", torch.bfloat16, 1)
    groups = [tune.script.Group(subject, 1, [16, 32], 3, {})]
    left = {key: list(configs) for key, configs in groups[0].others.items()}
    key = next(k for k in left if k.startswith("gemv"))
    bad = groups[0].codes.kernels({key: left[key][1]}, key)[-1]
    there: set[Kernel] = set()

    def compile_all(kernels: list[Kernel], target: Target, progress: Any) -> None:
        for done, kernel in enumerate(kernels):
            if kernel == bad:
                raise BuildError(f"{cubin.describe(bad, target.isa)}: too large")
            there.add(kernel)
            progress(done, len(kernels))

    monkeypatch.setattr(cubin_parallel, "compile_all", compile_all)
    monkeypatch.setattr(cubin, "cached", lambda kernel, target: kernel in there or None)
    clock = tune.script.Clocked(0.0, 1e9)
    found = tune.script.compiled(groups, clock, 1e9)
    assert (len(found["failed"]), found["ready"]) == (1, found["kernels"] - 1)
    assert groups[0].others == {**left, key: [left[key][0], *left[key][2:]]}
    there.clear()
    found = tune.script.compiled(groups, clock, -1.0)
    assert found["ready"] == 1
    assert not any(groups[0].others.values())


class FakeTurns:
    """Says of a step how many of its constants were exchanged, and runs nothing."""

    def __init__(self, *_: Any) -> None:
        pass

    def __call__(self, case: Any, runs: Sequence[Any], rounds: int) -> list[list[float]]:
        return [[100.0 - len(run.configs)] * rounds for run in runs]


@pytest.mark.interp
def test_a_search_over_interpreted_steps(
    tune: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tune.script, "Turns", FakeTurns)
    monkeypatch.setattr(tune.script, "candidates", lambda *args: tune.search.candidates(*args)[: next(counts)])
    counts = itertools.chain([0, 1], itertools.repeat(0))
    out = tmp_path / "tune.json"
    small = ["--device", "interpret", "--models", "tiny-llama", "--layers", "1", "--dtype", "float32", "--limit", "1"]
    tune.script.main([*small, "--cases", "1x20", "--out", str(out)])
    (case,) = json.loads(out.read_text())["cases"]
    assert case["errors"][0] < 1e-5
    assert (case["before_us"], case["after_us"]) == ([100.0], [99.0])
    assert [[t["verdict"] for t in row["tried"]] for row in case["kernels"]] == [[], ["chosen"], [], [], [], []]
    assert case["kernels"][1]["template"] == "decode_attention"


def test_cases_are_read(tune: SimpleNamespace) -> None:
    assert tune.script._case("16x1024") == (16, 1024)
    for text in ("65x8", "1x0", "x8", "8"):
        with pytest.raises(argparse.ArgumentTypeError):
            tune.script._case(text)
