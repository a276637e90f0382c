"""Low-bit weights under torch.compile in graphs that are only part of a model: what is quantised, and what is told.

The oracle is the same module with weights that were rounded beforehand.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from llmopt.backend import llmopt as backend
from llmopt.backend import reports
from llmopt.compiler.quant import quantize
from llmopt.compiler.recipe import PassSpec, Recipe

IDS = torch.randint(50, (2, 7), generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    backend.reset()
    torch.manual_seed(0)
    with torch.no_grad():
        yield
    torch._dynamo.reset()


def recipe(**options: Any) -> Recipe:
    """nvfp4 call by call, with more options."""
    plain = Recipe.parse("reference+nvfp4")
    passes = (PassSpec.of(s.name, **dict(s.options), **options) if s.name == "quantize" else s for s in plain.passes)
    return replace(plain, name="mine", passes=tuple(passes))


def compiled(model: Any, strict: bool = True, **options: Any) -> Any:
    return torch.compile(model, backend="llmopt", options={"recipe": recipe(**options), "strict": strict})


def rounded(model: nn.Module, but: tuple[str, ...] = ()) -> Any:
    """The module with the weights of its linears rounded, but those of some."""
    made = copy.deepcopy(model)
    for name, module in made.named_modules():
        if isinstance(module, nn.Linear) and name not in but:
            module.weight.copy_(quantize(module.weight, "nvfp4", "search").dequantize())
    return made


def assert_rounded(got: Tensor, model: nn.Module, *inputs: Tensor, but: tuple[str, ...] = ()) -> None:
    want, exact = rounded(model, but)(*inputs), model(*inputs)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5 * float(want.abs().max()))
    assert float((want - exact).abs().max()) > 1e-3  # rounding shows


class Text(nn.Module):
    """Embedding, a block, a head; with a graph break in its middle if asked to."""

    def __init__(self, breaks: bool = False, vocabulary: int = 50) -> None:
        super().__init__()
        self.breaks = breaks
        self.embed, self.norm = nn.Embedding(50, 32), nn.LayerNorm(32)
        self.up, self.down = nn.Linear(32, 48), nn.Linear(48, 32)
        self.head = nn.Linear(32, vocabulary, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        x = x + self.down(functional.relu(self.up(self.norm(x))))
        if self.breaks:
            torch._dynamo.graph_break()
        return self.head(self.norm(x))


def test_a_single_linear_and_a_block_are_quantised_whole() -> None:
    x = torch.randn(3, 32)
    for model in (nn.Linear(32, 16), nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 32))):
        assert_rounded(compiled(model)(x), model, x)


def test_a_submodule_of_a_model_is_quantised_whole() -> None:
    config = LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    compiled(model.model)(IDS)
    assert [report.rules["quantize-linear"] for report in reports] == [7]
    mlp, x = model.model.layers[0].mlp, torch.randn(2, 5, 64) * 30
    assert_rounded(compiled(mlp)(x), mlp, x)


def test_the_product_that_makes_the_logits_is_left_where_the_graph_shows_that_it_does() -> None:
    model = Text()
    assert_rounded(compiled(model)(IDS), model, IDS, but=("head",))
    other = Text(vocabulary=40)  # no embedding has so many rows
    assert_rounded(compiled(other)(IDS), other, IDS)


def test_behind_a_graph_break_every_product_is_quantised_and_exclude_names_it() -> None:
    model = Text(breaks=True)
    assert_rounded(compiled(model)(IDS), model, IDS)
    assert [report.rules["quantize-linear"] for report in reports] == [2, 1]
    torch._dynamo.reset()
    assert_rounded(compiled(model, exclude=["head.weight"])(IDS), model, IDS, but=("head",))


def test_weights_are_called_by_the_modules_own_names() -> None:
    model = Text()
    assert_rounded(compiled(model, include=["up.*", "head.weight"], lm_head="nvfp4")(IDS), model, IDS, but=("down",))
    model.head.weight = model.embed.weight
    torch._dynamo.reset()
    got = compiled(model, lm_head="int8", exclude=["head.weight"])(IDS)
    assert_rounded(got, model, IDS, but=("head",))


def test_names_that_nothing_has_are_told_of_whole_models_only() -> None:
    with pytest.raises(Exception, match=r"exclude has 'dwon.\*', .* did you mean 'down.\*'"):
        compiled(Text(), exclude=["dwon.*"])(IDS)
    x = torch.randn(2, 32)
    assert_rounded(compiled(part := nn.Linear(32, 16), exclude=["another.part"])(x), part, x)


class Conv(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = Conv1D(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Adds(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        x += self.first(x)
        return x


def functional_linear(x: Tensor, w: Tensor) -> Tensor:
    return functional.linear(x, w)


NET = nn.Linear(32, 32).requires_grad_(False)


def called(x: Tensor, weights: dict[str, Tensor]) -> Tensor:
    return torch.func.functional_call(NET, weights, (x,))


CASES: dict[str, tuple[Callable[[], tuple[Any, ...]], str, str]] = {
    "argument": (lambda: (functional_linear, torch.randn(32, 32)), "l_w_", "is the argument 'l_w_' and no parameter"),
    "functional_call": (
        lambda: (called, {name: p.detach() for name, p in NET.named_parameters()}),
        "l_weights_weight_",
        "is the argument 'l_weights_weight_' and no parameter of a module",
    ),
    "turned": (lambda: (Conv(),), "conv.weight", "conv.weight: its weight is turned or computed first"),
    "computed": (
        lambda: (nn.Sequential(parametrizations.weight_norm(nn.Linear(32, 32))),),
        "0.weight",
        "0.weight: its weight is computed",
    ),
    "in place": (lambda: (Adds(),), "first.weight", "first.weight: it touches memory that the graph writes in place"),
}


@pytest.mark.parametrize("case", list(CASES))
def test_what_cannot_be_quantised_is_an_error_or_a_warning(case: str) -> None:
    make, name, why = CASES[case]
    (model, *rest), x = make(), torch.randn(3, 32)
    want = model(x, *rest)
    with pytest.raises(Exception, match="asks for low-bit weights, and 1 product of a graph cannot be") as caught:
        compiled(model)(x, *rest)
    assert why in str(caught.value)
    assert "option `exclude`" in str(caught.value)
    torch._dynamo.reset()
    backend.reset()
    with pytest.warns(UserWarning, match="asks for low-bit weights, and 1 product of a graph cannot be") as told:
        torch.testing.assert_close(compiled(model, strict=False)(x, *rest), want)
    assert any(why in str(w.message) for w in told)
    assert len(reports[-1].unquantised) == 1
    torch._dynamo.reset()
    backend.reset()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(llmopt|recipe).*")
        torch.testing.assert_close(compiled(model, exclude=[name])(x, *rest), want)


def test_a_graph_in_which_nothing_was_quantised_is_told() -> None:
    model = nn.Sequential(nn.Embedding(50, 32), nn.Linear(32, 50))
    with pytest.warns(UserWarning, match="rewrote nothing: makes the logits, and lm_head is not set"):
        torch.testing.assert_close(compiled(model)(IDS), model(IDS))


def test_a_graph_without_products_is_nothing_to_tell_of() -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(llmopt|recipe).*")
        compiled(nn.Sequential(nn.Embedding(50, 32), nn.LayerNorm(32)))(IDS)


@pytest.mark.parametrize(
    ("name", "said"),
    [("reference+nvfp4", "what recipe 'reference\\+nvfp4' asks for did not happen in it .*low-bit format"),
     ("reference", "results are right, but slower than they could be")],
)  # fmt: skip
def test_a_fallback_says_what_did_not_happen(name: str, said: str) -> None:
    model, x = nn.Linear(32, 32), torch.randn(2, 32)
    run = torch.compile(model, backend="llmopt", options={"recipe": name})
    with torch.autocast("cpu", torch.bfloat16), pytest.warns(UserWarning, match=f"autocast is on.*{said}") as told:
        run(x)
    assert sum("results are right" in str(w.message) for w in told) == (name == "reference")


# what a weight was rounded to is kept for as long as it is that weight


def _linear() -> nn.Linear:
    return nn.Linear(64, 64, bias=False).requires_grad_(False)


def _data_twice(module: nn.Linear) -> None:
    module.weight.data = torch.empty(0)  # the allocator may well give the next one the place that this one had
    module.weight.data = torch.randn(64, 64)


EDITS: dict[str, Callable[[nn.Linear], object]] = {
    "to bfloat16": lambda m: m.to(torch.bfloat16),
    "half": lambda m: m.half(),
    "data": lambda m: setattr(m.weight, "data", m.weight.data * -3),
    "data twice": _data_twice,
    "data turned": lambda m: setattr(m.weight, "data", m.weight.data.t()),
    "in place": lambda m: m.weight.mul_(-2),
    "state": lambda m: m.load_state_dict(_linear().state_dict()),
    "state assigned": lambda m: m.load_state_dict(_linear().state_dict(), assign=True),
    "parameter": lambda m: setattr(m, "weight", nn.Parameter(torch.randn(64, 64), requires_grad=False)),
}


@pytest.mark.parametrize("edit", list(EDITS))
def test_a_weight_that_changed_is_rounded_anew(edit: str) -> None:
    model = _linear()
    run = compiled(model)

    def used() -> Tensor:
        """The rounded weight that was multiplied with: products with 1 and 0 are exact."""
        return run(torch.eye(64, dtype=model.weight.dtype)).T

    def wanted() -> Tensor:
        return quantize(model.weight, "nvfp4", "search").dequantize(model.weight.dtype)

    before = used()
    assert torch.equal(before, wanted())
    EDITS[edit](model)
    assert torch.equal(used(), wanted())
    assert not torch.equal(wanted(), before.to(model.weight.dtype))  # what was kept would show
