"""Rotations that run in the model, as compressed-tensors' `transform_config` says them.

What a product reads is rotated in front of it by a matrix of 1 and -1 that the checkpoint holds in the product's module
(its transforms of type `random-hadamard`, at the location `input`; vLLM runs them). Weights are rotated already.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from llmopt.compiler.emittable import op_name
from llmopt.compiler.errors import InputError
from llmopt.compiler.graph import where
from llmopt.compiler.program import Program
from llmopt.compiler.quant.checkpoint_format import CheckpointFormat

WIDEST = 2048  # of a matrix, which every module holds
NAME = "R4"


@dataclass
class Rotations:
    """By module what its input is multiplied with, and by order the modules."""

    factors: dict[str, tuple[str, str]] = field(default_factory=dict)
    orders: dict[int, list[str]] = field(default_factory=dict)

    def config(self) -> dict[str, Any]:
        """`transform_config`."""
        groups = {}
        for order, modules in self.orders.items():
            apply = {"targets": modules, "location": "input", "inverse": False, "ignore": []}
            groups[self.name(order)] = {
                "type": "random-hadamard", "apply": [apply], "randomize": False, "requires_grad": False,
                "head_dim": order, "precision": "torch.float32",
            }  # fmt: skip
        return {"config_groups": groups}

    def name(self, order: int) -> str:
        """What compressed-tensors calls the transform in its modules."""
        return NAME if len(self.orders) == 1 else f"{NAME}-{order}"

    def tensors(self, program: Program) -> dict[str, tuple[int, Any]]:
        """By its name in the checkpoint the order of each matrix, and what makes it."""
        return {
            f"{module}.{self.name(order)}_input.weight": (
                order,
                lambda both=self.factors[module]: _matrix(program, both),
            )
            for order, modules in self.orders.items()
            for module in modules
        }


def rotations(program: Program, products: Mapping[fx.Node, str], to: CheckpointFormat) -> Rotations:
    """Of a graph whose products (by node) belong to one module each.

    Raises InputError: `to` has no rotations, something else than a product reads what is rotated (r3), or the matrix is
    too large.
    """
    found = Rotations()
    for node in program.graph("forward").calls("rotate"):
        if not to.rotates:
            raise InputError(
                f"{where(node)} is rotated while the model runs, which {to.name} does not say; leave r3 and r4 out of "
                "the rotation (recipe `rotate`), or export --to compressed-tensors, which has r4"
            )
        readers = [products.get(user) for user in node.users]
        if any(module is None for module in readers):
            raise InputError(
                f"{where(node)} is rotated for {', '.join(op_name(user) for user in node.users)}, and runtimes of "
                "compressed-tensors rotate what products read alone; leave r3 out of the rotation (recipe `rotate`)"
            )
        left, right = (str(arg.target) for arg in node.args[1:3] if isinstance(arg, fx.Node))
        order = program.weights[left].shape[0] * program.weights[right].shape[0]
        if order > WIDEST:
            raise InputError(
                f"{where(node)} is rotated by blocks of {order}, whose matrix every module of the checkpoint would "
                f"hold; give the pass rotate-hadamard an `order` of at most {WIDEST}, such as 128, or leave r4 out"
            )
        for module in readers:
            assert module is not None
            found.factors[module] = left, right
            found.orders.setdefault(order, []).append(module)
    return found


def _matrix(program: Program, both: tuple[str, str]) -> Tensor:
    """Of 1 and -1 [n, n]: compressed-tensors divides by the square root of n."""
    left, right = (program.weights[name].load().double() for name in both)
    whole = torch.kron(left, right)
    return (whole * len(whole) ** 0.5).round()
