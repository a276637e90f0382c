"""A kernel's template function and its constants, hooks among them: what compiler and interpreter take.

The source of a kernel's hooks is kept as a module in the cache folder, since Triton reads functions from their file.
Its name is the digest of its text, so that no two texts share a module, a function name or an entry of any cache.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.util
import os
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any, TypeGuard

from llmopt.codegen.kernel import Kernel
from llmopt.compiler import knobs
from llmopt.compiler.errors import BuildError

TEMPLATES = "llmopt.codegen.templates"
_IMPORTING = threading.Lock()  # a module is in sys.modules before it has been executed


def function(kernel: Kernel) -> Any:
    """The template's function. Raises BuildError: no such template, or no Triton."""
    module, _, name = kernel.template.partition(":")
    try:
        found = getattr(importlib.import_module(f"{TEMPLATES}.{module}"), name, None)
    except ModuleNotFoundError as error:
        if error.name == "triton":
            raise BuildError("Triton is not installed, and GPU kernels need it: pip install triton (Linux)") from error
        raise BuildError(f"template {kernel.template!r}: module {error.name} does not exist") from error
    if found is None:
        raise BuildError(f"template {kernel.template!r}: module {TEMPLATES}.{module} has no {name!r}")
    return found


def constants(kernel: Kernel) -> dict[str, Any]:
    """Every parameter of the template that is no runtime argument, by name; hooks are functions. Raises BuildError."""
    values: dict[str, Any] = dict(kernel.constants)
    if kernel.hooks:
        module = _module(kernel.source)
        for parameter, name in kernel.hooks:
            if not hasattr(module, name):
                raise BuildError(f"kernel {kernel.template}: hook {parameter} is {name!r}, which its source lacks")
            values[parameter] = getattr(module, name)
    return values


def template_text(template: str) -> str:
    """The text of all that `template_texts` finds, for keys. Raises BuildError."""
    return "\0".join(f"{name}\0{text}" for name, text in sorted(template_texts(template).items()))


def template_texts(template: str) -> dict[str, str]:
    """By module's name the texts of a template's module, of those beside it that it imports, and they in turn, and of
    llmopt's other modules that their kernels read something of. Raises BuildError.
    """
    texts: dict[str, str] = {}
    waiting = [template.partition(":")[0]]
    while waiting:
        name = waiting.pop()
        if name not in texts:
            texts[name] = _text(name)
            if "." not in name:
                tree = ast.parse(texts[name])
                waiting += [*_beside(tree), *_read_elsewhere(tree)]
    return texts


def is_compiled(node: ast.stmt) -> TypeGuard[ast.FunctionDef]:
    """Is this statement a kernel, or a function that Triton calls while it compiles one?"""
    return isinstance(node, ast.FunctionDef) and any(
        ast.unparse(decorator).startswith(("triton.jit", "triton.constexpr_function"))
        for decorator in node.decorator_list
    )


def _text(name: str) -> str:
    found = importlib.util.find_spec(name if "." in name else f"{TEMPLATES}.{name}")
    if found is None or found.origin is None:
        raise BuildError(f"template {name!r} does not exist in {TEMPLATES}")
    return Path(found.origin).read_text(encoding="utf-8")


def _beside(tree: ast.Module) -> list[str]:
    """Modules of the templates' package that a module imports."""
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == TEMPLATES:
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith(TEMPLATES + "."):
            names.append(str(node.module).removeprefix(TEMPLATES + "."))
        elif isinstance(node, ast.Import):
            names += [a.name.removeprefix(TEMPLATES + ".") for a in node.names if a.name.startswith(TEMPLATES + ".")]
    return names


def _module(source: str) -> Any:
    """The hooks' module, written and imported once for each text; for other threads only once it is whole."""
    name = f"llmopt_hooks_{hashlib.sha256(source.encode()).hexdigest()[:20]}"
    with _IMPORTING:
        return sys.modules[name] if name in sys.modules else _imported(name, source)


def _imported(name: str, source: str) -> Any:
    path = knobs.cache() / "hooks" / f"{name}.py"
    write_new(path, source.encode())
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise BuildError(f"hooks {path} cannot be imported")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # Triton looks a function's module up by its name
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise BuildError(f"hooks {path} cannot be imported ({type(error).__name__}: {error})") from error
    return module


def write_new(path: Path, data: bytes) -> None:
    """Write a file of the cache whole or not at all, as another process may read or write it at the same time.

    Raises BuildError: the cache cannot be written.
    """
    with knobs.writing_cache():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(data)
        os.replace(file.name, path)


def _read_elsewhere(tree: ast.Module) -> list[str]:
    """Modules of llmopt outside the templates' package of which kernels read something by its name."""
    read = set().union(*(_free_names(node) for node in tree.body if is_compiled(node)))
    package = __name__.partition(".")[0]
    return [
        str(node.module)
        for node in tree.body
        if isinstance(node, ast.ImportFrom)
        and (node.module or "").startswith(f"{package}.")
        and not f"{node.module}.".startswith(f"{TEMPLATES}.")
        and read & {alias.asname or alias.name for alias in node.names}
    ]


def _free_names(kernel: ast.FunctionDef) -> set[str]:
    """What a function reads and neither takes nor assigns."""
    names = [node for node in ast.walk(kernel) if isinstance(node, ast.Name)]
    own = {node.arg for node in ast.walk(kernel) if isinstance(node, ast.arg)}
    return {node.id for node in names} - {node.id for node in names if isinstance(node.ctx, ast.Store)} - own
