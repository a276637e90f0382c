"""The code of a program for a GPU: each region's for each class of shapes, and the cubins of its kernels.

Both are made when a class is first needed, or all at once for an artifact; what an artifact holds is not made again,
and neither a compiler nor Triton is imported then.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from llmopt.codegen.kernel import Kernel, RegionCode
from llmopt.codegen.sampling import REGION as SAMPLE
from llmopt.codegen.sampling import sampling_code
from llmopt.compiler.emittable import ATTENDS, WRITES
from llmopt.compiler.graph import target_name
from llmopt.compiler.program import Program
from llmopt.compiler.target import Target
from llmopt.runtime.loader import Regions

# decoding steps of at most so many tokens, each of a sequence of its own; then any other step
DECODE_SHAPES = ("1", "8", "16", "32", "64")
MANY = "many"
SHAPES = (*DECODE_SHAPES, MANY)


def decode_shape(rows: int) -> str:
    """The class of a decoding step of `rows` tokens, at most 64."""
    return next(s for s in DECODE_SHAPES if rows <= int(s))


class GpuCode:
    """Region code by (region, class) and cubins by kernel; `codes` and `cubins` are those an artifact holds."""

    def __init__(
        self,
        program: Program,
        target: Target,
        codes: Mapping[tuple[str, str], RegionCode] | None = None,
        cubins: Mapping[str, Any] | None = None,
    ) -> None:
        self.program, self.target = program, target
        self.codes: dict[tuple[str, str], RegionCode] = dict(codes or {})
        self.cubins: dict[str, Any] = dict(cubins or {})  # by Kernel.digest()
        self._handed_over: dict[str, dict[tuple[str, str], int]] = {}  # by class

    def names(self) -> list[str]:
        """The regions the step calls, in first-call order, and `sample`, which ends a decoding step."""
        called = [str(n.target) for n in self.program.graph("step").fx.nodes if n.op == "call_module"]
        return [*dict.fromkeys(called), SAMPLE]

    @functools.cached_property
    def decodes(self) -> bool:
        """Has a decoding step classes of its own, which graphs capture? Not where attention was left to torch, whose
        way depends on values: every step is of class many then."""
        step = self.program.graph("step")
        return not any(target_name(n) in ATTENDS | WRITES for n in step.calls())

    def keys(self, shapes: Iterable[str] = SHAPES) -> list[tuple[str, str]]:
        """(region, class) of all code there is for these classes; class many is sampled by torch."""
        classes = [shape for shape in shapes if self.decodes or shape == MANY]
        return [(name, shape) for shape in classes for name in self.names() if (name, shape) != (SAMPLE, MANY)]

    def code(self, name: str, shape: str) -> RegionCode:
        """The code of a region for a class of shapes."""
        key = name, shape
        if key not in self.codes:
            self.codes[key] = self._sampling() if name == SAMPLE else self._region(name, shape)
        return self.codes[key]

    def cubin(self, kernel: Kernel) -> Any:
        """The kernel compiled. Raises BuildError."""
        digest = kernel.digest()
        if digest not in self.cubins:
            self.compile([kernel])
        return self.cubins[digest]

    def prepare(self, shape: str) -> None:
        """Compile what a class needs, side by side."""
        self.compile(k for key in self.keys([shape]) for k in self.code(*key).kernels())

    def compile_all(self, progress: Callable[[str], None] = lambda stage: None) -> None:
        """Compile every region for every class of shapes (what an artifact holds)."""
        kernels = dict.fromkeys(k for key in self.keys() for k in self.code(*key).kernels())
        progress(f"compile {len(kernels)} kernels for {self.target.isa}")
        self.compile(kernels)

    def compile(self, kernels: Iterable[Kernel]) -> None:
        """Compile those of the kernels that are not, in parallel."""
        missing = {k.digest(): k for k in kernels if k.digest() not in self.cubins}
        if missing:
            from llmopt.codegen.cubin_parallel import compile_all

            made = compile_all(missing.values(), self.target)
            self.cubins.update((kernel.digest(), cubin) for kernel, cubin in made.items())

    def _region(self, name: str, shape: str) -> RegionCode:
        from llmopt.codegen.fused import region_code  # templates import Triton
        from llmopt.codegen.handed import of_region

        return region_code(self.program.graph(name), shape, self.target, of_region(self._handed(shape), name))

    def _handed(self, shape: str) -> dict[tuple[str, str], int]:
        """What regions hand over in an order that suits the next one, in a decoding step of this class."""
        if shape == MANY:
            return {}
        if shape not in self._handed_over:
            from llmopt.codegen.fused import region_code
            from llmopt.codegen.handed import handed_over

            plain = functools.cache(lambda name: region_code(self.program.graph(name), shape, self.target))
            found = handed_over(self.program.graph("step"), self.program.graph, plain, int(shape), self.target)
            self._handed_over[shape] = found
        return self._handed_over[shape]

    def _sampling(self) -> RegionCode:
        (logits,) = self.program.graph("step").outputs()
        dtype = str(logits.meta["val"].dtype).removeprefix("torch.")
        page = self.program.state[0].shape[1] if self.program.state else 1
        return sampling_code(self.program.facts.vocab_size, dtype, page, self.target)


def code_for(program: Program, target: Target) -> Regions | GpuCode:
    """What compiles the regions of a lowered program and keeps them: kernels where `fuse` has cut some, else C++."""
    return GpuCode(program, target) if has_kernels(program, target) else Regions(program)


def has_kernels(program: Program, target: Target) -> bool:
    """Has the step been cut into kernels for a GPU? Without Triton it has not, and torch runs it node by node."""
    return target.kind == "cuda" and any(n.op == "call_module" for n in program.graph("step").fx.nodes)
