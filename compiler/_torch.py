"""The only file that imports torch's private modules: what llmopt leans on, and where it moves between versions."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._ops import HigherOrderOperator, OpOverload
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing, make_fx
from torch.fx.experimental.symbolic_shapes import (
    DimDynamic,
    ShapeEnv,
    StatelessSymbolicContext,
    free_unbacked_symbols,
    statically_known_true,
)

__all__ = [
    "FakeTensor",
    "FakeTensorMode",
    "HigherOrderOperator",
    "OpOverload",
    "concrete_values",
    "fake_mode",
    "fake_tensor",
    "faking",
    "free_unbacked_symbols",
    "guards_added",
    "statically_known_true",
]


def fake_mode() -> FakeTensorMode:
    """A fresh mode with its own shape environment."""
    return FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)


@contextlib.contextmanager
def faking(mode: FakeTensorMode) -> Iterator[None]:
    """Inside: ops run on fake values of `mode`, composite ops in Python, since those in C++ may ask for numbers."""
    with torch.no_grad(), mode, enable_python_dispatcher():
        yield


def fake_tensor(
    mode: FakeTensorMode, shape: Sequence[int | str], dtype: torch.dtype, symbols: dict[str, Any]
) -> FakeTensor:
    """A fake tensor whose string sizes are symbols: the same name is the same symbol, kept in `symbols`.

    A symbol is created with an example size of its own (a distinct one, so that two never unify) and is assumed to
    be at least 2; a graph for size 1 is another specialisation.
    """
    assert mode.shape_env is not None
    for name in (s for s in shape if isinstance(s, str) and s not in symbols):
        example = torch.empty(_EXAMPLES[len(symbols) % len(_EXAMPLES)] + 100 * (len(symbols) // len(_EXAMPLES)))
        context: Any = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC], constraint_sizes=[None])
        faked = mode.from_tensor(example, symbolic_context=context)
        symbols[name] = faked.shape[0]
    sizes = [symbols[s] if isinstance(s, str) else s for s in shape]
    with mode:
        made = torch.empty(sizes, dtype=dtype)
    assert isinstance(made, FakeTensor)
    return made


_EXAMPLES = (5, 7, 11, 13, 17, 19, 23, 29)


@contextlib.contextmanager
def concrete_values() -> Iterator[None]:
    """Inside a trace: compute on real tensors, unseen by the tracer."""
    with unset_fake_temporarily(), disable_proxy_modes_tracing():
        yield


def inductor_matcher() -> Any:
    """Inductor's pattern matcher module: the peer that `benchmarks/rewrite_cost.py` compares with."""
    from torch._inductor import pattern_matcher

    return pattern_matcher


def lazy_module(graph: torch.fx.Graph) -> torch.fx.GraphModule:
    """A GraphModule around the graph that generates no code until it is called."""
    from torch.fx._lazy_graph_module import _LazyGraphModule

    root = torch.nn.Module()
    for node in graph.find_nodes(op="get_attr"):
        setattr(root, str(node.target), None)
    return _LazyGraphModule(root, graph)


def inductor_source(
    function: Callable[..., Any], inputs: Sequence[Any], options: dict[str, Any]
) -> tuple[fx.GraphModule, str | None, list[tuple[list[str], str]]]:
    """What Inductor would run for `function` on these fake inputs, with nothing compiled yet.

    The traced graph; the wrapper's source (None for a graph without a call); and, in the order of the source, the
    argument types and code of each C++ kernel. `options` are Inductor's config keys, those unknown to this torch
    left out. Raises whatever tracing and Inductor raise, and ValueError if the source holds tensor constants.
    """
    from torch._inductor import config
    from torch._inductor.async_compile import AsyncCompile
    from torch._inductor.compile_fx import compile_fx_inner
    from torch._inductor.decomposition import select_decomp_table

    kernels: list[tuple[list[str], str]] = []

    def record(self: AsyncCompile, argtypes: list[str], source_code: str) -> Callable[..., None]:
        kernels.append((argtypes, source_code))
        return lambda *args: None

    mode = next(i.fake_mode for i in inputs if isinstance(i, FakeTensor))
    with faking(mode):
        graph = make_fx(function, decomposition_table=select_decomp_table())(*inputs)
    known = {key: value for key, value in options.items() if _has(config, key)}
    with _whole_loops(), config.patch(known), mock.patch.object(AsyncCompile, "cpp_pybinding", record):
        compiled = compile_fx_inner(graph, inputs)
    constants = getattr(compiled, "constants", None)
    if constants:
        raise ValueError(f"the graph holds tensor constants ({', '.join(constants)})")
    return graph, getattr(compiled, "source_code", None), kernels


@contextlib.contextmanager
def _whole_loops() -> Iterator[None]:
    """Inside: Inductor's C++ backend splits a loop only into whole parts, and its caches keep such code apart.

    To be rid of i // d in an index it turns a loop over n into loops over n // d and d, whatever n is, and the last
    n % d elements are never written (pytorch issue 195582; torch 2.11 to 2.13 have it). One thread at a time, since
    what is replaced is the process's.
    """
    from torch._inductor.codegen.cpp import CppScheduling

    with _COMPILING:
        split = CppScheduling.try_loop_split

        def split_whole(self: CppScheduling, nodes: Any) -> Any:
            return split(self, nodes) if _splits_whole(nodes) else nodes

        tag = f"{torch.compiler.config.cache_key_tag} llmopt: loops split whole"
        with (
            mock.patch.object(CppScheduling, "try_loop_split", split_whole),
            torch.compiler.config.patch(cache_key_tag=tag),  # type: ignore[attr-defined]
        ):
            yield


_COMPILING = threading.RLock()


def _splits_whole(nodes: Sequence[Any]) -> bool:
    """Does every loop of these scheduler nodes have a multiple of the steps that its index is divided by?"""
    from torch._inductor.ir import ComputedBuffer
    from torch._inductor.virtualized import V
    from torch.utils._sympy.functions import FloorDiv

    bodies = [node.node.get_default_sizes_body() for node in nodes if isinstance(node.node, ComputedBuffer)]
    indices = [e for _, body, _ in bodies for e in body.indexing_exprs.values() if hasattr(e, "find")]
    divisors: dict[Any, set[Any]] = {}
    for division in (found for index in indices for found in index.find(FloorDiv)):
        divisors.setdefault(division.args[0], set()).add(division.args[1])
    return all(
        V.graph.sizevars.statically_known_multiple_of(size, divisor)
        for (sizes, _), _, (variables, _) in bodies
        for variable, size in zip(variables, sizes, strict=True)
        for divisor in divisors.get(variable, ())
    )


def _has(config: Any, key: str) -> bool:
    for part in key.split("."):
        if not hasattr(config, part):
            return False
        config = getattr(config, part)
    return True


def size_guards(inputs: Sequence[Any]) -> list[str]:
    """What was assumed of the symbolic sizes of these fake inputs, beyond their being at least 2."""
    mode = next((i.fake_mode for i in inputs if isinstance(i, FakeTensor)), None)
    if mode is None or mode.shape_env is None:
        return []
    fixed = [f"{old} == {new}" for old, new in mode.shape_env.replacements.items()]
    return fixed + [str(guard.expr) for guard in mode.shape_env.guards]


def inductor_build(source: str, name: str, folder: str, options: dict[str, Any]) -> bytes:
    """Compile one C++ file with the flags Inductor gives its kernels; returns the shared library.

    Raises what Inductor raises when the compiler is missing or fails.
    """
    from torch._inductor import config
    from torch._inductor.cpp_builder import CppBuilder, CppTorchOptions
    from torch._inductor.cpu_vec_isa import pick_vec_isa

    path = os.path.join(folder, f"{name}.cpp")
    with open(path, "w", encoding="utf-8") as file:
        file.write(source)
    with config.patch({key: value for key, value in options.items() if _has(config, key)}):
        flags = CppTorchOptions(vec_isa=pick_vec_isa(), warning_all=False)
        builder = CppBuilder(name=name, sources=path, BuildOption=flags, output_dir=folder)
        builder.build()
    with open(builder.get_target_file_path(), "rb") as built:
        return built.read()


def tensor_data_address() -> int:
    """Address of the C function that takes a Python tensor to its data, for the bindings of compiled kernels."""
    return int(torch._C._dynamo.guards._torchinductor_pyobject_tensor_data_ptr)  # type: ignore[attr-defined]


def current_stream(device: int) -> int:
    """The handle of torch's current stream on a GPU, without an object around it, which takes ten times as long."""
    return int(torch._C._cuda_getCurrentRawStream(device))


def trace_pre_dispatch(run: Callable[..., Any], inputs: Sequence[Any], mode: FakeTensorMode) -> fx.GraphModule:
    """aten as the code calls it (nothing decomposed, writes kept) of `run(*inputs)`; inputs are fake, of `mode`.

    Each node keeps the stack trace and module of the node that is current (`torch.fx.traceback`) while it is traced.
    """
    with torch.fx.traceback.preserve_node_meta(), mode:
        return make_fx(run, pre_dispatch=True, _allow_non_fake_inputs=True)(*inputs)


def inductor_compile(graph: fx.GraphModule, inputs: Sequence[Any], options: dict[str, Any]) -> Callable[..., Any]:
    """Compile a graph through AOTAutograd and Inductor, as torch.compile's own backend does."""
    from torch._inductor.compile_fx import compile_fx

    with _whole_loops():
        compiled = compile_fx(graph, list(inputs), config_patches=options)
    assert callable(compiled)
    return compiled


def inductor_options() -> list[str]:
    """Names of Inductor's settings."""
    return list(torch._inductor.list_options())


def on_generate(backend: Callable[..., Any], say: Callable[[], None]) -> None:
    """Call `say` before `.generate(...)` of a module that torch.compile made with this backend function.

    Such a module hands `generate` through to the original module, which then runs uncompiled. Modules of other
    backends, and all other attributes, are as before.
    """
    from torch._dynamo.eval_frame import OptimizedModule, innermost_backend

    def generate(self: OptimizedModule) -> Any:
        found = self.__getattr__("generate")
        callback: Any = self.dynamo_ctx.callback
        if getattr(innermost_backend(callback), "compiler_fn", None) is not backend:
            return found

        @functools.wraps(found)
        def call(*args: Any, **kwargs: Any) -> Any:
            say()
            return found(*args, **kwargs)

        return call

    OptimizedModule.generate = property(generate)  # type: ignore[attr-defined]


def is_dynamo_restart(error: BaseException) -> bool:
    """Is this how Dynamo asks for the trace to begin anew (not a failure)?"""
    from torch._dynamo.exc import TorchDynamoException

    return isinstance(error, TorchDynamoException)


def compiled_graphs() -> int:
    """How many graphs torch.compile has compiled in this process: shows whether a peer really was compiled."""
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])


class _GuardLog(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.found: list[tuple[str, traceback.StackSummary]] = []

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if "[guard added]" in message:
            frames = [f for f in traceback.extract_stack() if f.filename not in (__file__, logging.__file__)]
            self.found.append((message.partition(" [guard added]")[0], traceback.StackSummary.from_list(frames)))


@contextlib.contextmanager
def guards_added() -> Iterator[list[tuple[str, traceback.StackSummary]]]:
    """Collects each condition on a symbolic size that tracing inside relies on, with the stack it arose in."""
    logger = logging.getLogger("torch.fx.experimental.symbolic_shapes")
    handler, level, propagate = _GuardLog(), logger.level, logger.propagate
    others, logger.handlers = logger.handlers, [handler]
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield handler.found
    finally:
        logger.handlers = others
        logger.setLevel(level)
        logger.propagate = propagate
