"""A rewrite of your own: see what it changes, prove it right; then break it and let bisection find the rewrite.

llmopt diff examples/models/pico-llama-4m --with examples/own_rule.py:OpenGated --pass open-gated
llmopt bisect examples/models/pico-llama-4m --with examples/own_rule.py:WrongInLayer1
"""

from typing import Any

from llmopt.compiler.graph import origin
from llmopt.compiler.pattern import ir
from llmopt.compiler.rule import Builder, Match, Rule


class OpenGated(Rule):
    """gated(gate, up, "silu") becomes silu(gate) * up."""

    def pattern(self, gate: Any, up: Any) -> Any:
        """The parameters' names are the variables."""
        return ir.gated(gate, up, "silu")

    def rewrite(self, b: Builder, m: Match) -> Any:
        """Two aten calls."""
        return b.aten.mul.Tensor(b.aten.silu.default(m["gate"]), m["up"])


class WrongInLayer1(OpenGated):
    """The same, with its operands swapped in one layer."""

    def rewrite(self, b: Builder, m: Match) -> Any:
        """Right in layer 0, wrong in layer 1."""
        if origin(m.root).module.startswith("layers.1."):
            return b.aten.mul.Tensor(b.aten.silu.default(m["up"]), m["gate"])
        return super().rewrite(b, m)


if __name__ == "__main__":
    import sys
    from pathlib import Path

    from llmopt.compiler.bisect import bisect
    from llmopt.compiler.extra import RulePass, insert_passes
    from llmopt.compiler.pipeline import Context
    from llmopt.compiler.recipe import Recipe
    from llmopt.compiler.target import Target
    from llmopt.passes import PASSES
    from llmopt.runtime.build import capture_any

    folder = Path(__file__).resolve().parent / "models" / "pico-llama-4m"
    recipe = Recipe.parse(sys.argv[1] if len(sys.argv) > 1 else "reference")
    program = capture_any(folder, "float32")
    for rule in (OpenGated(), WrongInLayer1()):
        passes = insert_passes(recipe.build(PASSES), [(RulePass(rule), None)])
        found = bisect(program, passes, Context(Target.detect(), recipe))
        print(f"{rule.name}: {found.culprit or 'nothing is wrong'}")
