"""canonicalize: what merges, what may not, and that nothing changes in value."""

from __future__ import annotations

import torch
from passes_common import context, counts, llama, run
from torch import Tensor, nn

from llmopt.compiler.capture import capture
from llmopt.compiler.pipeline import forward_error
from llmopt.compiler.program import ModelFacts, Program
from llmopt.passes import Canonicalize, RaiseAten

EPS = torch.finfo(torch.float32).eps


def plain(model: nn.Module) -> Program:
    return capture(model.eval(), ModelFacts("plain", 96, 64))


class Mlp(nn.Module):
    """Token-wise model with chosen projections of one input."""

    def __init__(self, biases: tuple[bool, ...], shared: bool = False) -> None:
        super().__init__()
        self.table = nn.Embedding(96, 16)
        self.parts = nn.ModuleList(nn.Linear(16, 8 * (i + 1), bias=b) for i, b in enumerate(biases))
        self.again = self.parts[0] if shared else None
        self.scale = nn.Parameter(torch.rand(96) + 1)
        width = sum(8 * (i + 1) for i in range(len(biases))) + (8 if shared else 0)
        self.head = nn.Linear(width, 96, bias=False)

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        x = self.table(input_ids)
        made = [part(x) for part in self.parts] + ([self.again(x)] if self.again is not None else [])
        return self.head(torch.cat(made, -1)) * (1.0 + self.scale.exp())


def test_qkv_and_gate_up_become_one_linear_each() -> None:
    raised, _ = run(llama(layers=2), RaiseAten())
    after, (report,) = run(raised, Canonicalize())
    assert counts(raised.graph("forward"))["linear"] == 2 * 7 + 1
    assert counts(after.graph("forward"))["linear"] == 2 * 4 + 1
    assert report.stats.per_rule["merge-linears"] == 4
    error, scale = forward_error(raised, after)
    assert scale > 0
    assert error <= 64 * EPS * scale


def test_a_merged_weight_is_the_rows_of_its_parts_in_order() -> None:
    raised, _ = run(llama(layers=1), RaiseAten())
    after, _ = run(raised, Canonicalize())
    stem = "model.layers.0.self_attn."
    merged = after.weights[f"{stem}q_proj|k_proj|v_proj.weight"]
    parts = [raised.weights[f"{stem}{p}_proj.weight"].load() for p in "qkv"]
    assert torch.equal(merged.load(), torch.cat(parts))
    assert merged.shape == (64, 32)


def test_biases_merge_along() -> None:
    raised, _ = run(llama(layers=1, bias=True), RaiseAten())
    after, _ = run(raised, Canonicalize())
    assert "model.layers.0.self_attn.q_proj|k_proj|v_proj.bias" in after.used_weights()
    error, scale = forward_error(raised, after)
    assert error <= 64 * EPS * scale


def test_linears_with_and_without_bias_stay_apart() -> None:
    after, (_, report) = run(plain(Mlp((True, False))), RaiseAten(), Canonicalize())
    assert report.stats.per_rule["merge-linears"] == 0
    assert counts(after.graph("forward"))["linear"] == 3


def test_a_linear_used_twice_is_computed_once() -> None:
    raised, _ = run(plain(Mlp((True,), shared=True)), RaiseAten())
    after, _ = run(raised, Canonicalize())
    assert counts(after.graph("forward"))["linear"] == 2
    error, scale = forward_error(raised, after)
    assert error <= 64 * EPS * scale


def test_what_depends_on_weights_alone_is_folded_and_read_once() -> None:
    program = plain(Mlp((True, True)))
    raised, _ = run(program, RaiseAten())
    after, (report,) = run(raised, Canonicalize())
    assert counts(raised.graph("forward"))["aten.exp"] == 1
    assert counts(after.graph("forward"))["aten.exp"] == 0
    assert report.stats.per_rule["fold-constants"] == 1
    assert "scale" not in after.used_weights()
    error, scale = forward_error(raised, after)
    assert error <= 64 * EPS * scale


def test_a_second_run_changes_nothing() -> None:
    once, _ = run(llama(), RaiseAten(), Canonicalize())
    twice, (report,) = run(once, Canonicalize())
    assert report.stats.rewritten == 0
    assert twice.graph("forward").print() == once.graph("forward").print()


def test_merging_can_be_turned_off() -> None:
    after, _ = run(llama(layers=1), RaiseAten(), Canonicalize(merge_linears=False))
    assert counts(after.graph("forward"))["linear"] == 8


def test_folds_count_as_rewrites() -> None:
    raised, _ = run(plain(Mlp((True,))), RaiseAten())
    folds = {}
    for limit in (0, 1, None):
        allowed = context(limit=limit)
        stats = Canonicalize(merge_linears=False).run(raised.copy(), allowed)
        folds[limit] = (stats.per_rule["fold-constants"], allowed.rewrites_left)
    assert folds == {0: (0, 0), 1: (1, 0), None: (1, None)}
