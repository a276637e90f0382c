"""What gets installed: the wheel's contents, the two entry points, and the declared dependencies."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
FOLDERS = ("compiler", "passes", "codegen", "runtime", "llmopt")
IMPORT_NAMES = {
    "huggingface-hub": "huggingface_hub",
    "compressed-tensors": "compressed_tensors",
    "onnx-ir": "onnx_ir",
    "cuda-bindings": "cuda",
    "PyYAML": "yaml",
}


def source_files() -> list[Path]:
    """Everything below the package folders that is not made by running something."""
    files = [p for folder in FOLDERS for p in (ROOT / folder).rglob("*") if p.is_file()]
    return [p.relative_to(ROOT) for p in files if "__pycache__" not in p.parts and p.suffix != ".so"]


def installed_as(path: Path) -> str:
    return str(path) if path.parts[0] == "llmopt" else f"llmopt/{path}"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy of the sources, so that nothing is left in the tree."""
    copy = tmp_path_factory.mktemp("sources")
    for path in [*source_files(), Path("pyproject.toml"), Path("LICENSE"), Path("README.md")]:
        (copy / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, copy / path)
    out = tmp_path_factory.mktemp("wheel")
    code = f"import setuptools.build_meta as build; build.build_wheel({str(out)!r})"
    subprocess.run([sys.executable, "-P", "-c", code], cwd=copy, check=True, capture_output=True)
    (made,) = out.glob("*.whl")
    return made


def test_wheel_holds_every_source_file(wheel: Path):
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert held == {installed_as(path) for path in source_files()}
    assert wheel.name == "llmopt-0.1.0-py3-none-any.whl"


def test_wheel_metadata(wheel: Path):
    with zipfile.ZipFile(wheel) as archive:
        texts = {Path(name).name: archive.read(name).decode() for name in archive.namelist() if ".dist-info/" in name}
    assert "llmopt = llmopt.cli:main" in texts["entry_points.txt"]
    assert "[torch_dynamo_backends]\nllmopt = llmopt.backend:llmopt" in texts["entry_points.txt"]
    assert "License-Expression: Apache-2.0" in texts["METADATA"]
    assert "Requires-Python: >=3.11" in texts["METADATA"]
    assert texts["LICENSE"] == (ROOT / "LICENSE").read_text(encoding="utf-8")


def test_every_module_imports_from_the_wheel(wheel: Path, tmp_path: Path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    modules = [
        installed_as(p).removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        for p in source_files()
        if p.suffix == ".py" and p.name != "__main__.py"
    ]
    code = (
        f"import sys, importlib; sys.path.insert(0, {str(tmp_path)!r})\n"
        f"for name in {sorted(modules)!r}:\n"
        f"    assert importlib.import_module(name).__file__.startswith({str(tmp_path)!r}), name"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_installed_version_is_the_declared_one():
    import llmopt

    assert importlib.metadata.version("llmopt") == PROJECT["version"] == llmopt.__version__


def test_torch_finds_the_backend_without_an_import():
    code = "import torch; print('llmopt' in torch.compiler.list_backends(exclude_tags=()))"
    assert subprocess.check_output([sys.executable, "-P", "-c", code], text=True).strip() == "True"
    assert "llmopt" in torch.compiler.list_backends()


def test_entry_points_resolve():
    import llmopt.backend
    import llmopt.cli

    (script,) = importlib.metadata.entry_points(group="console_scripts", name="llmopt")
    (backend,) = importlib.metadata.entry_points(group="torch_dynamo_backends", name="llmopt")
    assert script.load() is llmopt.cli.main
    assert backend.load() is llmopt.backend.llmopt


def third_party_imports() -> set[str]:
    found = set()
    for path in source_files():
        if path.suffix == ".py":
            for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
                if isinstance(node, ast.Import):
                    found |= {alias.name.split(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom):
                    found.add((node.module or "").split(".")[0])
    return found - set(sys.stdlib_module_names) - {"llmopt"}


def test_dependencies_are_those_imported():
    """Nothing is imported that is not declared, and nothing declared that is not imported; extras for users count."""
    extras = [line for name, lines in PROJECT["optional-dependencies"].items() if name != "dev" for line in lines]
    names = [re.match(r"[\w-]+", line).group() for line in [*PROJECT["dependencies"], *extras]]
    assert {IMPORT_NAMES.get(name, name) for name in names} == third_party_imports()


def test_torch_range():
    assert "torch>=2.11,<2.14" in PROJECT["dependencies"]
    assert (2, 11) <= tuple(map(int, torch.__version__.split(".")[:2])) < (2, 14)
