"""The sums of a group of values while windows are read: how they grow, and how they are kept when a run stops."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, fx
from torch.nn.functional import scaled_dot_product_attention

from llmopt.compiler import ops
from llmopt.compiler.calibration_file import LazyTensor, StoredTensors, format_of, read_metadata, write_tensors
from llmopt.compiler.calibration_statistics import UNFINISHED, Origin
from llmopt.compiler.errors import InputError
from llmopt.compiler.evaluate import evaluated
from llmopt.compiler.program import Program, Weight

if TYPE_CHECKING:
    from llmopt.compiler.calibration import Settings

_BLOCK = 1024  # rows of X^T X at once
_LARGEST = 1e16  # squares of more would leave fp32


class Sums:
    """X^T X, or its diagonal, in fp64 and the largest magnitudes of the values of `nodes`, [..., columns] each.

    Of X^T X only blocks on and above the diagonal are computed. Nothing is allocated before `clear`.
    """

    def __init__(
        self, nodes: Sequence[fx.Node], columns: int, second_moments: bool, products: torch.dtype, device: str
    ) -> None:
        self.nodes, self.columns, self.products, self.device = nodes, columns, products, device
        self.kind = "second" if second_moments else "diagonal"
        self.shape = (columns, columns) if second_moments else (columns,)
        self.tokens = 0
        self.state: dict[str, Tensor] = {}

    @property
    def nbytes(self) -> int:
        """What the sums take."""
        return 8 * torch.Size(self.shape).numel() + 4 * self.columns

    def clear(self) -> None:
        """Begin with nothing."""
        self.tokens = 0
        self.state = {
            self.kind: torch.zeros(self.shape, dtype=torch.float64, device=self.device),
            "amax": torch.zeros(self.columns, dtype=torch.float32, device=self.device),
        }

    def free(self) -> None:
        """Give the memory back; the count stays."""
        self.state = {}

    def add(self, value: Tensor) -> bool:
        """Count the rows of a value; False if it is not finite (or so large that a square is not)."""
        rows = value.detach().reshape(-1, self.columns)
        largest = rows.abs().amax(0).float()
        if not bool((largest < _LARGEST).all()):
            return False
        torch.maximum(self.state["amax"], largest, out=self.state["amax"])
        self.tokens += rows.shape[0]
        rows = rows.to(self.products)
        total = self.state[self.kind]
        if self.kind == "diagonal":
            total += rows.square().sum(0)
            return True
        for start in range(0, self.columns, _BLOCK):
            left = rows[:, start : start + _BLOCK].T
            band = total[start : start + _BLOCK, start:]
            if self.products is torch.float64:
                band.addmm_(left, rows[:, start:])
            else:
                band += left @ rows[:, start:]
        return True


def symmetric(upper: Tensor) -> Tensor:
    """fp32 [K, K], exactly symmetric, of fp64 sums that are valid on and above the diagonal."""
    made = torch.empty(upper.shape, dtype=torch.float32)
    for start in range(0, len(upper), _BLOCK):
        end = start + _BLOCK
        made[start:end, end:] = upper[start:end, end:]
        made[end:, start:end] = upper[start:end, end:].T
        corner = upper[start:end, start:end].triu()
        made[start:end, start:end] = corner + corner.triu(1).T
    return made


def _attention(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, scale: float, window: int, softcap: float
) -> Tensor:
    """The op's meaning without its scores [T, T] in memory, where torch has that."""
    if sinks is not None or softcap > 0 or 0 < window < q.shape[2]:
        return ops.attention(q, k, v, sinks, scale, window, softcap)  # type: ignore[no-any-return]
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    return scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)


FASTER = {ops.attention.overload: _attention}


class Part:
    """The sums that one reading of all windows fills, by key."""

    def __init__(self, sums: Mapping[str, Sums], origin: Origin) -> None:
        self.sums, self.origin = sums, origin
        self.file: Path | None = None
        self.done = 0  # windows

    @property
    def nbytes(self) -> int:
        """What all sums take."""
        return sum(s.nbytes for s in self.sums.values())

    def open(self, file: Path | None) -> list[str]:
        """Make room, and go on from what the file holds of this very run. Returns what the report should say."""
        self.file = file
        self._clear()
        if file is None or not file.is_file():
            return []
        try:
            against = self._resume(file)
        except InputError:
            against = "is damaged"  # and may have been restored in part
            self._clear()
        return [f"{file.name} {against}: begun anew" if against else f"went on after {self.done} windows"]

    def _clear(self) -> None:
        self.done = 0
        for sums in self.sums.values():
            sums.clear()

    def _resume(self, file: Path) -> str | None:
        """Read the sums; or say why they are no beginning of these. Raises InputError if the file is damaged."""
        made = unfinished(file)
        if made is None:
            return "is of another run"
        if difference := made.difference(self.origin):
            return f"is of another run ({difference})"
        meta = read_metadata(file)
        if list(meta["tokens"]) != list(self.sums):
            return "sums up other values, as the bound of memory was another"
        self._restore(StoredTensors(file), meta["tokens"])
        self.done = meta["done"]
        return None

    def _restore(self, stored: Mapping[str, Tensor], tokens: Mapping[str, int]) -> None:
        for key, sums in self.sums.items():
            for kind, tensor in sums.state.items():
                tensor.copy_(stored[f"{key}.{kind}"])
            sums.tokens = tokens[key]

    def run(
        self, program: Program, windows: Sequence[Tensor], settings: Settings, tell: Callable[[str, int], None]
    ) -> None:
        """Read the windows that are left; `tell(name, done)` counts values of windows."""
        cache: dict[str, Tensor] | None = None
        weights = {n: _placed(w, settings.device) for n, w in program.used_weights().items()}
        if self.nbytes + sum(w.nbytes for w in weights.values()) <= settings.memory:
            cache = {}
        while self.done < len(windows):
            self._window(program, weights, windows[self.done], cache, tell)
            self.done += 1
            if self.file is not None and (self.done % settings.every == 0 or self.done == len(windows)):
                self._write(self.file)

    def _window(
        self,
        program: Program,
        weights: Mapping[str, Weight],
        ids: Tensor,
        cache: dict[str, Tensor] | None,
        tell: Callable[[str, int], None],
    ) -> None:
        watchers: dict[fx.Node, list[str]] = {}
        for key, sums in self.sums.items():
            for node in sums.nodes:
                watchers.setdefault(node, []).append(key)
        device = next(iter(self.sums.values())).device
        inputs = {"input_ids": ids[None].to(device), "position_ids": torch.arange(len(ids), device=device)[None]}
        left = {key: len(sums.nodes) for key, sums in self.sums.items()}
        done = self.done * len(self.sums)
        for node, value in evaluated(
            program.graph("forward"), inputs, weights, list(watchers), cache, torch.device(device), FASTER
        ):
            for key in watchers.get(node, ()):
                if not self.sums[key].add(value):
                    raise InputError(
                        f"calibration: the value that {key!r} reads is not finite (or beyond {_LARGEST:g}) in window "
                        f"{self.done} of the tokens; calibrate in another dtype, or look for NaN in the weights"
                    )
                left[key] -= 1
                if left[key] == 0:
                    done += 1
                    tell(key, done)

    def _write(self, file: Path) -> None:
        tensors = {
            f"{key}.{kind}": LazyTensor(tuple(tensor.shape), tensor.dtype, partial(Tensor.cpu, tensor))
            for key, sums in self.sums.items()
            for kind, tensor in sums.state.items()
        }
        tokens = {key: sums.tokens for key, sums in self.sums.items()}
        write_tensors(file, UNFINISHED, {"origin": self.origin.to_json(), "done": self.done, "tokens": tokens}, tensors)

    def close(self) -> None:
        """Give the memory back: all is in the file."""
        for sums in self.sums.values():
            sums.free()

    def results(self) -> dict[str, LazyTensor]:
        """What statistics hold, fp32, made of the sums or of their file when asked for."""
        stored = StoredTensors(self.file) if self.file is not None else None
        return {
            f"{key}.{kind}": LazyTensor(
                sums.shape if kind != "amax" else (sums.columns,),
                torch.float32,
                partial(_result, stored, sums, key, kind),
            )
            for key, sums in self.sums.items()
            for kind in (sums.kind, "amax")
        }


def unfinished(file: Path) -> Origin | None:
    """What the sums in a file were to be made of; None for another file. Raises InputError if it is damaged."""
    return Origin.from_json(read_metadata(file)["origin"]) if format_of(file) == UNFINISHED else None


def _result(stored: Mapping[str, Tensor] | None, sums: Sums, key: str, kind: str) -> Tensor:
    tensor = sums.state.pop(kind).cpu() if stored is None else stored[f"{key}.{kind}"]
    return symmetric(tensor) if kind == "second" else tensor.float()


def _placed(weight: Weight, device: str) -> Weight:
    return weight if device == "cpu" else replace(weight, load=lambda: weight.load().to(device))
