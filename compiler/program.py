"""Program: named graphs, the weights and state they use, and the facts of the model they came from.

Weights are lazy: a `Weight` knows its shape and dtype and how to read itself, and a `Fold` makes a new weight from
others when it is read, so a model is never held twice. Structure work needs no weight data at all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from llmopt.compiler.errors import InputError
from llmopt.compiler.graph import Graph

NOT_KEPT = "not kept"  # the note of a weight that an artifact knows by name, shape and dtype only
JOINED = "concat"  # the label of a Fold of weights one below another


@dataclass(frozen=True)
class Weight:
    """A tensor that is read when asked for. `load()` returns it on the CPU with this shape and dtype.

    `inputs` are the weights it is made of, if it is not a checkpoint's own.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[], Tensor]
    note: str = ""
    inputs: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        count = 1
        for size in self.shape:
            count *= size
        return count * self.dtype.itemsize


@dataclass(frozen=True)
class Coded:
    """What a checkpoint holds of a weight in codes: `parts` as `quant.storage` names them, in `scheme`.

    `activations` is the scheme that what it multiplies is rounded to, `shared` a global scale. Without a scheme there
    are no codes here, and `notes` say why.
    """

    scheme: str
    activations: str
    shared: float | None
    parts: Mapping[str, Weight]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Fold:
    """An edit of weights: `name` = `fn(*inputs)`, computed when `name` is read.

    `shape` and `dtype` are those of the result; `label` is what reports print ("concat", "transpose").
    """

    name: str
    inputs: tuple[str, ...]
    fn: Callable[..., Tensor]
    shape: tuple[int, ...]
    dtype: torch.dtype
    label: str


def tensor_weight(tensor: Tensor, note: str = "in memory") -> Weight:
    """A weight that is already in memory (the tensor itself, not a copy)."""
    return Weight(tuple(tensor.shape), tensor.dtype, lambda: tensor.detach(), note)


def open_safetensors(path: Path) -> Any:
    """A safetensors file open for reading. Raises InputError if it is damaged."""
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise InputError(f"file {str(path)!r} cannot be read: {error}; download or save it again") from error


def safetensors_weight(path: Path, key: str, dtype: torch.dtype | None = None) -> Weight:
    """The tensor `key` of a safetensors file, read on demand and cast to `dtype` if given."""
    with open_safetensors(path) as file:
        part = file.get_slice(key)
        shape, stored = tuple(part.get_shape()), STORED_DTYPES[part.get_dtype()]

    def load() -> Tensor:
        with safe_open(path, framework="pt") as file:
            return file.get_tensor(key).to(wanted)

    wanted = dtype if dtype is not None and stored.is_floating_point else stored
    return Weight(shape, wanted, load, f"{path.name}:{key}")


# safetensors' names
STORED_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip


@dataclass(frozen=True)
class StateSpec:
    """One paged state tensor: [num_pages, *shape], shape = (Hkv, page_size, D)."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes_per_page(self) -> int:
        """Bytes one page of this tensor takes."""
        count = 1
        for size in self.shape:
            count *= size
        return count * self.dtype.itemsize


@dataclass(frozen=True)
class ModelFacts:
    """What the runtime must know of the model besides its graph."""

    name: str
    vocab_size: int
    context_length: int
    eos_token_ids: tuple[int, ...] = ()
    dtype: torch.dtype = torch.float32
    tokenizer: str | None = None  # folder or hub id with tokenizer files
    config: str | None = None  # transformers' config.json, of a transformers model


@dataclass
class Program:
    """Everything a compiled model is made of, before and after each pass.

    `near_pages`: how many pages a sequence has beside those of its tokens, at the end of its block table
    (`compiler.quant.near`). `neutral`: of norms' weights that were folded into products, the number that makes such a
    norm do nothing but normalise. `coded`: the weights that the checkpoint holds in codes, which `weights` has decoded.
    """

    graphs: dict[str, Graph]
    weights: dict[str, Weight]
    facts: ModelFacts
    state: tuple[StateSpec, ...] = ()
    properties: frozenset[str] = frozenset()
    choices: dict[str, Any] = field(default_factory=dict)
    near_pages: int = 0
    neutral: dict[str, float] = field(default_factory=dict)
    coded: dict[str, Coded] = field(default_factory=dict)

    def graph(self, name: str) -> Graph:
        """The graph of this name; an error that lists the names there are."""
        if name not in self.graphs:
            raise InputError(f"program has no graph {name!r}; it has {', '.join(sorted(self.graphs))}")
        return self.graphs[name]

    def fold(self, edit: Fold) -> None:
        """Add the weight that `edit` describes (its inputs must exist)."""
        sources = [self.weights[n] for n in edit.inputs]
        fn = edit.fn
        note = f"{edit.label}({', '.join(edit.inputs)})"
        self.weights[edit.name] = Weight(
            edit.shape, edit.dtype, lambda: fn(*(s.load() for s in sources)), note, edit.inputs
        )

    def origins(self, name: str) -> list[str]:
        """The checkpoint's weights that a weight is made of, in order; itself if it is one."""
        inputs = self.weights[name].inputs
        return [origin for source in inputs for origin in self.origins(source)] if inputs else [name]

    def is_joined(self, name: str) -> bool:
        """Is a weight one of the checkpoint's, or several of them one below another?"""
        weight = self.weights[name]
        return not weight.inputs or weight.note == f"{JOINED}({', '.join(weight.inputs)})"

    def same_codes(self, name: str) -> Any:
        """What weights have in common whose codes can be joined; None of a weight without codes."""
        coded = self.coded.get(name)
        return None if coded is None else (coded.scheme, coded.activations, coded.shared)

    def used_weights(self) -> Mapping[str, Weight]:
        """The weights some graph still reads, in first-use order."""
        used: dict[str, Weight] = {}
        for graph in self.graphs.values():
            for name in graph.weights():
                used[name] = self.weights[name]
        return used

    def copy(self) -> Program:
        """A copy whose graphs can be edited without touching this one (weights stay shared)."""
        return replace(
            self,
            graphs={k: g.copy() for k, g in self.graphs.items()},
            weights=dict(self.weights),
            choices=dict(self.choices),
            neutral=dict(self.neutral),
            coded=dict(self.coded),
        )
