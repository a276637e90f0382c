"""Programs on a GPU: graphs, growth into new pages, preemption, memory that runs out, sampling as torch's."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from gpu_models import CONTEXT, ragged, tiny

import llmopt
from llmopt.compiler.errors import CacheFullError, DeviceMemoryError
from llmopt.compiler.recipe import Recipe
from llmopt.model import CompiledModel
from llmopt.runtime import attend
from llmopt.runtime.build import build
from llmopt.runtime.engine import SamplingParams
from llmopt.runtime.gpu_code import code_for
from llmopt.runtime.sampler import SampleRows, sample

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
RECIPE = Recipe.parse("default")


def compiled(kind="llama", dtype=torch.float32, cache_bytes=None, recipe=RECIPE, **changes):
    """The tiny model on this machine's GPU."""
    program, report, context = build(tiny(kind, dtype, **changes), recipe, "cuda")
    code = code_for(program, context.target)
    return CompiledModel(program, recipe, context.target, report, code, cache_bytes)


@pytest.fixture(scope="module")
def pair():
    return compiled(), llmopt.compile(tiny("llama"), recipe="reference", target="cpu")


@pytest.mark.parametrize("params", [
    SamplingParams(max_new_tokens=40), SamplingParams(max_new_tokens=40, temperature=0.8, seed=11),
    SamplingParams(max_new_tokens=12, temperature=1.3, top_k=30, top_p=0.9, seed=4),
], ids=["greedy", "temperature", "top-k and top-p"])  # fmt: skip
def test_graphs_give_the_tokens_of_the_cpu(pair, params):
    model, cpu = pair
    prompts = ragged(1, 7, 18, 33)
    assert model.engine.generate(prompts, params) == cpu.engine.generate(prompts, params)
    assert model.session.decoder._replays


def test_a_model_on_the_gpu_is_compiled_where_it_is(pair):
    own = llmopt.compile(tiny("llama").cuda())
    assert own.target.kind == "cuda"
    (prompt,) = ragged(9)
    assert own.engine.generate([prompt]) == pair[0].engine.generate([prompt])


def test_the_plain_forward_takes_inputs_from_the_cpu(pair):
    ids = torch.tensor(ragged(12))
    logits = pair[0](ids)
    assert logits.device.type == "cuda"
    torch.testing.assert_close(logits.cpu(), pair[1](ids), rtol=1e-3, atol=1e-3)


def test_three_hundred_replays_give_the_same_logits_every_time(pair):
    model, _ = pair
    session = model.session
    params = SamplingParams(max_new_tokens=CONTEXT)
    handles = [model.engine.submit(p, params, i) for i, p in enumerate(ragged(5, 9, 30))]
    for _ in range(4):
        model.engine.step()
    state = session.decoder.state
    words = state.words.clone()
    replay = session.decoder.replay(3, 34)
    first = replay().clone()
    for number in range(300):
        state.words.copy_(words)
        assert torch.equal(replay(), first), f"replay {number} differs"
    state.words.copy_(words)
    for handle in handles:
        model.engine.cancel(handle)


def test_sequences_run_to_the_end_of_the_context_over_many_pages_and_graphs(pair):
    model, cpu = pair
    params = SamplingParams(max_new_tokens=CONTEXT)
    prompts = ragged(3, 100)
    got = model.engine.generate(prompts, params)
    assert [len(t) for t in got] == [CONTEXT - 3, CONTEXT - 100]
    assert got[1] == cpu.engine.generate(prompts, params)[1]


def test_pages_stay_where_they_are(pair):
    model, _ = pair
    before = {name: t.data_ptr() for name, t in model.cache.tensors.items()}
    model.engine.generate(ragged(*range(1, 40)), SamplingParams(max_new_tokens=30))
    assert {name: t.data_ptr() for name, t in model.cache.tensors.items()} == before


def test_running_out_of_pages_puts_the_newest_off_and_gives_the_same_tokens(pair):
    each = sum(s.bytes_per_page for s in pair[0].program.state)
    small = compiled(cache_bytes=14 * each)
    assert small.cache.max_pages == small.cache.num_pages == 14
    prompts, params = ragged(20, 31, 8, 40), SamplingParams(max_new_tokens=60)
    assert small.engine.generate(prompts, params) == pair[1].engine.generate(prompts, params)
    with pytest.raises(CacheFullError, match="takes 16 pages"):
        small.engine.generate(ragged(100), SamplingParams(max_new_tokens=200))


@pytest.mark.parametrize("count", [1, 2, 8, 9, 17, 64, 70])
def test_every_number_of_sequences_gives_what_one_gets(pair, count):
    model, _ = pair
    prompts, params = ragged(*[5] * count), SamplingParams(max_new_tokens=5)
    together = model.engine.generate(prompts, params)
    alone = [model.engine.generate([p], params)[0] for p in prompts[:: max(1, count // 3)]]
    assert together[:: max(1, count // 3)] == alone


@pytest.mark.parametrize("long", [512, 10**6], ids=["by torch", "over pages"])
@pytest.mark.parametrize("lengths", [(700,), (768, 768), (520, 900)], ids=str)
@torch.no_grad()
def test_whole_prompts_are_as_near_to_fp64_as_torchs(lengths, long, monkeypatch):
    monkeypatch.setattr(attend, "LONG", long)
    sizes = {"head_dim": 64, "hidden_size": 128, "max_position_embeddings": 2048}
    model, prompts = compiled("qwen3", torch.bfloat16, **sizes), [torch.tensor(p) for p in ragged(*lengths)]
    cache, rows = model.cache, [model.cache.open() for _ in lengths]
    for row, count in zip(rows, lengths, strict=True):
        cache.reserve(row, count)
    slots = torch.tensor([s for row, n in zip(rows, lengths, strict=True) for s in cache.slots(row, 0, n)])
    at = torch.cat([torch.arange(n) for n in lengths])
    seqs = torch.tensor(rows).repeat_interleave(torch.tensor(lengths))
    last = torch.tensor(lengths).cumsum(0) - 1
    given = torch.cat(prompts)[None], at[None], slots, seqs, cache.block_tables(), last
    got, again = model.step(*given), model.step(*(t.cuda() for t in given))
    assert torch.equal(got, again)
    plain, exact = tiny("qwen3", torch.bfloat16, **sizes), tiny("qwen3", torch.bfloat16, **sizes).double()
    for logits, prompt in zip(got.cpu(), prompts, strict=True):
        truth = exact(prompt[None]).logits[0, -1]
        eager = (plain(prompt[None]).logits[0, -1] - truth).norm()
        assert (logits - truth).norm() <= 1.5 * eager


@pytest.mark.parametrize("vocab", [1000, 128256])
def test_sampling_is_torchs_on_the_gpu(vocab):
    from llmopt.codegen.cubin import compile_kernel
    from llmopt.codegen.sampling import sampling_code
    from llmopt.compiler.target import Target
    from llmopt.runtime import cuda
    from llmopt.runtime.bound_region import BoundRegion, Frame
    from llmopt.runtime.decoder import Batch, DecodeState

    target, rows = Target.detect("cuda"), 16
    params = [SamplingParams(temperature=(i % 4) / 2, seed=i << 33) for i in range(rows)]
    sampling = SampleRows.of(params, list(range(rows)), "cuda")
    state, each = DecodeState(rows, 8, 16, "cuda"), torch.arange(rows, device="cuda")
    state.load(Batch(each, each, each, each, torch.ones(rows, 8, dtype=torch.int64, device="cuda"), sampling, 20))
    frame = Frame()
    frame.sizes |= {"R": rows, "M": state.width}
    launcher = cuda.launcher(lambda kernel: compile_kernel(kernel, target))
    code = sampling_code(vocab, "bfloat16", 16, target)
    run = BoundRegion(code, launcher, {}, frame, torch.device("cuda"))
    vectors = state.temperature, state.seeds, state.sequences, state.moves, state.tables, state.tokens
    for step in range(20):
        logits = torch.randn(rows, vocab, device="cuda", dtype=torch.bfloat16) * (1 + step % 4)
        expected = sample(logits, sampling, state.positions + 1)
        run([logits, *vectors, state.positions, state.slots])
        assert state.read(rows)() == expected.tolist()


def test_weights_that_do_not_fit_are_an_error(pair):
    free = torch.cuda.mem_get_info()[0]
    torch.cuda.empty_cache()
    hog = torch.empty(max(0, free - (256 << 20)), dtype=torch.uint8, device="cuda")
    try:
        with pytest.raises((DeviceMemoryError, CacheFullError), match="bytes"):
            compiled(hidden_size=2048, intermediate_size=16384, head_dim=512)
    finally:
        del hog
        torch.cuda.empty_cache()


def test_an_artifact_made_for_this_gpu_runs_without_compiling(pair, tmp_path):
    model, _ = pair
    model.save(tmp_path / "a")
    loaded = llmopt.load(tmp_path / "a")
    prompts = ragged(4, 11)
    params = SamplingParams(max_new_tokens=10)
    assert loaded.engine.generate(prompts, params) == model.engine.generate(prompts, params)


def test_two_pages_sizes_give_one_text(pair):
    other = compiled(recipe=replace(RECIPE, page_size=32))
    prompts, params = ragged(6, 35), SamplingParams(max_new_tokens=20)
    assert other.engine.generate(prompts, params) == pair[0].engine.generate(prompts, params)
