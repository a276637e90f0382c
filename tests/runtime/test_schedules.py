"""The engine under random schedules, and behind transformers' own forward."""

from __future__ import annotations

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from toy_lm import CONTEXT, PAGE, RAGGED, VOCAB, WARM, alone, is_empty, make_engine
from transformers import LlamaConfig, LlamaForCausalLM

from llmopt.compiler.program import StateSpec
from llmopt.runtime.engine import Engine, SamplingParams
from llmopt.runtime.kv_cache import KVCache


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
