"""rotate-hadamard: the function stays what it was, whichever rotations are made, of models of every kind."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from passes_common import counts, run
from torch import Tensor, fx
from transformers import AutoConfig, AutoModelForCausalLM

import llmopt
from llmopt.commands.model import notes_to_say
from llmopt.compiler.capture_hf import capture_model
from llmopt.compiler.errors import InputError, PassMatchedNothing, RecipeError
from llmopt.compiler.evaluate import evaluate
from llmopt.compiler.hadamard import Rotation, exists, hadamard, largest
from llmopt.compiler.pipeline import PassStats
from llmopt.compiler.program import Program, Weight
from llmopt.passes import Canonicalize, InsertKVCache, Quantize, RaiseAten, RotateHadamard
from llmopt.passes.residual import residual_stream

SIZES: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 48, "intermediate_size": 88, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64, "initializer_range": 0.2,
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "llama-tied": {"tie_word_embeddings": True},
    "qwen2": {},  # biases of q, k, v
    "qwen3": {},  # norms of q and k
    "gemma": {},  # norms with 1 + weight, scaled and tied embeddings
    "mistral": {"sliding_window": 4},
}
ONE = [{name: name == only for name in ("r1", "r2", "r3", "r4")} for only in ("r1", "r2", "r3", "r4")]
ALL = dict.fromkeys(("r1", "r2", "r3", "r4"), True)
PICO = Path(__file__).parents[2] / "examples" / "models" / "pico-llama-4m"
IDS = torch.randint(96, (2, 9), generator=torch.Generator().manual_seed(3))


@functools.cache
def structured(kind: str) -> Program:
    torch.manual_seed(1)
    config = AutoConfig.for_model(kind.partition("-")[0], **{**SIZES, **KINDS.get(kind, {})})
    model = AutoModelForCausalLM.from_config(config).eval()
    for name, weight in model.named_parameters():
        if weight.dim() == 1:  # norms, and biases, which begin as ones and zeros
            weight.data += torch.randn_like(weight) * 0.3
        if name.endswith("k_proj.bias"):
            weight.data += 20
    return doubled(run(capture_model(model), RaiseAten(), Canonicalize())[0])


def doubled(program: Program) -> Program:
    """The same in float64, norms included, which transformers computes in float32 whatever its weights are."""
    program = program.copy()
    program.weights = {name: wide(weight) for name, weight in program.weights.items()}
    for graph in program.graphs.values():
        for node in graph.fx.nodes:
            node.args = fx.node.map_aggregate(node.args, lambda a: torch.float64 if a is torch.float32 else a)
            value = node.meta.get("val")
            if isinstance(value, Tensor) and value.dtype == torch.float32:
                node.meta["val"] = value.new_empty(value.shape, dtype=torch.float64)
            elif isinstance(value, tuple | list):
                node.meta["val"] = [v.new_empty(v.shape, dtype=torch.float64) for v in value]
    return program


def wide(weight: Weight) -> Weight:
    if weight.dtype != torch.float32:
        return weight
    return replace(weight, dtype=torch.float64, load=lambda: weight.load().double())


def logits(program: Program) -> Tensor:
    positions = torch.arange(9).expand(2, 9).contiguous()
    return evaluate(program.graph("forward"), {"input_ids": IDS, "position_ids": positions}, program.weights)[0]


def rotated(kind: str, **options: Any) -> tuple[Program, PassStats]:
    after, (report,) = run(structured(kind), RotateHadamard(**options))
    return after, report.stats


@pytest.mark.parametrize("options", [*ONE, ALL, {**ALL, "order": 8, "seed": 5}], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_logits_stay_what_they_were(kind: str, options: dict[str, Any]) -> None:
    before, (after, stats) = structured(kind), rotated(kind, **options)
    want, got = logits(before), logits(after)
    assert float((got - want).norm() / want.norm()) < 1e-9
    made = {rule: stats.per_rule[rule] for rule in ("r1", "r2", "r3", "r4")}
    assert made == {"r1": options["r1"], "r2": 2 * options["r2"], "r3": 2 * options["r3"], "r4": 2 * options["r4"]}
    assert counts(after.graph("forward"))["rotate"] == 4 * options["r3"] + 2 * options["r4"]
    assert not stats.rejected


@pytest.mark.parametrize("order", [n for n in range(1, 301) if exists(n)])
def test_rows_are_orthogonal(order: int) -> None:
    made = hadamard(order)
    assert made.abs().eq(1).all()
    assert (made @ made.T).equal(order * torch.eye(order, dtype=torch.float64))


@pytest.mark.parametrize("size", [64, 80, 112, 128, 704, 3072, 4096, 11008, 14336, 18944])
def test_outliers_and_offsets_are_spread(size: int) -> None:
    """Which no signs would not do: of an offset of all elements one element would be the sum."""
    turn, make = Rotation(largest(size, size), seed=2), torch.Generator().manual_seed(4)
    assert turn.order == (256 if size == 11008 else size)
    x = torch.randn(5, size, generator=make, dtype=torch.float64)
    x[:, 3] += 100
    made = turn.turned(x)
    assert torch.allclose(made.norm(dim=1), x.norm(dim=1))
    assert float(made.abs().max()) < 100 * turn.order**-0.5 + 6
    offset = turn.turned(torch.ones(1, size, dtype=torch.float64))
    assert float(offset.abs().max()) < 0.6 * turn.order**0.5


def test_an_order_that_cannot_be_made_is_told() -> None:
    with pytest.raises(InputError, match="no rotation of order 172 can be made; wanted such as 168"):
        Rotation(172)
    with pytest.raises(InputError, match="no rotation of order 0 can be made; wanted such as 1"):
        Rotation(0)
    with pytest.raises(InputError, match="no Hadamard matrix of order 92"):
        hadamard(92)


def test_edits_of_a_weight_are_rounded_once() -> None:
    program = structured("llama").copy()
    name = "model.layers.0.self_attn.o_proj.weight"
    exact = program.weights[name].load()
    program.weights[name] = replace(program.weights[name], dtype=torch.bfloat16, load=lambda: exact.bfloat16())
    after, _ = run(program, RotateHadamard())
    made = after.weights[f"{name}.r1.r2"]
    stream, heads = Rotation(48), Rotation(16)
    want = heads.turned(stream.turned(exact.bfloat16().double().T).T)
    assert made.load().equal(want.bfloat16())
    assert after.origins(f"{name}.r1.r2") == [name]


def test_a_tied_table_is_turned_for_either_use() -> None:
    after, _ = rotated("llama-tied")
    table = "model.embed_tokens.weight"
    made = [name for name in after.used_weights() if name.startswith(table)]
    assert made == [f"{table}.r1", f"{table}.norm(model.norm.weight).r1"]
    assert "model.norm.weight" not in after.used_weights()


def test_norms_behind_products_keep_the_stream_as_it_is() -> None:
    """Gemma 2's, whose weights are no product's to take."""
    with pytest.raises(
        PassMatchedNothing, match=r"r1 left out: .*, rms_norm, writes to the residual stream; .* cannot be turned"
    ):
        rotated("gemma2", r2=False)
    after, stats = rotated("gemma2", r3=True, r4=True)
    assert [rule for rule, _ in stats.rejected] == ["r1"]
    assert "cannot be turned" in stats.notes[0]
    reports = run(structured("gemma2"), RotateHadamard(r3=True, r4=True), InsertKVCache())[1]
    assert notes_to_say(reports) == [f"note: rotate-hadamard: {stats.notes[0]}"]
    want, got = logits(structured("gemma2")), logits(after)
    assert float((got - want).norm() / want.norm()) < 1e-9


def test_products_are_known_by_the_names_they_had() -> None:
    after, _ = rotated("llama", **ALL)
    after, _ = run(after, InsertKVCache(), Quantize(weights="int8", include=("*.down_proj.weight",)))
    packed = [name for name in after.used_weights() if name.endswith(".packed")]
    assert packed == [f"model.layers.{i}.mlp.down_proj.weight.r1.r4.packed" for i in range(2)]


def test_patterns_do_not_meet_the_norms_that_are_folded_in() -> None:
    after, _ = rotated("llama")
    some, every = (
        run(after.copy(), InsertKVCache(), Quantize(weights="int8", exclude=exclude))[1][1].stats.rewritten
        for exclude in (("*layernorm*",), ())
    )
    assert some == every > 8


def test_blocks_are_no_larger_than_what_they_turn() -> None:
    assert largest(48, 10**18) == 48
    after, stats = rotated("llama", order=10**18)
    assert float((logits(after) - logits(structured("llama"))).norm()) < 1e-9
    assert not stats.notes


def test_other_blocks_than_were_asked_for_are_told() -> None:
    said = rotated("llama", r4=True, order=22)[1].notes
    assert said == [
        "r1 turns blocks of 16 of 48 channels, the largest that there are up to 22",
        "r4 turns blocks of 8 of 88 channels, the largest that there are up to 22",
    ]


def test_what_cannot_be_asked_for() -> None:
    for seed in (-1, 2**63):
        with pytest.raises(RecipeError, match=f"seed is {seed}; wanted a number from 0 up to"):
            rotated("llama", seed=seed)
    with pytest.raises(RecipeError, match="order is -1; wanted 0"):
        rotated("llama", order=-1)
    with pytest.raises(PassMatchedNothing, match="none of r1 to r4 is asked for"):
        rotated("llama", r1=False, r2=False)
    step = run(structured("llama"), InsertKVCache())[0]
    with pytest.raises(RecipeError, match="stands behind 'insert-kv-cache'; move it before"):
        run(step, RotateHadamard())


@pytest.mark.parametrize("recipe", ["rotate", "rotate-online"])
def test_tokens_stay_what_they_were(recipe: str) -> None:
    prompts = [[5, 6, 7, 8, 9, 100, 200], [11, 12]]
    want, got = (
        llmopt.compile(str(PICO), name, target="cpu", dtype="float32").generate(prompts, 12, ignore_eos=True)
        for name in ("default", recipe)
    )
    assert got == want


def test_weights_of_other_rotations_have_other_names() -> None:
    """Statistics of one are not taken for those of another."""
    seen = [set(rotated("llama", **options)[0].used_weights()) for options in ({}, {"seed": 1}, {"order": 8})]
    turned = [{name for name in names if ".r1" in name} for names in seen]
    assert all(turned)
    assert not turned[0] & turned[1]
    assert not turned[0] & turned[2]
    assert "model.layers.0.self_attn.o_proj.weight.r1-8.r2-8" in turned[2]


def test_a_norm_whose_weight_is_computed_and_a_stream_of_two_widths_are_left_alone() -> None:
    program = structured("llama").copy()
    graph = program.graph("forward")
    norm = next(graph.calls("rms_norm"))
    with graph.fx.inserting_before(norm):
        doubled_weight = graph.fx.call_function(torch.ops.aten.mul.Tensor, (norm.args[1], 2.0))
    doubled_weight.meta.update(norm.args[1].meta)
    norm.update_arg(1, doubled_weight)
    assert residual_stream(graph) == f"the weight of {norm.name} is computed"
    graph = structured("llama").copy().graph("forward")
    table = next(graph.calls("aten.embedding"))
    with graph.fx.inserting_after(table):
        other = graph.fx.call_function(table.target, table.args)
    other.meta.update(table.meta, val=table.meta["val"].new_empty((*table.meta["val"].shape[:-1], 8)))
    assert "elements, and what the stream begins with" in str(residual_stream(graph))
