"""Regions through Inductor's C++ backend: generated wrapper and kernels, kept as one source and one library.

Inductor turns the region into a Python wrapper and some C++ kernels. Its own path builds each kernel by itself and
finds it again through a cache keyed by compiler flags; here all kernels of a region go into one file with one binding,
so that a region costs one run of the compiler, and loading it costs none.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.machinery
import importlib.util
import linecache
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import fx

from llmopt.codegen.cpp import load_library, machine_key
from llmopt.codegen.hooks import write_new
from llmopt.compiler import knobs
from llmopt.compiler._torch import inductor_build, inductor_source, size_guards, tensor_data_address
from llmopt.compiler.errors import BuildError
from llmopt.compiler.target import cxx

OPTIONS: dict[str, Any] = {
    "size_asserts": False,
    "alignment_asserts": False,
    "scalar_asserts": False,
    "nan_asserts": False,
    "freezing": False,
    "fx_graph_cache": False,
    "graph_partition": False,
    "benchmark_harness": False,
    "comprehensive_padding": False,
    "cpp_wrapper": False,
    "max_autotune": False,
}
# how many threads share a kernel: one, or as many as torch has when the region runs (not when it is compiled)
SERIAL: dict[str, Any] = {"cpp.threads": 1, "cpp.dynamic_threads": False}
PARALLEL: dict[str, Any] = {"cpp.dynamic_threads": True}
MODULE = "llmopt_region"


@dataclass(frozen=True)
class CompiledRegion:
    """`source` defines `call(args: list) -> tuple`, which empties `args`; `libraries` are its kernels, by file name."""

    source: str
    libraries: dict[str, bytes]


Job = tuple[Callable[..., Any], Sequence[Any]]  # a function of flat arguments, and the fake inputs it is compiled for


def compile_region(function: Callable[..., Any], inputs: Sequence[Any], serial: bool = False) -> CompiledRegion:
    """One region; see `compile_regions`."""
    return compile_regions([(function, inputs)], serial)[0]


def compile_regions(jobs: Sequence[Job], serial: bool = False) -> list[CompiledRegion]:
    """Compile functions for their fake inputs (tensors, weights too, symbolic or plain ints), in one compiler run.

    Symbolic sizes hold for any value from 2 on. In-place ops on an input stay in place. `serial`: fused kernels run
    on the calling thread, which for one token is faster than waking others. Raises BuildError.
    """
    options = {**_options(), **(SERIAL if serial else PARALLEL)}
    generated = [_generated(function, inputs, options, f"r{i}_") for i, (function, inputs) in enumerate(jobs)]
    kernels = {name: code for _, own in generated for name, code in own.items()}
    library = _built(_translation_unit(kernels)) if kernels else b""
    file = f"region_{hashlib.sha256(library).hexdigest()[:20]}.so"
    return [CompiledRegion(source, {file: library} if own else {}) for source, own in generated]


def _generated(
    function: Callable[..., Any], inputs: Sequence[Any], options: dict[str, Any], prefix: str
) -> tuple[str, dict[str, str]]:
    """(wrapper, C++ code by kernel name) of one region, names beginning with `prefix`."""
    try:
        graph, source, kernels = inductor_source(function, inputs, options)
    except Exception as error:  # tracing and Inductor raise anything; the cause stays attached
        raise BuildError(f"region: Inductor could not compile it: {_one_line(error)}") from error
    assumed = size_guards(inputs)
    if assumed:
        raise BuildError(
            f"region: it holds only where {' and '.join(assumed)}; wanted code for any size from 2 on: "
            "give that size as a constant, or take the op that asks for it out of the region"
        )
    if source is None:
        return _selection(graph), {}
    names = re.findall(r"^(\w+) = async_compile\.cpp_pybinding\(", source, flags=re.MULTILINE)
    if len(names) != len(kernels):
        raise BuildError(f"region: Inductor's source binds {len(names)} kernels and gave code for {len(kernels)}")
    return _wrapper(source, names, prefix), {prefix + n: code for n, (_, code) in zip(names, kernels, strict=True)}


def load_region(region: CompiledRegion) -> Callable[[list[Any]], Any]:
    """The region as a function that takes its arguments in a list (and empties it); compiles nothing.

    Raises BuildError if the source calls kernels of `codegen.cpp` and those can be neither found nor built.
    """
    if "torch.ops.llmopt." in region.source:
        load_library()
    modules = [_imported(name, data) for name, data in region.libraries.items()]
    space: dict[str, Any] = {"kernels": modules[0] if modules else None}
    file = f"<llmopt region {hashlib.sha256(region.source.encode()).hexdigest()[:12]}>"
    linecache.cache[file] = (len(region.source), None, region.source.splitlines(True), file)
    exec(compile(region.source, file, "exec"), space)
    return space["call"]  # type: ignore[no-any-return]


def _options() -> dict[str, Any]:
    command = cxx()
    if command is None:
        raise BuildError("region: no C++ compiler was found: install g++ or clang++, or let CXX name one")
    return {**OPTIONS, "cpp.cxx": (None, command[0])}


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _selection(graph: fx.GraphModule) -> str:
    """A region that only passes inputs on."""
    places = {node: i for i, node in enumerate(graph.graph.find_nodes(op="placeholder"))}
    results = graph.graph.output_node().all_input_nodes
    picked = "".join(f"args[{places[r]}], " for r in results)
    return f"def call(args):\n    out = ({picked})\n    args.clear()\n    return out\n"


def _wrapper(source: str, kernels: Sequence[str], prefix: str) -> str:
    """The statements of Inductor's module that `call` needs, and each op it calls under a name of its own."""
    tree, lines = ast.parse(source), source.splitlines()
    needed, kept = {"call"}, []
    for node in reversed(tree.body):
        bound = _bound(node)
        if not bound & needed or bound == {"torch"}:
            continue
        if bound <= set(kernels):
            kept.append(f"{min(bound)} = kernels.{prefix}{min(bound)}")
            continue
        needed |= {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
        kept.append(_statement(node, bound & needed, lines))
    text = "\n".join(reversed(kept)) + "\n"
    ops = sorted(set(re.findall(r"torch\.ops\.(\w+\.\w+\.\w+)\(", text)))
    for op in ops:
        text = text.replace(f"torch.ops.{op}(", f"{op.replace('.', '_')}(")
    text = re.sub(r"^ +# Topologically Sorted.*\n", "", text, flags=re.MULTILINE)
    return "import torch\n" + "".join(f"{op.replace('.', '_')} = torch.ops.{op}\n" for op in ops) + text


def _bound(node: ast.stmt) -> set[str]:
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        return {(a.asname or a.name).split(".")[0] for a in node.names}
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return {node.name}
    if isinstance(node, ast.Assign):
        return {n.id for target in node.targets for n in ast.walk(target) if isinstance(n, ast.Name)}
    return set()


def _statement(node: ast.stmt, names: set[str], lines: Sequence[str]) -> str:
    if isinstance(node, ast.ImportFrom):
        wanted = [a for a in node.names if (a.asname or a.name) in names]
        return ast.unparse(ast.ImportFrom(node.module, wanted, node.level))
    return "\n".join(lines[node.lineno - 1 : node.end_lineno])


_BINDING = """
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <exception>
#include <type_traits>

static void* (*tensor_data)(PyObject*);

template <typename T>
static inline T argument(PyObject* value) {
  if constexpr (std::is_pointer_v<T>) {
    return static_cast<T>(tensor_data(value));
  } else if constexpr (std::is_floating_point_v<T>) {
    return static_cast<T>(PyFloat_AsDouble(value));
  } else {
    return static_cast<T>(PyLong_AsLongLong(value));
  }
}

template <typename R, typename... T, std::size_t... I>
static PyObject* call_kernel(R (*kernel)(T...), PyObject* const* args, Py_ssize_t count, std::index_sequence<I...>) {
  if (count != sizeof...(T)) return PyErr_Format(PyExc_TypeError, "kernel takes %zd arguments", sizeof...(T));
  try {
    kernel(argument<std::remove_cv_t<T>>(args[I])...);
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  if (PyErr_Occurred()) return nullptr;
  Py_RETURN_NONE;
}

template <typename R, typename... T>
static PyObject* bound(R (*kernel)(T...), PyObject* const* args, Py_ssize_t count) {
  return call_kernel(kernel, args, count, std::make_index_sequence<sizeof...(T)>{});
}

static PyObject* bind(PyObject*, PyObject* address) {
  tensor_data = reinterpret_cast<void* (*)(PyObject*)>(PyLong_AsVoidPtr(address));
  if (PyErr_Occurred()) return nullptr;
  Py_RETURN_NONE;
}
"""


def _translation_unit(kernels: Mapping[str, str]) -> str:
    includes: dict[str, None] = {}
    parts, methods = [], ['    {"bind", bind, METH_O, nullptr},']
    for name, code in kernels.items():
        includes.update(dict.fromkeys(re.findall(r"^#include .*$", code, flags=re.MULTILINE)))
        body = re.sub(r"^#include .*$", "", code, flags=re.MULTILINE)
        # every kernel is called `kernel` and has C linkage: give each a name of its own
        parts.append(re.sub(r'extern "C"\s+(?:\w+\s+)?void\s+kernel\(', f"static void {name}(", body))
        methods.append(
            f'    {{"{name}", (PyCFunction)(void*)+[](PyObject*, PyObject* const* a, Py_ssize_t n) '
            f"{{ return bound({name}, a, n); }}, METH_FASTCALL, nullptr}},"
        )
    table = "\n".join([*methods, "    {nullptr, nullptr, 0, nullptr},"])
    module = (
        f"static PyMethodDef methods[] = {{\n{table}\n}};\n"
        f'static PyModuleDef definition = {{PyModuleDef_HEAD_INIT, "{MODULE}", nullptr, -1, methods}};\n'
        f"PyMODINIT_FUNC PyInit_{MODULE}() {{ return PyModule_Create(&definition); }}\n"
    )
    return "\n".join([*includes, *parts, _BINDING, module])


def _built(source: str) -> bytes:
    """The library of this source, from the cache if it was ever built here with this compiler, torch and CPU."""
    key = hashlib.sha256("\0".join([source, *machine_key()]).encode()).hexdigest()[:20]
    path = knobs.cache() / "built" / f"{key}.so"
    if path.exists():
        return path.read_bytes()
    with tempfile.TemporaryDirectory(prefix="llmopt_") as folder:
        try:
            library = inductor_build(source, MODULE, folder, _options())
        except Exception as error:  # Inductor's errors share no base class; the cause stays attached
            raise BuildError(f"region: its C++ kernels could not be built: {_one_line(error)}") from error
    write_new(path, library)
    return library


def _imported(name: str, data: bytes) -> ModuleType:
    path = knobs.cache() / "regions" / name
    if not path.exists():
        write_new(path, data)
    return _module(path)


def _module(path: Path) -> ModuleType:
    loader = importlib.machinery.ExtensionFileLoader(MODULE, str(path))
    spec = importlib.util.spec_from_file_location(MODULE, path, loader=loader)
    assert spec is not None
    try:
        module = importlib.util.module_from_spec(spec)
        loader.exec_module(module)
    except ImportError as error:
        raise BuildError(
            f"region library {path} does not load ({_one_line(error)}); compile the model again"
        ) from error
    module.bind(tensor_data_address())
    return module
