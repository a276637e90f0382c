"""A toy attention LM in fp64, over pages for the engine and as a plain forward for the oracle.

The plain forward uses PyTorch's own attention; `alone` runs it anew for every token, with no engine and no cache.
"""

from __future__ import annotations

from functools import cache as memoize

import torch
from torch.nn.functional import scaled_dot_product_attention, silu

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
