"""Capture: from a model to a Program with one graph, `forward(input_ids [B, T], position_ids [B, T]) -> logits`.

Four sources end in the same form: a Hugging Face folder or hub id (`capture_hf`), a causal `nn.Module`, an
`ExportedProgram`, and a Dynamo graph (`capture_dynamo`). Capture is `torch.export` without decompositions, with B and T
dynamic; afterwards inputs are placeholders, weights are `get_attr` nodes, guards and aliases are gone, and every node
has a fake value on the CPU and an origin. No weight data is read.
"""

from __future__ import annotations

import contextlib
import re
import traceback
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind

from llmopt.compiler._torch import OpOverload, guards_added
from llmopt.compiler.errors import CaptureError
from llmopt.compiler.graph import Graph, Origin, type_of
from llmopt.compiler.program import ModelFacts, Program, Weight, tensor_weight
from llmopt.compiler.propagate import propagate, symbolic_inputs
from llmopt.compiler.skeleton import lives_elsewhere, skeleton, weights_of

EXAMPLE_SHAPE = (3, 6)  # not 0 or 1, and B != T, so that export keeps both dynamic and apart

_GUARDS = (
    "_assert_tensor_metadata",
    "_assert_scalar",
    "_assert_async",
    "sym_constrain_range",
    "sym_constrain_range_for_size",
)
_ALIASES = ("alias", "detach", "lift_fresh_copy", "lift_fresh", "detach_")


def export_module(model: nn.Module, limit: int) -> ExportedProgram:
    """`torch.export` of `model(input_ids, position_ids) -> logits` with B and T dynamic, T at most `limit`.

    Raises CaptureError with torch's reason when the forward cannot be traced.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    ids = torch.zeros(EXAMPLE_SHAPE, dtype=torch.int64, device=device)
    positions = torch.arange(EXAMPLE_SHAPE[1], device=device).expand(EXAMPLE_SHAPE).contiguous()
    # T = limit is left out: a table cut to all of its rows is a special case to export, and a constraint violated
    dims = {0: Dim("B", min=1, max=4096), 1: Dim("T", min=1, max=max(limit - 1, EXAMPLE_SHAPE[1] + 1))}
    modes = [(m, m.training) for m in model.modules()]
    model.eval()

    def export() -> ExportedProgram:
        with torch.no_grad():
            return torch.export.export(model, (ids, positions), dynamic_shapes=(dims, dims), strict=False)

    try:
        return export()
    except Exception as error:
        raise CaptureError(
            f"{type(model).__name__}.forward(input_ids [B, T], position_ids [B, T]) cannot be captured: "
            f"{_blame(error, export)}; wanted a forward that torch.export (non-strict) traces with any B and T; "
            "rewrite that line so that it does not depend on values or on one fixed size"
        ) from error
    finally:
        for module, training in modes:
            module.training = training


def _blame(error: Exception, export: Callable[[], Any]) -> str:
    """The reason torch gives, and the line of the model it was at."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    violated = [line.removeprefix("- ") for line in lines if line.startswith("- ")]
    at = _violation(export) if violated else _line_of(traceback.extract_tb(error.__traceback__))
    return f"{at}{type(error).__name__}: {(violated or lines or ['no message'])[0]}"


def _violation(export: Callable[[], Any]) -> str:
    """Where a size was fixed or bounded: the last place in the model that compared one with a number."""
    with guards_added() as guards, contextlib.suppress(Exception):
        export()
    places = [_line_of(stack) for guard, stack in guards if re.search(r"(?<![\w])\d", guard)]
    return next((place for place in reversed(places) if place), "")


def _line_of(stack: traceback.StackSummary) -> str:
    """`file.py:88: ` of the innermost frame of the model below this file's call, or nothing."""
    start = max((i for i, frame in enumerate(stack) if frame.filename == __file__), default=-1)
    own = [f for f in stack[start + 1 :] if not any(part in f.filename for part in _NOT_THE_MODEL)]
    return f"{own[-1].filename.rsplit('/', 1)[-1]}:{own[-1].lineno}: " if own else ""


_HERE = __file__.rsplit("/", 1)[0]
_TORCH = torch.__file__.rsplit("/", 1)[0] + "/"
_NOT_THE_MODEL = (_TORCH, "/integrations/", "<", "/contextlib.py", "/transformers/utils/", _HERE)


def capture(
    model: nn.Module | ExportedProgram,
    facts: ModelFacts,
    weights: Callable[[str, Tensor], Weight] | None = None,
) -> Program:
    """A Program from a causal module or an exported one.

    `weights(name, tensor)` says how the named parameter or buffer is read later; by default it is the model's own
    tensor. Raises CaptureError if the model does not export, or is not `(input_ids, position_ids) -> logits`.
    """
    if isinstance(model, nn.Module) and lives_elsewhere(model):
        weights, model = weights or weights_of(model), skeleton(model)
    exported = model if isinstance(model, ExportedProgram) else export_module(model, facts.context_length)
    exported = _functional(exported)
    tensors = _lifted_tensors(exported)
    _check_inputs(exported, tensors, facts)
    graph, names = _adopt(exported.graph, tensors)
    make = weights or (lambda name, tensor: tensor_weight(tensor))
    program = Program({"forward": graph}, {n: make(n, t) for n, t in names.items()}, facts)
    propagate(graph, symbolic_inputs({"input_ids": ("B", "T"), "position_ids": ("B", "T")}), program.weights)
    _check_logits(graph, facts)
    return program


def _functional(exported: ExportedProgram) -> ExportedProgram:
    """The same program without writes in place; a model that changes its buffers has no plain forward."""
    calls = [n for n in exported.graph.nodes if n.op == "call_function" and isinstance(n.target, OpOverload)]
    writes = [n for n in calls if n.target._schema.is_mutable]
    if not writes:
        return exported
    functional = exported.run_decompositions({})  # an empty table: composite ops stay whole
    signature = functional.graph_signature
    changed = {*signature.buffers_to_mutate.values(), *signature.user_inputs_to_mutate.values()}
    if changed:
        lines = ", ".join(sorted({_source(n) for n in writes}))
        raise CaptureError(
            f"forward writes to {', '.join(sorted(changed))} ({lines}): a call "
            "would depend on the calls before it; wanted a forward that keeps nothing between calls; compute the value "
            "anew or pass it in"
        )
    return functional


def _check_inputs(exported: ExportedProgram, tensors: Mapping[str, tuple[str, Tensor]], facts: ModelFacts) -> None:
    """Exactly input_ids and position_ids, int64 [B, T] with B and T free."""
    nodes = [n for n in exported.graph.nodes if n.op == "placeholder" and n.name not in tensors]
    if len(nodes) != 2:
        raise CaptureError(
            f"captured graph takes {[str(n.target) for n in nodes]}; wanted exactly (input_ids [B, T], position_ids "
            "[B, T]); wrap the model in a module whose forward takes these two and returns the logits"
        )
    values = [n.meta.get("val") for n in nodes]
    for name, value in zip(("input_ids", "position_ids"), values, strict=True):
        if not isinstance(value, Tensor) or value.dtype != torch.int64 or value.dim() != 2:
            seen = f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise CaptureError(f"captured graph takes {seen} as {name}; wanted int64 [B, T]; cast inside forward")
    first, second = (tuple(v.shape) for v in values)
    if not all(isinstance(size, torch.SymInt) for size in first) or str(first) != str(second):
        raise CaptureError(
            f"captured graph takes input_ids {first} and position_ids {second}: sizes are fixed or differ; "
            "wanted [B, T] of both with B and T dynamic; export with dynamic_shapes=({0: Dim('B'), 1: Dim('T')},) * 2"
        )
    longest = exported.range_constraints.get(first[1].node.expr)
    if longest is not None and longest.upper < facts.context_length - 1:
        raise CaptureError(
            f"captured graph holds for at most T = {longest.upper} tokens, but the context is {facts.context_length}; "
            "wanted a graph for the whole context; export with a larger Dim('T', max=...), or pass facts "
            "with that context_length"
        )


def _lifted_tensors(exported: ExportedProgram) -> dict[str, tuple[str, Tensor]]:
    """placeholder name -> (weight name, tensor); parameters that share storage share one name."""
    found: dict[str, tuple[str, Tensor]] = {}
    first_name: dict[int, str] = {}
    kinds = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)
    for spec in exported.graph_signature.input_specs:
        if spec.kind not in kinds or spec.target is None:
            continue
        store: Mapping[str, Any] = exported.state_dict
        tensor = store[spec.target] if spec.target in store else exported.constants[spec.target]
        name = first_name.setdefault(id(tensor), spec.target)
        found[spec.arg.name] = (name, tensor)
    return found


def _adopt(source: fx.Graph, tensors: Mapping[str, tuple[str, Tensor]]) -> tuple[Graph, dict[str, Tensor]]:
    """Copy an exported graph into the dialect's frame; returns it and the weights it reads."""
    new = fx.Graph()
    env: dict[fx.Node, Any] = {}
    used: dict[str, Tensor] = {}
    for node in source.nodes:
        if node.op == "placeholder":
            env[node] = _adopt_input(new, node, tensors, used)
        elif node.op == "output":
            (results,) = fx.node.map_arg(node.args, lambda n: env[n])
            new.output(tuple(results) if isinstance(results, (list, tuple)) else (results,))
        elif _target(node) not in _GUARDS:
            env[node] = _adopt_call(new, node, env)
    graph = Graph("forward", new)
    for made, name in zip(graph.inputs(), ("input_ids", "position_ids"), strict=True):
        made.target = name
        made._rename(name)
    new.eliminate_dead_code()
    return graph, {n: used[n] for n in graph.weights()}


def _adopt_input(
    new: fx.Graph, node: fx.Node, tensors: Mapping[str, tuple[str, Tensor]], used: dict[str, Tensor]
) -> fx.Node:
    if node.name in tensors:
        name, tensor = tensors[node.name]
        used[name] = tensor
        made = new.create_node("get_attr", name)
    else:
        made = new.placeholder(str(node.target))
    made.meta["origin"] = Origin()
    return made


def _adopt_call(new: fx.Graph, node: fx.Node, env: dict[fx.Node, Any]) -> Any:
    if node.op != "call_function":
        raise CaptureError(
            f"captured graph holds {node.op} {node.target!r} at {_source(node)}: control flow or a nested graph; "
            "wanted plain tensor calls only; move the autocast/grad-mode/cond block out of the model's forward"
        )
    if _target(node) in _ALIASES:
        return env[node.args[0]]  # type: ignore[index]
    args = fx.node.map_arg(node.args, lambda n: env[n])
    kwargs = {k: v for k, v in fx.node.map_arg(node.kwargs, lambda n: env[n]).items() if k != "device"}
    if _target(node) in ("to", "_to_copy"):
        args = tuple(a for a in args if not isinstance(a, torch.device))
        return _adopt_cast(new, node, args, kwargs)
    made = new.create_node("call_function", node.target, args, kwargs, name=node.name)
    made.meta["origin"] = origin_of(node)
    return made


def _adopt_cast(new: fx.Graph, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Every spelling of `.to` becomes `aten.to.dtype(x, dtype)`, or nothing where only the device was named."""
    dtypes = [a for a in (*args[1:], *kwargs.values()) if isinstance(a, torch.dtype)]
    others = [a for a in args[1:] if isinstance(a, fx.Node)]
    if others:  # x.to(other): the dtype of `other`
        dtypes = [node.args[1].meta["val"].dtype]  # type: ignore[union-attr]
    if not dtypes:
        return args[0]
    made = new.create_node("call_function", torch.ops.aten.to.dtype, (args[0], dtypes[0]), name=node.name)
    made.meta["origin"] = origin_of(node)
    return made


def _target(node: fx.Node) -> str:
    return str(getattr(node.target, "_opname", getattr(node.target, "__name__", node.target)))


_FRAME = re.compile(r'File "([^"]+)", line (\d+), in ')


def _source(node: fx.Node) -> str:
    """`file.py:88` of the innermost frame that is not torch's own."""
    frames = _FRAME.findall(node.meta.get("stack_trace") or node.stack_trace or "")
    own = [f for f in frames if not f[0].startswith(_TORCH) and "/integrations/" not in f[0]] or frames
    return f"{own[-1][0].rsplit('/', 1)[-1]}:{own[-1][1]}" if own else "unknown line"


def origin_of(node: fx.Node) -> Origin:
    """Source line and module path from what torch keeps in a traced node's meta."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [entry[0] for entry in stack.values() if entry[0] and not entry[0].startswith("_")]
    module = re.sub(r"^(L\['self'\]\.|model\.model\.)", "", paths[-1]) if paths else ""
    return Origin(_source(node), module)


def _check_logits(graph: Graph, facts: ModelFacts) -> None:
    outputs = graph.outputs()
    value = outputs[0].meta.get("val") if len(outputs) == 1 and isinstance(outputs[0], fx.Node) else None
    wanted = (*graph.inputs()[0].meta["val"].shape, facts.vocab_size)
    if not isinstance(value, Tensor) or str(tuple(value.shape)) != str(wanted):
        seen = graph.named_sizes(type_of(value)) if isinstance(value, Tensor) else f"{len(outputs)} results"
        raise CaptureError(
            f"captured graph returns {seen}; wanted one tensor of logits [B, T, {facts.vocab_size}]; "
            "return only the logits, and of every position, from forward"
        )
