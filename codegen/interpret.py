"""Kernels run on tensors of the CPU by Triton's interpreter, program by program, to test what they compute."""

from __future__ import annotations

import os
from collections.abc import Sequence

from llmopt.codegen import hooks
from llmopt.codegen.kernel import Argument, Kernel, Launch
from llmopt.compiler.errors import BuildError

# constants that put instructions of the GPU into a kernel: waiting for the kernel ahead, and for its own products
_INSTRUCTIONS = frozenset({"PDL", "DRAIN"})


def launcher(kernel: Kernel) -> Launch:
    """What runs `kernel`: call it with a grid and the runtime arguments in order, tensors on the CPU.

    Raises BuildError unless the process was started with TRITON_INTERPRET=1, which Triton reads at import.
    """
    if os.environ.get("TRITON_INTERPRET") != "1":
        raise BuildError("kernels are interpreted only in a process started with TRITON_INTERPRET=1, and it is not set")
    function = hooks.function(kernel)
    if type(function).__name__ != "InterpretedFunction":
        raise BuildError(
            f"template {kernel.template} was imported before TRITON_INTERPRET was set; set it before python starts"
        )
    fixed = hooks.constants(kernel)
    fixed |= dict.fromkeys(_INSTRUCTIONS & fixed.keys(), False)
    names = [name for name, _ in kernel.types]

    def launch(grid: tuple[int, ...], args: Sequence[Argument]) -> None:
        if len(args) != len(names):
            raise BuildError(
                f"kernel {kernel.template} takes {len(names)} arguments ({', '.join(names)}), got {len(args)}"
            )
        if all(grid):
            function[grid](**dict(zip(names, args, strict=True)), **fixed)

    return launch
