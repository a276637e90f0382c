"""Steps over packed keys and values on a GPU, also through Triton's interpreter, against the same recipe's plain
meaning and fp64."""

from __future__ import annotations

from functools import cache

import attention_cases as cases
import pytest
import torch
from gpu_models import ragged
from interpreted import rounding
from lowbit_steps import Case, by_reference, errors, lowered

from llmopt.codegen.templates import write_packed
from llmopt.compiler.ops.attention import kv_write
from llmopt.compiler.quant.kv import KINDS, Packing, pages_of
from llmopt.runtime.engine import SamplingParams
from llmopt.runtime.session import Session, open_session

pytestmark = pytest.mark.timeout(600)

WIDE = (("head_dim", 64), ("num_hidden_layers", 2))
CASES = (
    Case("int4-kv", "", WIDE),
    Case("int8-kv", "", WIDE),
    Case("fp8-kv", "", (("head_dim", 48),)),
    Case("nvfp4-kv", "", (("head_dim", 80),)),
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
@pytest.mark.parametrize("case", CASES[::3], ids=lambda c: c.recipe)
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


def stored(x: torch.Tensor, packing: Packing, parts: int) -> list[torch.Tensor]:
    """Pages of x [N, H, D] as keys and as values, by the kernel, and x rotated as two queries a key have it."""
    (count, heads, size), asked = x.shape, x.repeat_interleave(2, 1)
    turned = torch.empty_like(asked)
    pages = [
        torch.zeros(count // 16, heads, 16, packing.row_bytes(size), dtype=torch.uint8, device="cuda") for _ in "kv"
    ]
    none, sizes = torch.zeros(1, device="cuda"), torch.tensor([2 * heads, heads, size, size], device="cuda")
    write_packed.write_packed[(count, heads, parts)](
        turned, None, None, *pages, torch.arange(count, device="cuda"), asked, none, none, x, x, sizes,
        HQ=2 * heads, HKV=heads, D=size, DV=size, PAGE=16, LOAD_Q=cases.plain_q, LOAD_K=cases.plain_k,
        LOAD_V=cases.plain_v, K_KIND=packing.kind, K_ORDER=packing.order, V_KIND=packing.kind, V_ORDER=packing.order,
        PDL=False, num_warps=1,
    )  # fmt: skip
    return [*pages, turned[:, ::2]]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("size", "order"), [(128, 1), (128, 128), (80, 16)])
@pytest.mark.parametrize("kind", KINDS)
def test_a_gpu_stores_the_bytes_of_the_op(kind: str, size: int, order: int) -> None:
    """Of vectors of any magnitude, constant ones and zeros; what is not finite stays so."""
    packing, make = Packing(kind, order), torch.Generator("cuda").manual_seed(3)
    x = torch.randn(8192, 8, size, generator=make, device="cuda")
    x = (x * 2.0 ** torch.randint(-90, 90, (8192, 8, 1), generator=make, device="cuda")).bfloat16()
    x[:8, 0] = torch.tensor([0.0, -7.25, 1e30, 2.0**-120, -(2.0**-101), 3e-39, 448.0, -0.0], device="cuda")[:, None]
    pages = torch.zeros(512, 8, 16, packing.row_bytes(size), dtype=torch.uint8, device="cuda")
    want = kv_write(pages, x.transpose(0, 1)[None], torch.arange(8192, device="cuda"), str(packing))
    for parts in (1, 3, 4):
        k_pages, v_pages, turned = stored(x, packing, parts)
        assert torch.equal(k_pages, want)
        assert torch.equal(v_pages, want)
        assert torch.equal(turned, packing.asked(x).bfloat16())
    x[9, 1, 5], x[10, 2, size - 1], x[11, 3, 0] = torch.nan, -torch.inf, torch.inf
    for got in stored(x, packing, 1)[:2]:
        rows = packing.unpack(torch.cat(pages_of(got, packing), -1)).transpose(1, 2).flatten(0, 1)
        assert (~torch.isfinite(rows).all(2)).nonzero().tolist() == [[9, 1], [10, 2], [11, 3]]


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
