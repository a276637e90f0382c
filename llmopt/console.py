"""The terminal side of the commands: results on stdout, progress and errors on stderr, exit codes."""

from __future__ import annotations

import functools
import json
import math
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from llmopt.compiler.errors import InputError, LlmoptError

if TYPE_CHECKING:
    from llmopt.runtime.report import Report

P = ParamSpec("P")
T = TypeVar("T")
Progress = Callable[[str], None]

USER_ERROR, BUG, INTERRUPTED = 2, 1, 130


def guarded(fn: Callable[P, T]) -> Callable[P, T]:
    """A command whose errors end it as the exit codes say: 2 one line for the user's, 1 for bugs, 130 for ctrl-C.

    The command's option `debug` adds the traceback.
    """

    @functools.wraps(fn)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        debug = bool(kwargs.get("debug"))
        warnings.showwarning = _say_warning
        try:
            return fn(*args, **kwargs)
        except LlmoptError as error:
            _fail(f"error: {_first_line(error)}", debug)
            raise typer.Exit(USER_ERROR) from None
        except KeyboardInterrupt:
            _fail("interrupted", debug)
            raise typer.Exit(INTERRUPTED) from None
        except (BrokenPipeError, typer.Exit):
            raise
        except Exception as error:
            hint = "" if debug else "; this is a bug in llmopt: run again with --debug and report the traceback"
            _fail(f"error: {type(error).__name__}: {_first_line(error)}{hint}", debug)
            raise typer.Exit(BUG) from None

    return run


def _fail(message: str, debug: bool) -> None:
    if debug:
        traceback.print_exc()
    print(message, file=sys.stderr)


def _first_line(error: BaseException) -> str:
    """The message's first line; what follows it (the graph around a node) is for --debug."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else "no message"


def _say_warning(message: Warning | str, *rest: Any, **more: Any) -> None:
    print(f"warning: {_first_line(message) if isinstance(message, Warning) else message}", file=sys.stderr)


@contextmanager
def stages(title: str) -> Iterator[Progress]:
    """A spinner on stderr (a terminal's only) that shows the stage it is told."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda stage: None
        return
    with console.status(title) as status:
        yield lambda stage: status.update(f"{title}: [bold]{stage}[/bold]")


@contextmanager
def bar(title: str, total: int) -> Iterator[Callable[[int, str], None]]:
    """A bar on stderr (a terminal's only) that is told how much more is done, and a note."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda more, note: None
        return
    from rich import progress as rich_progress

    columns = (
        rich_progress.TextColumn("{task.description}"), rich_progress.BarColumn(),
        rich_progress.MofNCompleteColumn(), rich_progress.TimeRemainingColumn(),
        rich_progress.TextColumn("{task.fields[note]}"),
    )  # fmt: skip
    with rich_progress.Progress(*columns, console=console) as shown:
        task = shown.add_task(title, total=total, note="")
        yield lambda more, note: shown.update(task, advance=more, note=note)


def say(text: str) -> None:
    """A remark for people, on stderr."""
    Console(stderr=True, highlight=False).print(Text(text, style="dim"), soft_wrap=True)


def write_json(data: Any) -> None:
    """One JSON object on stdout; `finite` numbers only."""
    print(json.dumps(finite(data), indent=2, allow_nan=False))


def finite(data: Any) -> Any:
    """The same data with None for numbers that are infinite or NaN: JSON has neither, and its readers refuse them."""
    if isinstance(data, dict):
        return {key: finite(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


def write_code(text: str) -> None:
    """Python-like text on stdout, coloured on a terminal only."""
    console = Console()
    if not console.is_terminal:
        sys.stdout.write(text)
        return
    from rich.syntax import Syntax

    console.print(Syntax(text, "python", theme="ansi_dark", word_wrap=False), soft_wrap=True)


_DIFF_STYLES = (("+++", "bold"), ("---", "bold"), ("+", "green"), ("-", "red"), ("@@", "cyan"))


def write_diff(text: str) -> None:
    """A unified diff on stdout, coloured on a terminal only."""
    console = Console(highlight=False)
    if not console.is_terminal:
        sys.stdout.write(text)
        return
    for line in text.splitlines():
        style = next((s for prefix, s in _DIFF_STYLES if line.startswith(prefix)), "")
        console.print(Text(line, style=style), soft_wrap=True)


def write_table(table: Table) -> None:
    """A table on stdout; as wide as it likes where stdout is no terminal."""
    console = Console()
    (console if console.is_terminal else Console(width=160)).print(table)


def report_table(report: Report) -> Table:
    """What each pass matched and rewrote."""
    table = Table("pass", "matched", "rewritten", "by rule", "nodes", "ms", title="what each pass did")
    for entry in report.passes:
        rules = ", ".join(f"{name} {count}" for name, count in sorted(entry.stats.per_rule.items()))
        turned_down = sum(entry.stats.rejected.values())
        rules += f"; {turned_down} turned down" if turned_down else ""
        nodes = f"{entry.nodes_before} -> {entry.nodes_after}"
        table.add_row(entry.name, str(entry.stats.matched), str(entry.stats.rewritten), rules, nodes, f"{entry.ms:.0f}")
    return table


def is_artifact(path: str) -> bool:
    """Is this a folder that `save` wrote?"""
    return (Path(path) / "manifest.json").is_file()


def check_output(path: Path) -> None:
    """InputError unless an artifact can be written here: nothing there, an empty folder, or an older artifact."""
    wanted = "wanted a new or empty folder, or an artifact to replace; choose another -o"
    if path.exists() and not path.is_dir():
        raise InputError(f"output {str(path)!r} is a file; {wanted}")
    if path.is_dir() and any(path.iterdir()) and not is_artifact(str(path)):
        raise InputError(f"output {str(path)!r} is a folder with other files in it; {wanted}")
    check_parent(path)


def check_parent(path: Path) -> None:
    """InputError unless a folder can be made here."""
    parent = next(p for p in path.absolute().parents if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise InputError(
            f"output {str(path)!r} cannot be made: {str(parent)!r} is not a folder to write to; choose another -o"
        )


def read_text(path: str) -> str:
    """A text file, or stdin for `-`. Raises InputError."""
    if path == "-":
        return sys.stdin.read()
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise InputError(
            f"file {path!r} cannot be read: {reason}; give a readable text file, or - for stdin"
        ) from error
