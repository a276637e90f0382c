"""Perplexity, divergence and errors by layer against torch's own losses and transformers."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma2ForCausalLM, PreTrainedModel

import llmopt
from llmopt.compiler.errors import InputError, NumericsError
from llmopt.compiler.pipeline import Context, Pipeline
from llmopt.compiler.recipe import RECIPES
from llmopt.compiler.target import Target
from llmopt.model import CompiledModel
from llmopt.passes import Canonicalize, RaiseAten
from llmopt.runtime import perplexity
from llmopt.runtime.build import capture_any
from llmopt.runtime.layer_error import Loaded, hidden_states, stream_errors
from llmopt.runtime.perplexity import Mean, batched, measure, step_logits, windows

PICO = Path(__file__).resolve().parents[2] / "examples" / "models" / "pico-llama-4m"
VOCAB, SIZE = 50, 12


def toy(seed: int, scale: float = 2.0) -> Tensor:
    """The logits [V, V] of a model that looks at one token only."""
    return torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(seed)) * scale


def in_pieces(table: Tensor, piece: int = 5) -> Callable[[Tensor], Iterator[Tensor]]:
    return lambda ids: (table[part] for part in ids.split(piece, 1))


def text(length: int, vocab: int = VOCAB) -> Tensor:
    return torch.randint(vocab, (length,), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def pico() -> CompiledModel:
    return llmopt.compile(PICO, recipe="reference", dtype="float32")


@pytest.fixture(scope="module")
def oracle() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(PICO, dtype=torch.float32).eval()


def test_windows_are_disjoint_and_predict_the_token_behind():
    found = windows([torch.arange(25), torch.arange(100, 108), torch.arange(50, 63)], SIZE)
    assert [w.tolist() for w in found] == [[*range(13)], [*range(12, 25)], [*range(50, 63)]]
    assert len(windows([torch.arange(24)], SIZE)) == 1
    assert len(windows([torch.arange(25)], SIZE, most=1)) == 1
    with pytest.raises(InputError, match="longest text has 12 tokens; wanted at least 13"):
        windows([torch.arange(12), torch.arange(3)], SIZE)


@pytest.mark.parametrize("batch", [1, 3, 4])
@pytest.mark.parametrize("rows", [1, 4, 1000])
def test_means_are_those_of_torchs_losses(monkeypatch: pytest.MonkeyPatch, batch: int, rows: int):
    monkeypatch.setattr(perplexity, "SLICE", rows * VOCAB)
    ours, theirs = toy(0), toy(0) + 0.3 * toy(1)
    cut = windows([text(SIZE * 7 + 1)], SIZE)
    seen: list[int] = []
    found = measure(
        in_pieces(ours), batched(cut, batch), in_pieces(theirs), lambda quality, more: seen.append(more)
    )  # fmt: skip
    ids, targets = torch.cat([w[:-1] for w in cut]), torch.cat([w[1:] for w in cut])
    p, q = ours.double()[ids], theirs.double()[ids]
    close = found.against
    assert close is not None
    assert (found.tokens, sum(seen)) == (7 * SIZE, 7)
    assert found.nll.value == pytest.approx(float(functional.cross_entropy(p, targets)), rel=1e-12)
    assert found.perplexity == pytest.approx(math.exp(functional.cross_entropy(p, targets)), rel=1e-12)
    assert close.nll.value == pytest.approx(float(functional.cross_entropy(q, targets)), rel=1e-12)
    assert close.difference.value == pytest.approx(found.nll.value - close.nll.value, rel=1e-9)
    each = functional.kl_div(p.log_softmax(-1), q.log_softmax(-1), log_target=True, reduction="none").sum(-1)
    assert close.kl.value == pytest.approx(float(each.mean()), rel=1e-12)
    assert close.worst == pytest.approx(float(each.max()), rel=1e-12)
    assert close.top1.value == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()))
    assert 0.5 < close.top1.value < 1
    losses = functional.cross_entropy(p, targets, reduction="none").reshape(7, SIZE).mean(1).tolist()
    assert found.nll.error == pytest.approx(statistics.stdev(losses) / math.sqrt(7), rel=1e-9)


def test_one_sample_has_no_error():
    mean = Mean()
    mean.add(2.5)
    assert (mean.value, mean.error) == (2.5, None)


def test_equal_programs_are_equal():
    found = measure(in_pieces(toy(0)), batched(windows([text(99)], SIZE), 2), in_pieces(toy(0))).against
    assert found is not None
    assert (found.kl.value, found.worst, found.top1.value, found.difference.value) == (0.0, 0.0, 1.0, 0.0)


def test_half_precision_logits_are_widened_first():
    table = toy(0).bfloat16()
    cut = windows([text(SIZE + 1)], SIZE)
    want = functional.cross_entropy(table.double()[cut[0][:-1]], cut[0][1:])
    assert measure(in_pieces(table), batched(cut, 1)).nll.value == pytest.approx(float(want), rel=1e-12)


def test_what_never_happens_adds_nothing():
    ours, theirs = toy(0), toy(1)
    theirs[:, 7] = -math.inf
    ids = text(200)
    cut = windows([ids[ids != 7]], SIZE)
    found = measure(in_pieces(ours), batched(cut, 1), in_pieces(theirs)).against
    assert found is not None
    assert math.isfinite(found.kl.value)
    assert found.kl.value > 0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_is_an_error(bad: float):
    table = toy(0)
    cut = windows([text(3 * SIZE + 1)], SIZE)
    table[:, int(cut[0][1])] = bad
    with pytest.raises(NumericsError, match="window 0: the negative log-likelihood of its 12 tokens"):
        measure(in_pieces(table), batched(cut, 1))


@pytest.mark.parametrize("most", [1024, 70, 2])
def test_step_logits_are_transformers(pico: CompiledModel, oracle: PreTrainedModel, most: int):
    ids = torch.stack([text(40, 8000), text(80, 8000)[40:]])
    free = pico.cache.free_pages
    pieces = list(step_logits(pico.session, ids, most))
    assert [p.shape[1] for p in pieces] == {1024: [40], 70: [35, 5], 2: [1] * 40}[most]
    with torch.no_grad():
        want = oracle(ids).logits
    assert (torch.cat(pieces, 1) - want).abs().max() < 1e-4 * want.abs().max()
    assert pico.cache.free_pages == free


def test_pages_are_given_back_when_reading_stops(pico: CompiledModel):
    free = pico.cache.free_pages
    reading = step_logits(pico.session, text(64, 8000)[None], 16)
    next(reading)
    assert pico.cache.free_pages < free
    reading.close()
    assert pico.cache.free_pages == free


def test_hidden_states_are_transformers(pico: CompiledModel, oracle: PreTrainedModel):
    ids, seen = text(64, 8000).reshape(2, 32), []
    hooks = [
        layer.post_attention_layernorm.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        for layer in oracle.model.layers
    ]
    with torch.no_grad():
        whole = oracle(ids, output_hidden_states=True).hidden_states
    for hook in hooks:
        hook.remove()
    found = hidden_states(loaded(pico), ids)
    assert [name for name, _ in found] == [
        "embed_tokens", "layers.0.self_attn", "layers.0.mlp", "layers.1.self_attn", "layers.1.mlp",
    ]  # fmt: skip
    states = [state for _, state in found]
    for got, want in zip(states, (whole[0], seen[0], whole[1], seen[1]), strict=False):
        assert (got - want).abs().max() < 1e-5 * want.abs().max()
    with torch.no_grad():  # transformers gives the last one behind the final norm
        last = oracle.model.norm(states[4])
    assert (last - whole[2]).abs().max() < 1e-5 * last.abs().max()


def loaded(model: CompiledModel, **instead: Tensor) -> Loaded:
    return Loaded(model.program, {**model.weights, **instead}, model.session.device)


def test_an_error_shows_from_its_layer_on(pico: CompiledModel):
    name = "model.layers.1.self_attn.o_proj.weight"
    spoiled = loaded(pico, **{name: pico.weights[name] * 1.01})
    errors = stream_errors(spoiled, loaded(pico), text(32, 8000)[None])
    assert [e.relative for e in errors[:3]] == [0.0] * 3
    assert all(1e-5 < e.relative < 1e-2 for e in errors[3:])
    (_, x), (_, y) = (
        hidden_states(spoiled, text(32, 8000)[None])[3],
        hidden_states(loaded(pico), text(32, 8000)[None])[3],
    )
    want = torch.linalg.vector_norm(x - y, dim=-1) / torch.linalg.vector_norm(y, dim=-1)
    assert errors[3].relative == pytest.approx(float(want.mean()), rel=1e-5)


def test_what_follows_the_last_product_is_no_layer():
    config = Gemma2Config(
        vocab_size=90, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, final_logit_softcapping=5.0,
    )  # fmt: skip
    program = capture_any(Gemma2ForCausalLM(config).float())
    context = Context(Target.parse("cpu:generic"), RECIPES["reference"])
    raised = Pipeline([RaiseAten(), Canonicalize()]).run(program, context)
    found = hidden_states(Loaded(raised, {}, torch.device("cpu")), torch.arange(12)[None])
    assert [name.partition("_")[0] for name, _ in found] == [
        "embed",
        *(2 * ["layers.0.post"]),
        *(2 * ["layers.1.post"]),
    ]
    assert {tuple(state.shape) for _, state in found} == {(1, 12, 32)}


def test_programs_of_other_places_cannot_be_compared(pico: CompiledModel):
    other = pico.program.copy()
    graph = other.graph("forward")
    first, *_ = graph.calls("aten.add")
    graph.fx.output_node().args = ((first,),)
    graph.fx.eliminate_dead_code()
    with pytest.raises(InputError, match="alone at 5 places of one program and 1 of the other"):
        stream_errors(loaded(pico), Loaded(other, pico.weights, pico.session.device), text(8)[None])
