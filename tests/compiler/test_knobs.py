from __future__ import annotations

import ast
import errno
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from llmopt.compiler import knobs
from llmopt.compiler.errors import BuildError, KnobError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch):
    for name in [name for name in os.environ if name.startswith("LLMOPT_")]:
        monkeypatch.delenv(name)


def test_defaults(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert {key: knob() for key, knob in knobs.KNOBS.items()} == {
        "debug": 0,
        "dump": None,
        "verify": True,
        "numerics": False,
        "bisect": None,
        "provider": None,
        "cache": Path("/x/llmopt"),
        "tune": "cached",
    }


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("debug", "4", 4),
        ("verify", "0", False),
        ("verify", " 1 ", True),
        ("numerics", "1", True),
        ("numerics", "0", False),
        ("bisect", "0", 0),
        ("bisect", "1234", 1234),
        ("provider", "reference", ("reference",)),
        ("provider", "cpp, reference", ("cpp", "reference")),
        ("provider", "", None),
        ("dump", "/some/folder", Path("/some/folder")),
        ("cache", "~/kernels", Path.home() / "kernels"),
        ("tune", "off", "off"),
    ],
)
def test_values_are_read_when_asked(monkeypatch: pytest.MonkeyPatch, name: str, text: str, value: object):
    monkeypatch.setenv(f"LLMOPT_{name.upper()}", text)
    got = knobs.KNOBS[name]()
    assert got == value
    assert type(got) is type(value) or isinstance(value, Path)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("debug", "5"),
        ("debug", "-1"),
        ("debug", "yes"),
        ("verify", "2"),
        ("numerics", "true"),
        ("bisect", "-1"),
        ("bisect", "1.5"),
        ("provider", "cpp,,reference"),
        ("dump", __file__),
        ("cache", __file__),
        ("cache", f"{__file__}/a/b"),
        ("tune", "search"),
    ],
)
def test_bad_values_say_what_was_wanted(monkeypatch: pytest.MonkeyPatch, name: str, text: str):
    knob = knobs.KNOBS[name]
    monkeypatch.setenv(knob.name, text)
    with pytest.raises(KnobError) as caught:
        knob()
    said = str(caught.value)
    assert said.startswith(f"{knob.name} is {text!r}, wanted {knob.wanted}")
    assert "\n" not in said
    assert caught.value.__cause__ is None


def test_scope_sets_and_restores():
    with knobs.scope(debug=2, numerics=True, provider=("cpp", "reference")):
        assert (knobs.debug(), knobs.numerics(), knobs.provider()) == (2, True, ("cpp", "reference"))
        with knobs.scope(debug=None, numerics=False):
            assert (knobs.debug(), knobs.numerics()) == (0, False)
        assert knobs.debug() == 2
    assert not [name for name in os.environ if name.startswith("LLMOPT_")]


def test_scope_restores_after_an_error():
    def fail():
        with knobs.scope(verify=False):
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert knobs.verify()


def test_scope_reaches_child_processes():
    with knobs.scope(bisect=7):
        out = subprocess.check_output([sys.executable, "-P", "-c", "import os; print(os.environ['LLMOPT_BISECT'])"])
    assert out.strip() == b"7"


@pytest.mark.parametrize(
    ("values", "said"), [({"verify": 9}, "wanted 0 or 1"), ({"verfy": 1}, "did you mean 'verify'")]
)
def test_scope_refuses_and_sets_nothing(values: dict, said: str):
    with pytest.raises(KnobError, match=said), knobs.scope(debug=1, **values):
        pass
    assert "LLMOPT_DEBUG" not in os.environ


def test_unknown_variable_warns(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("LLMOPT_DEBUGG", "1")
    with pytest.warns(UserWarning, match=r"LLMOPT_DEBUGG does nothing; did you mean 'LLMOPT_DEBUG'") as caught:
        assert knobs.verify()
    assert caught[0].filename == __file__


def test_known_variables_do_not_warn(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("LLMOPT_DEBUG", "1")
    monkeypatch.setenv("LLMOPTIMAL", "1")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        knobs.debug()


def test_nothing_is_read_at_import(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("LLMOPT_VERIFY", "nonsense")
    subprocess.run([sys.executable, "-P", "-c", "import llmopt.compiler.knobs"], check=True)


def test_documented_table_is_the_code_s():
    printed = subprocess.check_output([sys.executable, "-P", "-m", "llmopt.compiler.knobs"], text=True)
    assert printed == knobs.table()
    assert printed in (ROOT / "docs" / "knobs.md").read_text(encoding="utf-8")


def test_no_other_file_reads_a_variable_of_ours():
    for folder in ("compiler", "passes", "codegen", "runtime", "llmopt"):
        for path in (ROOT / folder).rglob("*.py"):
            strings = [n.value for n in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(n, ast.Constant)]
            names = {s for s in strings if isinstance(s, str) and re.fullmatch(r"LLMOPT_\w+", s)}
            assert not names or path == ROOT / "compiler" / "knobs.py", (path, names)


def test_a_cache_that_cannot_be_written_is_told_with_the_remedy(tmp_path: Path):
    with knobs.scope(cache=tmp_path), pytest.raises(BuildError) as caught, knobs.writing_cache():
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert str(caught.value) == (
        f"cache {tmp_path} cannot be written (No space left on device); set LLMOPT_CACHE to a writable folder with "
        "free space"
    )


@pytest.mark.parametrize("args", [(errno.EACCES, "refused", "/ptxas"), (errno.ENOMEM, "no memory"), ("no source",)])
def test_what_fails_elsewhere_is_not_the_caches_fault(tmp_path: Path, args: tuple[object, ...]):
    with knobs.scope(cache=tmp_path), pytest.raises(OSError), knobs.writing_cache():  # noqa: PT011 - any of them
        raise OSError(*args)
