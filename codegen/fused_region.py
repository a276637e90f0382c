"""A region on its way to code: its graph, where its tensors lie, and the calls and temporaries made so far."""

from __future__ import annotations

import importlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from llmopt.codegen.emit import Hook, source_of
from llmopt.codegen.hooks import TEMPLATES
from llmopt.codegen.kernel import Buffer, Call, Kernel, Prepared, Scalar, Size
from llmopt.codegen.printer import TYPES, Operands
from llmopt.codegen.rows import rows_calls
from llmopt.codegen.tuning import pick
from llmopt.compiler.emittable import ATTENDS, CASTS, PRODUCTS, bias_of, is_product, keeps_order, op_name
from llmopt.compiler.errors import EmitError
from llmopt.compiler.graph import Graph
from llmopt.compiler.target import Target

Argument = tuple[str, str | None, Size | None]  # parameter, its type (None: no such tensor), what is passed


@dataclass
class FusedRegion:
    """A region's graph (biases apart from products), where its tensors lie, and the code made so far."""

    graph: Graph
    target: Target
    stored: dict[fx.Node, str]
    outputs: tuple[Buffer | str, ...]
    calls: list[Call] = field(default_factory=list)
    temporaries: list[Buffer] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    prepared: list[Prepared] = field(default_factory=list)
    ordered: Mapping[str, int] = field(default_factory=dict)  # arguments whose columns stand in `order.place`'s order

    @classmethod
    def of(cls, graph: Graph, target: Target, ordered: Mapping[str, int] | None = None) -> FusedRegion:
        """A region as it stands, without code."""
        graph = graph.copy()
        for node in filter(is_product, list(graph.calls())):
            _split_bias(graph, node)
        region = cls(graph, target, {n: f"in{i}" for i, n in enumerate(graph.inputs())}, ())
        region.outputs = tuple(region.output(n) for n in graph.outputs())
        region.ordered = ordered or {}
        return region

    def products(self) -> list[fx.Node]:
        """The calls of products with weights; fuse gives a region one at most."""
        return [n for n in self.graph.calls() if is_product(n)]

    def output(self, node: fx.Node) -> Buffer | str:
        """A buffer of the node's own, or the pages that a kv_write returns."""
        return self.stored[node.args[0]] if calls_any(node, {"kv_write"}) else self.buffer(node)  # type: ignore[index]

    def attend(self) -> fx.Node:
        """The one attention of a region of attention."""
        (found,) = (node for node in self.graph.calls() if calls_any(node, ATTENDS))
        return found  # type: ignore[no-any-return]

    def buffer(self, node: fx.Node, shape: tuple[Size, ...] | None = None) -> Buffer:
        """A tensor like the node's value."""
        value = node.meta["val"]
        sizes = shape or tuple(s if isinstance(s, int) else self.graph.named_sizes(str(s)) for s in value.shape)
        return Buffer(sizes, dtype_of(node))

    def temporary(self, buffer: Buffer) -> str:
        """Its name."""
        self.temporaries.append(buffer)
        return f"tmp{len(self.temporaries) - 1}"

    def tokens(self, node: fx.Node) -> str:
        """The name of the node's one symbolic size."""
        return next(self.graph.named_sizes(str(s)) for s in node.meta["val"].shape if not isinstance(s, int))

    def argument(self, node: fx.Node) -> str:
        """Where a tensor lies that is an input as it is. Raises EmitError."""
        found = self.place(node)
        if found is None:
            raise EmitError(f"{node.name} is computed; wanted an input of the region")
        return found

    def place(self, node: fx.Node) -> str | None:
        """Where the node's elements lie in its order: through views that keep it."""
        while node not in self.stored and keeps_order(node):
            node = node.args[0]  # type: ignore[assignment]
        return self.stored.get(node)

    def result(self) -> fx.Node:
        """What the region returns of its anchor."""
        (result,) = (n for n in self.graph.outputs() if not calls_any(n, {"kv_write"}))
        return result  # type: ignore[no-any-return]

    @property
    def pdl(self) -> bool:
        """May a kernel start before the one ahead of it has ended?"""
        return "pdl" in self.target.features

    def rows(
        self,
        outputs: Mapping[fx.Node, str],
        tokens: Size,
        by_token: tuple[fx.Node, ...] = (),
        early: bool = False,
    ) -> None:
        """Add kernels over rows that write these nodes; see `rows_calls`."""
        self.calls += rows_calls(outputs, self.stored, tokens, self.pdl, by_token, early)


def config_of(region: FusedRegion, template: str, sizes: Mapping[str, int], dtype: str) -> dict[str, Any]:
    """The tuned constants. Raises EmitError if the template does not take these sizes."""
    reason = template_of(template).supports(sizes, dtype, region.target)
    if reason is not None:
        raise EmitError(f"not by {template}: {reason}")
    return pick(template, sizes, dtype, region.target)


def template_of(template: str) -> Any:
    """The module of `module:function`."""
    return importlib.import_module(f"{TEMPLATES}.{template.partition(':')[0]}")


def passed(region: FusedRegion, operands: Operands) -> list[Argument]:
    """The tensors that hooks read, as arguments."""
    there = zip(operands.types(), operands.nodes, strict=True)
    given = [(name, type_, region.stored[node]) for (name, type_), node in there]
    return [*given, *((name, None, None) for name, _ in operands.absent())]


def operand(linear: fx.Node) -> tuple[fx.Node, fx.Node | None]:
    """(x, the norm of x in front of the product or None); casts of the norm's result are the kernel's business."""
    node = linear.args[0]
    while calls_any(node, CASTS) or keeps_order(node):  # type: ignore[arg-type]
        node = node.args[0]  # type: ignore[union-attr]
    if calls_any(node, {"rms_norm"}):  # type: ignore[arg-type]
        return node.args[0], node  # type: ignore[return-value, union-attr]
    return linear.args[0], None  # type: ignore[return-value]


def scratch_of(
    region: FusedRegion, template: str, sizes: Mapping[str, int], config: Mapping[str, Any]
) -> list[Argument]:
    """What programs that share K need: their tickets and partial sums."""
    tickets, partial = template_of(template).scratch(sizes, config)
    if not tickets:
        return [("tickets", None, None), ("partial", None, None)]
    return [
        ("tickets", "*i32", region.temporary(Buffer((tickets,), "int32", kept=True))),
        ("partial", "*fp32", region.temporary(Buffer((partial,), "float32"))),
    ]


def call_of(
    template: str,
    sizes: Mapping[str, int],
    config: Mapping[str, Any],
    arguments: Sequence[Argument],
    constants: Mapping[str, Scalar],
    hooks: Mapping[str, Hook | None],
) -> Call:
    """A launch of a template; what there is not (tensors, hooks) is a constant None."""
    there = [a for a in arguments if a[1] is not None]
    absent = [name for name, type_, _ in arguments if type_ is None] + [k for k, hook in hooks.items() if hook is None]
    printed = {k: hook for k, hook in hooks.items() if hook is not None}
    tuned = {k: v for k, v in config.items() if k not in ("num_warps", "num_stages")}
    kernel = Kernel(
        template,
        types=tuple((name, str(type_)) for name, type_, _ in there),
        constants=tuple({**constants, **tuned, **dict.fromkeys(absent)}.items()),
        hooks=tuple((k, hook.name) for k, hook in printed.items()),
        source=source_of(*printed.values()) if printed else "",
        num_warps=config["num_warps"],
        num_stages=config["num_stages"],
        pdl=bool(constants.get("PDL")),
    )
    return Call(tuple(value for _, _, value in there), kernel, template_of(template).grid(sizes, config))


def for_tokens(tokens: str, call: Call) -> Call:
    """The call with a grid for these tokens, which templates call N."""
    return replace(call, grid=tuple(size if isinstance(size, int) else size.replace("N", tokens) for size in call.grid))


def calls_any(node: fx.Node, names: Collection[str]) -> bool:
    """Does the node call one of these? (An input may be named like an op.)"""
    return node.op == "call_function" and op_name(node) in names


def _split_bias(graph: Graph, product: fx.Node) -> None:
    """linear(x, w, b) as linear(x, w) + b: torch's product then takes any bias, and so does an epilogue."""
    bias = bias_of(product)
    if bias is None:
        return
    product.update_arg(PRODUCTS[op_name(product)][1], None)
    with graph.fx.inserting_after(product):
        added = graph.fx.call_function(torch.ops.aten.add.Tensor, (product, bias))
    added.meta["val"] = product.meta["val"]
    product.replace_all_uses_with(added, delete_user_cb=lambda user: user is not added)


def dtype_of(node: fx.Node) -> str:
    """The torch name of its dtype."""
    return str(node.meta["val"].dtype).removeprefix("torch.")


def type_of(node: fx.Node) -> str:
    """The type of a pointer to its elements. Raises EmitError: no kernel reads this dtype."""
    if node.meta["val"].dtype not in TYPES:
        raise EmitError(f"{node.name} has dtype {dtype_of(node)}; wanted one that kernels read")
    return TYPES[node.meta["val"].dtype]
