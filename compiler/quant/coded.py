"""Weights that a checkpoint holds in codes: what is the same whichever format they are in.

A format's reader says which scheme a module's weight is in, and how each part of it (`storage.PARTS`) is made of the
module's tensors. Those are read when asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from llmopt.compiler.errors import InputError
from llmopt.compiler.program import Coded, Weight
from llmopt.compiler.quant.quantize import dequantize
from llmopt.compiler.quant.schemes import Scheme
from llmopt.compiler.quant.storage import PARTS, types_of


def by_module(names: Iterable[str]) -> dict[str, dict[str, str]]:
    """Names of tensors by the module they belong to and their last name."""
    found: dict[str, dict[str, str]] = {}
    for name in names:
        module, _, last = name.rpartition(".")
        found.setdefault(module, {})[last] = name
    return found


def kept(
    name: str,
    scheme: Scheme,
    activations: str,
    shape: tuple[int, int],
    dtype: torch.dtype,
    readers: Mapping[str, Callable[[], Tensor]],
    notes: Sequence[str],
) -> tuple[Weight, Coded]:
    """What the weight [N, K] of module `name` stands for, in `dtype`, and its codes; `readers` make its parts.

    Reading raises InputError where a tensor is missing or is not what the scheme and the model say.
    """
    parts = {}
    for part, (size, kind) in types_of(scheme, *shape).items():
        parts[part] = Weight(
            size, kind, _checked(name, part, readers[part], size, kind), f"{scheme.name} {part} of {name}"
        )
    shared = float(parts["global_scale"].load()) if scheme.has_global else None
    coded = Coded(scheme.name, activations, shared, parts, tuple(notes))
    return Weight(shape, dtype, partial(_decoded, parts, scheme, shape[1], dtype), f"{name} of codes"), coded


def _checked(
    name: str, part: str, read: Callable[[], Tensor], shape: tuple[int, ...], dtype: torch.dtype
) -> Callable[[], Tensor]:
    def load() -> Tensor:
        try:
            made = read()
        except KeyError as error:
            raise InputError(
                f"module {name}: the checkpoint has no {error.args[0]}, which its quantization_config asks for; "
                "save or download it again"
            ) from error
        if tuple(made.shape) != shape or made.dtype != dtype:
            raise InputError(
                f"module {name}: {part} of the checkpoint are {made.dtype} {tuple(made.shape)}; wanted {dtype} {shape} "
                "as its quantization_config and the model say; the two belong to different models, save it again"
            )
        return made

    return load


def _decoded(parts: Mapping[str, Weight], scheme: Scheme, columns: int, dtype: torch.dtype) -> Tensor:
    packed, scales, shared, zeros = (parts[part].load() if part in parts else None for part in PARTS)
    assert packed is not None
    assert scales is not None
    return dequantize(packed, scales, shared, zeros, scheme, columns, dtype)
