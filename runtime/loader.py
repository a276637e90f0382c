"""What stands between a Program and its Executor: weights read into memory, regions compiled or taken from disk."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from llmopt.codegen.regions import CompiledRegion, build_regions, load_region
from llmopt.compiler.errors import DeviceMemoryError
from llmopt.compiler.program import Program
from llmopt.runtime.executor import ShapeClass
from llmopt.runtime.transfer import aligned


def read_weights(
    program: Program,
    graphs: Iterable[str] = ("step",),
    known: Mapping[str, Tensor] | None = None,
    device: torch.device | None = None,
    apart: Collection[str] = (),
) -> dict[str, Tensor]:
    """The weights these graphs read, on `device` (None: the CPU; those `apart` there in any case), contiguous; `known`
    ones are not read again.

    Raises DeviceMemoryError: a GPU has no room for them.
    """
    known, place = known or {}, device or torch.device("cpu")
    names = dict.fromkeys(w for g in graphs for w in program.graph(g).weights())
    found: dict[str, Tensor] = {}
    try:
        for name in names:
            have, there = known.get(name), torch.device("cpu") if name in apart else place
            if have is None or have.device.type != there.type:
                have = _placed(program.weights[name].load() if have is None else have, there)
            found[name] = have
    except torch.OutOfMemoryError as error:
        whole = sum(program.weights[name].nbytes for name in names)
        done = sum(t.nbytes for t in found.values())
        raise DeviceMemoryError(
            f"weight {name!r} does not fit: the weights take {whole} bytes, of which {done} are on {place}, which has "
            f"{torch.cuda.mem_get_info(place)[0] if place.type == 'cuda' else 0} bytes left; free memory on it, or "
            "compile in a smaller dtype"
        ) from error
    return found


def _placed(weight: Tensor, place: torch.device) -> Tensor:
    # on a CPU a weight may stay where its file is mapped; on a GPU one that was there may be a view into another
    moved = weight.to(place)
    return moved.contiguous() if place.type == "cpu" else aligned(moved)


class Regions:
    """Compiled regions by name and shape class, read from `stored` or compiled when a class is first asked for.

    All regions of a class are compiled together, which takes one run of the C++ compiler.
    """

    def __init__(self, program: Program, stored: Mapping[str, CompiledRegion] | None = None) -> None:
        self.program = program
        self.compiled: dict[str, CompiledRegion] = dict(stored or {})
        self.loaded: dict[str, Callable[[list[Any]], Any]] = {}

    def __call__(self, name: str, shape: ShapeClass) -> Callable[[list[Any]], Any]:
        """The region as a function of its argument list."""
        key = self.key(name, shape)
        if key not in self.loaded:
            if key not in self.compiled:
                self._compile(key.endswith("@1"))
            self.loaded[key] = load_region(self.compiled[key])
        return self.loaded[key]

    def key(self, name: str, shape: ShapeClass) -> str:
        """`layer@1` for one token (or, for regions behind the row selection, one row), `layer@n` for more."""
        sizes = {str(d) for n in self.program.graph(name).inputs() for d in getattr(n.meta["val"], "shape", ())}
        symbols = self.program.graph(name).symbols.sizes
        single = shape[1] if str(symbols["R"]) in sizes and str(symbols["N"]) not in sizes else shape[0]
        return f"{name}@{'1' if single else 'n'}"

    def names(self) -> list[str]:
        """The regions the step calls, in first-call order."""
        return list(dict.fromkeys(str(n.target) for n in self.program.graph("step").fx.nodes if n.op == "call_module"))

    def compile_all(self, progress: Callable[[str], None] = lambda stage: None) -> None:
        """Compile every region for every shape class (what an artifact holds)."""
        for single in (True, False):
            if any(self.key(name, (single, single)) not in self.compiled for name in self.names()):
                progress(f"compile regions for {'one token' if single else 'several tokens'}")
                self._compile(single)

    def _compile(self, single: bool) -> None:
        missing = {self.key(n, (single, single)): n for n in self.names()}
        missing = {key: name for key, name in missing.items() if key not in self.compiled}
        made = build_regions([self.program.graph(name) for name in missing.values()], single)
        self.compiled.update(zip(missing, made, strict=True))
