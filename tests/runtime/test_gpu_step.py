"""Programs for a GPU from capture to tokens, on CPU tensors through Triton's interpreter, against the CPU's own.

Prompts are read by the kernels of class many, and decoded by those of the decoding classes with sampling included;
what a GPU captures as a graph is run anew here.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from gpu_models import ragged, tiny

import llmopt
from llmopt.compiler.recipe import Recipe
from llmopt.runtime.build import build
from llmopt.runtime.engine import Engine, SamplingParams
from llmopt.runtime.gpu_code import code_for
from llmopt.runtime.session import open_session

pytestmark = [pytest.mark.interp, pytest.mark.timeout(600)]

PAGE = 4
KINDS = ("llama", "qwen3")
_opened: dict = {}


def opened(kind):
    """(session over interpreted kernels, the same model compiled for the CPU)"""
    if kind not in _opened:
        from llmopt.codegen.interpret import launcher

        recipe = replace(Recipe.parse("default"), page_size=PAGE)
        program, _, context = build(tiny(kind), recipe, "cuda:sm_90")
        code = code_for(program, context.target)
        session = open_session(program, recipe, context.target, code, launcher=launcher, device="cpu")
        _opened[kind] = session, llmopt.compile(tiny(kind), recipe="reference", target="cpu")
    return _opened[kind]


def engine_of(session, **options):
    """Another engine over the session's step, decoder and cache."""
    own = session.engine
    return Engine(
        session.step, session.cache, vocab_size=own.vocab_size, context_length=own.context_length,
        decoder=session.decoder, **options,
    )  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_a_ragged_batch_gets_the_tokens_of_the_cpu(kind, temperature):
    session, model = opened(kind)
    prompts, params = ragged(1, 7, 14), SamplingParams(max_new_tokens=6, temperature=temperature, seed=5)
    expected = model.engine.generate(prompts, params)
    assert len({t for tokens in expected for t in tokens}) > 6, "the tokens should say something"
    assert session.engine.generate(prompts, params) == expected
    assert session.cache.free_pages == session.cache.num_pages - 1


@pytest.mark.parametrize("kind", KINDS)
def test_one_prompt_is_decoded_by_the_kernels_for_one_token(kind):
    session, model = opened(kind)
    (prompt,) = ragged(5)
    params = SamplingParams(max_new_tokens=5)
    assert session.engine.generate([prompt], params) == model.engine.generate([prompt], params)
    assert any(rows == 1 for rows, _ in session.decoder._replays)


def test_prompts_in_chunks_beside_sequences_that_decode():
    session, model = opened("llama")
    prompts, params = ragged(3, 9, 6), SamplingParams(max_new_tokens=3)
    assert engine_of(session, chunk_size=4).generate(prompts, params) == model.engine.generate(prompts, params)


def test_nine_sequences_are_padded_to_sixteen_rows():
    session, model = opened("llama")
    prompts, params = ragged(*[3] * 9), SamplingParams(max_new_tokens=3)
    assert session.engine.generate(prompts, params) == model.engine.generate(prompts, params)
    assert any(rows == 16 for rows, _ in session.decoder._replays)


def test_top_k_and_top_p_are_sampled_by_torch_on_the_decoders_logits():
    session, model = opened("llama")
    params = SamplingParams(max_new_tokens=4, temperature=1.2, top_k=20, top_p=0.9, seed=2)
    prompts = ragged(4, 9)
    assert session.engine.generate(prompts, params) == model.engine.generate(prompts, params)


@pytest.mark.parametrize("kind", KINDS)
def test_logits_of_a_prompt_are_as_near_to_fp64_as_torchs(kind):
    session, _ = opened(kind)
    (prompt,) = ragged(11)
    ids = torch.tensor(prompt)
    row = session.cache.open()
    session.cache.reserve(row, len(prompt))
    slots = torch.tensor(session.cache.slots(row, 0, len(prompt)))
    at = torch.arange(len(prompt))
    got = session.step(ids[None], at[None], slots, torch.full_like(slots, row), session.cache.block_tables(), at)
    session.cache.release(row)
    plain, exact = tiny(kind), tiny(kind).double()
    truth = exact(ids[None], use_cache=False).logits[0]
    eager = (plain(ids[None], use_cache=False).logits[0] - truth).norm()
    assert (got - truth).norm() <= 1.5 * eager


def test_the_flat_program_names_its_regions():
    session, _ = opened("llama")
    source = session.step.source("1")
    assert source.count("attention") == 2
    assert source.count("gemm") == 2 * 4 + 1
