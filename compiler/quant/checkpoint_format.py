"""Projects' formats of quantised weights in transformers checkpoints: what a writer of checkpoints asks of one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from llmopt.compiler.errors import InputError
from llmopt.compiler.quant.schemes import Scheme


@dataclass
class Contents:
    """What the configs of a checkpoint tell of it.

    `groups` are names of modules by (scheme, activations), `plain` those that stay as they are. `kv_cache`: each
    attention has scales of keys and values in fp8. `transforms` is a `transform_config`, of rotations that run in it.
    """

    groups: dict[tuple[str, str], list[str]] = field(default_factory=dict)
    plain: list[str] = field(default_factory=list)
    kv_cache: bool = False
    transforms: dict[str, Any] | None = None

    def __bool__(self) -> bool:
        return bool(self.groups or self.kv_cache or self.transforms)


@dataclass(frozen=True)
class CheckpointFormat:
    """A format by its name, and what it says of weights.

    `why_not(scheme, activations, columns)`: what of a weight cannot be said, and what can; None if all can be.
    `tensors(parts, scheme, columns)`: what a module keeps of its weight [N, columns], by the tensor's last name.
    `config(contents)`: `quantization_config` of config.json.
    `kv_scale`: the name, in an attention, of the scale of keys or values ({0} is k or v), of shape `kv_shape`.
    `rotates`: can it say that inputs of products are rotated in the model?
    `files(contents)`: what lies beside config.json, by name.
    """

    name: str
    why_not: Callable[[Scheme, str, int], str | None]
    tensors: Callable[[Mapping[str, Tensor], Scheme, int], dict[str, Tensor]]
    config: Callable[[Contents], dict[str, Any]]
    kv_scale: str
    kv_shape: tuple[int, ...]
    rotates: bool
    files: Callable[[Contents], dict[str, str]] = lambda contents: {}


def rows_of(parts: Mapping[str, Tensor], scheme: Scheme, first: int, count: int) -> dict[str, Tensor]:
    """The parts (`storage.PARTS`) of `count` rows of a weight. Raises InputError: a block of scales crosses an end."""
    if scheme.rows > 1 and (first % scheme.rows or count % scheme.rows):
        raise InputError(
            f"rows {first} to {first + count} cut through blocks of {scheme.rows} rows that share a scale; leave the "
            "weight out (`exclude`), or take a scheme with scales for each row, such as fp8_channel"
        )
    each = max(scheme.rows, 1)
    found = {"packed": parts["packed"][first : first + count]}
    for name in ("scales", "zero_points"):
        if name in parts:
            whole = parts[name]
            found[name] = whole if scheme.rows == 0 else whole[first // each : (first + count) // each]
    return found | {name: parts[name] for name in ("global_scale",) if name in parts}
