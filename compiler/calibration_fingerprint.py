"""What tells one model's weights from another's, without reading more of them than that takes.

Statistics belong to the weights they were gathered with: a fine-tune, or the same architecture from another seed, has
names and shapes in common and nothing else.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from llmopt.compiler.program import NOT_KEPT, Program, Weight

PIECES, LENGTH = 256, 64  # elements that are looked at: so many pieces, evenly over the tensor, of so many each
_COMPUTED = "computed from the config"  # such as RoPE's frequencies: on another CPU, the last bits may be others


@dataclass(frozen=True)
class Fingerprint:
    """Of a program's weights: `shapes` by name as the program reads them, and for each weight of the checkpoint that
    they are made of, in `values`, its dtype (torch's name) and the digest of its values.

    The dtype is there for messages alone. A bfloat16 checkpoint read as float32 has the same values and digests.
    """

    shapes: Mapping[str, tuple[int, ...]]
    values: Mapping[str, tuple[str, str]]

    @property
    def digest(self) -> str:
        """SHA-256 of all of it but the dtypes."""
        facts = [
            sorted((n, list(s)) for n, s in self.shapes.items()),
            sorted((n, d) for n, (_, d) in self.values.items()),
        ]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def difference(self, wanted: Fingerprint) -> str | None:
        """How the weights of `self`, the ones seen, are not those of `wanted`; None where they are."""
        for name in [*wanted.shapes, *self.shapes]:
            there, here = wanted.shapes.get(name), self.shapes.get(name)
            if there is None or here is None:
                return f"the weight {name!r} is {'one too many' if there is None else 'wanted and not there'}"
            if there != here:
                return f"the weight {name!r} has shape {list(here)}, wanted {list(there)}"
        other = [n for n in wanted.values if (n not in self.values) or self.values[n][1] != wanted.values[n][1]]
        other += [n for n in self.values if n not in wanted.values]
        if not other:
            return None
        name = other[0]
        (kind, seen), (wanted_kind, digest) = (f.values.get(name, ("nothing", "none")) for f in (self, wanted))
        read = "" if kind == wanted_kind else f" ({kind} seen, {wanted_kind} wanted)"
        count = len(self.values.keys() | wanted.values.keys())
        return f"{len(other)} of {count} weights hold other values{read}, {name!r} {seen[:12]}, wanted {digest[:12]}"


def fingerprint_of(program: Program) -> Fingerprint:
    """The fingerprint of the weights that a program reads now.

    Each weight of the checkpoint is loaded once and let go, and nothing is computed from them (as merged q, k, v are).
    All of a weight is looked at up to 16,384 elements, and of a larger one 256 pieces of 64 elements evenly over it.
    What a fine-tune or an adapter changes, it changes everywhere, and is seen; a change of 2 % of a weight's rows goes
    unseen in one weight of 170.

    The cost on one core (AMD EPYC), with torch 2.13: 0.04 s for the 75 weights of small-llama-28m, 0.03 s for a GB of
    weights of 128 MiB in files that are mapped and in memory already (nothing but the pieces is touched), 1.5 s for a
    GB of bfloat16 that is cast to float32. From a cold disk the system reads ahead, at worst all of the file once, as
    the first window does anyway.
    """
    used = program.used_weights()
    origins = dict.fromkeys(origin for name in used for origin in _held(program, name))
    values = {name: _of_values(program.weights[name]) for name in origins}
    return Fingerprint({name: tuple(weight.shape) for name, weight in used.items()}, values)


def _held(program: Program, name: str) -> list[str]:
    """The checkpoint's weights that a weight is made of; itself where they are known by shape only (an artifact's)."""
    origins = program.origins(name)
    return [name] if any(program.weights[origin].note == NOT_KEPT for origin in origins) else origins


def _of_values(weight: Weight) -> tuple[str, str]:
    """The dtype and the digest of a weight."""
    tensor = weight.load().detach()
    seen = _sample(tensor).cpu()
    if weight.note == _COMPUTED and seen.is_floating_point():
        seen = seen.to(torch.bfloat16)
    wide = torch.complex128 if seen.is_complex() else torch.float64 if seen.is_floating_point() else torch.int64
    content = seen.to(wide).contiguous().numpy().data
    return str(tensor.dtype).removeprefix("torch."), hashlib.sha256(content).hexdigest()


def _sample(tensor: Tensor) -> Tensor:
    """The elements that are looked at, by their places alone: neither strides nor dtype matter, nothing is copied but
    these.
    """
    count = tensor.numel()
    if count <= PIECES * LENGTH:
        return tensor
    device = tensor.device
    starts = torch.arange(PIECES, device=device) * (count - LENGTH) // (PIECES - 1)
    places = (starts[:, None] + torch.arange(LENGTH, device=device)).reshape(-1)
    return tensor[torch.unravel_index(places, tensor.shape)]
