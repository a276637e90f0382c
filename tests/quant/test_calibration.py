"""Calibration against transformers: hooks on a model's own linears sum what its graph's values must sum to."""

from __future__ import annotations

import argparse
import gc
import inspect
import weakref
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from calibrated import raised
from passes_common import llama, run
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from llmopt.compiler.calibration import Settings, calibrate, linear_inputs
from llmopt.compiler.calibration_data import read_tokens, windows_of
from llmopt.compiler.calibration_run import Sums, symmetric
from llmopt.compiler.capture import capture
from llmopt.compiler.capture_hf import capture_hf
from llmopt.compiler.errors import InputError
from llmopt.compiler.evaluate import evaluate, evaluated
from llmopt.compiler.graph import target_name
from llmopt.compiler.program import ModelFacts, Program, tensor_weight
from llmopt.compiler.quant import quantize
from llmopt.compiler.quant.gptq import gptq, output_error
from llmopt.passes.canonicalize import Canonicalize
from llmopt.passes.raise_aten import RaiseAten
from llmopt.runtime.tokenizer import load_tokenizer

PICO = str(Path(__file__).resolve().parents[2] / "examples" / "models" / "pico-llama-4m")


@pytest.fixture(scope="module")
def pico() -> Program:
    return raised(capture_hf(PICO, torch.float64))


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    """Real text of the kind that the model knows: 2,000 tokens of the standard library."""
    encode = load_tokenizer(PICO).encode
    return torch.tensor(encode(inspect.getsource(argparse.ArgumentParser))[:2000])


def hooked(model: nn.Module, windows: list[Tensor]) -> dict[str, tuple[Tensor, Tensor, int]]:
    """X^T X, largest magnitudes and tokens of the input of each nn.Linear, by module name, in fp64."""
    sums: dict[str, tuple[Tensor, Tensor, int]] = {}

    def watch(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0].reshape(-1, args[0].shape[-1]).double()
            moment, largest, count = sums.get(name, (0, torch.zeros(x.shape[1], dtype=torch.float64), 0))
            sums[name] = moment + x.T @ x, torch.maximum(largest, x.abs().amax(0)), count + len(x)

        return hook

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(watch(name))
    with torch.no_grad():
        for ids in windows:
            model(ids[None])
    return sums


def modules_of(weight: str) -> list[str]:
    """The modules that a (merged) weight stands for: `a.q_proj|k_proj.weight` -> a.q_proj, a.k_proj."""
    stem = weight.removesuffix(".weight").removesuffix("model.embed_tokens") or "lm_head"
    folder, _, last = stem.rpartition(".")
    return [f"{folder}.{part}".strip(".") for part in last.split("|")]


def close(a: Tensor, b: Tensor, tolerance: float) -> None:
    """Within `tolerance` of the largest element."""
    assert a.shape == b.shape
    assert float((a.double() - b.double()).abs().max()) <= tolerance * float(b.abs().max())


def test_second_moments_are_those_of_the_models_own_linears(pico: Program, tokens: Tensor):
    model = AutoModelForCausalLM.from_pretrained(PICO, dtype=torch.float64)
    want = hooked(model, list(tokens.split(600)))
    got = calibrate(pico, tokens, settings=Settings(window=600))
    seen = set()
    for name in got.entries:
        for module in modules_of(name):
            moment, largest, count = want[module]
            seen.add(module)
            assert got.tokens(name) == count == 2000
            close(got.second_moment(name), moment, 1e-7)  # summed in fp64, kept in fp32
            close(got.diagonal(name), moment.diagonal(), 1e-7)
            close(got.amax(name), largest, 1e-7)
            assert torch.equal(got.second_moment(name), got.second_moment(name).T)
    assert seen == set(want)


def test_diagonals_alone(pico: Program, tokens: Tensor):
    whole = calibrate(pico, tokens[:700], settings=Settings(window=300))
    got = calibrate(pico, tokens[:700], settings=Settings(window=300, second_moments=False))
    for name in whole.entries:
        close(got.diagonal(name), whole.diagonal(name), 1e-7)
        assert torch.equal(got.amax(name), whole.amax(name))
    with pytest.raises(InputError, match="diagonals only"):
        got.second_moment(name)


def test_gptq_by_these_statistics_beats_rounding(pico: Program, tokens: Tensor):
    """The whole way on a real model: products on text that was not calibrated with suffer less, in every layer."""
    made = calibrate(pico, tokens[:1500], settings=Settings(window=500))
    unseen = calibrate(pico, tokens[1500:], settings=Settings(window=500))
    for name in [n for n in made.entries if "layers" in n]:
        weight = pico.weights[name].load().float()
        moment = unseen.second_moment(name)
        better = output_error(weight, gptq(weight, made.second_moment(name), "nvfp4").dequantize(), moment)
        assert better < 0.9 * output_error(weight, quantize(weight, "nvfp4").dequantize(), moment), name


def test_fp32_products_stay_close(pico: Program, tokens: Tensor):
    exact, fast = (
        calibrate(pico, tokens[:1200], settings=Settings(window=600, products=p)) for p in ("float64", "float32")
    )
    name = "model.layers.1.mlp.down_proj.weight"
    assert not torch.equal(exact.second_moment(name), fast.second_moment(name))
    close(fast.second_moment(name), exact.second_moment(name), 1e-6)
    assert Settings().precision(4096) is torch.float64
    assert Settings().precision(4097) is torch.float32


@pytest.mark.parametrize("products", [torch.float64, torch.float32])
def test_sums_wider_than_a_block(products: torch.dtype):
    torch.manual_seed(0)
    x, y = torch.randn(3, 20, 2300), torch.randn(40, 2300)
    sums = Sums((), 2300, True, products, "cpu")
    sums.clear()
    assert sums.add(x)
    assert sums.add(y)
    rows = torch.cat([x.reshape(-1, 2300), y]).double()
    close(symmetric(sums.state["second"]), rows.T @ rows, 1e-7 if products is torch.float64 else 1e-6)
    assert sums.tokens == 100
    assert sums.nbytes == sum(t.nbytes for t in sums.state.values())


def test_values_read_by_several_linears_are_summed_once():
    program = run(llama(), RaiseAten(), Canonicalize(merge_linears=False))[0]
    made = calibrate(program, torch.arange(90) % 96, settings=Settings(window=30))
    keys = {made.entries[f"model.layers.0.self_attn.{p}_proj.weight"].key for p in "qkv"}
    assert keys == {"model.layers.0.self_attn.q_proj.weight"}
    assert len(made.entries) == 2 * 7 + 1
    assert len(made.tensors) == 2 * (2 * 4 + 1)
    progress: list[tuple[str, int, int]] = []
    calibrate(program, torch.arange(90) % 96, settings=Settings(window=30), progress=lambda *at: progress.append(at))
    assert [(done, total) for _, done, total in progress] == [(i + 1, 27) for i in range(27)]


class Shared(nn.Module):
    """One projection used twice, on different values."""

    vocab_size, context_length = 16, 32

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(16, 8)
        self.project = nn.Linear(8, 8, bias=False)
        self.head = nn.Linear(8, 16, bias=False)

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        x = self.project(self.table(input_ids))
        return self.head(self.project(torch.tanh(x)))


def test_a_weight_used_twice_counts_both_inputs():
    torch.manual_seed(0)
    model = Shared().double()
    program = raised(capture(model, ModelFacts("Shared", 16, 32, dtype=torch.float64)))
    ids = torch.randint(16, (2, 20))
    made = calibrate(program, ids)
    moment, largest, count = hooked_plain(model, ids)
    assert made.tokens("project.weight") == count == 80
    close(made.second_moment("project.weight"), moment, 1e-7)
    close(made.amax("project.weight"), largest, 1e-7)


def hooked_plain(model: Shared, ids: Tensor) -> tuple[Tensor, Tensor, int]:
    seen: list[Tensor] = []
    handle = model.project.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach().reshape(-1, 8)))
    model(ids, torch.arange(ids.shape[1]).expand(ids.shape))
    handle.remove()
    x = torch.cat(seen)
    return x.T @ x, x.abs().amax(0), len(x)


def test_any_value_can_be_watched(small: Program):
    """Keys after RoPE, [B, heads, T, D]: rows are tokens times heads."""
    graph = small.graph("forward")
    node = next(graph.calls("attention")).args[1]
    ids = torch.arange(40) % 96
    made = calibrate(small, ids, values={"keys": (node,)})
    (keys,) = evaluate(graph, {"input_ids": ids[None], "position_ids": torch.arange(40)[None]}, small.weights, [node])
    rows = keys.reshape(-1, 8).double()
    assert made.tokens("keys") == 80
    close(made.second_moment("keys"), rows.T @ rows, 1e-7)


VIEWS = ("split_with_sizes", "getitem", "reshape", "transpose", "unsqueeze")


def test_values_die_with_their_last_use(small: Program):
    graph = small.graph("forward")
    inputs = {"input_ids": torch.arange(9)[None], "position_ids": torch.arange(9)[None]}
    seen: dict[Any, weakref.ref[Tensor]] = {}
    order = list(graph.fx.nodes)
    watched = [n for nodes in linear_inputs(graph).values() for n in nodes]

    def last_use(node: Any) -> int:
        views = [u for u in node.users if target_name(u).removeprefix("aten.") in VIEWS]  # they hold what they show
        return max([order.index(u) for u in node.users] + [last_use(u) for u in views], default=-1)

    gc.disable()  # nothing may live on in a cycle either
    try:
        for node, value in evaluated(graph, inputs, small.weights, watched):
            if isinstance(value, Tensor) and node.op == "call_function":
                seen[node] = weakref.ref(value)
            at = order.index(node)
            dead = [n for n in seen if n is not node and last_use(n) < at]
            assert [n.name for n in dead if seen[n]() is not None] == []
            del value
    finally:
        gc.enable()
    assert len(seen) > 20
    assert [n.name for n in graph.calls("linear") if n not in seen] == [list(graph.calls("linear"))[-1].name]


class Counting(Shared):
    """Its forward makes a tensor of its own."""

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        x = super().forward(input_ids, position_ids)
        return x + torch.arange(x.shape[1], device=x.device)[:, None]


def test_another_device_gets_the_tensors_that_a_graph_makes():
    program = capture(Counting(), ModelFacts("Counting", 16, 32))
    graph, device = program.graph("forward"), torch.device("meta")
    assert "aten.arange" in map(target_name, graph.calls())
    weights = {n: replace(w, load=partial(torch.empty, w.shape, device=device)) for n, w in program.weights.items()}
    inputs = {n: torch.zeros(1, 5, dtype=torch.int64, device=device) for n in ("input_ids", "position_ids")}
    values = [v for _, v in evaluated(graph, inputs, weights, graph.outputs(), None, device) if isinstance(v, Tensor)]
    assert {v.device for v in values} == {device}


def test_few_tokens_are_said(small: Program):
    made = calibrate(small, torch.arange(20), settings=Settings(window=10))
    down, qkv = "model.layers.0.mlp.down_proj.weight", "model.layers.0.self_attn.o_proj.weight"
    assert "rank 20 of 48" in str(made.rank_warning(down))
    assert "rank 20 of 32" in str(made.rank_warning(qkv))
    assert made.rank_warning(qkv, wanted=20) is None
    enough = calibrate(small, torch.arange(48))
    assert enough.rank_warning(down) is None
    assert "48 tokens, of 100 wanted" in str(enough.rank_warning(down, wanted=100))


def test_values_that_are_not_finite_are_refused(small: Program):
    program = small.copy()
    name = "model.layers.1.mlp.down_proj.weight"
    broken = program.weights[name].load().clone()
    broken[3, 3] = torch.nan
    program.weights[name] = tensor_weight(broken)
    with pytest.raises(InputError, match=r"not finite .* in window 0"):
        calibrate(program, torch.arange(20))


def test_other_models_statistics_are_refused(small: Program):
    made = calibrate(small, torch.arange(20))
    assert calibrate(small, made) is made
    with pytest.raises(InputError, match="another model than Llama"):
        calibrate(raised(llama(layers=1)), made)
    with pytest.raises(InputError, match=r"did you mean 'model\.layers\.0\.mlp\.down_proj\.weight'"):
        made.amax("model.layers.0.mlp.down_proj")


def test_a_token_file_and_its_tensor_are_the_same(small: Program, tmp_path: Any):
    ids = torch.arange(60, dtype=torch.int32) % 96
    save_file({"tokens": ids}, tmp_path / "t.safetensors")
    a = calibrate(small, tmp_path / "t.safetensors", settings=Settings(window=25))
    b = calibrate(small, ids.tolist(), settings=Settings(window=25))
    assert all(torch.equal(a.tensors[key], b.tensors[key]) for key in a.tensors)
    assert a.notes == ("calibrated with 60 of 60 tokens in 3 windows",)
    assert [w.numel() for w in windows_of(read_tokens(ids, 96), 25, None)] == [25, 25, 10]
