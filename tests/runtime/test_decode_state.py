"""Decoding state and the engine's hand-over to a decoder: the same tokens as without, on the CPU in plain torch."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from toy_lm import CONTEXT, PAGE, RAGGED, VOCAB, WARM, alone, drain, is_empty, make_engine, prompts_of, tokens_of

from llmopt.compiler.errors import CacheFullError, DeviceMemoryError
from llmopt.runtime.decode_graphs import BUCKETS, DecodeGraphs, bucket
from llmopt.runtime.decoder import Batch, DecodeState, NewPage
from llmopt.runtime.engine import Engine, SamplingParams
from llmopt.runtime.sampler import SampleRows, sample

GREEDY = SamplingParams(max_new_tokens=12)
TEMPERATURE = SamplingParams(max_new_tokens=12, temperature=1.1, seed=3)


class Watched(DecodeGraphs):
    """A decoder in plain torch that remembers what it was asked for."""

    def __init__(self, step, rows=8):
        super().__init__(self._step, DecodeState(rows, CONTEXT // PAGE, PAGE), lambda rows, length: 1)
        self.forward, self.starts, self.pages, self.batches, self.runs = step, [], [], [], 0

    def _step(self, rows, parts):
        s = self.state
        self.runs += 1
        logits = torch.zeros(rows, VOCAB, dtype=torch.float64)
        real = int(s.moves.sum())  # the toy refuses rows of the scratch page
        slice_ = s.numbers[:real]
        at = s.tokens[None, :real], s.positions[None, :real]
        logits[:real] = self.forward(*at, s.slots[:real], slice_, s.tables[:rows], slice_)
        warm = SampleRows(s.temperature[:rows], *[torch.zeros(rows)] * 2, s.seeds[:rows], s.sequences[:rows],
                          sampled=True, max_k=0, nucleus=False)  # fmt: skip
        s.tokens[:rows] = sample(logits, warm, s.positions[:rows] + 1)
        s.positions[:rows] += s.moves[:rows]
        column = (s.positions[:rows] // PAGE).clamp_max(s.width - 1)
        s.slots[:rows] = s.tables[slice(rows), :].gather(1, column[:, None])[:, 0] * PAGE + s.positions[:rows] % PAGE
        return logits

    def start(self, batch):
        self.starts.append(len(batch.ids))
        super().start(batch)

    def step(self, pages, upcoming=None):
        self.pages += pages
        self.batches.append(self._count)
        return super().step(pages, upcoming)


def handed_engine(rows=8, **options):
    """An engine with a decoder for up to `rows` sequences."""
    plain, step = make_engine(**options)
    decoder = Watched(step, rows)
    kept = {k: v for k, v in options.items() if k in ("chunk_size", "max_batch")}
    engine = Engine(step, plain.cache, vocab_size=VOCAB, context_length=CONTEXT, decoder=decoder, **kept)
    return engine, decoder


@pytest.mark.parametrize("params", [GREEDY, TEMPERATURE, WARM], ids=["greedy", "temperature", "top-k and top-p"])
@pytest.mark.parametrize("rows", [8, 5])
def test_the_decoder_gives_what_each_prompt_gets_alone(params, rows):
    engine, decoder = handed_engine(rows)
    assert engine.generate(RAGGED, params) == [alone(p, params, i) for i, p in enumerate(RAGGED)]
    assert bool(decoder.batches) == (rows >= len(RAGGED)), "more sequences than the decoder takes stay with the engine"
    assert is_empty(engine)


def test_a_running_batch_is_handed_over_once_and_told_of_pages_only():
    engine, decoder = handed_engine()
    engine.generate(RAGGED[:3], SamplingParams(max_new_tokens=15))
    assert decoder.starts == [3]
    assert decoder.batches == [3] * 14
    begun = sum((len(p) + i) % PAGE == 0 for p in RAGGED[:3] for i in range(1, 14))
    assert len(decoder.pages) == begun > 3


@pytest.mark.parametrize("params", [GREEDY, WARM], ids=["greedy", "sampled"])
def test_joining_and_leaving_start_anew_and_change_nobody(params):
    engine, decoder = handed_engine(chunk_size=6)
    found, handles = {}, []
    for index, prompt in enumerate(RAGGED):
        handles.append(engine.submit(prompt, params, index))
        for _ in range(3 * index):
            for event in engine.step():
                found.setdefault(event.handle, []).append(event)
    for handle, events in drain(engine).items():
        found.setdefault(handle, []).extend(events)
    for index, (prompt, handle) in enumerate(zip(RAGGED, handles, strict=True)):
        assert tokens_of(found[handle]) == alone(prompt, params, index)
    assert len(set(decoder.starts)) > 2
    assert is_empty(engine)


def test_running_out_of_pages_puts_the_newest_off_and_gives_the_same_tokens():
    params = SamplingParams(max_new_tokens=20)
    engine, decoder = handed_engine(max_pages=15)
    assert engine.generate(RAGGED, params) == [alone(p, params, i) for i, p in enumerate(RAGGED)]
    assert len(decoder.starts) > 3
    assert is_empty(engine)


def test_cancelling_takes_a_sequence_out_of_the_decoder():
    engine, decoder = handed_engine()
    handles = [engine.submit(p, GREEDY) for p in RAGGED[:3]]
    kept = [e for _ in range(4) for e in engine.step()]
    engine.cancel(handles[1])
    found = drain(engine)
    assert decoder.starts == [3, 2]
    for i in (0, 2):
        assert [e.token for e in kept if e.handle == handles[i]] + tokens_of(found[handles[i]]) == alone(
            RAGGED[i], GREEDY
        )


@contextmanager
def failing(decoder, error):
    """Inside, a step of the decoder raises this once it has moved the state on."""
    run = decoder.run

    def fails(rows, parts):
        run(rows, parts)
        raise error

    decoder.run = fails
    yield
    decoder.run = run


def test_a_step_that_raised_is_repeated_from_the_engines_own_tokens():
    engine, decoder = handed_engine()
    handle = engine.submit(RAGGED[1], GREEDY)
    got = [e.token for _ in range(5) for e in engine.step()]
    with failing(decoder, RuntimeError("no")), pytest.raises(RuntimeError):
        engine.step()
    assert got + tokens_of(drain(engine)[handle]) == alone(RAGGED[1], GREEDY)


def test_the_next_step_is_launched_before_the_tokens_are_looked_at():
    engine, decoder = handed_engine()
    handle = engine.submit(RAGGED[1], GREEDY)
    while not decoder.batches:
        engine.step()
    assert decoder.runs == 2
    drain(engine)
    assert decoder.runs == len(decoder.batches), "where a sequence ends by length, nothing is launched ahead"

    engine, decoder = handed_engine()
    stop = SamplingParams(max_new_tokens=12, stop_token_ids=(alone(RAGGED[1], GREEDY)[6],))
    handle = engine.submit(RAGGED[1], stop)
    assert tokens_of(drain(engine)[handle]) == alone(RAGGED[1], stop)
    assert decoder.runs == len(decoder.batches) + 1, "the step after an end that nobody could know is forgotten"


def exhaust(engine, events):
    while True:
        events += engine.step()


def test_without_a_page_for_the_next_token_nothing_is_launched_ahead():
    length = len(RAGGED[1]) + GREEDY.max_new_tokens
    engine, decoder = handed_engine(max_pages=1 + -(-(length - 1) // PAGE))
    taken = engine.cache.reserve
    engine.cache.reserve = lambda row, length: taken(row, length) if not decoder.batches else refuse()

    def refuse():
        raise CacheFullError("none left")

    handle = engine.submit(RAGGED[1], GREEDY)
    events = []
    with pytest.raises(CacheFullError):
        exhaust(engine, events)
    assert decoder.runs == len(decoder.batches), "the tokens of the page's end are still made"
    engine.cache.reserve = taken
    events += drain(engine)[handle]
    assert tokens_of(events) == alone(RAGGED[1], GREEDY)


def test_a_step_ahead_that_fails_costs_no_token():
    engine, decoder = handed_engine()
    handle = engine.submit(RAGGED[1], GREEDY)
    got = [e.token for _ in range(4) for e in engine.step()]
    events = []
    with failing(decoder, DeviceMemoryError("none left")), pytest.raises(DeviceMemoryError):
        exhaust(engine, events)
    got += [e.token for e in events]
    assert got == alone(RAGGED[1], GREEDY)[: len(got)]
    made = len(got)
    got += tokens_of(drain(engine)[handle])
    assert got == alone(RAGGED[1], GREEDY)
    assert made > 4, "the token that was made before it"


def batch_of(count, width=3):
    sampling = SampleRows.of([TEMPERATURE] * count, list(range(10, 10 + count)))
    each = torch.arange(count)
    tables = torch.arange(1, 1 + 2 * count * width).view(2 * count, width)
    return Batch(each + 1, each + 5, each + 9, each * 2, tables, sampling, 9)


def test_loading_fills_the_rows_and_makes_padding_of_the_rest():
    state = DecodeState(4, 5, PAGE)
    state.load(batch_of(4))
    state.load(batch_of(2))
    assert state.tokens.tolist() == [1, 2, 0, 0]
    assert state.positions.tolist() == [5, 6, 0, 0]
    assert state.slots.tolist() == [9, 10, 0, 0]
    assert state.moves.tolist() == [1, 1, 0, 0]
    assert state.sequences.tolist() == [10, 11, 0, 0]
    assert state.temperature.tolist() == pytest.approx([1.1, 1.1, 0, 0])
    assert state.tables[:2, :3].tolist() == [[1, 2, 3], [7, 8, 9]], "the rows that the sequences have in the cache"
    assert state.tables[2:, 0].tolist() == [0, 0], "padding reads and writes the scratch page"
    assert state.read(2)() == [1, 2]


def test_new_pages_enter_the_table_and_the_slots_at_the_same_addresses():
    state = DecodeState(4, 5, PAGE)
    state.load(batch_of(3))
    before = state.words.data_ptr()
    state.add([NewPage(0, 3, 40), NewPage(2, 4, 50)])
    assert state.slots.tolist() == [40 * PAGE, 10, 50 * PAGE, 0][:4]
    assert state.tables[0].tolist() == [1, 2, 3, 40, 0]
    assert int(state.tables[2, 4]) == 50
    assert state.words.data_ptr() == before


def test_a_wider_block_table_is_cut_to_the_context():
    state = DecodeState(2, 2, PAGE)
    state.load(batch_of(2))
    assert state.tables.tolist() == [[1, 2], [7, 8]]


def test_near_pages_stay_the_last_ones_and_padding_has_none():
    for width, tables in ((6, [[1, 0, 0, 0, 2, 3], [7, 0, 0, 0, 8, 9]]), (3, [[1, 2, 3], [7, 8, 9]])):
        state = DecodeState(4, width, PAGE, near_pages=2)
        state.load(batch_of(4))
        state.load(batch_of(2))
        assert state.tables[:2].tolist() == tables
        assert not state.tables[2:, [0, -2, -1]].any()
    narrow = DecodeState(2, 3, PAGE, near_pages=1)
    narrow.load(batch_of(2, width=5))
    assert narrow.tables.tolist() == [[1, 2, 5], [11, 12, 15]]


def test_rows_run_as_they_are_up_to_8_then_padded():
    assert [bucket(n) for n in (1, 3, 8, 9, 16, 17, 33, 64)] == [1, 3, 8, 16, 16, 32, 64, 64]


def test_a_graph_is_captured_once_for_its_rows_and_parts():
    _, decoder = handed_engine(8)
    replays = {decoder.replay(rows, length) for _ in range(2) for rows in BUCKETS if rows <= 8 for length in (1, 60)}
    assert decoder.captured == len(replays) == len([b for b in BUCKETS if b <= 8])


def test_a_cache_that_cannot_hold_one_sequence_is_an_error():
    engine, _ = handed_engine(max_pages=4)
    with pytest.raises(CacheFullError, match="takes 5 pages"):
        engine.generate(prompts_of(9), SamplingParams(max_new_tokens=10))
