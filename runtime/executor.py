"""Executor: a lowered graph as one flat list of launches over named slots, run as straight-line Python.

The list is made once for each shape class (one token or more, one wanted row or more); values live in slots that are
reused as soon as their last reader is done (the memory plan), and nothing is decided while it runs. `source` is the
whole program, readable.
"""

from __future__ import annotations

import functools
import heapq
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from llmopt.compiler.errors import DeviceMemoryError
from llmopt.compiler.graph import Graph, target_name
from llmopt.compiler.op import op_of

ShapeClass = tuple[bool, bool]  # (one token, one row)
Regions = Callable[[str, ShapeClass], Callable[[list[Any]], Any]]


@dataclass(frozen=True)
class Plan:
    """A flat program: its source, the objects the source names, and how many slots it needs."""

    source: str
    names: dict[str, Any]
    launches: int
    slots: int

    def compile(self) -> Callable[..., Any]:
        """The program as a function of the graph's inputs, in order."""
        space = dict(self.names)
        exec(compile(self.source, "<llmopt step>", "exec"), space)
        return space["run"]  # type: ignore[no-any-return]


def implementation(node: fx.Node, device: torch.device | None = None) -> Callable[..., Any]:
    """What runs a call node outside of a region: the chosen provider's function, in place where proved safe.

    Graphs name no device, so functions that make tensors of nothing are given this one (None: the CPU).
    """
    op = op_of(node.target)
    if op is None:
        target: Any = node.target
        arguments = getattr(getattr(target, "_schema", None), "arguments", ())
        makes = device is not None and any(a.name == "device" for a in arguments)
        return functools.partial(target, device=device) if makes else target  # type: ignore[no-any-return]
    provider = node.meta.get("provider", "reference")
    if node.meta.get("in_place") and provider == "reference" and op.in_place_fn is not None:
        return op.in_place_fn
    return op.providers[provider].fn


class _Slots:
    """Slot numbers, lowest free one first."""

    def __init__(self) -> None:
        self.free: list[int] = []
        self.count = 0

    def take(self) -> int:
        if self.free:
            return heapq.heappop(self.free)
        self.count += 1
        return self.count - 1

    def give(self, slot: int) -> None:
        heapq.heappush(self.free, slot)


def flat_plan(
    graph: Graph,
    weights: Mapping[str, Tensor],
    call_region: Callable[[str], Any],
    implement: Callable[[fx.Node], Callable[..., Any]] = implementation,
) -> Plan:
    """The graph as a flat program: `call_region(name)` takes the region's inputs as a list and gives its outputs;
    `implement(node)` is what runs a node outside of regions."""
    return _Emitter(graph, weights, call_region, implement).plan()


class _Emitter:
    """Writes the program line by line."""

    def __init__(
        self,
        graph: Graph,
        weights: Mapping[str, Tensor],
        call_region: Callable[[str], Any],
        implement: Callable[[fx.Node], Callable[..., Any]],
    ) -> None:
        self.graph, self.weights, self.call_region, self.implement = graph, weights, call_region, implement
        self.names: dict[str, Any] = {}
        self.lines: list[str] = []
        self.where: dict[fx.Node, str] = {}
        self.slots = _Slots()
        nodes = list(graph.fx.nodes)
        self.last_reader = {source: node for node in nodes for source in node.all_input_nodes}

    def plan(self) -> Plan:
        inputs = self.graph.inputs()
        for node in inputs:
            self.where[node] = node.name
        for node in self.graph.fx.nodes:
            if node.op == "get_attr":
                self.where[node] = self._name("w", self.weights[str(node.target)])
            elif node.op in ("call_function", "call_module"):
                self._launch(node)
        results = [self._text(r) for r in self.graph.outputs()]
        self.lines.append("    return " + (results[0] if len(results) == 1 else f"({', '.join(results)})"))
        head = f"def run({', '.join(n.name for n in inputs)}):"
        return Plan("\n".join([head, *self.lines]) + "\n", self.names, len(self.lines) - 1, self.slots.count)

    def _launch(self, node: fx.Node) -> None:
        args = [self._text(a) for a in node.args] + [f"{k}={self._text(v)}" for k, v in node.kwargs.items()]
        if node.op == "call_module":
            call = f"{self._name(str(node.target) + '_', self.call_region(str(node.target)))}([{', '.join(args)}])"
        elif target_name(node) == "getitem":
            call = f"{args[0]}[{args[1]}]"
        else:
            call = f"{self._name(_identifier(target_name(node)), self.implement(node))}({', '.join(args)})"
        released = [s for s in dict.fromkeys(node.all_input_nodes) if self._is_done(s, node)]
        for source in released:
            self.slots.give(int(self.where[source][1:]))
        slot = f"t{self.slots.take()}"
        dead = [self.where[s] for s in released if self.where[s] != slot]
        tail = "".join(f"; {name} = None" for name in dead)
        self.where[node] = slot
        self.lines.append(f"    {slot} = {call}{tail}")

    def _is_done(self, source: fx.Node, node: fx.Node) -> bool:
        return source.op in ("call_function", "call_module") and self.last_reader[source] is node

    def _name(self, stem: str, value: Any) -> str:
        for name, known in self.names.items():
            if known is value and name.startswith(stem):
                return name
        name = f"{stem}{sum(n.startswith(stem) for n in self.names)}"
        self.names[name] = value
        return name

    def _text(self, arg: Any) -> str:
        if isinstance(arg, fx.Node):
            return self.where[arg]
        if isinstance(arg, (list, tuple)):
            return f"[{', '.join(self._text(a) for a in arg)}]"
        if isinstance(arg, (int, float, str, bool, type(None))) and arg == arg and abs_is_finite(arg):
            return repr(arg)
        return self._name("c", arg)


def abs_is_finite(arg: Any) -> bool:
    """inf has no literal."""
    return not isinstance(arg, float) or abs(arg) != float("inf")


def _identifier(name: str) -> str:
    return name.replace(".", "_") + "_"


class Executor:
    """Runs one graph. `state` gives the current page tensors by input name; `regions` the compiled regions.

    Calling it takes the graph's inputs without state, in order, and returns its single result (or a tuple). `device`
    is where the weights lie and it runs (None: the CPU).
    """

    def __init__(
        self,
        graph: Graph,
        weights: Mapping[str, Tensor],
        state: Mapping[str, Tensor] | None = None,
        regions: Regions | None = None,
        device: torch.device | None = None,
    ) -> None:
        self.graph, self.weights, self.regions, self.device = graph, weights, regions, device
        self._away = device is not None and device.type != "cpu"
        self.state = {} if state is None else state
        names = [n.name for n in graph.inputs()]
        self.state_names = [n for n in names if n in self.state]
        self.plans: dict[ShapeClass, Plan] = {}
        self._run: dict[ShapeClass, Callable[..., Any]] = {}

    def plan(self, shape: ShapeClass) -> Plan:
        """The flat program of a shape class, made when first asked for."""
        if shape not in self.plans:
            regions = self.regions
            self.plans[shape] = flat_plan(
                self.graph,
                self.weights,
                lambda name: regions(name, shape) if regions is not None else None,
                lambda node: implementation(node, self.device),
            )
            self._run[shape] = self.plans[shape].compile()
        return self.plans[shape]

    @torch.inference_mode()
    def __call__(self, *inputs: Tensor) -> Any:
        shape = (inputs[0].shape[-1] == 1, inputs[-1].shape[0] == 1)
        run = self._run.get(shape)
        if run is None:
            self.plan(shape)
            run = self._run[shape]
        if self._away:
            inputs = tuple(t.to(self.device) for t in inputs)
        try:
            return run(*inputs, *[self.state[n] for n in self.state_names])
        except torch.OutOfMemoryError as error:
            raise no_room(f"{self.graph.name!r} over inputs {[list(i.shape) for i in inputs]}", error) from error


def no_room(what: str, error: torch.OutOfMemoryError) -> DeviceMemoryError:
    """The error for work that a GPU's memory is too small for."""
    seen = str(error).partition("\n")[0].split(". GPU")[0].rstrip(".")
    return DeviceMemoryError(
        f"{what} does not fit the GPU's memory ({seen}); run fewer tokens or sequences at a time (dims of the recipe), "
        "give the KV cache less memory (cache_bytes), or free some on the GPU"
    )
