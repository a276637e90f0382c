"""quantize-kv: what it rewrites, what it refuses, and the tokens that come of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gpu_models import ragged, tiny
from lowbit_steps import of_a_prompt
from torch import Tensor

import llmopt
from llmopt.compiler.errors import InputError, PassOrderError, RecipeError
from llmopt.compiler.ops.attention import attend, kv_write
from llmopt.compiler.pipeline import Context, Pipeline
from llmopt.compiler.program import Program
from llmopt.compiler.quant.kv import Packing
from llmopt.compiler.recipe import RECIPES, PassSpec, Recipe
from llmopt.compiler.target import Target
from llmopt.passes import Canonicalize, InsertKVCache, QuantizeKV, RaiseAten
from llmopt.runtime.engine import SamplingParams


def step_of(head_dim: int = 32, **options: Any) -> Program:
    from llmopt.compiler.capture_hf import capture_model

    context = Context(Target.parse("cpu:generic"), RECIPES["reference"])
    passes = [RaiseAten(), Canonicalize(), InsertKVCache(), QuantizeKV(**options)]
    return Pipeline(passes).run(capture_model(tiny("llama", head_dim=head_dim)), context)


def packings(program: Program) -> list[tuple[Any, ...]]:
    return [node.args[10:] for node in program.graph("step").calls("attend")]


def recipe(**options: Any) -> Recipe:
    base = RECIPES["int4-kv"]
    passes = tuple(PassSpec.of(s.name, **options) if s.name == "quantize-kv" else s for s in base.passes)
    return Recipe("made", passes)


def test_writes_and_attentions_name_their_packings() -> None:
    program = step_of()
    assert packings(program) == [("int4-h32", "int4")] * 2
    written = [node.args[3] for node in program.graph("step").calls("kv_write")]
    assert written == ["int4-h32", "int4"] * 2
    assert {(spec.shape, spec.dtype) for spec in program.state} == {((2, 16, 20), torch.uint8)}
    program.graph("step").print()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"rotate": "none"}, ("int4", "int4")),
        ({"rotate": "kv", "order": 8}, ("int4-h8", "int4-h8")),
        ({"rotate": "v", "values": "int8"}, ("int4", "int8-h32")),
        ({"keys": "fp8", "values": "none", "order": 1}, ("fp8", "")),
        ({"keys": "nvfp4", "order": 16}, ("nvfp4-h16", "int4")),
    ],
)
def test_options(options: dict[str, Any], expected: tuple[str, str]) -> None:
    assert packings(step_of(**options)) == [expected] * 2


def test_attentions_are_skipped_by_number() -> None:
    program = step_of(skip=(1,))
    assert packings(program) == [("int4-h32", "int4"), ()]
    assert [spec.dtype for spec in program.state] == [torch.uint8] * 2 + [torch.float32] * 2


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"keys": "int3"}, "keys is 'int3'; wanted one of int4, int8, fp8, nvfp4, none"),
        ({"rotate": "q"}, "rotate is 'q'; wanted k, v, kv or none"),
        ({"rotate": "none", "order": 16}, "order is 16 and rotate is none, so nothing is rotated; wanted rotate k"),
        ({"order": 12}, "order is 12; wanted 0"),
        ({"keys": "none", "values": "none"}, "keys and values are both none, so nothing is packed; wanted one of int4"),
        ({"skip": (0, 1, 1)}, "skip names all 2 attentions, so nothing is left to pack"),
        ({"skip": (2,)}, "skip has 2; the model's attentions are numbered 0 to 1"),
    ],
)
def test_options_that_are_wrong(options: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        step_of(**options)


def test_what_cannot_be_packed_is_told() -> None:
    with pytest.raises(
        InputError, match=r"heads of 32 channels cannot be packed as int4-h64: .*; wanted a smaller order, "
    ):
        step_of(order=64)
    with pytest.raises(InputError, match=r"packed as nvfp4: .*; wanted another packing, or skip"):
        step_of(keys="nvfp4", rotate="none", head_dim=24)


@pytest.mark.parametrize("name", ["int4-kv", "rotate+nvfp4-kv"])
def test_the_cpu_s_kernels_make_the_reference_s_tokens(name: str) -> None:
    """Also in chunks, since a token sees its own key as it is stored."""
    parsed = Recipe.parse(name)
    prompts, params = ragged(1, 9, 21), SamplingParams(max_new_tokens=8)
    plain = llmopt.compile(tiny("llama"), Recipe(name, parsed.passes, providers=("reference",)), target="cpu")
    want = plain.engine.generate(prompts, params)
    model = llmopt.compile(tiny("llama"), parsed, target="cpu")
    assert model.engine.generate(prompts, params) == want
    assert all(t.dtype == torch.uint8 for t in model.cache.tensors.values())


def test_a_cache_of_eight_bits_gives_nearly_the_logits_of_the_whole_one() -> None:
    logits = {}
    for name in ("reference", "int8-kv", "int4-kv"):
        parsed = Recipe(name, Recipe.parse(name).passes, providers=("reference",))
        session = llmopt.compile(tiny("qwen3"), parsed, target="cpu").session
        logits[name] = of_a_prompt(session, torch.tensor(ragged(40)[0]))[1]
    want = logits.pop("reference")
    errors = {name: float((got - want).norm() / want.norm()) for name, got in logits.items()}
    assert 0 < errors["int8-kv"] < 0.03
    assert errors["int8-kv"] < 0.3 * errors["int4-kv"]


def test_the_report_says_how_many_bytes_a_token_takes() -> None:
    model = llmopt.compile(tiny("llama", head_dim=64), recipe(), target="cpu")
    (notes,) = [entry.stats.notes for entry in model.report.passes if entry.name == "quantize-kv"]
    assert notes == ["KV cache: 2048 -> 288 bytes a token, 7.11 times less"]


def test_reading_other_sequences_pages_is_never_needed() -> None:
    """Pages that no token may see hold NaN scales."""
    how = Packing.parse("int4-h16")
    make = torch.Generator().manual_seed(0)
    pages = [torch.full((6, 2, 4, how.row_bytes(16)), 255, dtype=torch.uint8) for _ in "kv"]
    slots, tables = torch.tensor([8, 9, 10, 11, 4]), torch.tensor([[2, 1, 5], [3, 3, 3]])
    x = torch.randn(1, 2, 5, 16, generator=make)
    k, v = (kv_write(p, x, slots, str(how)) for p in pages)
    q, at = torch.randn(1, 4, 1, 16, generator=make), torch.tensor([[4]])
    given: tuple[Tensor, ...] = (k, v, tables, torch.tensor([0]), at)
    got = attend(q, *given, None, 0.25, 0, 0.0, str(how), str(how))
    assert torch.isfinite(got).all()
    rows = how.turned_back(how.unpack(how.pack(x)))
    plain = torch.zeros(6, 2, 4, 16)
    plain = kv_write(plain, rows, slots)
    want = attend(q, plain, plain, tables, torch.tensor([0]), at, None, 0.25, 0, 0.0)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


def test_the_pass_stands_behind_the_cache() -> None:
    first = PassSpec.of("quantize-kv")
    passes = RECIPES["int4-kv"].passes
    before = [p for p in passes if p.name != "quantize-kv"]
    before.insert([p.name for p in before].index("insert-kv-cache"), first)
    with pytest.raises(PassOrderError, match=r"quantize-kv.*cached"):
        llmopt.compile(tiny("llama"), Recipe("made", tuple(before)), target="cpu:generic")
