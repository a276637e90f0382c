"""The engine against plain forwards: whatever the schedule, every sequence gets the tokens it gets alone."""

from __future__ import annotations

import pytest
import torch
from toy_lm import (
    CONTEXT,
    RAGGED,
    VOCAB,
    WARM,
    alone,
    drain,
    is_empty,
    make_engine,
    plain_logits,
    prompts_of,
    tokens_of,
)

from llmopt.compiler.errors import CacheFullError, InputError
from llmopt.runtime.engine import SamplingParams


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


def test_the_oldest_is_never_put_off_and_who_was_comes_before_who_waits():
    engine, _ = make_engine(max_pages=9, max_batch=2)
    oldest, put_off, waits = (engine.submit(p, SamplingParams(max_new_tokens=20)) for p in prompts_of(4, 8, 5))
    order = []
    while engine.unfinished:
        order.append([event.handle for event in engine.step()])
    assert all(oldest in handles for handles in order[:20])
    gone = next(i for i, handles in enumerate(order) if put_off not in handles)
    back = next(i for i, handles in enumerate(order) if put_off in handles and i > gone)
    first = next(i for i, handles in enumerate(order) if waits in handles)
    assert gone < 20 <= back <= first
    assert order[back][0] == put_off


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
