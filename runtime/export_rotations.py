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
from llmopt.compiler.quant.transforms_read import PREFIX

WIDEST = 2048  # of a matrix, which every module holds
NAME = "R4"
_ELSEWHERE = "export --to onnx, which takes it as it is, or use the checkpoint itself"


@dataclass
class Rotations:
    """By module what its input is multiplied with (signs or "", and two factors), and by order the modules."""

    factors: dict[str, tuple[str, str, str]] = field(default_factory=dict)
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
                lambda given=self.factors[module]: _matrix(program, given),
            )
            for order, modules in self.orders.items()
            for module in modules
        }


def rotations(program: Program, products: Mapping[fx.Node, list[str]], to: CheckpointFormat) -> Rotations:
    """Of a graph whose products (by node) are those of some modules.

    Raises InputError: `to` has no rotations, something else than a product reads what is rotated (r3), the matrix is
    too large, or a checkpoint's own transform is none of this kind.
    """
    found, written = Rotations(), set()
    for node in program.graph("forward").calls("rotate"):
        left, right = (str(arg.target) for arg in node.args[1:3] if isinstance(arg, fx.Node))
        ours = not left.startswith(PREFIX)
        if not to.rotates:
            raise InputError(
                f"{where(node)} is rotated while the model runs, which {to.name} does not say; "
                + ("leave r3 and r4 out of the rotation (recipe `rotate`), or " * ours)
                + "export --to compressed-tensors, which has rotations of what products read"
            )
        readers = [(user, products.get(user)) for user in node.users]
        if others := [op_name(user) for user, modules in readers if modules is None]:
            raise InputError(
                f"{where(node)} is rotated for {', '.join(others)}, and runtimes of compressed-tensors rotate what "
                f"products read alone; {'leave r3 out of the rotation (recipe `rotate`)' if ours else _ELSEWHERE}"
            )
        order = program.weights[left].shape[0] * program.weights[right].shape[0]
        if order > WIDEST:
            remedy = f"give the pass rotate-hadamard an `order` of at most {WIDEST}, such as 128, or leave r4 out"
            raise InputError(
                f"{where(node)} is rotated by blocks of {order}, whose matrix every module of the checkpoint would "
                f"hold; {remedy if ours else _ELSEWHERE}"
            )
        signs = _signs(node)
        written |= {signs, left, right}
        for module in [module for _, modules in readers for module in modules or ()]:
            found.factors[module] = signs, left, right
            found.orders.setdefault(order, []).append(module)
    for node in program.graph("forward").fx.nodes:
        left_out = node.op == "get_attr" and str(node.target) not in written
        if left_out and any(leaf.startswith(PREFIX) for leaf in program.origins(str(node.target))):
            raise InputError(
                f"{where(next(iter(node.users)))} is turned by a matrix of the checkpoint that it came from "
                f"({node.target}), and what leaves as {to.name} has rotations by Hadamard matrices of what products "
                f"read alone; {_ELSEWHERE}"
            )
    return found


def _signs(node: fx.Node) -> str:
    """The signs that what is rotated is multiplied by before, "" if there are none."""
    x = node.args[0]
    if isinstance(x, fx.Node) and op_name(x) == "mul" and list(x.users) == [node]:
        for arg in x.args[:2]:
            if isinstance(arg, fx.Node) and arg.op == "get_attr" and str(arg.target).startswith(PREFIX):
                return str(arg.target)
    return ""


def _matrix(program: Program, given: tuple[str, str, str]) -> Tensor:
    """Of 1 and -1 [n, n]: compressed-tensors divides by the square root of n."""
    signs, left, right = (program.weights[name].load().double() if name else None for name in given)
    assert left is not None
    assert right is not None
    whole = torch.kron(left, right)
    whole = (whole * len(whole) ** 0.5).round()
    return whole if signs is None else whole * signs[: len(whole), None]
