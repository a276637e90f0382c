"""A Dynamo graph (what `torch.compile` hands to a backend) as a Program, and back again.

It differs from an exported graph in two ways, and both are kept: it may be any fragment of a model, and it may write
into memory that others see (a static KV cache). Parameters are weights while passes run and inputs again afterwards:
their data is never read and nothing is computed from them ahead of time, so a parameter that is replaced or edited is
simply the next call's input.

Passes merge, move and drop calls as if no call wrote anything. To make that true, every call that touches memory which
some call of the graph writes in place is hidden: it becomes a call of a `Fixed`, which no rule matches and whose order
is checked after the passes, and it turns back into the original call at the end.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, fx, nn

from llmopt.compiler._torch import FakeTensor, OpOverload, trace_pre_dispatch
from llmopt.compiler.aliasing import sharing, storages, storages_of, written
from llmopt.compiler.capture import origin_of
from llmopt.compiler.errors import CaptureError, RewriteError
from llmopt.compiler.fake import find_mode, is_alike
from llmopt.compiler.graph import Graph, target_name, type_of
from llmopt.compiler.program import ModelFacts, Program, Weight

NAME = "fragment"  # the graph's name in the Program
_COPIES = ("aten.clone", "aten.contiguous", "aten.to", "aten._to_copy")
_ALIASES = ("aten.alias", "aten.detach", "aten.detach_")


class Fixed:
    """The target of a hidden call: its arguments are its number, which keeps equal calls apart, then its own."""

    def __init__(self, target: Any) -> None:
        self.target = target
        self.__name__ = f"fixed_{getattr(target, '__name__', target)}"

    def __call__(self, *args: Any, **kwargs: Any) -> NoReturn:
        """KeyError, which is how evaluation is told that a value is not known before the graph runs."""
        raise KeyError("memory that is written in place")


_fixed = functools.cache(Fixed)


@dataclass(frozen=True)
class Fragment:
    """A Dynamo graph as a Program of one graph, and what it takes to turn that back into a Dynamo graph.

    `arguments` names the graph input or weight that each argument is; `constants` are graph inputs that are no
    arguments, but tensors the code holds; `sharing` says which of arguments and results share memory.
    """

    source: fx.GraphModule
    program: Program
    arguments: tuple[str, ...]
    fakes: tuple[Any, ...]
    constants: dict[str, Tensor]
    results: tuple[Any, ...]
    sharing: tuple[int, ...]
    hidden: int

    @property
    def graph(self) -> Graph:
        """The graph that passes edit."""
        return self.program.graph(NAME)


def capture_fragment(source: fx.GraphModule, example_inputs: Sequence[Any]) -> Fragment:
    """Trace a Dynamo graph to aten without decompositions, under Dynamo's own fake tensors, sizes and guards.

    Raises CaptureError, with the reason, for a graph that should stay as it is.
    """
    fakes = _fake_arguments(source, example_inputs)
    traced = _trace(fx.Interpreter(source).run, fakes)
    nodes = list(traced.graph.nodes)
    changed = {s for node in nodes for s in written(node)}
    names = _names(source)
    weights = {
        name: _weight(real)
        for name, real, fake in zip(names, example_inputs, fakes, strict=True)
        if isinstance(real, nn.Parameter) and not changed & set(storages(fake))
    }
    adopter = _Adopter(traced, _hidden(nodes, changed), any(getattr(x, "requires_grad", False) for x in example_inputs))
    graph = adopter.adopt(names, weights)
    program = Program({NAME: graph}, weights, ModelFacts(NAME, vocab_size=0, context_length=0))
    results = _results(traced)
    return Fragment(
        source, program, names, fakes, adopter.constants, results, sharing((*fakes, *results)), adopter.hidden_calls
    )


def rebuild(fragment: Fragment, implementation: Callable[[fx.Node], Callable[..., Any]]) -> fx.GraphModule:
    """The edited graph as a Dynamo graph of aten calls again: same arguments, same results, same writes.

    `implementation(node)` is the function that computes a node; it is traced through. Raises RewriteError if the
    passes changed more than how values are computed.
    """
    graph = fragment.graph
    _check_calls(fragment, graph)
    results = graph.outputs()[: len(fragment.results)]

    def run(*arguments: Any) -> Any:
        given = {**fragment.constants, **dict(zip(fragment.arguments, arguments, strict=True))}
        values = {n: given[str(n.target)] for n in graph.fx.nodes if n.op in ("placeholder", "get_attr")}
        for node in graph.calls():
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: values[n])
            with torch.fx.traceback.set_current_meta(node):
                if isinstance(node.target, Fixed):
                    values[node] = node.target.target(*args[1:], **kwargs)
                else:
                    values[node] = implementation(node)(*args, **kwargs)
        return fx.node.map_arg(results, lambda n: values[n])

    traced = _trace(run, fragment.fakes)
    _check_results(fragment, _results(traced))
    return _as_dynamo(traced, fragment.source)


def _fake_arguments(source: fx.GraphModule, example_inputs: Sequence[Any]) -> tuple[Any, ...]:
    """Dynamo's fake values of the arguments, once it is clear that the graph can be traced with them."""
    if any("unbacked_bindings" in n.meta for n in source.graph.nodes):
        raise CaptureError("the graph reads sizes or numbers out of tensors (.item(), nonzero); it stays as it is")
    fakes = []
    for node, real in zip(source.graph.find_nodes(op="placeholder"), example_inputs, strict=True):
        fake = node.meta.get("example_value")
        if isinstance(real, Tensor) and not _is_plain(real, fake):
            raise CaptureError(
                f"argument {node.name} is a {type(real).__name__} that Dynamo sees as {type_of(fake)}; wanted a plain "
                "dense tensor whose shape the graph does not change"
            )
        if not isinstance(real, Tensor) and not isinstance(fake, (int, float, torch.SymInt, torch.SymFloat)):
            raise CaptureError(f"argument {node.name} is a {type(real).__name__}; wanted tensors and numbers")
        fakes.append(fake)
    kinds = {fake.device.type for fake in fakes if isinstance(fake, Tensor)}
    if any(torch.is_autocast_enabled(kind) for kind in kinds | {"cpu"}):
        raise CaptureError("autocast is on; convert the model instead, with model.to(torch.bfloat16)")
    return tuple(fakes)


def _is_plain(real: Tensor, fake: Any) -> bool:
    if type(real) not in (Tensor, nn.Parameter) or real.layout != torch.strided or not isinstance(fake, FakeTensor):
        return False
    sizes = zip(real.shape, fake.shape, strict=True) if real.dim() == fake.dim() else [(0, -1)]
    return all(isinstance(s, torch.SymInt) or s == r for r, s in sizes)


def _trace(run: Callable[..., Any], fakes: Sequence[Any]) -> fx.GraphModule:
    mode = find_mode(fakes)
    assert mode is not None
    return trace_pre_dispatch(run, fakes, mode)


def _names(source: fx.GraphModule) -> tuple[str, ...]:
    """`model.layers.0.mlp.up_proj.weight` where Dynamo tells, else its own name for the argument."""
    paths: dict[str, str] = source.meta.get("dynamo_flat_name_to_original_fqn", {})
    names: dict[str, None] = {}
    for node in source.graph.find_nodes(op="placeholder"):
        flat = node.name.removeprefix("l_").removesuffix("_")
        path = paths.get(flat, node.name)
        names[node.name if path in names else path] = None
    return tuple(names)


def _weight(parameter: Tensor) -> Weight:
    """A weight that nobody may read: what it holds at compile time says nothing about later calls."""

    def load() -> NoReturn:
        raise KeyError("a parameter, which may change between calls")

    return Weight(tuple(parameter.shape), parameter.dtype, load, "an argument")


def _hidden(nodes: Sequence[fx.Node], changed: set[int]) -> set[fx.Node]:
    """Calls to hide: those that touch memory which is written to, that move between devices, or that copy a result."""
    (output,) = (n for n in nodes if n.op == "output")
    returned = storages_of(output.all_input_nodes)

    def is_hidden(node: fx.Node) -> bool:
        own, read = storages_of([node]), storages_of(node.all_input_nodes)
        copies = target_name(node) in _COPIES and bool(own & returned) and not own & read
        devices = {n.meta["val"].device for n in (node, *node.all_input_nodes) if isinstance(n.meta.get("val"), Tensor)}
        return copies or len(devices) > 1 or bool((own | read) & changed)

    return {n for n in nodes if n.op == "call_function" and is_hidden(n)}


class _Adopter:
    """Copies a traced graph into the dialect's frame."""

    def __init__(self, traced: fx.GraphModule, hidden: set[fx.Node], trains: bool) -> None:
        self.traced, self.hidden, self.trains = traced, hidden, trains
        self.new = fx.Graph()
        self.env: dict[fx.Node, Any] = {}
        self.constants: dict[str, Tensor] = {}
        self.writes: list[fx.Node] = []
        self.hidden_calls = 0

    def adopt(self, names: Sequence[str], weights: dict[str, Weight]) -> Graph:
        """The graph; its results are followed by the calls that write, so that none of these is ever dropped."""
        left = iter(names)
        for node in self.traced.graph.nodes:
            if node.op == "placeholder":
                name = next(left)
                self.env[node] = self._input(node, name, "get_attr" if name in weights else "placeholder")
            elif node.op == "get_attr":
                self.env[node] = self._constant(node)
            elif node.op == "output":
                results = fx.node.map_arg(_flat(node.args[0]), lambda n: self.env[n])
                self.new.output((*results, *self.writes))
            else:
                self.env[node] = self._call(node)
        return Graph(NAME, self.new)

    def _input(self, node: fx.Node, name: str, kind: str) -> fx.Node:
        made = self.new.create_node(kind, name)
        made.meta["val"] = node.meta["val"]
        return made

    def _constant(self, node: fx.Node) -> fx.Node:
        value = getattr(self.traced, str(node.target))
        if not isinstance(value, Tensor):
            raise CaptureError(f"the graph holds a nested graph at {origin_of(node)}; control flow stays as it is")
        self.constants[str(node.target)] = value
        return self._input(node, str(node.target), "placeholder")

    def _call(self, node: fx.Node) -> Any:
        if not isinstance(node.target, OpOverload):
            if getattr(node.target, "__name__", "") in ("_set_grad_enabled", "_enter_autocast", "_exit_autocast"):
                return self._mode(node)
            if getattr(node.target, "__module__", "") not in ("_operator", "math", "torch"):
                raise CaptureError(f"the graph calls {node.target} at {origin_of(node)}; wanted tensor calls only")
        elif torch.Tag.inplace_view in node.target.tags and target_name(node) not in _ALIASES:
            raise CaptureError(f"{node.target} at {origin_of(node)} changes a tensor's own shape")
        args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), lambda n: self.env[n])
        if node in self.hidden:
            args = (self.hidden_calls, *args)
            made = self.new.create_node("call_function", _fixed(node.target), args, kwargs, node.name)
            self.hidden_calls += 1
            if written(node):
                self.writes.append(made)
        elif target_name(node) in _ALIASES and not any(u.op == "output" for u in node.users):
            return args[0]
        else:
            if target_name(node) == "aten.to":
                args, kwargs = (args[0], node.meta["val"].dtype), {}
                node.target = torch.ops.aten.to.dtype
            made = self.new.create_node("call_function", node.target, args, kwargs, node.name)
        kept = ("val", "stack_trace", "nn_module_stack")
        made.meta.update({k: node.meta[k] for k in kept if k in node.meta}, origin=origin_of(node))
        return made

    def _mode(self, node: fx.Node) -> None:
        """Switches that change nothing for inference without autocast; others are refused."""
        name = getattr(node.target, "__name__", "")
        on = {"_set_grad_enabled": self.trains and node.args[0], "_enter_autocast": node.args[2:3] == (True,)}.get(name)
        if on:
            raise CaptureError(f"{origin_of(node)} turns on autograd or autocast inside of the graph")


def _flat(results: Any) -> tuple[Any, ...]:
    return tuple(results) if isinstance(results, (list, tuple)) else (results,)


def _results(traced: fx.GraphModule) -> tuple[Any, ...]:
    results = _flat(traced.graph.output_node().args[0])
    return tuple(r.meta.get("val") if isinstance(r, fx.Node) else r for r in results)


def _check_calls(fragment: Fragment, graph: Graph) -> None:
    order: list[Any] = [n.args[0] for n in graph.calls() if isinstance(n.target, Fixed)]
    if order != sorted(order) or len(set(order)) != len(order):
        raise RewriteError(f"a pass moved calls across writes (now in the order {order}); it must leave Fixed calls")
    known = {*fragment.arguments, *fragment.constants}
    unknown = sorted(set(graph.weights()) - known)
    if unknown:
        raise RewriteError(
            f"a pass made the weight {unknown[0]!r}, but weights may change between calls here; "
            "it must leave weights alone when context.fold_weights is False"
        )


def _check_results(fragment: Fragment, results: tuple[Any, ...]) -> None:
    for at, (before, after) in enumerate(zip(fragment.results, results, strict=True)):
        if not is_alike(before, after):
            raise RewriteError(f"result {at} became {type_of(after)}, wanted {type_of(before)} as before the passes")
    now = sharing((*fragment.fakes, *results))
    if now != fragment.sharing:
        raise RewriteError(
            f"arguments and results share memory as {now}, wanted {fragment.sharing} as before the passes (for each, "
            "the first that it shares with); a pass dropped or added a copy"
        )


def _as_dynamo(traced: fx.GraphModule, source: fx.GraphModule) -> fx.GraphModule:
    """Give a traced graph what Dynamo keeps at its own: where arguments come from, and which never move."""
    pairs = zip(traced.graph.find_nodes(op="placeholder"), source.graph.find_nodes(op="placeholder"), strict=True)
    for new, old in pairs:
        new.meta.update(old.meta)
        new._dynamo_source = getattr(old, "_dynamo_source", None)
    for name in [name for name, _ in traced.named_buffers(recurse=False)]:
        # a constant of the code (an empty cache begins with one): AOTAutograd asks Dynamo where each buffer comes from
        constant = getattr(traced, name)
        delattr(traced, name)
        setattr(traced, name, constant)
    traced.meta.update(source.meta)
    if hasattr(source, "_param_name_to_source"):
        traced._param_name_to_source = source._param_name_to_source
    return traced
