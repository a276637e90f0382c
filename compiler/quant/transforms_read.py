"""Rotations that a checkpoint of compressed-tensors wants while the model runs: its `transform_config`.

Those of weights lie in the weights already. What a product reads or gives is turned by hooks on the empty model, which
capture sees. Of Hadamard matrices there remain two small factors, a `rotate`, and signs where rows or columns have any
that are no product (compressed-tensors' random ones: diag(s) H).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from llmopt.compiler import ops
from llmopt.compiler.errors import InputError
from llmopt.compiler.hadamard import WIDEST
from llmopt.compiler.program import safetensors_weight

if TYPE_CHECKING:
    from compressed_tensors.transform import TransformArgs, TransformScheme

PREFIX = "transform_"  # of the names of modules that turn
_PLACES = ("input", "output", "q_attn", "k_cache")  # where something is turned while the model runs
_KEYS = {"q_attn", "k_cache"}
_HADAMARD = ("hadamard", "random-hadamard")
_TYPES = (*_HADAMARD, "random-matrix")
_AGAIN = "use the checkpoint it was made from, with a recipe `rotate`"


def turn_activations(
    model: nn.Module, config: Mapping[str, Any], files: Mapping[str, Path], dtype: torch.dtype
) -> list[str]:
    """Hooks on `model`'s modules for what `transform_config` turns while it runs; what is to be said of it.

    Raises InputError: no config of compressed-tensors, a place that has no hook here, a matrix missing or of another
    size. Source: compressed_tensors.transform (its factories say which matrix, `apply_transform_weight` where).
    """
    from compressed_tensors.transform import TransformConfig

    try:
        groups = TransformConfig.model_validate(config).config_groups
    except ValueError as error:
        said = " ".join(str(error).split())
        raise InputError(
            f"transform_config is none that compressed-tensors reads ({said}); save the checkpoint again"
        ) from error
    notes: list[str] = []
    turns = _Turns(files, dtype)
    for name, scheme in groups.items():
        if scheme.type not in _TYPES:
            raise InputError(
                f"transform_config has {name} of type {scheme.type!r}, which is none of {', '.join(_TYPES)}; {_AGAIN}"
            )
        online = [apply for apply in scheme.apply if apply.is_online()]
        if left_out := _cancelling(scheme, online):
            notes.append(f"queries and keys are not turned by {name}: that changes none of their products")
        for apply in [apply for apply in online if apply not in left_out]:
            place = str(apply.location)
            for module_name, module in _matched(model, name, apply):
                if place not in ("input", "output") or not isinstance(module, nn.Linear):
                    raise InputError(
                        f"transform_config turns {place} of {module_name} ({type(module).__name__}) by {name} alone; "
                        f"wanted what linears read and give, or queries and keys by one Hadamard matrix; {_AGAIN}"
                    )
                width = module.in_features if place == "input" else module.out_features
                _hook(module, turns(name, module_name, scheme, apply, width), place)
    for number, turn in enumerate(turns.by_matrix.values()):
        model.add_module(f"{PREFIX}{number}", turn)  # so that its buffers have names
    return notes


def _matched(model: nn.Module, name: str, apply: TransformArgs) -> list[tuple[str, nn.Module]]:
    """Modules by name. Raises InputError: a pattern that is none, or there are none, and something would stay as it is
    that weights were made for otherwise."""
    from compressed_tensors.utils import match_named_modules

    try:
        found = list(match_named_modules(model, apply.targets, apply.ignore))
    except re.error as error:
        raise InputError(
            f"transform_config has a pattern that is none in {name} ({error}); mend its `targets` and `ignore`"
        ) from error
    if not found:
        raise InputError(
            f"transform_config turns {apply.location} of {', '.join(apply.targets) or 'nothing'} by {name}, and the "
            "model has no such module, while the weights were made for it; mend its `targets`, or save the checkpoint "
            "again"
        )
    return found


def _cancelling(scheme: TransformScheme, online: list[TransformArgs]) -> list[TransformArgs]:
    """Those of queries and keys where both are turned by the same orthogonal matrix: (q M) (k M)^T = q k^T."""
    found = [apply for apply in online if str(apply.location) in _KEYS]
    alike = len({(tuple(a.targets), tuple(a.ignore), a.inverse) for a in found}) == 1
    return found if alike and scheme.type in _HADAMARD and {str(a.location) for a in found} == _KEYS else []


def _hook(module: nn.Module, turn: Turn, place: str) -> None:
    if place == "input":
        # in the order of the config: what compressed-tensors registers later runs earlier
        module.register_forward_pre_hook(lambda _, given: turn(given[0]), prepend=True)
    else:
        module.register_forward_hook(lambda _, given, made: turn(made))


class _Turns:
    """The matrices of a checkpoint, each read once; equal ones are one module, so that equal products stay equal."""

    def __init__(self, files: Mapping[str, Path], dtype: torch.dtype) -> None:
        self.files, self.dtype = files, dtype
        self.by_name: dict[tuple[Any, ...], Turn] = {}
        self.by_matrix: dict[tuple[Any, ...], Turn] = {}

    def __call__(self, name: str, module: str, scheme: TransformScheme, apply: TransformArgs, width: int) -> Turn:
        """What turns a row of `width` elements of `module`."""
        size = width if scheme.head_dim is None else scheme.head_dim
        if size < 1 or width % size:
            raise InputError(
                f"transform_config turns {module} by blocks of {size}, which do not divide its {width}; save the "
                "checkpoint again"
            )
        hadamard, shape = scheme.type in _HADAMARD, (size, size)
        # all modules of a size share a matrix, which is saved once; those of other types have another for the inverse
        inverse = {str(place): {a.inverse for a in scheme.apply if a.location == place} for place in _PLACES}
        places = [place for place, found in inverse.items() if found and (hadamard or found == {apply.inverse})]
        stems = [f"{module}.{name}_{apply.location}", *(f".{name}_{place}" for place in places)]
        stored = self._stored(stems, "weight", shape)
        order = self._stored(stems, "perm", shape[:1]) if hadamard and scheme.randomize else ""
        made = stored is None and scheme.type == "hadamard" and not size & (size - 1)
        if order is None or (stored is None and not made):
            raise InputError(
                f"transform_config turns {module} by {name}, and the checkpoint has no {stems[0]}.weight of [{size}, "
                f"{size}]{f' or no .perm of [{size}]' * scheme.randomize}; save or download it again"
            )
        divisor = size**0.5 if hadamard else 1.0
        turned = hadamard and apply.inverse
        given = stored, order, turned, size, width
        if given not in self.by_name:
            matrix = self._matrix(stored, order, size, turned)
            content = hashlib.sha256(matrix.view(torch.uint8).numpy().data).hexdigest(), matrix.dtype, divisor, width
            if content not in self.by_matrix:
                self.by_matrix[content] = Turn(matrix, divisor, width, self.dtype)
            self.by_name[given] = self.by_matrix[content]
        return self.by_name[given]

    def _stored(self, stems: list[str], last: str, shape: tuple[int, ...]) -> str | None:
        """The first tensor of this shape whose name ends in one of `stems` and `last`."""
        named = (key for stem in stems for key in self.files if key.endswith(f"{stem}.{last}"))
        return next((key for key in named if safetensors_weight(self.files[key], key).shape == shape), None)

    def _matrix(self, stored: str | None, order: str, size: int, inverse: bool) -> Tensor:
        """[n, n] as stored: what blocks of n are multiplied by, Hadamard matrices times sqrt n."""
        from compressed_tensors.transform.utils.hadamard import deterministic_hadamard_matrix

        if stored is None:
            matrix = deterministic_hadamard_matrix(size, torch.float32)
        else:
            matrix = safetensors_weight(self.files[stored], stored).load()
        if not bool(matrix.float().isfinite().all()):
            raise InputError(f"matrix {stored} of the checkpoint has numbers that are not finite; download it again")
        if order:
            at = safetensors_weight(self.files[order], order).load()
            matrix = matrix[at][:, at]
        return (matrix.T if inverse else matrix).contiguous()


class Turn(nn.Module):
    """x M over blocks of a last axis of `width` elements.

    Buffers: `left` [a, a] and `right` [b, b] with M = diag(s) (left (x) right) diag(t), `before` and `after` s and t
    [width] where they are not ones; `whole` [n, n] of a matrix that is none.
    """

    left: Tensor
    right: Tensor
    whole: Tensor
    before: Tensor | None
    after: Tensor | None

    def __init__(self, matrix: Tensor, divisor: float, width: int, dtype: torch.dtype) -> None:
        """M is `matrix` [n, n] over `divisor`, for x in `dtype`."""
        super().__init__()
        exact = torch.float64 if dtype == torch.float64 else torch.float32
        plain = divisor == len(matrix) ** 0.5 and bool((matrix.abs() == 1).all())
        found = _factored(matrix.to(torch.int8)) if plain else None
        self.kind = "whole" if found is None else "factors"
        if found is None:
            self.register_buffer("whole", (matrix.double() / divisor).to(exact))
            return
        before, left, right, after = found
        for name, factor in (("left", left), ("right", right)):
            self.register_buffer(name, (factor.double() / len(factor) ** 0.5).to(exact))
        for name, signs in (("before", before), ("after", after)):
            tiled = signs.repeat(width // len(matrix)).to(dtype)
            self.register_buffer(name, None if bool((signs > 0).all()) else tiled)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., width] in its dtype."""
        if self.kind == "whole":
            blocks = x.to(self.whole.dtype).unflatten(-1, (-1, self.whole.shape[0]))
            return (blocks @ self.whole).flatten(-2).to(x.dtype)
        x = x if self.before is None else x * self.before
        made: Tensor = ops.rotate(x, self.left, self.right)
        return made if self.after is None else made * self.after


def _factored(signs: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
    """s [n], left [a, a], right [b, b], t [n] of a matrix [n, n] of +-1, all int8; None if there are none."""
    ones = torch.ones(len(signs), dtype=signs.dtype)
    rows, columns = signs[:, 0], signs[0]
    # signs of a product's rows or columns are a product again, so that its first ones may be taken for them
    for before, after in ((ones, ones), (rows, ones), (ones, columns), (rows * rows[0], columns)):
        plain = signs * before[:, None] * after
        for size in _rights(len(signs)):
            right = plain[:size, :size]
            left = plain[::size, ::size] * right[0, 0]
            if torch.equal(plain, torch.kron(left, right.contiguous())):
                return before, left, right, after
    return None


def _rights(size: int) -> list[int]:
    """Orders of a right factor such that kernels hold both, those nearest to the left one's first."""
    both = [(max(b, size // b), b) for b in range(1, WIDEST + 1) if size % b == 0 and size // b <= WIDEST]
    return [right for _, right in sorted(both)]
