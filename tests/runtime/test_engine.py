"""The engine against plain forwards: whatever the schedule, every sequence gets the tokens it gets alone."""

from __future__ import annotations

from functools import cache as memoize

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from torch.nn.functional import scaled_dot_product_attention, silu
from transformers import LlamaConfig, LlamaForCausalLM

from llmopt.compiler.errors import CacheFullError, InputError
from llmopt.compiler.ops import attend, kv_write
from llmopt.compiler.program import StateSpec
from llmopt.runtime.engine import Engine, SamplingParams
from llmopt.runtime.kv_cache import KVCache
from llmopt.runtime.sampler import SampleRows, sample

VOCAB, CONTEXT, PAGE = 61, 64, 4
LAYERS, HEADS, KV_HEADS, WIDTH = 2, 4, 2, 5
SCALE = WIDTH**-0.5
WARM = SamplingParams(max_new_tokens=12, temperature=1.1, top_k=30, top_p=0.95, seed=7)


@memoize
def weights():
    generator = torch.Generator().manual_seed(0)
    dim = HEADS * WIDTH

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64) * shape[0] ** -0.5

    layers = [
        (
            draw(dim, dim),
            draw(dim, KV_HEADS * WIDTH),
            draw(dim, KV_HEADS * WIDTH),
            draw(dim, dim),
            draw(dim, dim),
        )
        for _ in range(LAYERS)
    ]
    return draw(VOCAB, dim) * 9, draw(CONTEXT, dim) * 9, layers, draw(dim, VOCAB) * 3


def toy(ids, positions, attention):
    """Logits [1, N, VOCAB] of the toy model; attention(layer, q, k, v) is the caller's."""
    embedding, places, layers, head = weights()
    x = embedding[ids] + places[positions]
    for index, (wq, wk, wv, wo, wm) in enumerate(layers):
        q, k, v = (
            (x @ w).unflatten(-1, (heads, WIDTH)).transpose(1, 2)
            for w, heads in ((wq, HEADS), (wk, KV_HEADS), (wv, KV_HEADS))
        )
        x = x + attention(index, q, k, v).transpose(1, 2).flatten(2) @ wo
        x = x + silu(x @ wm)
    return x @ head


def plain_logits(tokens):
    """Logits [N, VOCAB] of one whole sequence, with PyTorch's attention."""
    ids = torch.tensor([tokens])

    def attention(_, q, k, v):
        return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    return toy(ids, torch.arange(len(tokens))[None], attention)[0]


@memoize
def alone(prompt, params, sequence=0, eos=()):
    """The tokens this prompt gets by running the whole sequence anew for every token."""
    tokens, rows = list(prompt), SampleRows.of([params], [sequence])
    while len(tokens) < min(len(prompt) + params.max_new_tokens, CONTEXT):
        logits = plain_logits(tokens)[-1:]
        tokens.append(int(sample(logits, rows, torch.tensor([len(tokens)]))))
        if tokens[-1] in (*eos, *params.stop_token_ids):
            break
    return tokens[len(prompt) :]


class ToyStep:
    """The toy model over pages; remembers how large its steps were, and the logits of every one."""

    def __init__(self, cache):
        self.cache, self.sizes, self.logits, self.addresses = cache, [], [], []

    def __call__(self, input_ids, position_ids, slots, seq_ids, block_tables, rows):
        n = input_ids.shape[1]
        assert input_ids.shape == position_ids.shape == (1, n)
        assert slots.shape == seq_ids.shape == (n,)
        assert {t.dtype for t in (input_ids, position_ids, slots, seq_ids, block_tables, rows)} == {torch.int64}
        where = block_tables[seq_ids, position_ids[0] // PAGE] * PAGE + position_ids[0] % PAGE
        assert torch.equal(where, slots)
        assert (slots >= PAGE).all(), "the scratch page was written"
        state = self.cache.tensors

        def attention(layer, q, k, v):
            state[f"k{layer}"] = kv_write(state[f"k{layer}"], k, slots)
            state[f"v{layer}"] = kv_write(state[f"v{layer}"], v, slots)
            pages = state[f"k{layer}"], state[f"v{layer}"]
            return attend(q, *pages, block_tables, seq_ids, position_ids, None, SCALE, 0, 0.0)

        logits = toy(input_ids, position_ids, attention)[0, rows]
        self.sizes.append(n)
        self.logits.append(logits)
        self.addresses.append(input_ids.data_ptr())
        return logits


def make_engine(*, eos=(), initial_pages=4, max_pages=None, **options):
    specs = [StateSpec(f"{s}{i}", (KV_HEADS, PAGE, WIDTH), torch.float64) for s in "kv" for i in range(LAYERS)]
    cache = KVCache(specs, page_size=PAGE, initial_pages=initial_pages, max_pages=max_pages)
    step = ToyStep(cache)
    engine = Engine(step, cache, vocab_size=VOCAB, context_length=CONTEXT, eos_token_ids=eos, **options)
    return engine, step


def drain(engine):
    """All events until nothing is left, by handle."""
    found = {}
    while engine.unfinished:
        for event in engine.step():
            found.setdefault(event.handle, []).append(event)
    return found


def tokens_of(events):
    return [e.token for e in events]


def is_empty(engine):
    return engine.unfinished == 0 and engine.cache.free_pages == engine.cache.num_pages - 1


def prompts_of(*lengths):
    generator = torch.Generator().manual_seed(sum(lengths))
    return [tuple(torch.randint(VOCAB, (n,), generator=generator).tolist()) for n in lengths]


RAGGED = prompts_of(1, 19, 4, 2, 33, 8, 5)


@pytest.mark.parametrize("chunk_size", [1, 2, 3, 4, 7, 16, 18, 19, 20, 500])
def test_chunked_prefill_is_whole_prefill(chunk_size):
    (prompt,) = prompts_of(19)
    engine, step = make_engine(chunk_size=chunk_size)
    (got,) = engine.generate([prompt], SamplingParams(max_new_tokens=9))
    assert len(set(got)) > 3, "the toy model should not repeat itself"
    whole = plain_logits([*prompt, *got])
    prefill_steps = -(-len(prompt) // chunk_size)
    assert step.sizes == [chunk_size] * (prefill_steps - 1) + [len(prompt) - chunk_size * (prefill_steps - 1)] + [1] * 8
    torch.testing.assert_close(torch.cat(step.logits[prefill_steps - 1 :]), whole[len(prompt) - 1 : -1])
    assert got == alone(prompt, SamplingParams(max_new_tokens=9))
    assert is_empty(engine)


@pytest.mark.parametrize("params", [SamplingParams(max_new_tokens=12), WARM], ids=["greedy", "sampled"])
@pytest.mark.parametrize(("chunk_size", "max_batch"), [(500, 256), (8, 256), (3, 4), (1, 2), (500, 1)])
def test_a_ragged_batch_gives_what_each_gets_alone(params, chunk_size, max_batch):
    engine, step = make_engine(chunk_size=chunk_size, max_batch=max_batch)
    got = engine.generate(RAGGED, params)
    assert got == [alone(p, params, i) for i, p in enumerate(RAGGED)]
    assert max(step.sizes) <= max(chunk_size, max_batch)
    assert is_empty(engine)


def test_each_prompt_has_its_own_parameters():
    params = [SamplingParams(max_new_tokens=n, temperature=t, seed=n) for n, t in ((3, 0.0), (1, 2.0), (9, 0.5))]
    engine, _ = make_engine()
    got = engine.generate(RAGGED[:3], params)
    assert got == [alone(p, q, i) for i, (p, q) in enumerate(zip(RAGGED, params, strict=False))]


def test_samples_depend_on_seed_and_prompt_index_only():
    prompt = RAGGED[2]
    engine, _ = make_engine()
    twins = engine.generate([prompt, prompt], WARM)
    assert twins[0] != twins[1]
    handle = engine.submit(prompt, WARM, sequence=1)
    assert tokens_of(drain(engine)[handle]) == twins[1]
    other = SamplingParams(**{**WARM.__dict__, "seed": 8})
    assert engine.generate([prompt], other)[0] != twins[0]


@pytest.mark.parametrize("params", [SamplingParams(max_new_tokens=12), WARM], ids=["greedy", "sampled"])
def test_joining_a_running_batch_changes_nobody(params):
    engine, _ = make_engine(chunk_size=6)
    found, handles = {}, []
    for index, prompt in enumerate(RAGGED):
        handles.append(engine.submit(prompt, params, index))
        for _ in range(index):
            for event in engine.step():
                found.setdefault(event.handle, []).append(event)
    for handle, events in drain(engine).items():
        found.setdefault(handle, []).extend(events)
    for index, (prompt, handle) in enumerate(zip(RAGGED, handles, strict=True)):
        events = found[handle]
        assert tokens_of(events) == alone(prompt, params, index)
        assert [e.position for e in events] == [len(prompt) + i for i in range(len(events))]
        assert [e.finished for e in events] == [None] * (len(events) - 1) + ["length"]
        assert {e.sequence for e in events} == {index}
    assert is_empty(engine)


def test_decoding_alone_advances_its_tensors_in_place():
    engine, step = make_engine()
    engine.generate(RAGGED[:3], SamplingParams(max_new_tokens=15))
    assert step.sizes[1:] == [3] * 14
    assert len(set(step.addresses[1:])) == 1


def test_decoding_goes_on_beside_a_long_prefill():
    engine, step = make_engine(chunk_size=5)
    first = engine.submit(RAGGED[0], SamplingParams(max_new_tokens=20))
    engine.step()
    engine.submit(RAGGED[4], SamplingParams(max_new_tokens=1))
    before = len(step.sizes)
    events = [event for _ in range(9) for event in engine.step()]
    assert step.sizes[before:] == [5] * 8 + [2]
    assert [e.handle for e in events] == [first] * 9 + [first + 1]


def test_cancel_frees_pages_at_once_and_changes_nobody():
    params = SamplingParams(max_new_tokens=12)
    engine, _ = make_engine(max_batch=3)
    handles = [engine.submit(p, params) for p in RAGGED[:5]]
    kept = [engine.step() for _ in range(3)]
    held = engine.cache.free_pages
    engine.cancel(handles[1])
    assert engine.cache.free_pages == held + engine.cache.pages_for(len(RAGGED[1]) + 3)
    engine.cancel(handles[4])  # still waits
    engine.cancel(handles[1])  # over already
    found = drain(engine)
    assert set(found) == {handles[i] for i in (0, 2, 3)}
    for i in (0, 2, 3):
        early = [e.token for events in kept for e in events if e.handle == handles[i]]
        assert early + tokens_of(found[handles[i]]) == alone(RAGGED[i], params)
    assert is_empty(engine)
    with pytest.raises(InputError, match=r"handle 5 was never given; this engine has given 0\.\.4"):
        engine.cancel(5)


@pytest.mark.parametrize("params", [SamplingParams(max_new_tokens=20), WARM], ids=["greedy", "sampled"])
@pytest.mark.parametrize("chunk_size", [3, 500])
def test_running_out_of_pages_puts_the_newest_off_and_gives_the_same_tokens(params, chunk_size, monkeypatch):
    engine, _ = make_engine(max_pages=15, chunk_size=chunk_size)
    opened = []
    open_row = engine.cache.open
    monkeypatch.setattr(engine.cache, "open", lambda: opened.append(1) or open_row())
    got = engine.generate(RAGGED, params)
    assert got == [alone(p, params, i) for i, p in enumerate(RAGGED)]
    assert len(opened) > len(RAGGED), "no sequence was put off: the pool is too large for this test"
    assert engine.cache.num_pages == 15
    assert is_empty(engine)


def test_a_sequence_that_can_never_fit_is_refused_before_anything_runs():
    engine, step = make_engine(max_pages=6)
    fits, long = prompts_of(5, 17)
    with pytest.raises(
        CacheFullError, match="prompt 1 with its new tokens takes 6 pages of 4 tokens, the cache holds 5"
    ):
        engine.generate([fits, long], SamplingParams(max_new_tokens=5))
    assert step.sizes == []
    assert is_empty(engine)
    # the last token is never read again, so its K and V take no place
    assert engine.generate([long], SamplingParams(max_new_tokens=4)) == [alone(long, SamplingParams(max_new_tokens=4))]


def test_a_device_that_runs_out_of_memory_puts_the_newest_off(monkeypatch):
    engine, _ = make_engine(initial_pages=16)
    params = SamplingParams(max_new_tokens=20)

    new_zeros = torch.Tensor.new_zeros

    def no_memory_for_pages(like, *args):
        if like.dtype == torch.float64:
            raise torch.OutOfMemoryError("no")
        return new_zeros(like, *args)

    monkeypatch.setattr(torch.Tensor, "new_zeros", no_memory_for_pages)
    assert engine.generate(RAGGED[:5], params) == [alone(p, params) for p in RAGGED[:5]]
    assert engine.cache.max_pages == engine.cache.num_pages == 16


def test_end_tokens_are_kept_as_the_last_id():
    params = SamplingParams(max_new_tokens=12)
    free = alone(RAGGED[1], params)
    end = free[5]
    cut = free[: free.index(end) + 1]
    engine, _ = make_engine(eos=(end,))
    assert list(engine.stream([RAGGED[1]], params))[-1][1:4] == (end, len(RAGGED[1]) + len(cut) - 1, "stop")
    assert engine.generate([RAGGED[1]], params) == [cut]
    assert engine.generate([RAGGED[1]], SamplingParams(max_new_tokens=12, ignore_eos=True)) == [free]
    stopped = SamplingParams(max_new_tokens=12, ignore_eos=True, stop_token_ids=(end,))
    assert engine.generate([RAGGED[1]], stopped) == [cut]
    assert is_empty(engine)


def test_generation_ends_where_the_context_ends():
    (prompt,) = prompts_of(CONTEXT - 3)
    engine, _ = make_engine()
    events = list(engine.stream([prompt], SamplingParams(max_new_tokens=50)))
    assert [e.position for e in events] == [CONTEXT - 3, CONTEXT - 2, CONTEXT - 1]
    assert events[-1].finished == "length"


def test_closing_a_stream_frees_its_pages_and_no_others():
    params = SamplingParams(max_new_tokens=12)
    engine, _ = make_engine(max_batch=4)
    stream, other = engine.stream(RAGGED[:3], params), engine.stream(RAGGED[3:], params)
    for _ in range(4):
        next(stream)
    rest = {i: [] for i in range(4)}
    event = next(other)
    rest[event.sequence].append(event.token)
    stream.close()
    for event in other:
        rest[event.sequence].append(event.token)
    assert list(rest.values()) == [alone(p, params) for p in RAGGED[3:]]
    assert is_empty(engine)


def test_a_stream_that_is_never_read_runs_nothing():
    engine, step = make_engine()
    stream = engine.stream(RAGGED)
    del stream
    assert (engine.unfinished, engine.step(), step.sizes) == (0, [], [])


def test_streams_and_submitted_sequences_get_their_own_tokens():
    params = SamplingParams(max_new_tokens=6)
    engine, _ = make_engine()
    handle = engine.submit(RAGGED[1], params)
    assert engine.generate(RAGGED[2:4], params) == [alone(p, params) for p in RAGGED[2:4]]
    events = engine.step()
    while engine.unfinished:
        events += engine.step()
    assert {e.handle for e in events} == {handle}
    assert tokens_of(events) == alone(RAGGED[1], params)


@pytest.mark.parametrize("at", [0, 1, 3, 6])
def test_a_step_that_raises_can_be_repeated(at):
    engine, step = make_engine(chunk_size=10)
    calls = []

    def flaky(*args):
        calls.append(1)
        if len(calls) == at + 1:
            raise RuntimeError("a kernel failed")
        return step(*args)

    engine._forward = flaky
    params = SamplingParams(max_new_tokens=8)
    handles = [engine.submit(p, params) for p in RAGGED[:3]]
    found = {}
    failures = 0
    while engine.unfinished:
        try:
            for event in engine.step():
                found.setdefault(event.handle, []).append(event.token)
        except RuntimeError:
            failures += 1
    assert failures == 1
    assert [found[h] for h in handles] == [alone(p, params) for p in RAGGED[:3]]


@pytest.mark.parametrize(
    ("prompts", "params", "message"),
    [
        ([(1,), ()], SamplingParams(), "prompt 1 is empty"),
        ([(1, 2, VOCAB)], SamplingParams(), "prompt 0 has token id 61 at index 2, the vocabulary has 61"),
        ([(1, -1)], SamplingParams(), "prompt 0 has token id -1 at index 1"),
        (
            [(0,), (0,) * 65],
            SamplingParams(),
            "prompt 1 has 65 tokens, the model's context is 64; shorten it to 63",
        ),
        ([(0,) * 64], SamplingParams(), "prompt 0 has 64 tokens, the model's context is 64"),
        (["hello"], SamplingParams(), "prompt 0 is no sequence of token ids"),
        ([(1.5,)], SamplingParams(), "prompt 0 is no sequence of token ids"),
        ([(1,), (2,)], [SamplingParams()], "1 sampling parameters for 2 prompts"),
    ],
)
def test_unusable_prompts_are_refused_before_anything_runs(prompts, params, message):
    engine, step = make_engine()
    with pytest.raises(InputError, match=message) as error:
        engine.stream(prompts, params)
    assert "\n" not in str(error.value)
    assert (engine.unfinished, step.sizes) == (0, [])


def test_unusable_engines_and_sequence_numbers_are_refused():
    with pytest.raises(InputError, match="chunk_size is 0; wanted at least 1"):
        make_engine(chunk_size=0)
    engine, _ = make_engine()
    with pytest.raises(InputError, match=r"the prompt has sequence number -1; wanted one in \[0, 2\*\*32\)"):
        engine.submit([1], sequence=-1)


def test_tokens_are_those_of_transformers_generate():
    """Transformers' forward behind the engine, without pages, against its generate, end tokens and all."""
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=CONTEXT, initializer_range=0.3,
        bos_token_id=1, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config).double().eval()
    history: dict[tuple[int, int], int] = {}

    def step(input_ids, position_ids, slots, seq_ids, block_tables, rows):
        places = list(zip(seq_ids.tolist(), position_ids[0].tolist(), strict=True))
        history.update(zip(places, input_ids[0].tolist(), strict=True))
        texts = [[history[places[r][0], at] for at in range(places[r][1] + 1)] for r in rows.tolist()]
        return torch.cat([model(torch.tensor([text])).logits[:, -1] for text in texts])

    def theirs(prompt, eos):
        ids = torch.tensor([prompt])
        # without a mask, pad tokens inside of a prompt would be masked
        mask = torch.ones_like(ids)
        made = model.generate(ids, attention_mask=mask, max_new_tokens=14, do_sample=False, eos_token_id=eos)
        return made[0, len(prompt) :].tolist()

    free = [theirs(p, None) for p in RAGGED]
    eos = [free[1][4], free[4][7]]
    wanted = [theirs(p, eos) for p in RAGGED]
    assert len({len(w) for w in wanted}) > 1, "no sequence ends early: choose other end tokens"
    cache = KVCache([StateSpec("unused", (1, PAGE, 1), torch.int8)], page_size=PAGE)
    engine = Engine(
        step,
        cache,
        vocab_size=VOCAB,
        context_length=CONTEXT,
        eos_token_ids=tuple(eos),
        chunk_size=6,
        max_batch=3,
    )
    assert engine.generate(RAGGED, SamplingParams(max_new_tokens=14)) == wanted


class Schedules(RuleBasedStateMachine):
    """Random submits, steps and cancels in a small pool; nothing leaks and nobody's tokens change."""

    def __init__(self):
        super().__init__()
        self.engine, self.step_fn = make_engine(max_pages=13, chunk_size=5, max_batch=3, eos=(7,))
        self.wanted: dict[int, list[int]] = {}
        self.got: dict[int, list[int]] = {}
        self.cancelled: set[int] = set()

    @rule(which=st.integers(0, len(RAGGED) - 1), warm=st.booleans(), sequence=st.integers(0, 2))
    def submit(self, which, warm, sequence):
        params = WARM if warm else SamplingParams(max_new_tokens=7)
        handle = self.engine.submit(RAGGED[which], params, sequence)
        self.wanted[handle] = alone(RAGGED[which], params, sequence, (7,))
        self.got[handle] = []

    @rule(times=st.integers(1, 6))
    def step(self, times):
        for _ in range(times):
            for event in self.engine.step():
                self.got[event.handle].append(event.token)
                if event.finished:
                    assert self.got[event.handle] == self.wanted[event.handle]

    @precondition(lambda self: self.got)
    @rule(data=st.data())
    def cancel(self, data):
        handle = data.draw(st.sampled_from(sorted(self.got)))
        self.engine.cancel(handle)
        self.cancelled.add(handle)

    @invariant()
    def no_page_leaks_or_is_shared(self):
        cache = self.engine.cache
        running = [s for s in self.engine._live.values() if s.row >= 0]
        held = [page for s in running for page in cache.pages(s.row)]
        assert len(set(held)) == len(held)
        assert 0 not in held
        assert len(held) + cache.free_pages == cache.num_pages - 1
        for handle, tokens in self.got.items():
            assert tokens == self.wanted[handle][: len(tokens)]

    def teardown(self):
        while self.engine.unfinished:
            before = len(self.step_fn.sizes)
            self.step(1)
            assert len(self.step_fn.sizes) == before + 1, "a step with work to do ran nothing"
        assert is_empty(self.engine)
        for handle in set(self.got) - self.cancelled:
            assert self.got[handle] == self.wanted[handle]


TestSchedules = Schedules.TestCase
TestSchedules.settings = settings(max_examples=15, stateful_step_count=20, deadline=None)
