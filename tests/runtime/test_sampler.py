"""The sampler against published vectors, transformers' warpers, and the law it samples from."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import TopKLogitsWarper, TopPLogitsWarper

from llmopt.compiler.errors import InputError
from llmopt.runtime.sampler import SampleRows, SamplingParams, gumbel, keep_top_k, keep_top_p, philox, sample

MASK = 0xFFFFFFFF


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ("00000000 " * 4, "00000000 " * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff " * 4, "ffffffff " * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_gives_the_known_answers_of_random123(counter, key, words):
    counter, key, words = ([int(w, 16) for w in text.split()] for text in (counter, key, words))
    assert philox(torch.tensor(counter), torch.tensor(key)).tolist() == words


def philox_by_hand(counter, key):
    """The round function of Salmon et al., section 3.3, on Python integers."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & MASK, (p0 >> 32) ^ c3 ^ k1, p0 & MASK
        k0, k1 = (k0 + 0x9E3779B9) & MASK, (k1 + 0xBB67AE85) & MASK
    return c0, c1, c2, c3


@given(
    st.integers(0, 2**63 - 1),
    st.integers(0, 2**32 - 1),
    st.integers(0, 2**31 - 1),
    st.integers(1, 70),
    st.data(),
)
def test_noise_of_an_index_is_a_word_of_its_own_counter(seed, sequence, position, vocab, data):
    index = data.draw(st.integers(0, vocab - 1))
    noise = gumbel(torch.tensor([seed]), torch.tensor([sequence]), torch.tensor([position]), vocab)
    assert noise.shape == (1, vocab)
    word = philox_by_hand((index // 4, position, sequence, 0), (seed & MASK, seed >> 32))[index % 4]
    u = min((word + 0.5) / 2**32, 1 - 2.0**-24)
    assert float(noise[0, index]) == pytest.approx(-math.log(-math.log1p(-u)), rel=1e-5, abs=1e-5)


def test_the_extreme_words_give_finite_noise(monkeypatch):
    words = torch.tensor([0, 1, MASK - 1, MASK])[:, None, None]
    monkeypatch.setattr("llmopt.runtime.sampler.philox", lambda counter, key: words)
    zero = torch.zeros(1, dtype=torch.int64)
    noise = gumbel(zero, zero, zero, 4)[0]
    assert noise.isfinite().all()
    assert noise.tolist() == sorted(noise.tolist(), reverse=True)


def scores_and_rows(rows, vocab, seed):
    scores = torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 3
    # rounding makes ties
    return (scores * 2).round() / 2 if seed % 2 else scores


@given(st.integers(0, 99), st.integers(2, 60), st.lists(st.integers(1, 70), min_size=1, max_size=4))
def test_top_k_is_transformers(seed, vocab, ks):
    scores = scores_and_rows(len(ks), vocab, seed)
    got = keep_top_k(scores, torch.tensor(ks), max(ks))
    for row, k in enumerate(ks):
        assert torch.equal(got[row : row + 1], TopKLogitsWarper(k)(None, scores[row : row + 1]))


@given(st.integers(0, 99), st.integers(2, 60), st.lists(st.floats(1e-4, 0.9999), min_size=1, max_size=4))
def test_top_p_is_transformers(seed, vocab, ps):
    scores = scores_and_rows(len(ps), vocab, seed)
    got = keep_top_p(scores, torch.tensor([1.0 - p for p in ps]))
    for row, p in enumerate(ps):
        assert torch.equal(got[row : row + 1], TopPLogitsWarper(p)(None, scores[row : row + 1]))


def test_rows_that_ask_for_nothing_keep_everything():
    scores = scores_and_rows(2, 30, 1)
    assert torch.equal(keep_top_k(scores, torch.tensor([0, 2]), 2)[0], scores[0])
    assert torch.equal(keep_top_p(scores, torch.tensor([0.0, 0.5]))[0], scores[0])


def test_the_best_token_stays_whatever_top_p():
    scores = torch.tensor([[0.0, 2.0, 1.0]])
    assert keep_top_p(scores, torch.tensor([1.0 - 1e-12])).isfinite().tolist() == [[False, True, False]]


def test_no_warmth_is_argmax_in_every_company():
    logits = scores_and_rows(3, 50, 2)
    params = [SamplingParams(), SamplingParams(temperature=0.8, top_k=3, top_p=0.5), SamplingParams(top_k=2)]
    got = sample(logits, SampleRows.of(params, [0, 1, 2]), torch.tensor([4, 5, 6]))
    assert got[[0, 2]].tolist() == logits[[0, 2]].argmax(-1).tolist()
    alone = sample(logits[[0]], SampleRows.of(params[:1], [0]))
    assert alone.tolist() == got[[0]].tolist()


@given(st.permutations(range(6)), st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))
@settings(max_examples=30)
def test_a_sample_is_the_same_whatever_stands_beside_it(order, dtype):
    logits = scores_and_rows(6, 333, 4).to(dtype)
    params = [
        SamplingParams(temperature=t, top_k=k, top_p=p, seed=s)
        for t, k, p, s in [
            (1, 0, 1, 0),
            (0, 0, 1, 0),
            (0.3, 7, 1, 2**62),
            (2, 0, 0.7, 1),
            (1, 20, 0.9, 3),
            (9, 1, 1, 0),
        ]
    ]
    position = torch.tensor([3, 1, 4, 1, 5, 9])
    sequence = [0, 1, 2**32 - 1, 3, 4, 5]

    def draw(rows):
        chosen = SampleRows.of([params[r] for r in rows], [sequence[r] for r in rows])
        return sample(logits[rows], chosen, position[rows]).tolist()

    assert draw(list(order)) == [draw([r])[0] for r in order]


@pytest.mark.parametrize("temperature", [1e-45, 1e-12, 1e38])
def test_extreme_temperatures_give_tokens(temperature):
    logits = torch.tensor([[3.0, -4.0, float("-inf"), 2.0]])
    rows = SampleRows.of([SamplingParams(temperature=temperature, top_p=0.99)], [0])
    drawn = {int(sample(logits, rows, torch.tensor([p]))) for p in range(64)}
    assert drawn == {0} if temperature < 1 else drawn == {0, 1, 3}


def p_value(counts, expected):
    """Chance of a chi-square statistic at least this large."""
    statistic = ((counts - expected) ** 2 / expected).sum()
    return float(torch.special.gammaincc(torch.tensor((len(counts) - 1) / 2.0, dtype=torch.float64), statistic / 2))


@pytest.mark.parametrize("axis", ["seed", "sequence", "position", "all"])
@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(1.0, 0, 1.0), (0.7, 5, 1.0), (1.3, 0, 0.8), (1.0, 8, 0.9)]
)
def test_the_law_is_softmax_of_the_kept_scores(axis, temperature, top_k, top_p):
    draws = 40_000
    logits = torch.randn(1, 13, generator=torch.Generator().manual_seed(5)) * 1.5
    scores = logits / temperature
    if top_k:
        scores = TopKLogitsWarper(top_k)(None, scores)
    if top_p < 1:
        scores = TopPLogitsWarper(top_p)(None, scores)
    law = scores.double().softmax(-1)[0]
    n = torch.arange(draws)
    rows = SampleRows.of([SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p)], [0])
    keys = {name: n if axis in (name, "all") else n * 0 for name in ("seed", "sequence", "position")}
    many = SampleRows(
        rows.temperature.expand(draws), rows.tail.expand(draws), rows.top_k.expand(draws),
        keys["seed"], keys["sequence"], rows.sampled, rows.max_k, rows.nucleus,
    )  # fmt: skip
    counts = sample(logits.expand(draws, -1), many, keys["position"]).bincount(minlength=13).double()
    assert counts[law == 0].sum() == 0
    assert p_value(counts[law > 0], law[law > 0] * draws) > 1e-4
    # the test can fail: a law that is off by a tenth in one token is refused
    wrong = law.clone()
    wrong[law.argmax()] *= 0.9
    wrong /= wrong.sum()
    assert p_value(counts[law > 0], wrong[law > 0] * draws) < 1e-4


def test_noise_of_neighbours_is_uncorrelated():
    n = torch.arange(64)
    noise = gumbel(n // 16, n // 4 % 4, n % 4, 4096)
    correlation = torch.corrcoef(noise) - torch.eye(64)
    assert correlation.abs().max() < 6 / math.sqrt(4096)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.1}, r"temperature is -0.1; wanted 0 \(greedy\) or"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"temperature": math.inf}, "temperature is inf"),
        ({"top_p": 0.0}, "top_p is 0.0; wanted a probability"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"top_k": -1}, "top_k is -1"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0; wanted at least 1"),
        ({"seed": 2**63}, "seed is 9223372036854775808"),
    ],
)
def test_unusable_parameters_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        SamplingParams(**options)
