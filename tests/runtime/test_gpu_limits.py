"""What a GPU or its machine is too small or too odd for: a clear error, or a slower way that is stated."""

from __future__ import annotations

import builtins
import sys
from types import SimpleNamespace

import pytest
import torch
from gpu_models import ragged, tiny

import llmopt
from llmopt.compiler.errors import BuildError, DeviceError, DeviceMemoryError, TargetError
from llmopt.compiler.recipe import Recipe
from llmopt.compiler.target import Target
from llmopt.model import CompiledModel
from llmopt.runtime import cuda, native
from llmopt.runtime.build import build
from llmopt.runtime.decode_graphs import DecodeGraphs
from llmopt.runtime.decoder import DecodeState
from llmopt.runtime.engine import SamplingParams
from llmopt.runtime.gpu_code import MANY, SHAPES, GpuCode, code_for
from llmopt.runtime.session import open_session

HOPPER = "cuda:sm_90"
SAID = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 139.80 GiB of which"


def no_room(*args, **kwargs):
    raise torch.OutOfMemoryError(SAID)


def planned(dtype=torch.float32, launcher=None, **changes):
    """A session for a GPU, on tensors of the CPU, whose kernels are not run."""
    program, _, context = build(tiny("llama", dtype, **changes), "default", HOPPER)
    code = code_for(program, context.target)
    return open_session(program, Recipe.parse("default"), context.target, code, launcher=launcher, device="cpu")


def test_a_step_too_large_says_how_many_tokens_and_what_was_missing():
    session = planned(launcher=lambda kernel: no_room)
    seen = r"\(CUDA out of memory\. Tried to allocate 2\.00 GiB\)"
    with pytest.raises(DeviceMemoryError, match=rf"a step of 5 tokens does not fit the GPU's memory {seen}; run fewer"):
        session.engine.generate(ragged(5))


def test_a_graph_too_large_says_of_how_many_sequences():
    graphs = DecodeGraphs(no_room, DecodeState(16, 4, 16), lambda rows, length: 1)
    graphs._pool, graphs._record = object(), no_room  # as on a GPU, where recording runs the step
    with pytest.raises(DeviceMemoryError, match="the graph of a step of 16 sequences does not fit"):
        graphs.replay(16, 40)
    assert graphs.captured == 0


def drained(running):
    events = []
    while running.unfinished:
        events += running.step()
    return events


@pytest.mark.parametrize(
    ("place", "lengths", "params"),
    [
        ("engine", (5, 9), SamplingParams(max_new_tokens=4)),
        ("engine", (5, 9), SamplingParams(max_new_tokens=4, temperature=1.0)),
        ("decode_graphs", (5,), SamplingParams(max_new_tokens=4, temperature=1.0, top_k=3)),
    ],
)
def test_choosing_tokens_without_room_is_an_error_and_the_step_can_be_repeated(place, lengths, params, monkeypatch):
    """In a step that reads prompts, and in one that decodes with torch's sampler behind the graph."""
    running = planned(launcher=lambda kernel: lambda grid, args: None).engine
    for length in lengths:
        running.submit([1] * length, params)
    with monkeypatch.context() as patch:
        patch.setattr(f"llmopt.runtime.{place}.sample", no_room)
        said = f"a step of {len(lengths)} sequences with the choice of their tokens does not fit the GPU's memory"
        with pytest.raises(DeviceMemoryError, match=said):
            drained(running)
    assert len(drained(running)) >= 3 * len(lengths)


def test_a_decoding_state_without_room_says_its_size(monkeypatch):
    monkeypatch.setattr("llmopt.runtime.session.DecodeState", no_room)
    with pytest.raises(DeviceMemoryError, match=r"the decoding state of \d+ sequences of \d+ pages does not fit"):
        planned(launcher=lambda kernel: no_room)


def test_a_step_or_forward_of_torch_too_large_says_its_shapes(monkeypatch):
    model = llmopt.compile(tiny("llama"), "reference", "cpu")
    monkeypatch.setattr(torch.nn.functional, "linear", no_room)
    with pytest.raises(DeviceMemoryError, match=r"'forward' over inputs \[\[2, 9\], \[2, 9\]\] does not fit"):
        model(torch.ones(2, 9, dtype=torch.int64))
    with pytest.raises(DeviceMemoryError, match=r"'step' over inputs \[\[1, 7\]"):
        model.generate(ragged(7))


def test_another_current_device_than_the_models_is_refused(monkeypatch):
    model = llmopt.compile(tiny("llama"), "reference", "cpu")
    monkeypatch.setattr(CompiledModel, "session", SimpleNamespace(device=torch.device("cuda", 1), engine="engine"))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    with pytest.raises(DeviceError, match=r"lies on cuda:1 and the current device .* is cuda:0; .*set_device\(1\)"):
        model.generate([1, 2])
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert model.engine == "engine"


def test_code_for_one_gpu_is_refused_by_another(monkeypatch):
    ampere = Target.parse("cuda:sm_80")
    monkeypatch.setattr(Target, "detect", classmethod(lambda cls, kind=None: ampere))
    with pytest.raises(TargetError, match=r"'a' does not run here: it was compiled for sm_90 .* only sm_80; compile"):
        native.check_machine("a", Target.parse(HOPPER), {})


def test_without_cuda_bindings_it_says_what_to_install(monkeypatch):
    real = builtins.__import__

    def without(name, *rest):
        if name.startswith("cuda.bindings"):
            raise ImportError("No module named 'cuda'")
        return real(name, *rest)

    monkeypatch.delitem(sys.modules, "cuda.bindings", raising=False)
    monkeypatch.setattr(builtins, "__import__", without)
    cuda._driver.cache_clear()
    with pytest.raises(BuildError, match=r"\(No module named 'cuda'\); pip install cuda-bindings"):
        cuda._driver()


@pytest.mark.skipif(sys.platform != "linux", reason="Triton is there on Linux only")
@pytest.mark.parametrize(
    ("dtype", "changes", "reason"),
    [
        (torch.float64, {}, "attend not by triton: float64"),
        (torch.float32, {"head_dim": 300}, "attend not by triton: head size 300: at most 256"),
    ],
    ids=["float64", "wide heads"],
)
def test_attention_that_no_kernel_takes_is_torchs_and_the_reason_is_stated(dtype, changes, reason, caplog):
    program, report, context = build(tiny("llama", dtype, **changes), "default", HOPPER)
    assert report.choices["providers"]["attend=reference"] == 2
    assert any(text.startswith(reason) for text in report.choices["against"])
    assert f"torch attends, and there are no decoding graphs: {reason}" in caplog.text
    code = code_for(program, context.target)
    assert isinstance(code, GpuCode)
    assert {shape for _, shape in code.keys(SHAPES)} == {MANY}, "no graphs, and no code for them"
    assert all(code.code(*key).calls for key in code.keys())  # noqa: SIM118
    assert planned(dtype, lambda kernel: None, **changes).decoder is None
