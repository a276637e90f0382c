"""A region's code made ready to run: launches bound to kernels, sizes worked out once for each set of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from llmopt.codegen.kernel import SIZES, Buffer, Call, Launcher, RegionCode, evaluate
from llmopt.compiler.errors import BuildError
from llmopt.runtime.attend import StepLayout

# what a call of torch's own ops runs: called with the arguments as they are
Ops = Mapping[str, Callable[..., Any]]
_KEPT_PLANS = 64  # sets of sizes that are remembered; prefill comes in many


@dataclass
class Frame:
    """What all regions of a step share: the sizes of `codegen.kernel.SIZES`, and in class many which tokens follow one
    another."""

    sizes: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SIZES, 1))
    layout: StepLayout | None = None


@dataclass(frozen=True)
class _Ready:
    """Calls and shapes for one set of sizes; a launch's arguments are names, numbers or None."""

    calls: tuple[tuple[Callable[..., Any], tuple[int, ...] | None, tuple[Any, ...]], ...]
    outputs: tuple[tuple[tuple[int, ...], torch.dtype] | str, ...]
    temporaries: tuple[tuple[tuple[int, ...], torch.dtype] | Tensor, ...]


class BoundRegion:
    """Runs a region: call it with the list of its inputs; it gives the list of its outputs.

    Outputs and temporaries come from torch's allocator at each call, which gives what a layer has left to the next and,
    while a graph is captured, lays them out once; buffers to be kept are made once for each set of sizes.
    """

    def __init__(self, code: RegionCode, launcher: Launcher, ops: Ops, frame: Frame, device: torch.device) -> None:
        self.code, self.frame, self.device = code, frame, device
        self._functions = [_function(call, launcher, ops) for call in code.calls]
        self._block = next((_block_of(c) for c in code.calls if c.kernel is not None and "tiles" in c.args), None)
        self._ready: dict[tuple[int, ...], _Ready] = {}
        self._kept: dict[tuple[int, tuple[int, ...]], Tensor] = {}

    def __call__(self, inputs: list[Any]) -> list[Tensor]:
        frame, device = self.frame, self.device
        values: dict[str, Any] = {f"in{i}": value for i, value in enumerate(inputs)}
        values["layout"] = frame.layout
        if self._block is not None:
            assert frame.layout is not None
            values["tiles"] = tiles = frame.layout.tiles(self._block)
            frame.sizes["T"] = len(tiles)
        key = tuple(frame.sizes.values())
        ready = self._ready.get(key) or self._prepare(key)
        for i, made in enumerate(ready.temporaries):
            values[f"tmp{i}"] = made if isinstance(made, Tensor) else torch.empty(made[0], dtype=made[1], device=device)
        for i, out in enumerate(ready.outputs):
            values[f"out{i}"] = (
                values[out] if isinstance(out, str) else torch.empty(out[0], dtype=out[1], device=device)
            )
        for function, grid, named in ready.calls:
            args = [values[a] if isinstance(a, str) else a for a in named]
            if grid is None:
                function(*args)
            else:
                function(grid, args)
        return [values[f"out{i}"] for i in range(len(ready.outputs))]

    def _prepare(self, key: tuple[int, ...]) -> _Ready:
        sizes = self.frame.sizes
        if len(self._ready) >= _KEPT_PLANS:
            self._ready.clear()

        def shaped(buffer: Buffer) -> tuple[tuple[int, ...], torch.dtype]:
            return tuple(evaluate(s, sizes) for s in buffer.shape), getattr(torch, buffer.dtype)

        def temporary(index: int, buffer: Buffer) -> tuple[tuple[int, ...], torch.dtype] | Tensor:
            shape, dtype = shaped(buffer)
            if not buffer.kept:
                return shape, dtype
            if (index, shape) not in self._kept:
                self._kept[index, shape] = torch.zeros(shape, dtype=dtype, device=self.device)
            return self._kept[index, shape]

        names = {"tiles", "layout"} | {f"tmp{i}" for i in range(len(self.code.temporaries))}
        names |= {f"out{i}" for i in range(len(self.code.outputs))}

        def argument(value: Any) -> Any:
            tensor = isinstance(value, str) and (value in names or value.startswith("in"))
            return value if value is None or tensor else evaluate(value, sizes)

        calls = []
        for function, call in zip(self._functions, self.code.calls, strict=True):
            grid = tuple(evaluate(g, sizes) for g in call.grid) if call.kernel is not None else None
            calls.append((function, grid, tuple(argument(a) for a in call.args)))
        ready = _Ready(
            tuple(calls),
            tuple(o if isinstance(o, str) else shaped(o) for o in self.code.outputs),
            tuple(temporary(i, t) for i, t in enumerate(self.code.temporaries)),
        )
        self._ready[key] = ready
        return ready


def _block_of(call: Call) -> int:
    """How many queries a tile of this attention has."""
    assert call.kernel is not None
    return int(dict(call.kernel.constants)["BLOCK_Q"])  # type: ignore[arg-type]


def _function(call: Call, launcher: Launcher, ops: Ops) -> Callable[..., Any]:
    if call.kernel is not None:
        return launcher(call.kernel)
    if call.op is None or call.op not in ops:
        raise BuildError(f"a region calls {call.op!r}, which nothing here runs; known are {', '.join(sorted(ops))}")
    return ops[call.op]
