"""Steps with low-bit weights on a GPU, through Triton's interpreter: which kernels they are, and how exact.

Weights are exact in every format, so the truth is the model in fp64 with the weights that the formats hold.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import pytest
import torch
from gpu_models import ragged, tiny
from interpreted import rounding
from torch import Tensor, nn

from llmopt.codegen.kernel import RegionCode
from llmopt.compiler.program import Program
from llmopt.compiler.quant import quantize
from llmopt.compiler.recipe import Recipe
from llmopt.compiler.target import Target
from llmopt.runtime.build import build
from llmopt.runtime.decoder import Batch
from llmopt.runtime.engine import SamplingParams
from llmopt.runtime.gpu_code import GpuCode, code_for
from llmopt.runtime.prepared import prepare_weights
from llmopt.runtime.sampler import SampleRows
from llmopt.runtime.session import Session, open_session

pytestmark = [pytest.mark.interp, pytest.mark.timeout(600)]

PAGE = 4
PROMPTS = (9, 6, 1)  # lengths of what is decoded from


@dataclass(frozen=True)
class Case:
    """A recipe, the scheme it gives weights, and how the tiny model differs."""

    recipe: str
    scheme: str
    changes: tuple[tuple[str, Any], ...] = ()

    def model(self) -> Any:
        """In bf16, of one layer."""
        wider = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1}
        return tiny("llama", torch.bfloat16, **{**wider, **dict(self.changes)})

    def exact(self) -> Any:
        """The model in fp64 with the weights that the program holds: q, k, v and gate, up as one matrix each."""
        model = self.model().double()
        for layer in model.model.layers:
            a, m = layer.self_attn, layer.mlp
            for group in ([a.q_proj, a.k_proj, a.v_proj], [a.o_proj], [m.gate_proj, m.up_proj], [m.down_proj]):
                self._round(group)
        return model

    def _round(self, group: list[nn.Linear]) -> None:
        whole = torch.cat([linear.weight.detach().bfloat16() for linear in group])
        rounded = quantize(whole, self.scheme, "search").dequantize(torch.float64)
        for linear, part in zip(group, rounded.split([linear.out_features for linear in group]), strict=True):
            linear.weight.data.copy_(part)


BIASES = (("attention_bias", True), ("mlp_bias", True))
CASES = (
    Case("nvfp4", "nvfp4"),
    Case("mxfp4", "mxfp4", BIASES),
    Case("int4", "int4_g128"),
    Case("int4-asym", "int4_g128_asym", BIASES),
    Case("fp8", "fp8_channel", (("intermediate_size", 40),)),  # halves that end inside a stripe of rows
)


@cache
def lowered(case: Case) -> tuple[Program, Recipe, Target, GpuCode]:
    recipe = replace(Recipe.parse(case.recipe), page_size=PAGE)
    program, _, context = build(case.model(), recipe, "cuda:sm_90")
    code = code_for(program, context.target)
    assert isinstance(code, GpuCode)
    return program, recipe, context.target, code


@cache
def opened(case: Case) -> Session:
    """Over interpreted kernels."""
    from llmopt.codegen.interpret import launcher

    program, recipe, target, code = lowered(case)
    return open_session(program, recipe, target, code, launcher=launcher, device="cpu")


def by_reference(case: Case) -> Session:
    """The same recipe, every op by its plain meaning."""
    recipe = replace(Recipe.parse(case.recipe), page_size=PAGE, providers=("reference",))
    program, _, context = build(case.model(), recipe, "cpu")
    return open_session(program, recipe, context.target, code_for(program, context.target))


def of_a_prompt(session: Session, ids: Tensor) -> tuple[int, Tensor]:
    """The row that its sequence has in the cache, and logits of every token."""
    row = session.cache.open()
    session.cache.reserve(row, len(ids) + 1)
    slots, at = torch.tensor(session.cache.slots(row, 0, len(ids))), torch.arange(len(ids))
    tables = session.cache.block_tables()
    return row, session.step(ids[None], at[None], slots, torch.full_like(slots, row), tables, at)


def decoded(session: Session, prompts: list[list[int]]) -> Tensor:
    """Logits [len(prompts), V] of a token more, all sequences in one step."""
    rows = [of_a_prompt(session, torch.tensor(prompt[:-1]))[0] for prompt in prompts]
    ids, at = torch.tensor([p[-1] for p in prompts]), torch.tensor([len(p) - 1 for p in prompts])
    slots = torch.tensor([session.cache.slots(r, int(n), int(n) + 1)[0] for r, n in zip(rows, at, strict=True)])
    tables, numbers = session.cache.block_tables(), torch.tensor(rows)
    if session.decoder is None:
        step = session.step(ids[None], at[None], slots, numbers, tables, torch.arange(len(rows)))
    else:
        greedy = SampleRows.of([SamplingParams()] * len(rows), [0] * len(rows))
        session.decoder.state.load(Batch(ids, at, slots, numbers, tables, greedy, int(at.max()) + 1))
        step = session.step.decode(session.decoder.state, len(rows), 1)
    for row in rows:
        session.cache.release(row)
    return step


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.recipe)
def test_logits_are_as_near_to_fp64_as_the_reference_s(case: Case) -> None:
    """Of a prompt's tokens, and of tokens decoded alone and beside others."""
    session, plain, exact = opened(case), by_reference(case), case.exact()
    prompts = [[*ragged(n)[0], 7] for n in PROMPTS]
    with torch.no_grad():
        truth = [exact(torch.tensor([p]), use_cache=False).logits[0] for p in prompts]
    ids = torch.tensor(prompts[0])
    wanted = [truth[0], truth[0][-1:], torch.stack([t[-1] for t in truth])]
    errors = []
    for one in (session, plain):
        with rounding():
            row, whole = of_a_prompt(one, ids)
            one.cache.release(row)
            found = [whole, decoded(one, prompts[:1]), decoded(one, prompts)]
        errors.append([float((f.double() - w).norm() / w.norm()) for f, w in zip(found, wanted, strict=True)])
    for kind, ours, theirs in zip(("prompt", "one", "several"), *errors, strict=True):
        assert ours <= 1.5 * theirs, f"{kind}: {ours:.2g} from fp64, the reference {theirs:.2g}"


@pytest.mark.parametrize("case", CASES[:4], ids=lambda c: c.recipe)
def test_a_product_in_decoding_is_one_kernel_over_its_low_bit_weights(case: Case) -> None:
    program, _, _, code = lowered(case)
    called = [str(n.target) for n in program.graph("step").fx.nodes if n.op == "call_module"]
    assert len(called) == 5 + 3
    for shape in ("1", "8", "64"):
        made = [code.code(name, shape) for name in called]
        assert [len(region.calls) for region in made] == [1] * len(called)
        assert [region.notes for region in made] == [()] * len(called)
        templates = [str(region.calls[0].kernel and region.calls[0].kernel.template) for region in made]
        assert templates == [
            "rows:rows", "rows:rows", "lowbit:lowbit", "decode_attention:decode_attention", *["lowbit:lowbit"] * 3,
            "gemv:gemv" if shape == "1" else "gemm:gemm",
        ]  # fmt: skip
        assert [len(region.prepared) for region in made] == [0, 0, 1, 0, 1, 1, 1, 0]


def calls(region: RegionCode) -> list[str]:
    """Templates and ops of torch, in order."""
    return [str(c.op) if c.kernel is None else c.kernel.template.partition(":")[0] for c in region.calls]


def test_elsewhere_weights_are_decoded_for_torch_s_product() -> None:
    *_, code = lowered(CASES[0])
    ops = {name: calls(code.code(name, "many")) for name in ("gemm", "gemm_1", "gemm_2")}
    assert ops["gemm"] == ["rows", "decoded", "linear"]
    assert ops["gemm_1"] == ["decoded", "linear_add"]
    assert ops["gemm_2"] == ["rows", "decoded", "linear", "rows"]


def test_halves_that_end_inside_a_stripe_are_torch_s_with_a_note() -> None:
    *_, code = lowered(CASES[-1])
    region = code.code("gemm_2", "8")
    assert calls(region) == ["rows", "decoded", "linear", "rows"]
    (note,) = region.notes
    assert "its row 40 begins a part" in note
    assert region.prepared == code.code("gemm_2", "many").prepared


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
