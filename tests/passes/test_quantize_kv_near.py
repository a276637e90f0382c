"""quantize-kv with first and last tokens as they are: against masks over whole sequences, however prompts are cut."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from gpu_models import CONTEXT, ragged, tiny
from near_oracle import oracle, stepped
from passes_common import counts, llama, run
from torch import Tensor
from transformers import MistralConfig, MistralForCausalLM

import llmopt
from llmopt.codegen import cpp  # noqa: F401 - registers the providers
from llmopt.compiler import ops
from llmopt.compiler.bisect import bisect
from llmopt.compiler.capture_hf import capture_model
from llmopt.compiler.errors import DeviceMemoryError, RecipeError, VerifyError
from llmopt.compiler.pipeline import Context
from llmopt.compiler.program import Program
from llmopt.compiler.recipe import RECIPES, PassSpec, Recipe
from llmopt.compiler.target import Target
from llmopt.passes import Canonicalize, InsertKVCache, Lower, QuantizeKV, RaiseAten
from llmopt.runtime.engine import Engine, SamplingParams

LENGTHS = (23, 1, 40)
# of each prompt, where steps end
WHOLE = [[23], [1], [40]]
CHUNKS = [[5, 6, 13, 22, 23], [1], [7, 30, 31, 32, 40]]


def recipe(page: int = 16, providers: tuple[str, ...] = ("reference",), **options: Any) -> Recipe:
    base = RECIPES["int4-kv"]
    passes = tuple(PassSpec.of(s.name, **options) if s.name == "quantize-kv" else s for s in base.passes)
    return Recipe("near", passes, page_size=page, providers=providers)


def mistral() -> Any:
    """With a window of 9 tokens."""
    torch.manual_seed(1)
    config = MistralConfig(
        vocab_size=128, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=1, head_dim=16, max_position_embeddings=CONTEXT, sliding_window=9, initializer_range=0.2,
    )  # fmt: skip
    return MistralForCausalLM(config).eval()


def prompts() -> list[Tensor]:
    return [torch.tensor(p) for p in ragged(*LENGTHS)]


def check(model: Any, options: dict[str, Any], page: int, cuts: list[list[int]]) -> None:
    compiled = llmopt.compile(model, recipe(page, **options), target="cpu:generic")
    got = stepped(compiled.session, prompts(), cuts)
    for logits, ids in zip(got, prompts(), strict=True):
        want = oracle(model, ids, options)
        torch.testing.assert_close(logits, want, atol=2e-4 * float(want.abs().max()), rtol=0)


@pytest.mark.parametrize("cuts", [WHOLE, CHUNKS], ids=["whole", "chunks"])
@pytest.mark.parametrize("page", [16, 2])
@pytest.mark.parametrize(
    "options",
    [
        {"sinks": 4, "recent": 0},
        {"sinks": 0, "recent": 1},
        {"sinks": 2, "recent": 7},
        {"sinks": 3, "recent": 5, "keys": "int8", "values": "none", "order": 8},
        {"sinks": 1, "recent": 6, "keys": "none", "values": "fp8", "rotate": "v"},
    ],
    ids=str,
)
def test_masks_over_whole_sequences_give_the_same(options: dict[str, Any], page: int, cuts: list[list[int]]) -> None:
    check(tiny("llama"), options, page, cuts)


@pytest.mark.parametrize("cuts", [WHOLE, CHUNKS], ids=["whole", "chunks"])
@pytest.mark.parametrize(
    "options",
    [
        {"sinks": 2, "recent": 4},
        {"sinks": 2, "recent": 30},  # more than the window
        {"sinks": 3, "recent": 5, "skip": (0,), "rotate": "kv", "values": "nvfp4"},
    ],
    ids=str,
)
def test_windows_and_layers_that_are_skipped(options: dict[str, Any], cuts: list[list[int]]) -> None:
    check(mistral(), options, 16, cuts)


def test_the_oracle_tells_one_token_more_or_less() -> None:
    """So that what passes above is meant so exactly."""
    model, ids = tiny("llama"), prompts()[0]
    want = oracle(model, ids, {"sinks": 2, "recent": 7})
    for other in ({"sinks": 3, "recent": 7}, {"sinks": 2, "recent": 6}, {"sinks": 2, "recent": 8}):
        assert (oracle(model, ids, other) - want).abs().max() > 4e-3 * want.abs().max()


@pytest.mark.parametrize("options", [{"recent": 40}, {"sinks": 40}, {"sinks": 1, "recent": 10**9}], ids=str)
def test_where_every_token_is_near_nothing_is_rounded(options: dict[str, Any]) -> None:
    plain = Recipe("plain", RECIPES["reference"].passes, providers=("reference",))
    want = stepped(llmopt.compile(tiny("llama"), plain, target="cpu").session, prompts(), CHUNKS)
    got = stepped(llmopt.compile(tiny("llama"), recipe(**options), target="cpu").session, prompts(), CHUNKS)
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5 * float(theirs.abs().max()), rtol=0)


def test_compiled_regions_give_what_the_reference_does(tmp_path: Path) -> None:
    """Also from an artifact, also where sequences are put out of a cache too small for all."""
    options, params = {"sinks": 2, "recent": 7}, SamplingParams(max_new_tokens=12)
    given = ragged(1, 9, 21, 33)
    plain = llmopt.compile(tiny("llama"), recipe(**options), target="cpu")
    want = [plain.engine.generate([prompt], params)[0] for prompt in given]
    model = llmopt.compile(tiny("llama"), recipe(providers=RECIPES["int4-kv"].providers, **options), target="cpu")
    assert model.engine.generate(given, params) == want
    assert model.cache.free_pages == model.cache.num_pages - 1
    assert model.program.near_pages == model.cache.near_pages == 3
    model.save(tmp_path / "made")
    loaded = llmopt.load(tmp_path / "made")
    assert loaded.program.near_pages == 3
    assert loaded.engine.generate(given, params) == want
    cache = loaded.cache
    assert cache.near_pages == 3
    small = llmopt.load(tmp_path / "made", cache_bytes=12 * cache.bytes_per_page)
    assert small.engine.generate(given, params) == want


def test_a_step_that_raised_is_not_repeated_over_what_it_wrote() -> None:
    """Chunks of 4 tokens, the third of which fails when everything is written."""
    model = llmopt.compile(tiny("llama"), recipe(sinks=1, recent=6), target="cpu")
    params, (prompt,), steps = SamplingParams(max_new_tokens=6), ragged(15), []

    def step(*given: Tensor) -> Tensor:
        logits: Tensor = model.session.step(*given)
        steps.append(given[0].shape[1])
        if len(steps) == 3:
            raise torch.OutOfMemoryError("no")
        return logits

    facts = model.program.facts
    sizes: dict[str, int] = {"vocab_size": facts.vocab_size, "context_length": facts.context_length}
    engine = Engine(step, model.cache, chunk_size=4, **sizes)
    engine.submit(prompt, params)
    assert engine.step() == engine.step() == []
    with pytest.raises(DeviceMemoryError):
        engine.step()
    made = []
    while engine.unfinished:
        made += [event.token for event in engine.step()]
    assert made == model.engine.generate([prompt], params)[0]
    assert steps == [4, 4, 4, 4, 4, 4, 3, *[1] * 5]


def test_without_the_options_nothing_is_added(tmp_path: Path) -> None:
    model = llmopt.compile(tiny("llama"), recipe(sinks=0, recent=0), target="cpu")
    assert not {"attend_near", "near_write"} & counts(model.program.graph("step")).keys()
    assert model.program.near_pages == 0
    model.save(tmp_path / "made")
    assert "near_pages" not in (tmp_path / "made" / "manifest.json").read_text()


def made(**options: Any) -> Program:
    program, _ = run(llama(head_dim=16), RaiseAten(), Canonicalize(), InsertKVCache(), QuantizeKV(**options))
    return program


def test_state_is_returned_by_the_write_behind_attention() -> None:
    program = made(sinks=1, recent=4, values="none")
    step = program.graph("step")
    assert [n.name for n in step.outputs()[1:]] == ["near_write", "kv_write_1", "near_write_1", "kv_write_3"]
    (seen, _), (write, _) = step.calls("attend_near"), step.calls("near_write")
    assert seen.args[-2:] == (1, 4)
    assert write.args[5] is seen
    assert not list(step.calls("attend"))
    lowered, _ = run(program, Lower())
    writes = [n for op in ("kv_write", "near_write") for n in lowered.graph("step").calls(op)]
    assert len(writes) == 6
    assert all(n.meta["in_place"] for n in writes)


def test_a_write_over_rows_that_others_read_is_refused() -> None:
    program = made(recent=4)
    step = program.graph("step")
    (write, *_), output = step.calls("near_write"), step.fx.output_node()
    with step.fx.inserting_before(output):
        late = step.call(ops.near_write.overload, (write.args[0], *write.args[1:5], write.args[5], 0, 4), write, "test")
    late.meta["val"] = write.meta["val"]
    with pytest.raises(
        VerifyError, match=r"pages are also read by .*near_write.*, perhaps after it; wanted attend_near"
    ):
        run(program, Lower())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"sinks": -1}, "pass 'quantize-kv': sinks is -1; wanted a number of tokens from 0 on"),
        ({"recent": -4}, "pass 'quantize-kv': recent is -4; wanted"),
        (
            {"keys": "none", "values": "none", "recent": 3},
            "keys and values are both none, so nothing is packed; wanted one of int4, int8, fp8, nvfp4 for one of them",
        ),
    ],
)
def test_options_that_are_wrong(options: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        made(**options)


def test_the_report_says_what_a_sequence_takes() -> None:
    model = llmopt.compile(tiny("llama"), recipe(sinks=1, recent=4), target="cpu")
    (notes,) = [entry.stats.notes for entry in model.report.passes if entry.name == "quantize-kv"]
    each = model.cache.bytes_per_page * model.cache.near_pages
    assert notes[1:] == [f"KV cache: {each} bytes a sequence for 1 first and 4 last tokens as they are"]


def test_bisect_keeps_near_pages() -> None:
    """Where all tokens are near, its steps give what `forward` does; where not, the pass is blamed."""
    context = Context(Target.parse("cpu:generic"), RECIPES["reference"])
    ids = torch.randint(128, (2, 20), generator=torch.Generator().manual_seed(3))
    passes = RaiseAten(), Canonicalize(), InsertKVCache()
    program = capture_model(tiny("llama"))
    for recent, blamed in ((20, False), (4, True)):
        found = bisect(program, [*passes, QuantizeKV(recent=recent)], context, ids)
        assert (found.culprit is not None) == blamed
