"""The shape of the source tree: which way imports point, who touches private torch, how long files are."""

from __future__ import annotations

import ast
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))

# each layer may import itself and those before it
LAYERS = ["llmopt.compiler", "llmopt.passes", "llmopt.codegen", "llmopt.runtime", "llmopt"]
FOLDERS = {"llmopt" if name == "llmopt" else name.split(".")[1]: at for at, name in enumerate(LAYERS)}
LONGEST = 400


def layer_of_file(path: str) -> int:
    return FOLDERS[Path(path).parts[0]]


def layer_of_module(name: str) -> int | None:
    """The layer a dotted name belongs to; None for what is not llmopt's."""
    parts = name.split(".")
    if parts[0] != "llmopt":
        return None
    return FOLDERS.get(parts[1], FOLDERS["llmopt"]) if len(parts) > 1 else FOLDERS["llmopt"]


def imported(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import, at any depth; `from a import b` counts as a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.lineno, f"{'.' * node.level}{node.module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            yield from ((node.lineno, a.value) for a in node.args if isinstance(a, ast.Constant))


def wrong_way(path: str, source: str) -> list[str]:
    """Imports of a layer further out, and relative ones, which hide where they point."""
    here = layer_of_file(path)
    found = []
    for line, name in imported(ast.parse(source)):
        there = layer_of_module(name)
        if name.startswith(".") or (there is not None and there > here):
            found.append(f"{path}:{line} imports {name}")
    return found


def dotted(node: ast.expr) -> list[str]:
    """`a.b.c` as its parts; what does not start with a name (a call's result) has none."""
    if isinstance(node, ast.Attribute):
        inner = dotted(node.value)
        return [*inner, node.attr] if inner else []
    return [node.id] if isinstance(node, ast.Name) else []


def is_private_torch(name: str) -> bool:
    parts = name.split(".")
    return parts[0] == "torch" and any(p.startswith("_") and not p.endswith("__") for p in parts[1:])


def private_torch(path: str, source: str) -> list[str]:
    """Imports and attribute paths through a private part of torch, anywhere but in compiler/_torch.py."""
    if path == "compiler/_torch.py":
        return []
    tree = ast.parse(source)
    names = list(imported(tree))
    names += [(n.lineno, ".".join(dotted(n))) for n in ast.walk(tree) if isinstance(n, ast.Attribute)]
    return sorted({f"{path}:{line} uses {name}" for line, name in names if is_private_torch(name)})


def sources() -> dict[str, str]:
    files = [p for folder in FOLDERS for p in sorted((ROOT / folder).rglob("*.py"))]
    return {str(p.relative_to(ROOT)): p.read_text(encoding="utf-8") for p in files}


def test_every_layer_has_files():
    assert {Path(p).parts[0] for p in sources()} == set(FOLDERS)


def test_imports_point_one_way():
    assert [w for path, source in sources().items() for w in wrong_way(path, source)] == []


def test_private_torch_in_one_file_only():
    assert [w for path, source in sources().items() for w in private_torch(path, source)] == []


def test_files_stay_short():
    tests = {str(p.relative_to(ROOT)): p.read_text(encoding="utf-8") for p in (ROOT / "tests").rglob("*.py")}
    lengths = {path: source.count("\n") for path, source in (sources() | tests).items()}
    assert {path: n for path, n in lengths.items() if n > LONGEST} == {}


def test_every_package_folder_is_listed():
    settings = PYPROJECT["tool"]["setuptools"]
    folders = {p.parent for folder in FOLDERS for p in (ROOT / folder).rglob("__init__.py")}
    names = {".".join(("llmopt", *f.relative_to(ROOT).parts)).replace("llmopt.llmopt", "llmopt") for f in folders}
    assert names == set(settings["packages"])
    assert settings["package-dir"] == {LAYERS[at]: folder for folder, at in FOLDERS.items()}


def test_modules_lie_in_listed_packages():
    """A folder with modules but no __init__.py would be left out of the wheel without a word."""
    bare = {str(Path(p).parent) for p in sources() if not (ROOT / p).with_name("__init__.py").exists()}
    assert bare == set()


def test_test_folders_shadow_no_package():
    """tests/ is on the path for its own modules: a folder tests/llmopt would hide the installed llmopt."""
    assert not (ROOT / "tests" / "llmopt").exists()


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("compiler/a.py", "import llmopt.passes.lower"),
        ("compiler/ops/a.py", "from llmopt.passes import lower"),
        ("compiler/a.py", "from llmopt import passes"),
        ("compiler/a.py", "import llmopt"),
        ("passes/a.py", "def f():\n    from llmopt.codegen.cpp import build"),
        ("codegen/a.py", "import importlib\nimportlib.import_module('llmopt.runtime.engine')"),
        ("runtime/a.py", "from llmopt.backend import llmopt"),
        ("runtime/a.py", "from llmopt import compile"),
        ("llmopt/a.py", "from . import backend"),
    ],
)
def test_wrong_way_is_seen(path: str, source: str):
    assert len(wrong_way(path, source)) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("compiler/a.py", "from llmopt.compiler import knobs"),
        ("passes/a.py", "from llmopt.compiler.op import op_of"),
        ("runtime/a.py", "import llmopt.codegen.cpp"),
        ("llmopt/a.py", "from llmopt.runtime.engine import Engine"),
        ("compiler/a.py", "import llmoptional"),
    ],
)
def test_right_way_passes(path: str, source: str):
    assert wrong_way(path, source) == []


@pytest.mark.parametrize(
    "source",
    [
        "import torch._dynamo",
        "from torch._ops import OpOverload",
        "from torch import _C",
        "import torch.fx._pytree",
        "x = torch._ops.OpOverload",
        "def f(t: torch._ops.OpOverload): ...",
    ],
)
def test_private_torch_is_seen(source: str):
    assert private_torch("compiler/a.py", source) != []
    assert private_torch("compiler/_torch.py", source) == []


@pytest.mark.parametrize("source", ["import torch.fx", "torch.__version__", "node.target._schema", "torch.ones(1)._x"])
def test_public_torch_passes(source: str):
    assert private_torch("compiler/a.py", source) == []
