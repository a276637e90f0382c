"""What a command measured: into a file if there is to be one, and onto stdout."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from llmopt.console import finite, write_json
from llmopt.runtime import measure as records

Figures = dict[str, Any]


def deliver(figures: Figures, show: Callable[[Figures], None], out: Path | None, as_json: bool) -> None:
    """Write `figures` to `out`, too, then print them: as JSON, or by `show`."""
    if out is not None:
        records.write_json(out, finite(figures))
    if as_json:
        write_json(figures)
    else:
        show(figures)
