"""Steps over packed pages with near tokens on a GPU, also through Triton's interpreter, against the same recipe's plain
meaning and fp64."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from gpu_models import ragged
from interpreted import rounding
from lowbit_steps import PAGE, Case, errors, of_a_prompt
from near_oracle import oracle, stepped
from torch import Tensor

from llmopt.compiler.recipe import PassSpec, Recipe
from llmopt.runtime.build import build
from llmopt.runtime.decoder import Batch
from llmopt.runtime.engine import SamplingParams
from llmopt.runtime.gpu_code import GpuCode, code_for
from llmopt.runtime.sampler import SampleRows
from llmopt.runtime.session import Session, open_session

pytestmark = pytest.mark.timeout(600)

CASE = Case("int4-kv", "", (("head_dim", 64),))
NEAR = ((1, 3), (2, 0), (0, 256))  # the last: every token
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@cache
def opened(first: int, recent: int, by: str, target: str = "cpu") -> Session:
    """`by` "triton": over kernels, on a CPU interpreted ones; "reference": by plain meanings. No tokens at all: of a
    plain cache."""
    recipe = Recipe.parse("int4-kv" if first or recent else "reference")
    options = {"sinks": first, "recent": recent}
    passes = (PassSpec.of(p.name, **options) if p.name == "quantize-kv" else p for p in recipe.passes)
    recipe = replace(recipe, passes=tuple(passes), page_size=PAGE)
    if by == "reference":
        program, _, context = build(CASE.model(), replace(recipe, providers=("reference",)), "cpu")
        return open_session(program, recipe, context.target, code_for(program, context.target))
    program, _, context = build(CASE.model(), recipe, "cuda:sm_90" if target == "cpu" else target)
    code = code_for(program, context.target)
    given: dict[str, Any] = {}
    if target == "cpu":
        from llmopt.codegen.interpret import launcher

        given = {"launcher": launcher, "device": "cpu"}
    return open_session(program, recipe, context.target, code, **given)


def decoded_along(session: Session, ids: Tensor, begin: int) -> Tensor:
    """Logits [T, V]: the first `begin` tokens as a prompt, each one after by a decoding step."""
    cache = session.cache
    row, logits = of_a_prompt(session, ids[:begin])
    made = [logits]
    for at in range(begin, len(ids)):
        cache.reserve(row, at + 1)
        sampling = SampleRows.of([SamplingParams()], [0], session.device)
        place = torch.tensor([at]), torch.tensor(cache.slots(row, at, at + 1)), torch.tensor([row])
        session.decoder.state.load(Batch(ids[at : at + 1], *place, cache.block_tables(), sampling, at + 1))
        made.append(session.step.decode(session.decoder.state, 1, 1).clone())
    cache.release(row)
    return torch.cat(made).float().cpu()


def check(near: tuple[int, int], session: Session) -> None:
    """As near to fp64 as the reference; where every token is near, as the reference with a plain cache."""
    ours = errors(CASE, session)
    theirs = errors(CASE, opened(*(near if near[1] < 256 else (0, 0)), "reference"))
    for kind, error in ours.items():
        assert error <= 1.5 * theirs[kind], f"{kind}: {error:.2g} from fp64, the reference {theirs[kind]:.2g}"


def check_along(near: tuple[int, int], session: Session) -> None:
    """Nearer to masks over the whole sequence than to those of any other near tokens, and as near as the reference."""
    ids = torch.tensor(ragged(12)[0])

    def error(logits: Tensor, first: int, recent: int) -> float:
        want = oracle(CASE.model().float(), ids, {"sinks": first, "recent": recent})
        return float((logits - want).norm() / want.norm())

    ours = decoded_along(session, ids, 5)
    (theirs,) = stepped(opened(*near, "reference"), [ids], [[5, *range(6, 13)]])
    least = error(ours, *near)
    assert least <= 1.5 * error(theirs.float(), *near)
    for first, recent in ((0, 0), (1, 2), (1, 4), (0, 3), (2, 3), (1, 0), (3, 0)):
        assert error(ours, first, recent) > 1.1 * least, (first, recent)


@pytest.mark.interp
@pytest.mark.parametrize("near", NEAR, ids=str)
def test_logits_are_as_near_to_fp64_as_the_reference_s(near: tuple[int, int]) -> None:
    session = opened(*near, "triton")
    code = session.step.code
    assert isinstance(code, GpuCode)
    calls = {shape: code.code("attention", shape).calls for shape in ("1", "many")}
    assert [c.kernel.template for c in calls["1"] if c.kernel] == ["decode_packed:decode_packed"]
    assert calls["many"][-1].op == "attend_near"
    with rounding():
        check(near, session)


@pytest.mark.interp
@pytest.mark.parametrize("near", NEAR[:1], ids=str)
def test_the_ring_goes_round_in_decoding(near: tuple[int, int]) -> None:
    with rounding():
        check_along(near, opened(*near, "triton"))


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("near", NEAR, ids=str)
def test_a_gpu_s_logits_are_as_near_to_fp64(near: tuple[int, int]) -> None:
    session = opened(*near, "triton", "cuda")
    check(near, session)
    check_along(near, session)
    params = SamplingParams(max_new_tokens=12)
    assert session.engine.generate(ragged(5, 9), params) == session.engine.generate(ragged(5, 9), params)
