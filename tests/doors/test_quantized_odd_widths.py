"""Low-bit weights whose rows are no whole groups: compiled code against the plain meaning, in every dtype.

A row of 200 or 328 columns ends within a group of 16, 32 and 128, and one of 704 within 128.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import llmopt
from llmopt.codegen.cpp import cpp_available
from llmopt.codegen.inductor import compile_regions, load_region
from llmopt.compiler._torch import fake_mode, fake_tensor
from llmopt.compiler.op import OPS
from llmopt.compiler.quant import quantize
from llmopt.runtime.perplexity import step_logits

reason = cpp_available()
pytestmark = [pytest.mark.skipif(reason is not None, reason=str(reason)), pytest.mark.timeout(240)]

PICO = Path(__file__).parents[2] / "examples" / "models" / "pico-llama-4m"
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
# what the recipes make of weights and activations
WAYS = {
    "nvfp4": ("nvfp4", ""),
    "mxfp4": ("mxfp4", ""),
    "int4": ("int4_g128", ""),
    "int4-asym": ("int4_g128_asym", ""),
    "fp8": ("fp8_channel", ""),
    "w4a4": ("nvfp4", "nvfp4"),
    "w8a8": ("int8", "int8"),
}
HIDDEN, INNER, OUT = 200, 328, 24


def product(way: str, dtype: torch.dtype) -> tuple[Any, list[Tensor]]:
    """A function of rows [1, 5, 200] and the stored parts of a weight [24, 200], and these."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 5, HIDDEN, generator=generator).to(dtype)
    made = quantize(torch.randn(OUT, HIDDEN, generator=generator), WAYS[way][0], "search")
    parts = made.packed(), made.scales, made.global_scale, made.zero_points
    have = [part is not None for part in parts]

    def function(x: Tensor, *given: Tensor) -> list[Tensor]:
        rest = iter(given)
        stored = (next(rest) if there else None for there in have)
        return [OPS["quantized_linear"].fn(torch.relu(x), *stored, None, *WAYS[way])]

    return function, [x, *(part for part in parts if part is not None)]


def test_products_are_those_of_the_plain_meaning():
    """Every recipe in every dtype; compiled together, since most of the time is the compiler's start."""
    cases = {(way, dtype): product(way, dtype) for way in WAYS for dtype in DTYPES}
    jobs = []
    for function, args in cases.values():
        mode = fake_mode()
        shapes = [(1, "N", HIDDEN), *(a.shape for a in args[1:])]
        jobs.append((function, [fake_tensor(mode, s, a.dtype, {}) for s, a in zip(shapes, args, strict=True)]))
    for (case, (function, args)), region in zip(cases.items(), compile_regions(jobs), strict=True):
        (got,), (want,) = load_region(region)(list(args)), function(*args)
        assert got.dtype is case[1]
        close = {torch.bfloat16: 1e-2, torch.float16: 1e-3, torch.float32: 1e-6}[case[1]]
        assert apart(got.double(), want.double()) < close, case


def logits(model: Any) -> Tensor:
    ids = torch.randint(96, (2, 9), generator=torch.Generator().manual_seed(5))
    return torch.cat(list(step_logits(model.session, ids, 1000)), 1).double()


def apart(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.fixture(scope="module")
def tiny() -> nn.Module:
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=96, hidden_size=HIDDEN, intermediate_size=INNER, num_hidden_layers=1, num_attention_heads=5,
        num_key_value_heads=5, max_position_embeddings=64, initializer_range=0.05,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def test_a_model_is_that_of_the_plain_meaning(tiny: nn.Module):
    model = copy.deepcopy(tiny).half()
    got, want = (logits(llmopt.compile(model, r, target="cpu")) for r in ("int4-asym", "int4-asym+reference"))
    assert apart(got, want) < 0.02


def test_a_model_that_rounds_activations_is_as_near_to_the_exact_one(tiny: nn.Module):
    """Activations near a tie go either way, since compiled code rounds less often to bfloat16."""
    model = copy.deepcopy(tiny).bfloat16()
    exact = logits(llmopt.compile(tiny, "w4a4+reference", target="cpu"))
    got, want = (logits(llmopt.compile(model, r, target="cpu")) for r in ("w4a4", "w4a4+reference"))
    assert apart(got, exact) < 1.1 * apart(want, exact)


def test_groups_of_128_in_rows_of_704():
    """The embedded model, whose answer was empty."""
    got, want = (llmopt.compile(PICO, r, dtype="bfloat16", target="cpu") for r in ("int4", "int4+reference"))
    assert apart(logits(got), logits(want)) < 0.02
    prompt = "def fibonacci(n):"
    assert got.generate(prompt, max_new_tokens=12) == want.generate(prompt, max_new_tokens=12) != ""
