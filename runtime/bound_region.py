"""A region's code made ready to run: launches bound to kernels, sizes worked out once for each set of them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from llmopt.codegen.kernel import PAGED, SIZES, WHEN, Buffer, Call, Launcher, RegionCode, evaluate
from llmopt.compiler.errors import BuildError
from llmopt.runtime.attend import StepLayout
from llmopt.runtime.prepared import prepared

# what a call of torch's own ops runs: called with the arguments as they are
Ops = Mapping[str, Callable[..., Any]]
_KEPT_PLANS = 64  # sets of sizes that are remembered; prefill comes in many


@dataclass
class Frame:
    """What all regions of a step share: the sizes of `codegen.kernel.SIZES`, and in class many which tokens follow one
    another."""

    sizes: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SIZES, 1))
    layout: StepLayout | None = None

    def __post_init__(self) -> None:
        self.begin(self.sizes, self.layout)

    def begin(self, sizes: dict[str, int], layout: StepLayout | None = None) -> None:
        """The next step's."""
        self.sizes, self.layout = sizes, layout
        self.kind = PAGED if layout is None else layout.kind
        self.key: tuple[int | str, ...] = (*sizes.values(), self.kind)


@dataclass(frozen=True)
class _Ready:
    """A region for one set of sizes, over a list of values: inputs, layout, tiles, weights in other forms, what is
    `made` at each call, what is `fixed`. Calls are (function of the arguments, the arguments out of the list, place of
    the result)."""

    made: tuple[tuple[tuple[int, ...], torch.dtype], ...]
    fixed: tuple[Any, ...]
    calls: tuple[tuple[Callable[[Any], Any], Callable[[list[Any]], Any], int], ...]
    results: tuple[int, ...]


class BoundRegion:
    """Runs a region: call it with the list of its inputs; it gives the list of its outputs.

    Outputs and temporaries come from torch's allocator at each call, which gives what a layer has left to the next and,
    while a graph is captured, lays them out once; buffers to be kept are made once for each set of sizes. `spent` are
    the inputs that nobody reads after the region: outputs may be written over them.
    """

    def __init__(
        self,
        code: RegionCode,
        launcher: Launcher,
        ops: Ops,
        frame: Frame,
        device: torch.device,
        spent: Collection[int] = (),
    ) -> None:
        self.code, self.frame, self.device = code, frame, device
        self._spent = {f"in{i}" for i in spent}
        self._functions = [_function(call, launcher, ops) for call in code.calls]
        self._blocks = {kind: next(map(_block_of, filter(_tiled, self._calls(kind))), None) for kind in WHEN}
        self._ready: dict[tuple[int | str, ...], _Ready] = {}
        self._kept: dict[tuple[str, tuple[int, ...]], Tensor] = {}

    def __call__(self, inputs: list[Any]) -> list[Tensor]:
        frame, device, tiles = self.frame, self.device, None
        key, block = frame.key, self._blocks[frame.kind]
        if block is not None:
            assert frame.layout is not None
            tiles = frame.layout.tiles(block)
            key = (*key, tiles.shape[0])
        ready = self._ready.get(key) or self._prepare(key, len(inputs), tiles)
        values = [*inputs, frame.layout, tiles]
        for item in self.code.prepared:
            values += prepared(item, inputs, device)
        values += [torch.empty(shape, dtype=dtype, device=device) for shape, dtype in ready.made]
        values += ready.fixed
        for run, take, place in ready.calls:
            given = run(take(values))
            if given is not None:
                values[place] = given
        return [values[i] for i in ready.results]

    def _calls(self, kind: str) -> list[Call]:
        return [c for c in self.code.calls if c.when in (None, kind)]

    def _prepare(self, key: tuple[int | str, ...], inputs: int, tiles: Tensor | None) -> _Ready:
        if len(self._ready) >= _KEPT_PLANS:
            self._ready.clear()
        sizes = {**self.frame.sizes, "T": 0 if tiles is None else tiles.shape[0]}
        where = {**{f"in{i}": i for i in range(inputs)}, "layout": inputs, "tiles": inputs + 1}
        for i, item in enumerate(self.code.prepared):
            where |= {f"prepared{i}.{result}": len(where) + at for at, result in enumerate(item.results)}
        first = len(where)
        made: list[tuple[tuple[int, ...], torch.dtype]] = []
        kept: list[tuple[str, Tensor]] = []
        for name, buffer in self._buffers():
            alias = buffer if isinstance(buffer, str) else buffer.over if buffer.over in self._spent else None
            if alias is not None:
                where[name] = where[alias]
                continue
            assert isinstance(buffer, Buffer)
            shape = tuple(evaluate(s, sizes) for s in buffer.shape)
            if buffer.kept:
                kept.append((name, self._keep(name, shape, buffer)))
            else:
                where[name] = first + len(made)
                made.append((shape, getattr(torch, buffer.dtype)))
        start = first + len(made)
        where.update((name, start + i) for i, (name, _) in enumerate(kept))
        fixed: list[Any] = [tensor for _, tensor in kept]

        def place(value: Any) -> int:
            if value in where:
                return where[value]
            fixed.append(value if value is None else evaluate(value, sizes))
            return start + len(fixed) - 1

        calls = []
        for run, call in zip(self._functions, self.code.calls, strict=True):
            if call.when in (None, self.frame.kind):
                places = [place(a) for a in call.args]
                over = partial(run, tuple(evaluate(g, sizes) for g in call.grid)) if call.kernel is not None else run
                calls.append((over, itemgetter(*places) if len(places) > 1 else _only(places[0]), places[-1]))
        results = tuple(where[f"out{i}"] for i in range(len(self.code.outputs)))
        ready = self._ready[key] = _Ready(tuple(made), tuple(fixed), tuple(calls), results)
        return ready

    def _buffers(self) -> Iterator[tuple[str, Buffer | str]]:
        yield from ((f"tmp{i}", buffer) for i, buffer in enumerate(self.code.temporaries))
        yield from ((f"out{i}", buffer) for i, buffer in enumerate(self.code.outputs))

    def _keep(self, name: str, shape: tuple[int, ...], buffer: Buffer) -> Tensor:
        if (name, shape) not in self._kept:
            self._kept[name, shape] = torch.zeros(shape, dtype=getattr(torch, buffer.dtype), device=self.device)
        return self._kept[name, shape]


def _tiled(call: Call) -> bool:
    return call.kernel is not None and "tiles" in call.args


def _only(place: int) -> Callable[[list[Any]], tuple[Any]]:
    return lambda values: (values[place],)


def _block_of(call: Call) -> int:
    """How many queries a tile of this attention has."""
    assert call.kernel is not None
    return int(dict(call.kernel.constants)["BLOCK_Q"])  # type: ignore[arg-type]


def _function(call: Call, launcher: Launcher, ops: Ops) -> Callable[..., Any]:
    if call.kernel is not None:
        return launcher(call.kernel)
    if call.op is None or call.op not in ops:
        raise BuildError(f"a region calls {call.op!r}, which nothing here runs; known are {', '.join(sorted(ops))}")
    return partial(_spread, partial(ops[call.op], **dict(call.constants)))


def _spread(op: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    return op(*args)
