"""Which nodes codegen can print into a kernel, as tables that passes may read.

Names are `target_name`'s, without `aten.`. A test holds the printer (codegen/emit.py) to exactly these.
"""

from __future__ import annotations

from torch import fx

VIEWS: frozenset[str] = frozenset()
POINTWISE: frozenset[str] = frozenset()
REDUCTIONS: frozenset[str] = frozenset()


def why_not(node: fx.Node) -> str | None:
    """None if the node can be printed inside a kernel, else the reason in a few words."""
    raise NotImplementedError("not written yet")
