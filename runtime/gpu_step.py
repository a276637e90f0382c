"""A lowered step on a GPU: launches of its regions' kernels, one flat list for each class of shapes.

Steps of any tokens (prompts, and what more than 64 sequences decode) are launched one kernel after the other. A
decoding step of up to 64 sequences, one token each, has kernels of its own and is run by `decode` on a DecodeState,
sampling included, without the host knowing a value: that is what `runtime.decode_graphs` captures.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from llmopt.codegen.kernel import Launcher
from llmopt.codegen.sampling import REGION as SAMPLE
from llmopt.codegen.splits import splits
from llmopt.compiler.graph import Graph, target_name
from llmopt.runtime.attend import StepLayout
from llmopt.runtime.bound_region import BoundRegion, Frame
from llmopt.runtime.decoder import DecodeState
from llmopt.runtime.executor import flat_plan, implementation, no_room
from llmopt.runtime.gpu_code import MANY, GpuCode, decode_shape
from llmopt.runtime.torch_calls import TORCH_CALLS
from llmopt.runtime.transfer import inputs_on

SHORTEST = 256  # contexts up to here are split alike


class GpuStep:
    """Implements `runtime.engine.StepFn` for regions compiled to kernels.

    Steps of any tokens take tensors of the host, from which the host knows which tokens follow one another: nothing is
    waited for, and steps queue up. Tensors of the device are waited for.

    `state` gives the page tensors by input name; `launcher` makes kernels ready (`runtime.cuda` on a GPU,
    `codegen.interpret` on a CPU, where `device` is the CPU too).
    """

    def __init__(
        self,
        code: GpuCode,
        weights: Mapping[str, Tensor],
        state: Mapping[str, Tensor],
        launcher: Launcher,
        device: torch.device,
    ) -> None:
        self.code, self.weights, self.state, self.launcher, self.device = code, weights, state, launcher, device
        self.frame = Frame()
        graph = code.program.graph("step")
        self.state_names = [n.name for n in graph.inputs() if n.name in state]
        self._spent = spent_inputs(graph)
        self._bound: dict[tuple[str, str], BoundRegion] = {}
        self._runs: dict[str, Callable[..., Any]] = {}

    @torch.inference_mode()
    def __call__(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        slots: Tensor,
        seq_ids: Tensor,
        block_tables: Tensor,
        rows: Tensor,
        /,
    ) -> Tensor:
        sequences, width = block_tables.shape
        layout = StepLayout.of(seq_ids, position_ids, self.device)
        self._frame(len(slots), len(rows), sequences, width, 1, layout)
        inputs = inputs_on(self.device, (input_ids, position_ids, slots, seq_ids, block_tables, rows))
        try:
            return self._run(MANY)(*inputs, *[self.state[n] for n in self.state_names])  # type: ignore[no-any-return]
        except torch.OutOfMemoryError as error:
            raise no_room(f"a step of {len(slots)} tokens", error) from error

    @torch.inference_mode()
    def decode(self, state: DecodeState, rows: int, parts: int) -> Tensor:
        """One token of each of the state's first `rows` rows, stored, and the rows moved on; logits [rows, V]."""
        shape = decode_shape(rows)
        self._frame(rows, rows, rows, state.width, parts)
        tables, numbers = state.tables[:rows], state.numbers[:rows]
        tokens, positions, slots = state.tokens[:rows], state.positions[:rows], state.slots[:rows]
        inputs = (tokens[None], positions[None], slots, numbers, tables, numbers)
        logits: Tensor = self._run(shape)(*inputs, *[self.state[n] for n in self.state_names])
        vectors = state.temperature, state.seeds, state.sequences, state.moves
        self._region(SAMPLE, shape)([logits, *(v[:rows] for v in vectors), tables, tokens, positions, slots])
        return logits

    def parts(self, rows: int, length: int) -> int:
        """Parts to split the keys of `length` tokens into; lengths are rounded up, so that few graphs are captured."""
        rounded = max(SHORTEST, 1 << (length - 1).bit_length())
        specs = self.code.program.state
        packed = any(spec.dtype == torch.uint8 for spec in specs)
        return splits(rows, specs[0].shape[0], rounded, self.code.target, packed) if specs else 1

    def source(self, shape: str) -> str:
        """The flat program of a class, readable."""
        return self._plan(shape).source

    def _frame(
        self, tokens: int, rows: int, sequences: int, width: int, parts: int, layout: StepLayout | None = None
    ) -> None:
        sizes = {"N": tokens, "R": rows, "S": sequences, "M": width, "T": 1, "SPLITS": parts}
        self.frame.begin(sizes, layout)

    def _run(self, shape: str) -> Callable[..., Any]:
        if shape not in self._runs:
            if self.device.type == "cuda":
                self.code.prepare(shape)
            self._runs[shape] = self._plan(shape).compile()
        return self._runs[shape]

    def _plan(self, shape: str) -> Any:
        def implement(node: fx.Node) -> Callable[..., Any]:
            return _as_it_is if shape != MANY and _selects_rows(node) else implementation(node, self.device)

        graph = self.code.program.graph("step")
        return flat_plan(graph, self.weights, lambda name: self._region(name, shape), implement)

    def _region(self, name: str, shape: str) -> BoundRegion:
        key = name, shape
        if key not in self._bound:
            code = self.code.code(name, shape)
            spent = self._spent.get(name, ())
            self._bound[key] = BoundRegion(code, self.launcher, TORCH_CALLS, self.frame, self.device, spent)
        return self._bound[key]


def spent_inputs(step: Graph) -> dict[str, frozenset[int]]:
    """By region, which of its inputs are results of regions that nothing reads after it, whichever call it is."""
    order = {node: i for i, node in enumerate(step.fx.nodes)}
    found: dict[str, frozenset[int]] = {}
    for node in order:
        if node.op == "call_module":
            own = frozenset(i for i, arg in enumerate(node.args) if _ends(arg, node, order))
            found[str(node.target)] = found.get(str(node.target), own) & own
    return found


def _ends(value: Any, reader: fx.Node, order: Mapping[fx.Node, int]) -> bool:
    if not isinstance(value, fx.Node) or target_name(value) != "getitem" or reader.args.count(value) > 1:
        return False
    maker, index = value.args
    others = [u for u in maker.users if u is not value and u.args[1] == index]  # type: ignore[union-attr]
    regions = [maker, *value.users]
    # an op of torch may give back a view of what it reads
    alone = not others and all(n.op == "call_module" for n in regions)  # type: ignore[union-attr]
    return alone and max(value.users, key=order.__getitem__) is reader


def _selects_rows(node: fx.Node) -> bool:
    return target_name(node) == "aten.index_select" and getattr(node.args[2], "op", None) == "placeholder"


def _as_it_is(hidden: Tensor, *_: Any) -> Tensor:
    # every token of a decoding step is a wanted row
    return hidden
