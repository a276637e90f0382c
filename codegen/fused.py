"""The code of a region that `fuse` has cut: which kernels it calls for a class of shapes, with what arguments.

Classes "1", "8", ... "64" are decoding steps of so many tokens at most, each of its own sequence; there a region is
one kernel:

    gemm       y = EPILOGUE(W . NORM(x))       gemv for one token, else gemm
    attention  q, k, v made from the products before, k and v stored, attend      decode_attention
    rows       everything without an anchor    rows

Class "many" is any other step: the product is torch's (cuBLAS), attention works on tiles of queries, and what stands
before and behind them are kernels over rows.
"""

from __future__ import annotations

import importlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from llmopt.codegen.emit import (
    Hook,
    epilogue_hook,
    key_hook,
    load_g_hook,
    load_x_hook,
    per_token,
    query_hook,
    source_of,
)
from llmopt.codegen.hooks import TEMPLATES
from llmopt.codegen.kernel import Buffer, Call, Kernel, RegionCode, Scalar, Size
from llmopt.codegen.printer import TYPES, Operands
from llmopt.codegen.rows import rows_calls
from llmopt.codegen.tuning import pick
from llmopt.compiler.emittable import op_name
from llmopt.compiler.errors import BuildError, EmitError
from llmopt.compiler.graph import Graph
from llmopt.compiler.target import Target

MANY = "many"
_PLAIN = {"view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze"}
_CASTS = {"to", "_to_copy"}


def region_code(graph: Graph, shape: str, target: Target) -> RegionCode:
    """The code of a region for a class of shapes. Raises BuildError: no template takes it as it is."""
    region = _Region.of(graph, target)
    try:
        if list(region.graph.calls("attend")):
            _many_attention(region) if shape == MANY else _attention(region)
        elif list(region.graph.calls("linear")):
            _many_product(region) if shape == MANY else _product(region, int(shape))
        else:
            _rows(region)
    except EmitError as error:
        raise BuildError(
            f"region {graph.name} for class {shape}: {error}; set LLMOPT_PROVIDER=reference to run the model by "
            "torch's own ops, and report the model"
        ) from error
    return RegionCode(tuple(region.calls), region.outputs, tuple(region.temporaries))


@dataclass
class _Region:
    """A region's graph (biases apart from products), where its tensors lie, and the code made so far."""

    graph: Graph
    target: Target
    stored: dict[fx.Node, str]
    outputs: tuple[Buffer | str, ...]
    calls: list[Call] = field(default_factory=list)
    temporaries: list[Buffer] = field(default_factory=list)

    @classmethod
    def of(cls, graph: Graph, target: Target) -> _Region:
        graph = graph.copy()
        for node in list(graph.calls("linear")):
            _split_bias(graph, node)
        region = cls(graph, target, {n: f"in{i}" for i, n in enumerate(graph.inputs())}, ())
        region.outputs = tuple(region.output(n) for n in graph.outputs())
        return region

    def output(self, node: fx.Node) -> Buffer | str:
        """A buffer of the node's own, or the pages that a kv_write returns."""
        return self.stored[node.args[0]] if _calls(node, {"kv_write"}) else self.buffer(node)  # type: ignore[index]

    def buffer(self, node: fx.Node, shape: tuple[Size, ...] | None = None) -> Buffer:
        """A tensor like the node's value."""
        value = node.meta["val"]
        sizes = shape or tuple(s if isinstance(s, int) else self.graph.named_sizes(str(s)) for s in value.shape)
        return Buffer(sizes, _dtype(node))

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
        while node not in self.stored and _keeps_order(node):
            node = node.args[0]  # type: ignore[assignment]
        return self.stored.get(node)

    def result(self) -> fx.Node:
        """What the region returns of its anchor."""
        (result,) = (n for n in self.graph.outputs() if not _calls(n, {"kv_write"}))
        return result  # type: ignore[no-any-return]

    @property
    def pdl(self) -> bool:
        """May a kernel start before the one ahead of it has ended?"""
        return "pdl" in self.target.features

    def rows(self, outputs: Mapping[fx.Node, str], tokens: Size, by_token: tuple[fx.Node, ...] = ()) -> None:
        """Add kernels over rows that write these nodes."""
        self.calls += rows_calls(outputs, self.stored, tokens, self.pdl, by_token)


Argument = tuple[str, str | None, Size | None]  # parameter, its type (None: no such tensor), what is passed


def _rows(region: _Region) -> None:
    outputs = {n: f"out{i}" for i, n in enumerate(region.graph.outputs())}
    region.rows(outputs, region.tokens(next(iter(outputs))))


# --- products


def _product(region: _Region, tokens: int) -> None:
    """One kernel; where no template takes it, torch's product between two kernels over rows."""
    (linear,) = region.graph.calls("linear")
    kept = len(region.calls)
    try:
        region.calls.append(_product_call(region, linear, tokens))
    except EmitError:
        del region.calls[kept:], region.temporaries[:]
        _many_product(region)


def _product_call(region: _Region, linear: fx.Node, tokens: int) -> Call:
    result = region.result()
    x, norm = _operand(linear)
    operands = Operands()
    load_x = load_x_hook(operands, x, region.stored)
    load_g = load_g_hook(operands, norm, region.stored) if norm is not None else None
    epilogue, offsets = epilogue_hook(operands, result, linear, region.stored)
    weight = linear.args[1]
    sizes = {"K": weight.meta["val"].shape[1], "J": per_token(result), "PARTS": len(offsets), "N": tokens}  # type: ignore[union-attr]
    sizes["NORM"] = int(norm is not None)
    template = "gemv:gemv" if tokens == 1 else "gemm:gemm"
    config = _config(region, template, sizes, _dtype(weight))  # type: ignore[arg-type]
    arguments: list[Argument] = [
        ("w", _type(weight), region.argument(weight)),  # type: ignore[arg-type]
        ("y", _type(result), "out0"),
        *_passed(region, operands),
        ("N", "i32", region.tokens(linear)),
    ]
    if template == "gemm:gemm":
        arguments += _scratch(region, sizes, config)
    constants: dict[str, Scalar] = {
        **{k: sizes[k] for k in ("K", "J", "PARTS", "NORM")},
        "OFFSET0": offsets[0],
        "OFFSET1": offsets[-1],
        "EPS": 0.0 if norm is None else float(norm.args[2]),  # type: ignore[arg-type]
        "PDL": region.pdl,
    }
    hooks = {"LOAD_X": load_x, "LOAD_G": load_g, "EPILOGUE": epilogue}
    return _call(template, sizes, config, arguments, constants, hooks)


def _operand(linear: fx.Node) -> tuple[fx.Node, fx.Node | None]:
    """(x, the norm of x in front of the product or None); casts of the norm's result are the kernel's business."""
    node = linear.args[0]
    while _calls(node, _CASTS) or _keeps_order(node):  # type: ignore[arg-type]
        node = node.args[0]  # type: ignore[union-attr]
    if _calls(node, {"rms_norm"}):  # type: ignore[arg-type]
        return node.args[0], node  # type: ignore[return-value, union-attr]
    return linear.args[0], None  # type: ignore[return-value]


def _scratch(region: _Region, sizes: Mapping[str, int], config: Mapping[str, Any]) -> list[Argument]:
    tickets, partial = _template("gemm:gemm").scratch(sizes, config)
    if not tickets:
        return [("tickets", None, None), ("partial", None, None)]
    return [
        ("tickets", "*i32", region.temporary(Buffer((tickets,), "int32", kept=True))),
        ("partial", "*fp32", region.temporary(Buffer((partial,), "float32"))),
    ]


def _many_product(region: _Region) -> None:
    """The operand made, torch's product, the result made; the first and last only where there is something to do."""
    (linear,) = region.graph.calls("linear")
    x, weight = linear.args[:2]
    result, tokens = region.result(), region.tokens(linear)
    place = region.place(x)  # type: ignore[arg-type]
    if place is None:
        place = region.temporary(region.buffer(x))  # type: ignore[arg-type]
        region.rows({x: place}, tokens)  # type: ignore[dict-item]
    region.stored[linear] = "out0"
    alone = region.place(result) is not None
    if not alone:
        region.stored[linear] = region.temporary(region.buffer(linear))
    region.calls.append(Call((place, region.argument(weight), region.stored[linear]), op="linear"))  # type: ignore[arg-type]
    if not alone:
        region.rows({result: "out0"}, tokens)


# --- attention


def _heads(attend: fx.Node) -> dict[str, int]:
    q, k, v = (n.meta["val"].shape for n in attend.args[:3])  # type: ignore[union-attr]
    return {"HQ": q[1], "HKV": k[1], "D": k[3], "DV": v[3], "PAGE": k[2]}


def _common(region: _Region, attend: fx.Node) -> tuple[list[Argument], Argument, Argument, dict[str, Scalar]]:
    """What both templates of attention take: pages and tables, sinks, the result, constants."""
    k_write, v_write, tables = attend.args[1:4]
    paged: list[Argument] = [
        ("k_pages", _type(k_write), region.argument(k_write.args[0])),  # type: ignore[arg-type, union-attr]
        ("v_pages", _type(v_write), region.argument(v_write.args[0])),  # type: ignore[arg-type, union-attr]
        ("tables", "*i64", region.argument(tables)),  # type: ignore[arg-type]
    ]
    sinks, scale, window, softcap = attend.args[6:10]
    sunk: Argument = ("sinks", None, None)
    if isinstance(sinks, fx.Node):
        sunk = ("sinks", _type(sinks), region.argument(sinks))
    constants: dict[str, Scalar] = {"SCALE": float(scale), "WINDOW": int(window), "SOFTCAP": float(softcap)}  # type: ignore[arg-type]
    return paged, sunk, ("out", _type(attend), f"out{_place_of(region, attend)}"), {**_heads(attend), **constants}


def _place_of(region: _Region, attend: fx.Node) -> int:
    """Which output the attention's result is, token by token. Raises EmitError."""
    result = region.result()
    turned = [n for n in _chain(result, attend) if not _keeps_order(n)]
    if len(turned) != 1 or list(turned[0].meta["val"].shape[2:]) != [_heads(attend)["HQ"], _heads(attend)["DV"]]:
        raise EmitError(f"{attend.name} is returned as {list(result.meta['val'].shape)}; wanted it token by token")
    return region.graph.outputs().index(result)


def _chain(last: fx.Node, first: fx.Node) -> list[fx.Node]:
    found = []
    while last is not first:
        found.append(last)
        last = last.args[0]  # type: ignore[assignment]
    return found


def _attention(region: _Region) -> None:
    (attend,) = region.graph.calls("attend")
    q, k_write, v_write = attend.args[:3]
    paged, sinks, out, constants = _common(region, attend)
    operands = Operands()
    hooks = {
        "LOAD_Q": query_hook(operands, q, region.stored),  # type: ignore[arg-type]
        "LOAD_K": key_hook(operands, k_write.args[1], region.stored),  # type: ignore[arg-type, union-attr]
        "LOAD_V": key_hook(operands, v_write.args[1], region.stored),  # type: ignore[arg-type, union-attr]
    }
    heads = _heads(attend)
    arguments: list[Argument] = [
        *paged,
        ("positions", "*i64", region.argument(attend.args[5])),  # type: ignore[arg-type]
        ("slots", "*i64", region.argument(k_write.args[2])),  # type: ignore[arg-type, union-attr]
        sinks,
        out,
        ("partial", "*fp32", region.temporary(Buffer((f"N * SPLITS * {heads['HQ'] * heads['DV']}",), "float32"))),
        ("lse", "*fp32", region.temporary(Buffer((f"N * SPLITS * {heads['HQ'] * 2}",), "float32"))),
        ("tickets", "*i32", region.temporary(Buffer((f"N * {heads['HKV']}",), "int32", kept=True))),
        *_passed(region, operands),
        *((name, "i32", name) for name in ("N", "M", "SPLITS")),
    ]
    template = "decode_attention:decode_attention"
    config = _config(region, template, heads, _dtype(attend))
    region.calls.append(_call(template, heads, config, arguments, {**constants, "PDL": region.pdl}, hooks))


def _many_attention(region: _Region) -> None:
    (attend,) = region.graph.calls("attend")
    q, k_write, v_write = attend.args[:3]
    paged, sinks, out, constants = _common(region, attend)
    heads = _heads(attend)
    made = region.temporary(region.buffer(q, ("N", heads["HQ"], heads["D"])))  # type: ignore[arg-type]
    pages = {n: region.argument(n.args[0]) for n in (k_write, v_write)}  # type: ignore[union-attr, arg-type]
    region.rows({q: made, **pages}, "N", by_token=(q,))  # type: ignore[dict-item, arg-type]
    arguments: list[Argument] = [
        ("q", _type(q), made),  # type: ignore[arg-type]
        *paged,
        ("tiles", "*i32", "tiles"),
        sinks,
        out,
        ("M", "i32", "M"),
    ]
    template = "prefill_attention:prefill_attention"
    config = _config(region, template, heads, _dtype(attend))
    region.calls.append(_call(template, heads, config, arguments, constants, {}))


# --- kernels


def _config(region: _Region, template: str, sizes: Mapping[str, int], dtype: str) -> dict[str, Any]:
    """The tuned constants. Raises EmitError if the template does not take these sizes."""
    reason = _template(template).supports(sizes, dtype, region.target)
    if reason is not None:
        raise EmitError(f"not by {template}: {reason}")
    return pick(template, sizes, dtype, region.target)


def _template(template: str) -> Any:
    return importlib.import_module(f"{TEMPLATES}.{template.partition(':')[0]}")


def _passed(region: _Region, operands: Operands) -> list[Argument]:
    """The tensors that hooks read, as arguments."""
    there = zip(operands.types(), operands.nodes, strict=True)
    given = [(name, type_, region.stored[node]) for (name, type_), node in there]
    return [*given, *((name, None, None) for name, _ in operands.absent())]


def _call(
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
    return Call(tuple(value for _, _, value in there), kernel, _template(template).grid(sizes, config))


def _keeps_order(node: fx.Node) -> bool:
    """Is this a view of the same elements in the same order?"""
    if _calls(node, {"select"}):
        source, dim = node.args[0], node.args[1]
        return bool(source.meta["val"].shape[dim] == 1)  # type: ignore[union-attr]
    return _calls(node, _PLAIN)


def _calls(node: fx.Node, names: Collection[str]) -> bool:
    """Does the node call one of these? (An input may be named like an op.)"""
    return node.op == "call_function" and op_name(node) in names


def _split_bias(graph: Graph, linear: fx.Node) -> None:
    """linear(x, w, b) as linear(x, w) + b: torch's product then takes any bias, and so does an epilogue."""
    bias = linear.args[2] if len(linear.args) > 2 else None
    if not isinstance(bias, fx.Node):
        return
    linear.update_arg(2, None)
    with graph.fx.inserting_after(linear):
        added = graph.fx.call_function(torch.ops.aten.add.Tensor, (linear, bias))
    added.meta["val"] = linear.meta["val"]
    linear.replace_all_uses_with(added, delete_user_cb=lambda user: user is not added)


def _dtype(node: fx.Node) -> str:
    return str(node.meta["val"].dtype).removeprefix("torch.")


def _type(node: fx.Node) -> str:
    """Raises EmitError: no kernel reads this dtype."""
    if node.meta["val"].dtype not in TYPES:
        raise EmitError(f"{node.name} has dtype {_dtype(node)}; wanted one that kernels read")
    return TYPES[node.meta["val"].dtype]
