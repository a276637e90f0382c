"""Steps with low-bit weights on a GPU, also through Triton's interpreter: which kernels they are, and how exact."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from gpu_models import ragged
from interpreted import rounding
from lowbit_steps import CASES, HANDED_CASES, PROMPTS, Case, by_reference, decoded, errors, lowered

from llmopt.codegen.kernel import RegionCode
from llmopt.runtime.engine import SamplingParams
from llmopt.runtime.prepared import only_prepared, prepare_weights
from llmopt.runtime.session import Session, open_session

pytestmark = pytest.mark.timeout(600)


@cache
def opened(case: Case) -> Session:
    """Over interpreted kernels."""
    from llmopt.codegen.interpret import launcher

    program, recipe, target, code = lowered(case)
    return open_session(program, recipe, target, code, launcher=launcher, device="cpu")


def check(case: Case, session: Session, lengths: tuple[int, ...] = PROMPTS) -> None:
    """No farther from fp64 than half as far again as the same recipe with every op by its plain meaning."""
    ours, theirs = errors(case, session, lengths), errors(case, by_reference(case), lengths)
    for kind, error in ours.items():
        assert error <= 1.5 * theirs[kind], f"{kind}: {error:.2g} from fp64, the reference {theirs[kind]:.2g}"


@pytest.mark.interp
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.recipe)
def test_logits_are_as_near_to_fp64_as_the_reference_s(case: Case) -> None:
    with rounding():
        check(case, opened(case))


ELEVEN = (7, 5, 2, 4, 3, 2, 6, 2, 3, 2, 2)  # the first one is read as a prompt, too: few tokens would be all chance


@pytest.mark.interp
@pytest.mark.parametrize("case", HANDED_CASES, ids=lambda c: c.recipe)
def test_what_is_handed_over_in_another_order_is_the_same(case: Case) -> None:
    """Eleven sequences decode by wgmma; attention and gate|up write in the order of o and down, in every layer."""
    *_, code = lowered(case)
    orders = [dict(code.code(name, "16").calls[-1].kernel.constants) for name in code.names()[2:6]]
    width = {"nvfp4": 16, "mxfp4": 32, "int4": 8}[case.recipe]
    assert [constants["ORDER"] for constants in orders] == [0, width, 0, width]
    assert [constants.get("ORDERED") for constants in orders] == [1, None, 1, 1]
    assert calls(code.code("gemm_1", "16")) == ["lowbit"]
    with rounding():
        check(case, opened(case), ELEVEN)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("case", HANDED_CASES, ids=lambda c: c.recipe)
def test_a_gpu_hands_over_in_another_order(case: Case) -> None:
    program, recipe, target, code = lowered(case, "cuda")
    check(case, open_session(program, recipe, target, code), ELEVEN)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.recipe)
def test_a_gpu_s_logits_are_as_near_to_fp64(case: Case) -> None:
    """Codes and scales stay on the host; graphs give the same tokens again."""
    program, recipe, target, code = lowered(case, "cuda")
    session = open_session(program, recipe, target, code)
    check(case, session)
    apart = only_prepared(program)
    assert apart
    assert {name for name, weight in session.weights.items() if weight.device.type == "cpu"} == apart
    made = session.engine.generate(ragged(5, 9), SamplingParams(max_new_tokens=6))
    assert session.engine.generate(ragged(5, 9), SamplingParams(max_new_tokens=6)) == made
    assert session.decoder is not None
    assert session.decoder.captured > 0


@pytest.mark.interp
@pytest.mark.parametrize("case", CASES[:4], ids=lambda c: c.recipe)
def test_a_product_in_decoding_is_one_kernel_over_its_low_bit_weights(case: Case) -> None:
    program, _, _, code = lowered(case)
    called = [str(n.target) for n in program.graph("step").fx.nodes if n.op == "call_module"]
    assert len(called) == 5 + 3
    for shape in ("1", "8"):
        made = [code.code(name, shape) for name in called]
        assert [region.notes for region in made] == [()] * len(called)
        assert [calls(region) for region in made] == [
            ["rows"], ["rows"], ["lowbit"], ["decode_attention"], *[["lowbit"]] * 3,
            ["gemv" if shape == "1" else "gemm"],
        ]  # fmt: skip
        assert [len(region.prepared) for region in made] == [0, 0, 1, 0, 1, 1, 1, 0]


@pytest.mark.interp
def test_many_tokens_are_first_brought_into_the_order_of_wgmma() -> None:
    """Behind a norm sooner, which is then computed once; not where columns do not fill the order's blocks."""
    *_, code = lowered(CASES[0])  # 64 columns, for down 96
    products = ("gemm", "gemm_1", "gemm_2", "gemm_3")
    found = {shape: [calls(code.code(name, shape)) for name in products] for shape in ("8", "16", "64")}
    alone, both = ["lowbit"], ["rows", "lowbit"]
    assert found["8"] == [alone, alone, alone, alone]
    assert found["16"] == found["64"] == [both, alone, both, alone]  # attention writes so itself


def calls(region: RegionCode) -> list[str]:
    """Templates and ops of torch, in order."""
    return [str(c.op) if c.kernel is None else c.kernel.template.partition(":")[0] for c in region.calls]


@pytest.mark.interp
def test_elsewhere_weights_are_decoded_for_torch_s_product() -> None:
    *_, code = lowered(CASES[0])
    ops = {name: calls(code.code(name, "many")) for name in ("gemm", "gemm_1", "gemm_2")}
    assert ops["gemm"] == ["rows", "decoded", "linear"]
    assert ops["gemm_1"] == ["decoded", "linear_add"]
    assert ops["gemm_2"] == ["rows", "decoded", "linear", "rows"]


@pytest.mark.interp
def test_halves_that_end_inside_a_stripe_are_torch_s_with_a_note() -> None:
    *_, code = lowered(CASES[-1])
    region = code.code("gemm_2", "8")
    assert calls(region) == ["rows", "decoded", "linear", "rows"]
    (note,) = region.notes
    assert "its row 40 begins a part" in note
    assert region.prepared == code.code("gemm_2", "many").prepared


@pytest.mark.interp
def test_weights_are_laid_out_once_for_all_classes_and_before_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    from llmopt.runtime import prepared, session

    made: list[str] = []
    lay = prepared.FORMS["lowbit"]
    monkeypatch.setattr(
        prepared, "FORMS", {"lowbit": lambda *args, **told: (made.append("laid"), lay(*args, **told))[1]}
    )
    before = session.open_cache
    monkeypatch.setattr(session, "open_cache", lambda *args: (made.append("cache"), before(*args))[1])
    opened.cache_clear()
    found = opened(CASES[0])
    assert made == ["laid"] * 4 + ["cache"]
    with rounding():
        for count in (1, 2):
            decoded(found, [[3, 4]] * count)
    prepare_weights(lowered(CASES[0])[-1], found.weights, found.device)
    assert len(made) == 5
