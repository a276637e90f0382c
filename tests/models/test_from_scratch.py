"""Models that are not transformers': a GPT in several spellings, and an ExportedProgram, against plain torch."""

from __future__ import annotations

import pytest
import torch
from models.scratch import CONTEXT, GPT, VOCAB, greedy, randomized
from torch.export import Dim

import llmopt
from llmopt.compiler.errors import CaptureError, InputError, LlmoptError
from llmopt.compiler.program import ModelFacts

PROMPTS = [[5], [7, 8], [3, 1, 4, 1, 5, 9, 2, 6], list(range(40, 70)), [90, 2] * 25]
FACTS = ModelFacts("GPT", VOCAB, CONTEXT)


def tokens_of_torch(model: torch.nn.Module, count: int) -> list[list[int]]:
    want = [greedy(model, prompt, count) for prompt in PROMPTS]
    assert len({t for row in want for t in row}) >= 12, "a degenerate model would prove nothing"
    return want


def exported(model: torch.nn.Module, dynamic: bool = True) -> torch.export.ExportedProgram:
    shape = (2, 5)
    ids = torch.ones(shape, dtype=torch.int64)
    at = torch.arange(shape[1]).expand(shape).contiguous()
    sizes = {0: Dim("batch", max=64), 1: Dim("tokens", max=CONTEXT - 1)} if dynamic else None
    return torch.export.export(model, (ids, at), dynamic_shapes=(sizes, sizes) if dynamic else None)


@pytest.mark.parametrize("counts", [False, True], ids=["position_ids", "arange"])
@pytest.mark.parametrize("spelling", ["flag", "mask", "written"])
def test_every_spelling_gives_the_tokens_of_plain_torch(spelling, counts):
    model = randomized(GPT(spelling, counts))
    compiled = llmopt.compile(model, recipe="reference")
    assert [n.args[5] for n in compiled.program.graph("forward").calls("attention")] == [0, 0]
    assert compiled.generate(PROMPTS, max_new_tokens=30) == tokens_of_torch(model, 30)


def test_dropout_of_a_model_left_in_training_mode_is_off_and_the_mode_is_kept():
    model = randomized(GPT()).train()
    compiled = llmopt.compile(model, recipe="reference")
    assert model.training
    assert all(module.training for module in model.modules())
    assert compiled.generate(PROMPTS, max_new_tokens=8) == tokens_of_torch(model.eval(), 8)


def test_forward_gives_the_logits_of_the_module():
    model = randomized(GPT("written"))
    ids = torch.randint(VOCAB, (3, 17), generator=torch.Generator().manual_seed(0))
    want = model(ids, torch.arange(17).expand(3, 17))
    torch.testing.assert_close(llmopt.compile(model, recipe="reference")(ids), want)


def test_the_context_ends_generation_where_the_learned_positions_end():
    model = randomized(GPT())
    made = llmopt.compile(model, recipe="reference").generate([list(range(90))], max_new_tokens=100)[0]
    assert len(made) == CONTEXT - 90
    assert made == greedy(model, list(range(90)), CONTEXT - 90)


def test_exported_program_is_a_source():
    model = randomized(GPT("written"))
    compiled = llmopt.compile(exported(model), recipe="reference", facts=FACTS)
    assert compiled.generate(PROMPTS, max_new_tokens=12) == tokens_of_torch(model, 12)


def test_exported_program_says_that_facts_are_needed():
    with pytest.raises(InputError, match="facts=ModelFacts"):
        llmopt.compile(exported(randomized(GPT())), recipe="reference")


def test_exported_program_of_fixed_sizes_is_refused():
    with pytest.raises(CaptureError, match=r"fixed.*dynamic_shapes"):
        llmopt.compile(exported(randomized(GPT()), dynamic=False), recipe="reference", facts=FACTS)


class OneInput(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(VOCAB, VOCAB)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.table(input_ids)


def test_exported_program_with_another_signature_is_refused():
    sizes = {0: Dim("batch", max=64), 1: Dim("tokens", max=CONTEXT - 1)}
    program = torch.export.export(OneInput(), (torch.ones(2, 5, dtype=torch.int64),), dynamic_shapes=(sizes,))
    with pytest.raises(CaptureError, match=r"takes \['input_ids'\]; wanted exactly \(input_ids \[B, T\], position_ids"):
        llmopt.compile(program, recipe="reference", facts=FACTS)


def test_exported_program_with_float_inputs_is_refused():
    class Floats(torch.nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return x + y

    x = torch.ones(2, 5, VOCAB)
    sizes = {0: Dim("batch", max=64), 1: Dim("tokens", max=CONTEXT - 1)}
    program = torch.export.export(Floats(), (x, x), dynamic_shapes=(sizes, sizes))
    with pytest.raises(CaptureError, match=r"input_ids.*int64"):
        llmopt.compile(program, recipe="reference", facts=FACTS)


def test_logits_of_another_width_are_refused():
    with pytest.raises(CaptureError, match=rf"logits \[B, T, {VOCAB + 1}\]"):
        llmopt.compile(randomized(GPT()), recipe="reference", facts=ModelFacts("GPT", VOCAB + 1, CONTEXT))


class InPlace(GPT):
    """Edits its activations in place, as many small models do."""

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        x = self.tokens(input_ids)
        kept = x
        x += self.places(position_ids)
        for block in self.blocks:
            x = x + block(x)
            x[..., :8] *= 0.5
            x.clamp_(-20, 20)
        return self.head(self.norm(x + kept)) / 3


def test_edits_in_place_mean_what_they_mean_in_torch():
    model = randomized(InPlace())
    assert llmopt.compile(model, recipe="reference").generate(PROMPTS, max_new_tokens=12) == tokens_of_torch(model, 12)


class Products(GPT):
    """Products with weights that are not nn.Linear's: `x @ w`, `x @ w.T`, einsum."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = (torch.nn.Parameter(torch.empty(64, 64)) for _ in range(2))
        self.third = torch.nn.Parameter(torch.empty(64, 64))

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        x = self.tokens(input_ids) + self.places(position_ids)
        for block in self.blocks:
            x = block(x) @ self.left
            x = x @ self.right.T + torch.einsum("btd,de->bte", x, self.third)
        return self.head(self.norm(x))


def test_products_with_bare_weights_become_linears():
    model = randomized(Products())
    compiled = llmopt.compile(model, recipe="reference")
    forward = compiled.program.graph("forward")
    assert not list(forward.calls("aten.matmul"))
    assert compiled.generate(PROMPTS, max_new_tokens=12) == tokens_of_torch(model, 12)


class Autocast(GPT):
    """Casts in a block of its own."""

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return super().forward(input_ids, position_ids).float()


def test_autocast_inside_the_forward_is_an_error_or_the_same_tokens():
    model = randomized(Autocast())
    try:
        compiled = llmopt.compile(model, recipe="reference")
    except LlmoptError as error:
        assert "autocast" in str(error)  # noqa: PT017
    else:
        ids = torch.tensor([PROMPTS[-1]])
        torch.testing.assert_close(compiled(ids), model(ids, torch.arange(ids.shape[1])[None]))


def test_a_model_exported_in_training_mode_is_refused():
    program = exported(randomized(GPT()).train())
    with pytest.raises(LlmoptError, match=r"scratch\.py:\d+.*random numbers.*eval mode"):
        llmopt.compile(program, recipe="reference", facts=FACTS)
