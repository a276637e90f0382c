"""The GPU benchmarks on a CPU: what they compare, how they count, what they write."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def bench() -> SimpleNamespace:
    """The benchmarks' modules."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        import _gpu_cases as cases
        import _gpu_models as models
        import _gpu_peers as peers
        import _gpu_timeline as timeline
        import _gpu_timing as timing
        import decode
        import kv_quality
        import prefill
        import startup
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))
    return SimpleNamespace(
        cases=cases, models=models, peers=peers, timeline=timeline, timing=timing, decode=decode, prefill=prefill,
        startup=startup, kv_quality=kv_quality,
    )  # fmt: skip


def model_and_ids(bench: SimpleNamespace, shape: str, dtype: torch.dtype = torch.float32):
    model = bench.models.random_model(shape, "cpu", dtype)
    return model, torch.randint(0, 256, (2, 21), generator=torch.Generator().manual_seed(0))


def next_logits(bench: SimpleNamespace, model, ids: torch.Tensor, got: torch.Tensor) -> torch.Tensor:
    """transformers' logits after ids, which those `got` must match: no farther from fp64 than twice as far."""
    want = bench.models.reference_logits(bench.models.plain_weights(model), ids)
    plain = model(ids).logits[:, -1]
    assert bench.timing.relative_error(got, want) <= 2 * bench.timing.relative_error(plain, want)
    return plain


@pytest.mark.parametrize("shape", ["tiny-llama", "tiny-qwen3"])
def test_the_fp64_reference_is_of_the_model_that_transformers_runs(bench: SimpleNamespace, shape: str) -> None:
    model, ids = model_and_ids(bench, shape)
    want = bench.models.reference_logits(bench.models.plain_weights(model), ids)
    with torch.no_grad():
        assert bench.timing.relative_error(model(ids).logits[:, -1], want) < 2e-6


@pytest.mark.parametrize("attention", ["sdpa", "flex", "grouped"])
@pytest.mark.parametrize("shape", ["tiny-llama", "tiny-qwen3"])
@torch.no_grad()
def test_the_plain_module_decodes_as_transformers_do(bench: SimpleNamespace, shape: str, attention: str) -> None:
    model, ids = model_and_ids(bench, shape)
    plain = bench.models.Plain(bench.models.plain_weights(model), 2, 32, attention)
    plain(ids[:, :-1], torch.arange(20))
    plain.token.copy_(ids[:, -1:])
    plain.position.fill_(20)
    for _ in range(3):
        want = next_logits(bench, model, ids, plain.step())
        ids = torch.cat([ids, want.argmax(-1, keepdim=True)], 1)
        assert torch.equal(plain.token, ids[:, -1:])


@pytest.mark.parametrize("name", ["hf-eager", "hf-reduce-overhead", "plain-max-autotune", "llmopt"])
@torch.no_grad()
def test_a_peer_rewound_makes_the_same_tokens_as_transformers(bench: SimpleNamespace, name: str) -> None:
    model, ids = model_and_ids(bench, "tiny-llama")
    case = bench.peers.Case(model, bench.models.plain_weights(model), ids, compiled=False)
    peer = bench.peers.PEERS[name](case)
    for _ in range(2):
        peer.rewind()
        seen = ids
        for _ in range(4):
            want = next_logits(bench, model, seen, peer.step())
            seen = torch.cat([seen, want.argmax(-1, keepdim=True)], 1)


@torch.no_grad()
def test_llmopts_decoding_graphs_make_the_tokens_of_its_step(bench: SimpleNamespace) -> None:
    from llmopt.runtime.decode_graphs import DecodeGraphs
    from llmopt.runtime.decoder import DecodeState

    model, ids = model_and_ids(bench, "tiny-llama")
    peer = bench.peers.Llmopt(bench.peers.Case(model, bench.models.plain_weights(model), ids))
    state = DecodeState(4, 8, peer.model.cache.page_size)

    def run(rows: int, parts: int) -> torch.Tensor:
        tokens, positions, slots = (v[:rows] for v in (state.tokens, state.positions, state.slots))
        numbers, tables = state.numbers[:rows], state.tables[:rows]
        logits = peer.model.step(tokens[None], positions[None], slots, numbers, tables, numbers)
        tokens.copy_(logits.argmax(-1))
        positions += state.moves[:rows]
        slots += state.moves[:rows]
        return logits

    peer.rewind()
    want = [peer.step().clone() for _ in range(16)]  # over the end of a page
    peer.decoder = DecodeGraphs(run, state, lambda rows, length: 1)
    for _ in range(2):
        peer.rewind()
        assert all(torch.equal(peer.step(), logits) for logits in want)


class Recorder:
    """A peer that notes when it is called."""

    note = ""

    def __init__(self, name: str, log: list[str], logits: torch.Tensor | None = None) -> None:
        self.name, self.log, self.logits = name, log, logits

    def rewind(self) -> None:
        self.log.append(f"{self.name}<")

    def step(self) -> torch.Tensor | None:
        self.log.append(self.name)
        return self.logits


def test_peers_take_turns_and_another_one_begins_each_round(bench: SimpleNamespace) -> None:
    log: list[str] = []
    peers = {name: Recorder(name, log) for name in "ab"}
    found = bench.timing.interleaved(peers, 2, 3, bench.timing.Clock("cpu"), lambda: log.append("|"))
    turn = {name: [f"{name}<", *name * (bench.timing.LEAD + 3)] for name in "ab"}
    assert log == ["|", *turn["a"], *turn["b"], "|", *turn["b"], *turn["a"]]
    assert all(len(times) == 6 and min(times) >= 0 for peer in found.values() for times in peer.values())


def test_the_gate_stops_logits_that_are_too_far_off(bench: SimpleNamespace) -> None:
    model, ids = model_and_ids(bench, "tiny-llama", torch.bfloat16)
    case = bench.peers.Case(model, bench.models.plain_weights(model), ids, compiled=False)
    want = bench.models.reference_logits(case.weights, ids)
    off = {name: Recorder(name, [], want * (1 + e)) for name, e in (("hf-eager", 0.01), ("good", 0.014))}
    assert bench.cases.gate(off, case, ids)["good"] == pytest.approx(0.014)
    for error in (0.016, float("nan")):
        with pytest.raises(bench.cases.GateError, match="bad is"):
            bench.cases.gate(off | {"bad": Recorder("bad", [], want * (1 + error))}, case, ids)
    with pytest.raises(bench.cases.GateError, match=r"hf-eager is 0\.5"):
        bench.cases.gate({"hf-eager": Recorder("hf-eager", [], want * 1.5)}, case, ids)


@torch.no_grad()
def test_a_low_bit_peer_is_held_to_its_own_rounded_weights(bench: SimpleNamespace) -> None:
    model, ids = model_and_ids(bench, "tiny-llama")
    case = bench.peers.Case(model, bench.models.plain_weights(model), ids, compiled=False)
    made = {name: bench.peers.PEERS[name](case) for name in ("hf-eager", "llmopt-nvfp4")}
    errors = bench.cases.gate(made, case, ids)
    assert errors["llmopt-nvfp4"] < 1e-5
    low = made["llmopt-nvfp4"]
    low.scheme = ""
    with pytest.raises(bench.cases.GateError, match="llmopt-nvfp4 is"):
        bench.cases.gate(made, case, ids)
    matrices = [m for layer in case.weights.layers for m in (layer.qkv, layer.out, layer.gate_up, layer.down)]
    stored = sum(m.shape[0] * -(-m.shape[1] // 16) * 9 + 4 for m in matrices)  # 16 codes and a scale, a global scale
    assert low.saved_bytes == sum(m.nbytes for m in matrices) - stored


def test_kernels_are_counted_from_the_trace(bench: SimpleNamespace) -> None:
    events = [
        {"cat": "kernel", "name": "gemm", "dur": 3.0},
        {"cat": "kernel", "name": "norm", "dur": 1.0},
        {"cat": "kernel", "name": "gemm", "dur": 4.0},
        {"cat": "gpu_memcpy", "name": "Memcpy", "dur": 0.5},
        {"cat": "gpu_user_annotation", "name": "## step", "dur": 100.0},
        {"name": "process_name", "ph": "M"},
    ]
    found = bench.timing.counted(events, 1)
    assert found == {
        "kernels": 3,
        "copies": 1,
        "busy_us": 8.5,
        "longest": [{"name": "gemm", "calls": 2, "us": 7.0}],
    }


def test_idle_time_lies_between_kernels_of_steps_that_follow_each_other(bench: SimpleNamespace) -> None:
    step = (("copy", 0.0, 2.0), ("gemm", 5.0, 10.0), ("norm", 14.0, 4.0), ("in the gemm", 6.0, 1.0))
    events = [
        {"cat": "kernel", "name": name, "ts": 100 * i + at, "dur": us, "args": {"grid": [len(name), 1]}}
        for i in range(5)
        for name, at, us in step
    ]
    found = bench.timeline.timeline(bench.timeline.device_events(events[::-1]), 5, 1, 3)
    assert (found["wall_us"], found["busy_us"], found["idle_us"], found["events"]) == (100, 15, 85, 4)
    assert found["gaps"][0] == (82, "norm [4, 1]", "copy [4, 1]")
    assert found["kernels"][0] == ("gemm [4, 1]", 1, 10)
    uneven = bench.timeline.timeline(bench.timeline.device_events(events[1:]), 5, 1, 3)
    assert uneven["wall_us"] == (414 - 5) / 5


def test_a_diagnosis_tells_a_lone_step_from_those_that_follow_each_other(
    bench: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ["--diagnose", "--device", "cpu", "--no-compile", "--steps", "2", "--peers", "plain-max-autotune"]
    bench.prefill.main([*small, "--models", "tiny-llama", "--shapes", "2x16"])
    assert "tiny-llama 2x16 plain-max-autotune: step" in capsys.readouterr().out


def test_bytes_of_a_step_count_a_tied_table_once(bench: SimpleNamespace) -> None:
    for shape in ("tiny-llama", "tiny-qwen3"):
        model, _ = model_and_ids(bench, shape)
        matrices = sum(p.nbytes for p in model.parameters())
        unread = 0 if model.config.tie_word_embeddings else model.model.embed_tokens.weight.nbytes
        cached = 2 * 2 * 2 * model.config.head_dim * 4  # k and v, layers, heads, channels, bytes
        found = bench.models.step_bytes(bench.models.plain_weights(model), 3, 20)
        assert found == matrices - unread + 3 * 20 * cached


def test_the_scripts_write_cases_and_replace_older_ones(bench: SimpleNamespace, tmp_path: Path) -> None:
    small = ["--device", "cpu", "--no-compile", "--rounds", "2", "--steps", "2"]
    out, peers = tmp_path / "decode.json", ["--peers", "hf-eager", "plain-max-autotune"]
    for batch in ("1", "2", "1"):
        options = ["--models", "tiny-llama", "--batch", batch, "--ctx", "16", *peers]
        bench.decode.main([*small, *options, "--out", str(out)])
    cases = json.loads(out.read_text())["cases"]
    assert [c["batch"] for c in cases] == [1, 2]
    assert [p["peer"] for p in cases[0]["peers"]] == ["hf-eager", "plain-max-autotune"]
    assert cases[0]["peers"][0]["ms"]["steps"] == 4
    assert not cases[0]["failed"]
    bench.decode.main(["--merge", str(out), "--out", str(tmp_path / "all.json")])
    assert json.loads((tmp_path / "all.json").read_text()) == json.loads(out.read_text())
    out = tmp_path / "prefill.json"
    bench.prefill.main([*small, "--models", "tiny-qwen3", "--shapes", "2x16", "--out", str(out)])
    (case,) = json.loads(out.read_text())["cases"]
    assert [p["peer"] for p in case["peers"]] == list(bench.prefill.DEFAULT)


def test_a_peer_that_fails_is_reported_and_the_others_run(
    bench: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(case: object) -> None:
        raise RuntimeError("no such luck")

    monkeypatch.setitem(bench.decode.PEERS, "plain-max-autotune", fail)
    options = ["--models", "tiny-llama", "--batch", "1", "--ctx", "16", "--peers", "hf-eager", "plain-max-autotune"]
    out = tmp_path / "decode.json"
    bench.decode.main(["--device", "cpu", "--rounds", "1", "--steps", "2", *options, "--out", str(out)])
    (case,) = json.loads(out.read_text())["cases"]
    assert case["failed"] == {"plain-max-autotune": "RuntimeError: no such luck"}
    assert [p["peer"] for p in case["peers"]] == ["hf-eager"]


def test_start_up_refuses_other_tokens_and_a_load_that_compiled(bench: SimpleNamespace) -> None:
    fine = {"tokens": [1, 2], "cubins": 0, "triton_files": 0}
    bench.startup.check({"cold": fine | {"cubins": 9}, "load": fine})
    with pytest.raises(SystemExit, match="different tokens"):
        bench.startup.check({"cold": fine, "load": fine | {"tokens": [1, 3]}})
    with pytest.raises(SystemExit, match="it compiled"):
        bench.startup.check({"cold": fine, "load": fine | {"triton_files": 2}})


def test_tables_are_made_from_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    spec = importlib.util.spec_from_file_location("docs_generate", ROOT / "docs" / "generate.py")
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    monkeypatch.setattr(generate, "RESULTS", tmp_path)
    assert generate.gpu() == ""
    environment = {"gpu": {"name": "NVIDIA H200"}, "torch": "2.11.0", "triton": "3.6.0"}
    times = {"llmopt": 4.0, "plain-max-autotune": 5.2, "plain-reduce-overhead": 5.6, "hf-max-autotune": 6.0}
    rows = [{"peer": p, "ms": {"median": ms}, "read_bandwidth_share": 0.81, "kernels": 163} for p, ms in times.items()]
    case = {"model": "m", "dtype": "bfloat16", "batch": 1, "tokens": 512, "environment": environment, "peers": rows}
    (tmp_path / "decode_h200.json").write_text(json.dumps({"cases": [case, case | {"peers": rows[1:]}]}))
    less = {"peer": "llmopt-nvfp4", "ms": {"median": 2.0}, "read_bandwidth_share": 0.5, "saved_bytes": 10e9}
    few = {**case, "bytes_per_step": 15e9, "peers": [rows[0] | {"saved_bytes": 0}, less]}
    (tmp_path / "decode-lowbit_h200.json").write_text(json.dumps({"cases": [few]}))
    (tmp_path / "prefill_h200.json").write_text(json.dumps({"cases": [case | {"tokens": 2048}]}))
    starts = {
        "cold": {"first_token_s": 40.0, "weight_bytes": 16e9},
        "cached": {"first_token_s": 9.0},
        "load": {"first_token_weights_resident_s": 2.0, "weights_s": 3.0, "hashes_s": 1.0},
    }
    figures = {"model": "m", "dtype": "bfloat16", "ways": starts, "environment": environment}
    (tmp_path / "startup_h200.json").write_text(json.dumps(figures))
    us = {"ours": 200.0, "best": 199.0, "flex16": 500.0, "flex128": 400.0, "sdpa": 90.0}
    long = {"batch": 8, "context": 32768, "page": 16, "us": us, "bytes_per_s": {"ours": 3.4e12}}
    other = {**long, "page": 64, "us": {"ours": 210.0}}
    attention = {"copy_bytes_per_s": 4e12, "decode": [long, other]}
    (tmp_path / "attention_h200.json").write_text(json.dumps(attention))
    way = {"equal": 3, "of": 4}
    errors = {
        "prompt": {"ratio": 0.7, "worst_sequence_ratio": 1.1},
        "decode": {"ratio": 1.2, "worst_sequence_ratio": 1.3},
    }
    checks = {
        "float32": {"ways": {"batch": way, "alone": way, "reference on the CPU": way}},
        "bfloat16": {"errors": errors},
    }
    exact = {"models": {"m": {**checks, "float16": {"errors": errors}}}}
    (tmp_path / "exactness_h200.json").write_text(json.dumps(exact))
    text = generate.gpu()
    assert "| 8 x 32768 | 16 | 200 us | 85% | 400 us, 2.00x |" in text
    assert "| 8 x 32768 | 64 | 210 us | 85% | 400 us, 1.90x |" in text
    assert "in fp32 6 of 8 greedy tokens" in text
    assert "is 0.70 to 1.20 times" in text
    assert "prompt 1.30 times" in text
    assert "graphs (max-autotune, reduce-overhead), *transformers* of its StaticCache (max-autotune)" in text
    assert "NVIDIA H200 (torch 2.11.0, Triton 3.6.0)" in text
    assert "| m | 1 | 512 | 4.00 ms | 5.20 ms, 1.30x | 6.00 ms, 1.50x | - | 81% | 163 |" in text
    assert "| m | 1 | 512 | `default` | 4.00 ms | 1.00x | 15.0 | 81% |" in text
    assert "| m | 1 | 512 | `nvfp4` | 2.00 ms | 2.00x | 5.0 | 50% |" in text
    assert text.count("| m | 1 |") == 3
    assert "| m | 1 x 2048 | 4.0 ms | 5.20 ms, 1.30x | - |" in text
    assert "without any compiler: 2.0 s, and 4.0 s to read and check 16 GB" in text


@torch.no_grad()
def test_biases_that_no_score_sees(bench: SimpleNamespace) -> None:
    from transformers import AutoModelForCausalLM

    without, wide = (
        bench.kv_quality.with_biases(
            AutoModelForCausalLM.from_pretrained(ROOT / "examples" / "models" / "pico-llama-4m", dtype=torch.float64),
            times,
        ).double()
        for times in (0.0, 30.0)
    )
    assert all(layer.self_attn.k_proj.bias.abs().max() > 10 for layer in wide.model.layers)
    ids = torch.arange(300)[None] % wide.config.vocab_size
    torch.testing.assert_close(wide(ids).logits, without(ids).logits, atol=1e-9, rtol=1e-9)
