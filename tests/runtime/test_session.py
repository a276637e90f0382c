"""Memory of a GPU as a session divides it, and models compiled for a GPU that is not there."""

from __future__ import annotations

import sys
from dataclasses import replace
from subprocess import run

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import llmopt
from llmopt.compiler.errors import CacheFullError, DeviceMemoryError, TargetError
from llmopt.compiler.recipe import Recipe
from llmopt.compiler.target import Target
from llmopt.runtime.build import build
from llmopt.runtime.gpu_code import code_for
from llmopt.runtime.loader import read_weights
from llmopt.runtime.session import CACHE_SHARE, absent, fixed_pages, open_cache

REFERENCE = Recipe.parse("reference")
CONTEXT = 64


@pytest.fixture(scope="module")
def program():
    config = LlamaConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=CONTEXT,
    )  # fmt: skip
    torch.manual_seed(0)
    return build(LlamaForCausalLM(config).eval(), REFERENCE, "cpu")[0]


PAGE_BYTES = 2 * 2 * 16 * 16 * 4  # layers, keys and values, tokens, channels, fp32


def test_a_fixed_cache_takes_its_share_of_what_is_free(program):
    assert fixed_pages(program, REFERENCE, 200 * PAGE_BYTES, None) == int(200 * CACHE_SHARE)


def test_it_takes_no_more_than_all_sequences_could_fill(program):
    whole = 1 + REFERENCE.dims.sequences[1] * CONTEXT // 16
    assert fixed_pages(program, REFERENCE, 10**12, None) == whole
    assert fixed_pages(program, REFERENCE, 10**12, 10**12) == whole


def test_cache_bytes_is_what_it_takes(program):
    assert fixed_pages(program, REFERENCE, 200 * PAGE_BYTES, 7 * PAGE_BYTES + 1) == 7


def test_too_little_for_two_pages_is_said_in_bytes(program):
    with pytest.raises(CacheFullError, match=rf"may take {PAGE_BYTES} bytes.*take {2 * PAGE_BYTES}; raise cache_bytes"):
        fixed_pages(program, REFERENCE, 10 * PAGE_BYTES, PAGE_BYTES)


def test_a_cache_on_a_cpu_grows(program):
    cache = open_cache(program, REFERENCE, torch.device("cpu"))
    assert cache.max_pages is None


def test_pages_that_do_not_fit_after_all_are_an_error_in_bytes(program, monkeypatch):
    def no_memory(*args, **kwargs):
        raise torch.OutOfMemoryError("no")

    monkeypatch.setattr("llmopt.runtime.session.free_bytes", lambda device: 200 * PAGE_BYTES)
    monkeypatch.setattr(torch, "zeros", no_memory)
    with pytest.raises(CacheFullError, match=f"100 pages takes {100 * PAGE_BYTES} bytes, and the GPU has"):
        open_cache(program, REFERENCE, torch.device("cuda"))


def test_weights_that_do_not_fit_are_an_error_that_names_one(program, monkeypatch):
    names = list(program.graph("step").weights())

    def no_memory(self, *args):
        raise torch.OutOfMemoryError("no")

    monkeypatch.setattr(torch.Tensor, "to", no_memory)
    with pytest.raises(DeviceMemoryError, match=rf"weight '{names[0]}' does not fit: the weights take \d+ bytes"):
        read_weights(program)


def test_weights_lie_at_multiples_of_16_bytes_on_a_gpu(program, monkeypatch):
    """As kernels take them to; one that was there already may be a view into another, or of a file that is mapped."""
    odd = {name: torch.rand(weight.nbytes // 4 + 1)[1:].view(weight.shape) for name, weight in program.weights.items()}
    views = {name: replace(weight, load=lambda name=name: odd[name]) for name, weight in program.weights.items()}
    monkeypatch.setattr(program, "weights", views)
    monkeypatch.setattr(torch.Tensor, "to", lambda self, *args: self)  # every device is this one
    read = read_weights(program, device=torch.device("cuda", 0))
    assert all(weight.data_ptr() % 16 == 0 and torch.equal(weight, odd[name]) for name, weight in read.items())
    kept = read_weights(program, device=torch.device("cpu"))
    assert all(weight.data_ptr() == odd[name].data_ptr() for name, weight in kept.items())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_model_for_a_gpu_that_is_not_there_says_so_when_it_is_asked_to_run(program):
    model = llmopt.compile(
        LlamaForCausalLM(LlamaConfig(vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
                                     num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=CONTEXT)),
        recipe="reference", target="cuda:sm_90",
    )  # fmt: skip
    assert "def step(" in model.text()
    said = r"compiled for cuda:sm_90 and cannot run here: .*; save it and load it on"
    ids = torch.ones(1, 2, dtype=torch.int64)
    for use in (lambda: model.generate([1, 2]), lambda: model(ids), lambda: model.cache):
        with pytest.raises(TargetError, match=said):
            use()


def test_absence_is_of_the_kind_and_of_the_architecture():
    assert absent(Target.detect("cpu")) is None
    if not torch.cuda.is_available():
        assert "no GPU" in str(absent(Target.parse("cuda:sm_90")))


def test_code_is_kernels_only_where_the_step_was_cut_for_a_gpu(program):
    assert type(code_for(program, Target.parse("cuda:sm_90"))).__name__ == "Regions"


def test_what_runs_a_gpu_program_imports_no_triton():
    lines = "import sys, llmopt.model, llmopt.runtime.artifact, llmopt.runtime.session; print('triton' in sys.modules)"
    assert run([sys.executable, "-c", lines], capture_output=True, text=True, check=True).stdout.strip() == "False"


def test_cache_bytes_bounds_the_cache_of_a_model(program):
    config = LlamaConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=CONTEXT,
    )  # fmt: skip
    made = llmopt.compile(LlamaForCausalLM(config), "reference", "cpu", cache_bytes=5 * PAGE_BYTES)
    assert made.cache.max_pages == 5
