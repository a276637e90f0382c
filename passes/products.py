"""Products with weights: by which names people know them, which one makes the logits, and which no pass can take."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, fx

from llmopt.compiler._torch import OpOverload
from llmopt.compiler.capture_dynamo import Fixed
from llmopt.compiler.errors import RecipeError
from llmopt.compiler.graph import Graph, origin, target_name
from llmopt.compiler.program import Program

_ROOT = re.compile(r"^[LG]\['\w+'\]\.?")  # Dynamo's name of what it was given, before a module's path
_SPELLINGS = {f"aten.{name}" for name in ("linear", "matmul", "mm", "addmm", "bmm", "baddbmm", "einsum")}


def names_of(node: fx.Node, weight: fx.Node | None, program: Program) -> list[str]:
    """What `include` and `exclude` may call the weight of a product: its own name, those of the checkpoint's matrices
    that it is made of, and, where it is another module's (tied embeddings) or computed, `lm_head.weight` after the
    module that the product is in. The last one is what people know it by; there may be none of a computed weight.
    """
    names: list[str] = []
    if weight is not None:
        own = str(weight.target)
        made_of = program.origins(own) if own in program.weights else []
        matrices = [name for name in made_of if len(program.weights[name].shape) > 1]
        # the name of one that a norm's weight is folded into tells of the norm, which nobody means
        names = [own, *matrices, _path(own)] if len(matrices) == len(made_of) else matrices
    module = _ROOT.sub("", origin(node).module)
    short = module.removeprefix("model.")  # capture wraps transformers' models
    if short and not any(f".{short}." in f".{name}" for name in names):
        names += [f"{module}.weight", f"{short}.weight"]
    return list(dict.fromkeys(names))


def _path(name: str) -> str:
    """Dynamo's name of a parameter as the module has it: `l_self_modules_a_modules_0_parameters_w_` -> `a.0.w`."""
    modules, found, leaf = name.partition("_parameters_")
    return ".".join([*modules.split("_modules_")[1:], leaf.removesuffix("_")]) if found else name


def matches(names: Collection[str], patterns: Sequence[str]) -> bool:
    """Does one of the names fit one of the patterns?"""
    return any(fnmatchcase(name, pattern) for name in names for pattern in patterns)


def known_names(program: Program) -> list[str]:
    """Every name of a weight that some graph reads, and every other name of a product's weight."""
    used = list(program.used_weights())
    found = [name for own in used for name in (_path(own), *program.origins(own))]
    for graph in program.graphs.values():
        products = [names_of(node, operand(node), program) for node in graph.calls("linear")]
        found += [names[-1] for names in products]
        used += [name for names in products for name in names]
    return list(dict.fromkeys([*found, *used]))  # those that people know come first


def check_patterns(option: str, patterns: Sequence[str], names: Sequence[str]) -> None:
    """Raises RecipeError for a pattern that fits none of the names, with what may have been meant."""
    for pattern in patterns:
        if not matches(names, [pattern]):
            rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise RecipeError(
                f"pass 'quantize': {option} has {pattern!r}, which is the name of no weight and fits none; "
                f"{_meant(pattern, names)}wanted a name or a pattern of such as {', '.join(names[:3])}{rest}"
            )


def _meant(pattern: str, names: Sequence[str]) -> str:
    """`did you mean '*.layers.0.*'? ` for `*.layer.0.*`, nothing where nothing is near."""
    parts = {part for name in names for part in re.split(r"[.|]", name)}
    spelt = ".".join(
        part if part in parts or set(part) & set("*?[") else (get_close_matches(part, parts, 1) or [part])[0]
        for part in pattern.split(".")
    )
    near = [p for p in (spelt, f"{spelt}.*", f"*.{spelt}", f"*.{spelt}.*") if matches(names, [p])]
    found = near or get_close_matches(pattern, names, 1)
    return f"did you mean {found[0]!r}? " if found else ""


def head_of(graph: Graph, whole: bool) -> fx.Node | None:
    """The product that makes the logits: the last one whose result becomes the graph's through calls of one operand.

    The graphs of a `whole` model have one. Any other graph has one only if it looks up an embedding with as many rows
    as that product has columns: then it is the vocabulary's, else a product like others.
    """
    results = [node for node in graph.outputs() if isinstance(node, fx.Node)]
    if whole:
        return _product(results[0]) if results else None
    tables = [n.args[0] for n in graph.calls("aten.embedding")]
    rows = {rows for t in tables if isinstance(t, fx.Node) and isinstance(rows := t.meta["val"].shape[0], int)}
    found = [head for result in results if (head := _product(result)) and head.meta["val"].shape[-1] in rows]
    return max(found, key=list(graph.fx.nodes).index, default=None)


def _product(result: fx.Node) -> fx.Node | None:
    node: fx.Node | None = result
    while node is not None and target_name(node) != "linear":
        sources = [n for n in node.all_input_nodes if n.op == "call_function" and isinstance(n.meta["val"], Tensor)]
        node = sources[0] if len(sources) == 1 else None
    return node


def missed(graph: Graph) -> Iterator[tuple[fx.Node, fx.Node | None, str]]:
    """Products with weights that are no `linear(x, w["name"])`: the node, its weight where there is one, and why.

    In a whole model there are none: it is captured without writes, and its weights may be turned and computed.
    """
    for node in graph.calls():
        hidden = isinstance(node.target, Fixed)
        if target_name(node) == "linear":
            weight: fx.Node | None = operand(node)
            if weight is not None and weight.op == "placeholder":
                yield node, weight, f"its weight is the argument {weight.target!r} and no parameter of a module"
        elif _spelling(node.target.target if isinstance(node.target, Fixed) else node.target) in _SPELLINGS:
            weight = next((w for n in node.all_input_nodes if (w := _made_of(n)) is not None), None)
            if hidden and (weight is not None or "linear" in target_name(node)):
                yield node, weight, "it touches memory that the graph writes in place"
            elif weight is not None:
                yield node, weight, "its weight is turned or computed first, and weights are left as they are here"
            elif target_name(node) == "aten.linear":
                yield node, None, "its weight is computed"


def _spelling(target: Any) -> str:
    return "aten." + target._schema.name.split("::")[1] if isinstance(target, OpOverload) else ""


def operand(linear: fx.Node) -> fx.Node:
    weight = linear.args[1]
    assert isinstance(weight, fx.Node)
    return weight


def _made_of(node: fx.Node) -> fx.Node | None:
    """The matrix, or stack of them, that a value is computed from, if that is a weight and alone."""
    while node.op == "call_function" and len(node.all_input_nodes) == 1:
        (node,) = node.all_input_nodes
    return node if node.op == "get_attr" and node.meta["val"].dim() >= 2 else None
