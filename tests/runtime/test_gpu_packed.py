"""Steps over packed keys and values on a GPU, also through Triton's interpreter, against the same recipe's plain
meaning and fp64."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from gpu_models import ragged
from interpreted import rounding
from lowbit_steps import Case, by_reference, errors, lowered

from llmopt.runtime.engine import SamplingParams
from llmopt.runtime.session import Session, open_session

pytestmark = pytest.mark.timeout(600)

WIDE = (("head_dim", 64), ("num_hidden_layers", 2))
CASES = (
    Case("int4-kv", "", WIDE),
    Case("int8-kv", "", WIDE),
    Case("fp8-kv", "", (("head_dim", 48),)),
)


@cache
def opened(case: Case) -> Session:
    """Over interpreted kernels."""
    from llmopt.codegen.interpret import launcher

    program, recipe, target, code = lowered(case)
    return open_session(program, recipe, target, code, launcher=launcher, device="cpu")


def check(case: Case, session: Session) -> None:
    """As near to fp64 as the reference, whose error is that of the packing."""
    ours, theirs = errors(case, session), errors(case, by_reference(case))
    for kind, error in ours.items():
        assert error <= 1.5 * theirs[kind], f"{kind}: {error:.2g} from fp64, the reference {theirs[kind]:.2g}"


@pytest.mark.interp
@pytest.mark.parametrize("case", CASES[::2], ids=lambda c: c.recipe)
def test_logits_are_as_near_to_fp64_as_the_reference_s(case: Case) -> None:
    *_, code = lowered(case)
    for shape, kernels in (("1", ["decode_packed"]), ("many", ["write_packed", "prefill_attention"])):
        calls = [c.kernel.template.partition(":")[0] for c in code.code("attention", shape).calls if c.kernel]
        assert calls == kernels
    with rounding():
        check(case, opened(case))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.recipe)
def test_a_gpu_s_logits_are_as_near_to_fp64(case: Case) -> None:
    program, recipe, target, code = lowered(case, "cuda")
    session = open_session(program, recipe, target, code)
    check(case, session)
    made = session.engine.generate(ragged(5, 9), SamplingParams(max_new_tokens=6))
    assert made == session.engine.generate(ragged(5, 9), SamplingParams(max_new_tokens=6))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("lengths", [(700,), (520, 900)])
def test_long_prompts_on_a_gpu(lengths: tuple[int, ...]) -> None:
    """By torch's attention over what the pages hold."""
    case = Case("int4-kv", "", (*WIDE, ("max_position_embeddings", 1024)))
    program, recipe, target, code = lowered(case, "cuda")
    ours = errors(case, open_session(program, recipe, target, code), lengths)
    theirs = errors(case, by_reference(case), lengths)
    assert all(error <= 1.5 * theirs[kind] for kind, error in ours.items()), (ours, theirs)
