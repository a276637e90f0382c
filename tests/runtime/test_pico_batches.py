"""The embedded model on both recipes: how a prompt is cut up or batched never shows in its tokens."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import llmopt
from llmopt.model import CompiledModel
from llmopt.runtime.engine import Engine, SamplingParams

PICO = Path(__file__).resolve().parents[2] / "examples" / "models" / "pico-llama-4m"
TEXTS = (
    "def fibonacci(n):\n    ",
    "x",
    "import os\nimport sys\n\n\nclass Reader:\n    def __init__(self, path):\n        self.path = path\n" * 5,
    "for i in range(10):",
)


@pytest.fixture(scope="module", params=["default", "reference"])
def model(request: pytest.FixtureRequest) -> CompiledModel:
    return llmopt.compile(PICO, recipe=request.param, dtype="float32")


@pytest.fixture
def prompts(model: CompiledModel) -> list[list[int]]:
    return [model.tokenizer.encode(text) for text in TEXTS]


def engine_like(model: CompiledModel, chunk_size: int) -> Engine:
    """Another engine over the same step and cache."""
    own = model.engine
    return Engine(
        model.step,
        model.cache,
        vocab_size=own.vocab_size,
        context_length=own.context_length,
        eos_token_ids=model.program.facts.eos_token_ids,
        chunk_size=chunk_size,
    )


@pytest.fixture(autouse=True)
def no_page_is_lost(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "model" in request.fixturenames:
        cache = request.getfixturevalue("model").cache
        assert cache.free_pages == cache.num_pages - 1


@pytest.mark.parametrize("chunk_size", [1, 7, 16, 64])
def test_chunked_prefill_equals_whole_prefill(model: CompiledModel, prompts: list[list[int]], chunk_size: int) -> None:
    params = SamplingParams(max_new_tokens=24)
    assert len(prompts[2]) > 64
    whole = engine_like(model, 4096).generate(prompts, params)
    assert engine_like(model, chunk_size).generate(prompts, params) == whole


def test_batched_equals_alone(model: CompiledModel, prompts: list[list[int]]) -> None:
    together = model.generate(prompts, max_new_tokens=32)
    assert together == [model.generate(p, max_new_tokens=32) for p in prompts]
    assert len({tuple(t) for t in together}) == len(together)


def test_joining_and_leaving_a_running_batch_changes_nothing(model: CompiledModel, prompts: list[list[int]]) -> None:
    alone = [model.generate(p, max_new_tokens=32) for p in prompts]
    engine = model.engine
    made: dict[int, list[int]] = {}
    arrivals = {0: 0, 3: 1, 9: 2, 15: 3}  # step -> prompt
    handles: dict[int, int] = {}
    left = None
    for step in range(400):
        if step in arrivals:
            handle = engine.submit(prompts[arrivals[step]], SamplingParams(max_new_tokens=32))
            handles[handle] = arrivals[step]
        if step == 12:  # one leaves early
            left = next(iter(handles))
            engine.cancel(left)
        for event in engine.step():
            made.setdefault(event.handle, []).append(event.token)
        if step > 15 and not engine.unfinished:
            break
    assert left is not None
    for handle, prompt in handles.items():
        if handle == left:
            assert made[handle] == alone[prompt][: len(made[handle])]
        else:
            assert made[handle] == alone[prompt]


def test_a_sample_depends_on_its_seed_and_not_on_its_neighbours(model: CompiledModel, prompts: list[list[int]]) -> None:
    def sample(seed: int) -> list[list[int]]:
        return model.generate(prompts, max_new_tokens=24, temperature=0.9, top_p=0.95, seed=seed)  # type: ignore[no-any-return]

    together = sample(5)
    assert together == sample(5)
    assert together != sample(6)
    params = SamplingParams(max_new_tokens=24, temperature=0.9, top_p=0.95, seed=5)
    for index, prompt in enumerate(prompts):
        handle = model.engine.submit(prompt, params, sequence=index)
        alone = []
        while model.engine.unfinished:
            alone += [event.token for event in model.engine.step() if event.handle == handle]
        assert alone == together[index]
