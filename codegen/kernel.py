"""What codegen hands to the runtime, as plain data: kernels to compile, calls of them, the code of a region.

Everything here can be written to JSON and read back, so that a machine without a GPU compiles and another one runs.
Sizes are ints or text: arithmetic on the names of `SIZES`, whose values are known when a step is planned.
"""

from __future__ import annotations

import ast
import hashlib
import json
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from llmopt.compiler.errors import BuildError

Scalar = bool | int | float | str | None
Size = int | str

# a runtime argument, and what launches one kernel: grid, arguments in the order of `Kernel.types`
Argument = Tensor | int | float | None
Launch = Callable[[tuple[int, ...], Sequence[Argument]], None]

# tokens, rows of logits, sequences (rows of the block table), width of the block table, query tiles, parts a
# sequence's keys are split into
SIZES = ("N", "R", "S", "M", "T", "SPLITS")
# two kinds of steps of class many: whole prompts, long enough for torch's attention over themselves; and any other
WHEN = FRESH, PAGED = "fresh", "paged"


@dataclass(frozen=True)
class Kernel:
    """One Triton kernel: a template, the types of its runtime arguments, its constants, hooks and launch options.

    `template` is `module:function` below `llmopt.codegen.templates`; `types` are (parameter, type) in the template's
    order, a type being `*bf16` (16-byte aligned), `i32`, ...; every other parameter is in `constants` or, as the name
    of a function of `source`, in `hooks`, or has a default. `pdl`: launched so that it may start before the kernel
    ahead has ended.
    """

    template: str
    types: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Scalar], ...] = ()
    hooks: tuple[tuple[str, str], ...] = ()
    source: str = ""
    num_warps: int = 4
    num_stages: int = 1
    pdl: bool = False

    def digest(self) -> str:
        """20 hex digits over everything said here (not over the template's own text)."""
        return hashlib.sha256(json.dumps(self.to_data(), sort_keys=True).encode()).hexdigest()[:20]

    def to_data(self) -> dict[str, Any]:
        """JSON types only; `from_data` reads it back."""
        return {
            "template": self.template,
            "types": [list(t) for t in self.types],
            "constants": [list(c) for c in self.constants],
            "hooks": [list(h) for h in self.hooks],
            "source": self.source,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "pdl": self.pdl,
        }

    @classmethod
    def from_data(cls, data: Mapping[str, Any]) -> Kernel:
        """Read `to_data`'s form."""
        pairs: dict[str, Any] = {k: tuple(tuple(p) for p in data[k]) for k in ("types", "constants", "hooks")}
        rest = {k: data[k] for k in ("template", "source", "num_warps", "num_stages", "pdl")}
        return cls(**pairs, **rest)


# what makes a kernel ready to launch: runtime.cuda on a GPU, codegen.interpret on a CPU
Launcher = Callable[[Kernel], Launch]


@dataclass(frozen=True)
class Buffer:
    """A tensor that a region makes: `shape` of sizes, `dtype` a torch name. `kept`: zeroed once and then kept from
    call to call (tickets, which a kernel leaves at zero again). `over`: an output that may be written over this input,
    where nothing reads the input afterwards."""

    shape: tuple[Size, ...]
    dtype: str
    kept: bool = False
    over: str | None = None

    def to_data(self) -> dict[str, Any]:
        """JSON types only; `from_data` reads it back."""
        return {"shape": list(self.shape), "dtype": self.dtype, "kept": self.kept, "over": self.over}

    @classmethod
    def from_data(cls, data: Mapping[str, Any]) -> Buffer:
        """Read `to_data`'s form."""
        return cls(tuple(data["shape"]), data["dtype"], data["kept"], data["over"])


@dataclass(frozen=True)
class Prepared:
    """A weight in another form, made of some inputs once and kept with them: `form` (of `runtime.prepared`) called with
    these `args` (inputs, None for no tensor) and `constants`; calls name its results `prepared0.words`, ..."""

    form: str
    args: tuple[str | None, ...]
    constants: tuple[tuple[str, Scalar], ...]
    results: tuple[str, ...]

    def to_data(self) -> dict[str, Any]:
        """JSON types only; `from_data` reads it back."""
        constants = [list(c) for c in self.constants]
        return {"form": self.form, "args": list(self.args), "constants": constants, "results": list(self.results)}

    @classmethod
    def from_data(cls, data: Mapping[str, Any]) -> Prepared:
        """Read `to_data`'s form."""
        constants = tuple((name, value) for name, value in data["constants"])
        return cls(data["form"], tuple(data["args"]), constants, tuple(data["results"]))


@dataclass(frozen=True)
class Call:
    """One launch: a kernel over a grid, or one of torch's own ops (`op`, such as `linear`, with its `constants`).

    `args` are the runtime arguments in order: `in0` (a region input), `out0`, `tmp0`, `prepared0.words`, `tiles`,
    `layout`, or a size; None for no tensor. An op writes its last argument, or gives a tensor that takes its place.
    `when`: one of `WHEN`, the only steps of class many with this call; None for every step.
    """

    args: tuple[Size | None, ...]
    kernel: Kernel | None = None
    grid: tuple[Size, ...] = (1,)
    op: str | None = None
    constants: tuple[tuple[str, Scalar], ...] = ()
    when: str | None = None

    def to_data(self) -> dict[str, Any]:
        """JSON types only, the kernel by its digest; `from_data` reads it back."""
        kernel = None if self.kernel is None else self.kernel.digest()
        rest = {"constants": [list(c) for c in self.constants], "when": self.when}
        return {"args": list(self.args), "kernel": kernel, "grid": list(self.grid), "op": self.op, **rest}

    @classmethod
    def from_data(cls, data: Mapping[str, Any], kernels: Mapping[str, Kernel]) -> Call:
        """Read `to_data`'s form; `kernels` by digest. Raises KeyError: a kernel is not among them."""
        kernel = None if data["kernel"] is None else kernels[data["kernel"]]
        constants = tuple((name, value) for name, value in data["constants"])
        return cls(tuple(data["args"]), kernel, tuple(data["grid"]), data["op"], constants, data["when"])


@dataclass(frozen=True)
class RegionCode:
    """The code of a region for one class of shapes: calls in order, over inputs, outputs and temporaries.

    An output is a Buffer, or the name of the input or temporary it is (a view of its shape). `notes` say what one
    kernel was meant to do and does not, and why.
    """

    calls: tuple[Call, ...]
    outputs: tuple[Buffer | str, ...]
    temporaries: tuple[Buffer, ...] = ()
    notes: tuple[str, ...] = ()
    prepared: tuple[Prepared, ...] = ()

    def kernels(self) -> tuple[Kernel, ...]:
        """The kernels called, each once."""
        return tuple(dict.fromkeys(c.kernel for c in self.calls if c.kernel is not None))

    def to_data(self) -> dict[str, Any]:
        """JSON types only, kernels by their digests; `from_data` reads it back."""
        return {
            "calls": [c.to_data() for c in self.calls],
            "outputs": [o if isinstance(o, str) else o.to_data() for o in self.outputs],
            "temporaries": [t.to_data() for t in self.temporaries],
            "notes": list(self.notes),
            "prepared": [p.to_data() for p in self.prepared],
        }

    @classmethod
    def from_data(cls, data: Mapping[str, Any], kernels: Mapping[str, Kernel]) -> RegionCode:
        """Read `to_data`'s form; `kernels` by digest. Raises KeyError: a kernel is not among them."""
        calls = tuple(Call.from_data(c, kernels) for c in data["calls"])
        outputs = tuple(o if isinstance(o, str) else Buffer.from_data(o) for o in data["outputs"])
        temporaries = tuple(Buffer.from_data(t) for t in data["temporaries"])
        prepared = tuple(Prepared.from_data(p) for p in data["prepared"])
        return cls(calls, outputs, temporaries, tuple(data["notes"]), prepared)


_BINARY: dict[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}  # fmt: skip


def evaluate(size: Size, sizes: Mapping[str, int]) -> int:
    """The value of a size: ints, names of `SIZES`, + - * // % and cdiv(a, b)."""
    return size if isinstance(size, int) else _value(ast.parse(size, mode="eval").body, sizes)


def _value(node: ast.expr, sizes: Mapping[str, int]) -> int:
    if isinstance(node, ast.Constant) and isinstance(node.value, int):
        return node.value
    if isinstance(node, ast.Name) and node.id in sizes:
        return sizes[node.id]
    if isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
        return _BINARY[type(node.op)](_value(node.left, sizes), _value(node.right, sizes))
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "cdiv":
        a, b = (_value(arg, sizes) for arg in node.args)
        return -(-a // b)
    raise BuildError(f"size {ast.unparse(node)!r} is no arithmetic on {', '.join(sizes)}; wanted + - * // % and cdiv")
