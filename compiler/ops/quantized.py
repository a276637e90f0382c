"""Matrix products with weights in low-bit formats."""

from __future__ import annotations

from collections.abc import Iterable, MutableMapping
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.weak import WeakTensorKeyDictionary

from llmopt.compiler.op import Cost, nbytes, op
from llmopt.compiler.quant import dequantize, fake_quantize, quantize, scheme_of


@op
def quantized_linear(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    global_scale: Tensor | None,
    zero_points: Tensor | None,
    bias: Tensor | None,
    scheme: str,
    activations: str = "",
) -> Tensor:
    """y = x @ w.T + bias, w [N, K] = what `packed` (uint8 [N, bytes]), `scales`, `global_scale` and `zero_points` hold
    in `scheme` (see `compiler.quant`), rounded to x's dtype; x [..., K], bias [N] or None, y [..., N] in x's dtype.

    `activations`: the scheme that x is rounded to first, token by token ("" leaves it as it is).
    """
    weight = dequantize(packed, scales, global_scale, zero_points, scheme_of(scheme), x.shape[-1], x.dtype)
    seen = fake_quantize(x, scheme_of(activations)) if activations else x
    return torch.nn.functional.linear(seen, weight, bias)


@quantized_linear.cost
def _cost(x: Tensor, packed: Tensor, *others: Any) -> Cost:
    n, k = packed.shape[0], x.shape[-1]
    rows = x.numel() // k
    moved = nbytes(x, packed, *others)
    return Cost(2 * rows * n * k, moved + rows * n * x.element_size())


@quantized_linear.samples
def _samples() -> Iterable[tuple[Any, ...]]:
    cases = [("nvfp4", "", 48), ("mxfp4", "mxfp4", 64), ("int4_g32_asym", "", 64), ("fp8_channel", "fp8_channel", 40),
             ("mxfp6_e2m3", "", 32), ("int8", "int8", 24), ("nvfp4", "nvfp4", 40)]  # fmt: skip
    for scheme, activations, k in cases:
        w = quantize(torch.randn(6, k), scheme)
        bias = torch.randn(6) if activations else None
        stored = w.packed(), w.scales, w.global_scale, w.zero_points
        yield torch.randn(2, 3, k), *stored, bias, scheme, activations


# what a weight holds: its memory, how it lies there, and how often it was written to
_State = tuple[StorageWeakRef, int, int, torch.dtype, torch.device, torch.Size, tuple[int, ...]]
_Parts = tuple[Tensor | None, ...]
_ROUNDED: MutableMapping[Tensor, dict[tuple[str, str], tuple[_State, _Parts]]] = WeakTensorKeyDictionary()


@op
def rounded_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, scheme: str, activations: str = "", scale: str = "search"
) -> Tensor:
    """`quantized_linear` over `quantize(weight, scheme, scale)`, for weights that belong to someone else.

    x [..., K], weight [N, K], bias [N] or None, y [..., N] in x's dtype. What a weight was rounded to is kept for as
    long as it lives, holds the same memory in the same dtype, and its version counter stands still. So an edited weight
    counts at once, and so does one given other memory, as `model.to(dtype)` and `p.data = q` do; only writes through
    `.data` (`p.data.mul_(2)`) pass by the counter. A weight made in inference mode has no counter and is rounded in
    every call. Raises InputError as `quantize` does.
    """
    state = _state(weight)
    kept = _ROUNDED.setdefault(weight, {})
    have = kept.get((scheme, scale))
    if have is None or have[0] != state or weight.is_inference():
        made = quantize(weight.detach(), scheme, scale)
        have = state, (made.packed(), made.scales, made.global_scale, made.zero_points)
        kept[scheme, scale] = have
    return quantized_linear.fn(x, *have[1], bias, scheme, activations)  # type: ignore[no-any-return]


def _state(weight: Tensor) -> _State:
    # an address alone may be used again by what comes after: the weak reference keeps the storage's own from that
    return (
        StorageWeakRef(weight.untyped_storage()), weight.data_ptr(), 0 if weight.is_inference() else weight._version,
        weight.dtype, weight.device, weight.shape, weight.stride(),
    )  # fmt: skip


rounded_linear.traceable = False


@rounded_linear.fake
def _rounded_fake(x: Tensor, weight: Tensor, *_: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@rounded_linear.cost
def _rounded_cost(
    x: Tensor, weight: Tensor, bias: Tensor | None, scheme: str, activations: str = "", scale: str = "search"
) -> Cost:
    n, k = weight.shape
    rows = x.numel() // k
    stored = int(n * k * scheme_of(scheme).bits_per_weight / 8)
    return Cost(2 * rows * n * k, nbytes(x, bias) + stored + rows * n * x.element_size())


@rounded_linear.samples
def _rounded_samples() -> Iterable[tuple[Any, ...]]:
    yield torch.randn(2, 3, 48), torch.randn(6, 48), None, "nvfp4"
    yield torch.randn(1, 1, 24), torch.randn(4, 24), torch.randn(4), "int8", "int8", "max"
