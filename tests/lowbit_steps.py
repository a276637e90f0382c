"""Steps of a tiny model with low-bit weights: its truth in fp64, and logits of prompts and of decoding steps.

Weights are exact in every format, so the truth is the model in fp64 with the weights that the format holds.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from gpu_models import ragged, tiny
from torch import Tensor, nn

from llmopt.compiler.program import Program
from llmopt.compiler.quant import quantize
from llmopt.compiler.recipe import PassSpec, Recipe
from llmopt.compiler.target import Target
from llmopt.runtime.build import build
from llmopt.runtime.decoder import Batch
from llmopt.runtime.engine import SamplingParams
from llmopt.runtime.gpu_code import GpuCode, code_for
from llmopt.runtime.sampler import SampleRows
from llmopt.runtime.session import Session, open_session

PAGE = 4
PROMPTS = (7, 4)  # lengths of what is decoded from


@dataclass(frozen=True)
class Case:
    """A recipe, the scheme it gives weights ("": none), and how the tiny model differs."""

    recipe: str
    scheme: str
    changes: tuple[tuple[str, Any], ...] = ()

    def model(self) -> Any:
        """In bf16, of one layer."""
        wider = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1}
        return tiny("llama", torch.bfloat16, **{**wider, **dict(self.changes)})

    def parsed(self) -> Recipe:
        """The recipe, with weights in the scheme."""
        recipe = replace(Recipe.parse(self.recipe), page_size=PAGE)
        passes = []
        for spec in recipe.passes:
            options = dict(spec.options)
            if self.scheme and "weights" in options:
                spec = PassSpec.of(spec.name, **{**options, "weights": self.scheme})
            passes.append(spec)
        return replace(recipe, passes=tuple(passes))

    def exact(self) -> Any:
        """The model in fp64 with the weights that the program holds: q, k, v and gate, up as one matrix each."""
        model = self.model().double()
        for layer in model.model.layers:
            a, m = layer.self_attn, layer.mlp
            for group in ([a.q_proj, a.k_proj, a.v_proj], [a.o_proj], [m.gate_proj, m.up_proj], [m.down_proj]):
                self._round(group)
        return model

    def _round(self, group: list[nn.Linear]) -> None:
        if not self.scheme:
            return
        whole = torch.cat([linear.weight.detach().bfloat16() for linear in group])
        rounded = quantize(whole, self.scheme, "search").dequantize(torch.float64)
        for linear, part in zip(group, rounded.split([linear.out_features for linear in group]), strict=True):
            linear.weight.data.copy_(part)


SCHEME_OF = {"nvfp4": "nvfp4", "mxfp4": "mxfp4", "int4": "int4_g128"}
BIASES = (("attention_bias", True), ("mlp_bias", True))
CASES = (
    Case("nvfp4", "nvfp4"),
    Case("mxfp4", "mxfp4", BIASES),
    Case("int4", "int4_g128"),
    Case("int4-asym", "int4_g128_asym", BIASES),
    Case("int4", "int4_g32_f16"),
    Case("int4-asym", "int4_g128_asym_f16", BIASES),
    Case("fp8", "fp8_channel", (("intermediate_size", 40),)),  # halves that end inside a stripe of rows
)

# attention and gate|up hand their results over in the order that the next product wants
HANDED = (("hidden_size", 128), ("head_dim", 32), ("intermediate_size", 256), ("num_hidden_layers", 2))
HANDED_CASES = tuple(Case(recipe, SCHEME_OF[recipe], HANDED) for recipe in ("nvfp4", "mxfp4", "int4"))


@cache
def lowered(case: Case, target: str = "cuda:sm_90") -> tuple[Program, Recipe, Target, GpuCode]:
    recipe = case.parsed()
    program, _, context = build(case.model(), recipe, target)
    code = code_for(program, context.target)
    assert isinstance(code, GpuCode)
    return program, recipe, context.target, code


def by_reference(case: Case) -> Session:
    """The same recipe, every op by its plain meaning."""
    recipe = replace(case.parsed(), providers=("reference",))
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
        greedy = SampleRows.of([SamplingParams()] * len(rows), [0] * len(rows), session.device)
        session.decoder.state.load(Batch(ids, at, slots, numbers, tables, greedy, int(at.max()) + 1))
        step = session.step.decode(session.decoder.state, len(rows), 1)
    for row in rows:
        session.cache.release(row)
    return step


def errors(case: Case, session: Session, lengths: tuple[int, ...] = PROMPTS) -> dict[str, float]:
    """Of logits against fp64, in the norm: of a prompt's tokens, of one decoded alone, of all decoded together."""
    prompts = [[*ragged(n)[0], 7] for n in lengths]
    exact = case.exact()
    with torch.no_grad():
        truth = [exact(torch.tensor([p]), use_cache=False).logits[0] for p in prompts]
    row, whole = of_a_prompt(session, torch.tensor(prompts[0]))
    session.cache.release(row)
    pairs = {
        "prompt": (whole, truth[0]),
        "one": (decoded(session, prompts[:1]), truth[0][-1:]),
        "several": (decoded(session, prompts), torch.stack([t[-1] for t in truth])),
    }
    return {kind: float((found.cpu() - wanted).norm() / wanted.norm()) for kind, (found, wanted) in pairs.items()}
