"""A module's structure without its data, for tracing on the CPU a model that lives elsewhere."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from llmopt.compiler.program import Weight, tensor_weight


def lives_elsewhere(model: nn.Module) -> bool:
    """Is a parameter or buffer on a device that is neither the CPU nor meta?"""
    return any(t.device.type not in ("cpu", "meta") for t in (*model.parameters(), *model.buffers()))


def skeleton(model: nn.Module) -> nn.Module:
    """A copy on the CPU whose parameters and buffers were never written, so that they take no memory.

    Tensors that are neither are copied as they are: they become constants of the graph.
    """
    memo: dict[int, object] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(_unwritten(parameter), requires_grad=parameter.requires_grad)
    for buffer in model.buffers():
        memo[id(buffer)] = _unwritten(buffer)
    for tensor in _loose(model):
        memo.setdefault(id(tensor), tensor.detach().cpu().clone())
    return copy.deepcopy(model, memo)


def weights_of(model: nn.Module) -> Callable[[str, Tensor], Weight]:
    """Reads the weights of a skeleton from the `model` it was made of: parameters where they are, buffers (which are
    small, and may be looked at while compiling) copied to the CPU."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    buffers = dict(model.named_buffers(remove_duplicate=False))

    def weight(name: str, tensor: Tensor) -> Weight:
        if name in parameters:
            return tensor_weight(parameters[name])
        found = buffers.get(name)
        if found is None:
            return tensor_weight(tensor)
        return Weight(tuple(found.shape), found.dtype, lambda: found.detach().cpu(), "in memory")

    return weight


def _unwritten(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype)


def _loose(model: nn.Module) -> Iterator[Tensor]:
    for module in model.modules():
        yield from (value for value in vars(module).values() if isinstance(value, Tensor))
