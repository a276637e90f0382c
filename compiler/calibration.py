"""Calibration: one run of a program over some tokens, whose statistics serve every pass that needs data.

    statistics = calibrate(program, "tokens.safetensors", path="model-statistics.safetensors")
    hessian = statistics.second_moment("model.layers.0.mlp.down_proj.weight")

`forward` is run node by node over windows of tokens, and the inputs of its linears are summed up as they pass: X^T X
(or its diagonal) and the largest magnitude of each channel. A value that several linears read is summed once. Memory is
that of one window's activations, of the sums, and of the weights where there is room. Where the sums of all values
exceed the bound, the windows are read several times, for one group of values after the other.

With a path, work in progress is kept beside it (`<path>.part0`, ...): a run that was stopped goes on where it was, with
the same result bit for bit.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from llmopt.compiler import plain
from llmopt.compiler.calibration_data import Chosen, Encode, TokenSource, choose_windows, digest_of
from llmopt.compiler.calibration_file import LazyTensor, StoredTensors
from llmopt.compiler.calibration_fingerprint import fingerprint_of
from llmopt.compiler.calibration_run import Part, Sums, unfinished
from llmopt.compiler.calibration_statistics import Entry, Origin, Statistics, is_statistics, other_model
from llmopt.compiler.errors import InputError
from llmopt.compiler.graph import Graph
from llmopt.compiler.program import Program

Progress = Callable[[str, int, int], None]
Values = Mapping[str, Sequence[fx.Node]]
MIB, GIB = 1 << 20, 1 << 30


@dataclass(frozen=True)
class Settings:
    """How to calibrate.

    `window` tokens are read at once (never more than the model's context), `tokens` at most in all (None: all there
    are). `second_moments=False` keeps diagonals only, for what needs no more. Products of a window are formed in
    `products` precision, "float64" or "float32"; "auto" takes fp64 up to K = 4096 and fp32 above, and sums over windows
    are fp64 always. `memory` bounds the sums held at once, in bytes. `every` so many windows the work is written down,
    if there is a path for it. `device` is where all is computed: "cpu", or "cuda" where there is a GPU. Raises
    InputError.
    """

    window: int = 2048
    tokens: int | None = 131_072
    second_moments: bool = True
    products: str = "auto"
    memory: int = 8 * GIB
    every: int = 16
    device: str = "cpu"

    def __post_init__(self) -> None:
        for name in ("window", "tokens", "memory", "every"):
            value = getattr(self, name)
            if not (plain.is_int(value) and value >= 1) and not (name == "tokens" and value is None):
                raise InputError(f"calibration: {name} is {value!r}, wanted a whole number >= 1")
        if self.products not in ("auto", "float64", "float32"):
            raise InputError(f"calibration: products is {self.products!r}, wanted auto, float64 or float32")
        _check_device(self.device)

    def precision(self, columns: int) -> torch.dtype:
        """What X^T X of one window is computed in."""
        choice = self.products if self.products != "auto" else "float64" if columns <= 4096 else "float32"
        return torch.float64 if choice == "float64" else torch.float32


def _check_device(name: str) -> None:
    device = None
    with contextlib.suppress(RuntimeError, TypeError):  # of what torch does not know
        device = torch.device(name)
    if not isinstance(name, str) or device is None or device.type not in ("cpu", "cuda"):
        raise InputError(f"calibration: device is {name!r}, wanted 'cpu', 'cuda', or one GPU of several ('cuda:1')")
    if device.type == "cuda" and (device.index or 0) >= (gpus := torch.cuda.device_count()):
        raise InputError(
            f"calibration: device is {name!r}, and torch sees {gpus} GPUs here; use one of those, or 'cpu'"
        )


def linear_inputs(graph: Graph) -> dict[str, tuple[fx.Node, ...]]:
    """By weight name, the values it multiplies: one, or several where layers share the weight."""
    found: dict[str, dict[fx.Node, None]] = {}
    for node in graph.calls("linear"):
        x, weight = node.args[:2]
        if isinstance(x, fx.Node) and isinstance(weight, fx.Node) and weight.op == "get_attr":
            found.setdefault(str(weight.target), {})[x] = None
    return {name: tuple(values) for name, values in found.items()}


def calibrate(
    program: Program,
    source: TokenSource | Statistics,
    *,
    encode: Encode | None = None,
    path: str | Path | None = None,
    settings: Settings | None = None,
    values: Values | None = None,
    progress: Progress | None = None,
) -> Statistics:
    """Statistics of `values` (name -> nodes of `forward`, each [..., K]; by default `linear_inputs`) over the source.

    The source is anything `choose_windows` takes, or statistics saved before, which are checked to be of this model's
    weights. `encode` makes ids of text. `path` (*.safetensors) is where the result is written, and read if it is there
    already. `progress(name, done, total)` is told of each value of each window. Raises InputError.
    """
    saved = _saved(source)
    if saved is not None:
        return saved.check(program)
    settings = settings or Settings()
    window = min(settings.window, program.facts.context_length)
    chosen = choose_windows(source, program.facts.vocab_size, encode, window, settings.tokens)  # type: ignore[arg-type]
    watched = values if values is not None else linear_inputs(program.graph("forward"))
    run = _Run(program, chosen.windows, settings, _shared(watched), _result_file(path))
    done = run.finished()
    if done is not None:
        return done
    return run.run(progress or (lambda name, done, total: None), _notes(chosen))


def _saved(source: TokenSource | Statistics) -> Statistics | None:
    if isinstance(source, Statistics):
        return source
    if isinstance(source, (str, Path)) and is_statistics(Path(source)):
        return Statistics.load(source)
    return None


def _result_file(path: str | Path | None) -> Path | None:
    if path is None:
        return None
    path = Path(path)
    if path.suffix != ".safetensors" or path.is_dir() or not path.parent.is_dir():
        raise InputError(
            f"statistics cannot be written to {str(path)!r}; wanted a name that ends in .safetensors, in a "
            "folder that exists"
        )
    return path


def _shared(values: Values) -> dict[tuple[fx.Node, ...], list[str]]:
    """The names of each set of nodes, in order: they share one sum."""
    if not values:
        raise InputError("calibration: there is nothing to watch; wanted a program with linears, raised from aten")
    found: dict[tuple[fx.Node, ...], list[str]] = {}
    for name, nodes in values.items():
        found.setdefault(tuple(nodes), []).append(name)
    return found


def _notes(chosen: Chosen) -> list[str]:
    used = sum(window.numel() for window in chosen.windows)
    return [f"calibrated with {used} of {chosen.source} in {len(chosen.windows)} windows"]


class _Run:
    """One calibration: its parts (groups of values whose sums fit the bound), and where they are written."""

    def __init__(
        self,
        program: Program,
        windows: list[Tensor],
        settings: Settings,
        shared: Mapping[tuple[fx.Node, ...], list[str]],
        path: Path | None,
    ) -> None:
        self.program, self.windows, self.settings, self.path = program, windows, settings, path
        self.names = {names[0]: names for names in shared.values()}
        self.origin = Origin(fingerprint_of(program), self._facts(shared))
        self.parts = [Part(group, self.origin) for group in _groups(shared, settings)]
        if path is None and len(self.parts) > 1:
            needed = sum(part.nbytes for part in self.parts)
            raise InputError(
                f"calibration: sums take {needed / MIB:.1f} MiB, the bound is {settings.memory / MIB:.1f} MiB; "
                "give a path, so that one group after the other can be written, or raise memory"
            )

    def _facts(self, shared: Mapping[tuple[fx.Node, ...], list[str]]) -> dict[str, Any]:
        """What a result depends on beside the weights; `tokens` and `window` by the windows that they make."""
        values = [(names, [node.name for node in nodes]) for nodes, names in shared.items()]
        return {
            "tokens": digest_of(self.windows),
            "values": hashlib.sha256(json.dumps(values).encode()).hexdigest(),
            "dtype": str(self.program.facts.dtype).removeprefix("torch."),
            "second_moments": self.settings.second_moments,
            "products": self.settings.products,
            "device": torch.device(self.settings.device).type,  # which GPU of several is all the same
        }

    def finished(self) -> Statistics | None:
        """The result, if it is there. Raises InputError for one of another run."""
        if self.path is None or not self.path.exists():
            return None
        if not is_statistics(self.path):
            raise InputError(f"file {str(self.path)!r} is there already and holds no statistics; give another name")
        found = Statistics.load(self.path).check(self.program, self.origin.fingerprint)
        if difference := found.origin.difference(self.origin):
            raise InputError(
                f"file {str(self.path)!r} holds statistics made otherwise: {difference}; give another name, remove it, "
                "or use it as it is by giving it as the source"
            )
        return found

    def run(self, progress: Progress, notes: list[str]) -> Statistics:
        """Read the windows for each part. Raises InputError before, if some were read with other weights."""
        self._check_weights()
        total = len(self.windows) * sum(len(part.sums) for part in self.parts)
        if len(self.parts) > 1:
            notes.append(
                f"read {len(self.parts)} times, as the sums of all values exceed {self.settings.memory / MIB:.1f} MiB"
            )
        before = 0
        for number, part in enumerate(self.parts):
            notes += part.open(self._file(number))
            part.run(self.program, self.windows, self.settings, _counted(progress, before, total))
            before += len(self.windows) * len(part.sums)
            if self.path is not None:
                part.close()
        return self._result(tuple(notes))

    def _check_weights(self) -> None:
        """That no unfinished work with other weights is here: it would be lost, and nobody asked for that."""
        for file in self._files():
            made = None
            with contextlib.suppress(InputError):  # a damaged one is begun anew
                made = unfinished(file)
            if made and (difference := self.origin.fingerprint.difference(made.fingerprint)):
                raise other_model("unfinished statistics", file, self.program, difference)

    def _file(self, number: int) -> Path | None:
        return None if self.path is None else self.path.with_name(f"{self.path.name}.part{number}")

    def _files(self) -> list[Path]:
        """What is there of unfinished work, in this division into parts or another."""
        if self.path is None:
            return []
        name = re.compile(re.escape(self.path.name) + r"\.part\d+")
        return sorted(file for file in self.path.parent.iterdir() if name.fullmatch(file.name) and file.is_file())

    def _result(self, notes: tuple[str, ...]) -> Statistics:
        lazy: dict[str, LazyTensor] = {}
        for part in self.parts:
            lazy |= part.results()
        columns = {key: (s.columns, s.tokens) for part in self.parts for key, s in part.sums.items()}
        entries = {name: Entry(key, *columns[key]) for key, names in self.names.items() for name in names}
        tensors: Mapping[str, Tensor] = {}
        made = Statistics(self.origin, entries, tensors, self.settings.second_moments, notes)
        if self.path is None:
            return made.with_tensors({key: tensor.make() for key, tensor in lazy.items()})
        made.write(self.path, lazy)
        for file in self._files():
            file.unlink()
        return made.with_tensors(StoredTensors(self.path))


def _counted(progress: Progress, before: int, total: int) -> Callable[[str, int], None]:
    return lambda name, done: progress(name, before + done, total)


def _groups(shared: Mapping[tuple[fx.Node, ...], list[str]], settings: Settings) -> list[dict[str, Sums]]:
    """Sums by key, in the graph's order, in groups of at most `memory` bytes. InputError if one alone is larger."""
    groups: list[dict[str, Sums]] = [{}]
    room = settings.memory
    for nodes, (key, *_) in shared.items():
        columns = _columns(key, nodes)
        sums = Sums(nodes, columns, settings.second_moments, settings.precision(columns), settings.device)
        if sums.nbytes > settings.memory:
            raise InputError(
                f"calibration: the sums of {key!r} take {sums.nbytes / MIB:.1f} MiB, more than the bound of "
                f"{settings.memory / MIB:.1f} MiB; raise memory, or keep diagonals only (second_moments=False)"
            )
        if sums.nbytes > room:
            groups.append({})
            room = settings.memory
        groups[-1][key] = sums
        room -= sums.nbytes
    return groups


def _columns(key: str, nodes: Sequence[fx.Node]) -> int:
    sizes = {node.meta["val"].shape[-1] for node in nodes}
    if len(sizes) != 1 or not plain.is_int(next(iter(sizes))):
        raise InputError(f"calibration: {key!r} is of sizes {sizes}; wanted values with one fixed last dimension")
    return int(sizes.pop())
