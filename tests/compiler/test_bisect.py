"""Bisection finds faults planted among right rewrites: the rewrite, the pass, or nothing where nothing is wrong."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from llmopt.compiler.bisect import Errors, bisect
from llmopt.compiler.capture_hf import capture_model
from llmopt.compiler.errors import InputError, RecipeError
from llmopt.compiler.extra import RulePass, insert_passes, load_pass
from llmopt.compiler.graph import origin
from llmopt.compiler.pattern import ir
from llmopt.compiler.pipeline import Context, Pass, PassStats
from llmopt.compiler.program import Program
from llmopt.compiler.recipe import Recipe
from llmopt.compiler.rewrite import Rule
from llmopt.compiler.target import Target
from llmopt.passes import PASSES

LAYERS = 4


@pytest.fixture(scope="module")
def program() -> Program:
    """A random Llama of four layers, in fp32."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.3,
    )  # fmt: skip
    return capture_model(LlamaForCausalLM(config).eval())


@pytest.fixture(scope="module")
def context() -> Context:
    return Context(Target("cpu", "generic", 1), Recipe.parse("reference"))


def recipe_with(*extra: tuple[Pass, str | None]) -> tuple[Pass, ...]:
    return insert_passes(Recipe.parse("reference").build(PASSES), extra)


class OpenGated(Rule):
    """gated(gate, up, "silu") as two aten calls: right everywhere but in the layers named by `wrong`."""

    wrong: tuple[int, ...] = ()

    def pattern(self, gate, up):
        return ir.gated(gate, up, "silu")

    def rewrite(self, b, m):
        swap = any(f"layers.{i}." in origin(m.root).module for i in self.wrong)
        gate, up = (m["up"], m["gate"]) if swap else (m["gate"], m["up"])
        return b.aten.mul.Tensor(b.aten.silu.default(gate), up)


class OpenGatedWrong2(OpenGated):
    wrong = (2,)


class OpenGatedWrong13(OpenGated):
    wrong = (1, 3)


class LooserNorm(Rule):
    """An eps of 1e-3 in place of 1e-6, in one norm."""

    def pattern(self, x, w):
        return ir.rms_norm(x, w, 1e-6)

    def check(self, m):
        return None if origin(m.root).module == "layers.1.post_attention_layernorm" else m.fail("another norm")

    def rewrite(self, b, m):
        return b.ir.rms_norm(m["x"], m["w"], 1e-3)


@dataclass(frozen=True)
class ForgetsScale(Pass):
    """Changes an attention's scale by hand, without counting it as a rewrite."""

    name: ClassVar[str] = "forgets-scale"
    graph: str = "forward"

    def run(self, program: Program, context: Context) -> PassStats:
        op = "attention" if self.graph == "forward" else "attend"
        node = list(program.graph(self.graph).calls(op))[1]
        at = 4 if op == "attention" else 7
        node.update_arg(at, node.args[at] * 1.5)
        return PassStats()


class NarrowWindow(Rule):
    """Attend to the last three tokens only: `forward` has no attend, so only `step` shows it."""

    def pattern(self, q, k, v, tables, seqs, positions, scale):
        return ir.attend(q, k, v, tables, seqs, positions, None, scale, 0, 0.0)

    def rewrite(self, b, m):
        names = ("q", "k", "v", "tables", "seqs", "positions")
        return b.ir.attend(*(m[n] for n in names), None, m["scale"], 3, 0.0)


def test_nothing_is_wrong(program: Program, context: Context):
    found = bisect(program, recipe_with((RulePass(OpenGated()), None)), context)
    assert found.culprit is None
    assert [name for name, _ in found.passes] == [
        "raise-aten",
        "canonicalize",
        "open-gated",
        "insert-kv-cache",
        "fuse",
        "lower",
    ]
    assert all(errors.within(found.limit) for _, errors in found.passes)
    assert found.passes[-1][1].step is not None


def test_one_wrong_layer_among_right_ones(program: Program, context: Context):
    found = bisect(program, recipe_with((RulePass(OpenGatedWrong2()), None)), context)
    culprit = found.culprit
    assert culprit is not None
    assert (culprit.pass_name, culprit.rule) == ("open-gated-wrong2", "open-gated-wrong2")
    assert culprit.module.startswith("layers.2.mlp")
    assert culprit.source.startswith("modeling_llama.py:")
    assert culprit.before.within(found.limit)
    assert not culprit.after.within(found.limit)
    # the diff shows this rewrite and no other
    changed = [line for line in culprit.diff.splitlines() if line[:1] in "+-" and line[:3] not in ("+++", "---")]
    assert sum("= gated(" in line for line in changed) == 1
    assert f"-    {culprit.node}: " in culprit.diff


def test_overall_number_stops_right_behind_the_culprit(program: Program, context: Context):
    passes = recipe_with((RulePass(OpenGatedWrong2()), None))
    culprit = bisect(program, passes, context).culprit
    assert culprit is not None
    for allowed, wrong in ((culprit.overall - 1, False), (culprit.overall, True)):
        limited, current = replace(context, rewrites_left=allowed), program
        for item in passes[:3]:
            current = current.copy()
            item.run(current, limited)
        assert (_error(program, current) > 1e-2) is wrong


def _error(a: Program, b: Program) -> float:
    from llmopt.compiler.pipeline import forward_error

    return forward_error(a, b)[0]


def test_two_wrong_rewrites_give_one_of_them(program: Program, context: Context):
    culprit = bisect(program, recipe_with((RulePass(OpenGatedWrong13()), None)), context).culprit
    assert culprit is not None
    assert culprit.module.startswith(("layers.1.", "layers.3."))


def test_small_fault_stands_out_of_rounding(program: Program, context: Context):
    found = bisect(program, recipe_with((RulePass(LooserNorm()), None)), context)
    assert found.culprit is not None
    assert found.culprit.module == "layers.1.post_attention_layernorm"


@pytest.mark.parametrize(("graph", "after"), [("forward", "canonicalize"), ("step", "insert-kv-cache")])
def test_uncounted_edit_blames_the_pass(program: Program, context: Context, graph: str, after: str):
    found = bisect(program, recipe_with((ForgetsScale(graph), after)), context)
    assert found.culprit is not None
    assert (found.culprit.pass_name, found.culprit.rule) == ("forgets-scale", "")
    assert found.culprit.graph == graph
    assert "attention(" in found.culprit.diff if graph == "forward" else "attend(" in found.culprit.diff


def test_fault_in_step_alone(program: Program, context: Context):
    found = bisect(program, recipe_with((RulePass(NarrowWindow()), "insert-kv-cache")), context)
    culprit = found.culprit
    assert culprit is not None
    assert (culprit.rule, culprit.graph, culprit.number) == ("narrow-window", "step", 1)
    assert found.passes[-1][1].forward <= found.limit


def test_fault_that_a_later_pass_takes_back(program: Program, context: Context):
    class BackAgain(Rule):
        def pattern(self, gate, up):
            from llmopt.compiler.pattern import aten

            return aten.mul.Tensor(aten.silu.default(gate), up)

        def check(self, m):
            return None if "layers.2." in origin(m.root).module else m.fail("another layer")

        def rewrite(self, b, m):
            return b.ir.gated(m["up"], m["gate"], "silu")

    extra = ((RulePass(OpenGatedWrong2()), None), (RulePass(BackAgain()), "open-gated-wrong2"))
    found = bisect(program, recipe_with(*extra), context)
    assert found.healed
    assert found.culprit is not None
    assert found.culprit.rule == "open-gated-wrong2"


def test_nan_is_wrong():
    assert not Errors(float("nan")).within(1.0)
    assert not Errors(0.0, float("nan")).within(1.0)


@pytest.mark.parametrize(
    "tokens", [torch.zeros(3, dtype=torch.int64), torch.full((1, 8), 96), torch.zeros(1, 65).long()]
)
def test_unusable_tokens(program: Program, context: Context, tokens: torch.Tensor):
    with pytest.raises(InputError, match="bisect: token"):
        bisect(program, recipe_with(), context, tokens)


def test_given_tokens_are_used(program: Program, context: Context):
    passes = recipe_with((RulePass(OpenGatedWrong2()), None))
    found = bisect(program, passes, context, torch.tensor([[1, 2, 3, 4, 5]]))
    assert found.culprit is not None
    assert found.culprit.module.startswith("layers.2.")


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("nowhere.py:Name", "no file 'nowhere.py'"),
        ("nameless", "wanted file.py:Name"),
        ("FILE:Nothing", "defines no Nothing; Known: Broken, Right."),
        ("FILE:NUMBER", "wanted a subclass of"),
        ("FILE:Broken", "every option needs a default"),
        ("FAULTY:Right", "fails: ZeroDivisionError"),
    ],
)
def test_unusable_with(tmp_path, spec: str, said: str):
    (tmp_path / "rules.py").write_text(
        "from llmopt.compiler.rewrite import Rule\nNUMBER = 3\nclass Right(Rule): pass\n"
        "class Broken(Rule):\n    def __init__(self, needed): pass\n"
    )
    (tmp_path / "faulty.py").write_text("1 / 0\n")
    spec = spec.replace("FILE", str(tmp_path / "rules.py")).replace("FAULTY", str(tmp_path / "faulty.py"))
    with pytest.raises(RecipeError, match=said):
        load_pass(spec)


def test_with_names_the_pass_to_stand_behind(tmp_path):
    (tmp_path / "own.py").write_text("from llmopt.compiler.rewrite import Rule\nclass Right(Rule): pass\n")
    item, after = load_pass(f"{tmp_path / 'own.py'}:Right@raise-aten")
    assert [p.name for p in recipe_with((item, after))][:2] == ["raise-aten", "right"]
    with pytest.raises(RecipeError, match="no pass 'lover'; did you mean 'lower'"):
        recipe_with((item, "lover"))
