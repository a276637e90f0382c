"""Kernels of the template `rows`: pointwise nodes and reductions over the last axis, without an anchor."""

from __future__ import annotations

from collections.abc import Mapping

from torch import fx

from llmopt.codegen.kernel import Call, Size


def rows_calls(
    outputs: Mapping[fx.Node, str], stored: Mapping[fx.Node, str], tokens: Size = "N", pdl: bool = False
) -> list[Call]:
    """The calls that compute `outputs` from `stored`: one kernel for all outputs that can share rows.

    `outputs`: node -> the argument it is written to (`out0`, `tmp1`), contiguous in its fx shape. A `kv_write` node
    may be an output: then its value is scattered into the pages, and the argument is that of the pages (`in5`).
    `stored`: node -> argument (`in0`, `tmp0`) of what lies in memory; the walk from the outputs stops there.
    `tokens` is the size behind the one symbolic axis of the nodes ("N", or "R" behind the selection of rows).
    Raises EmitError with the reason if a node cannot be printed.
    """
    raise NotImplementedError("not written yet")
