"""What may be quantised and how it may be asked for: every refusal of `quantize`, before anything is computed."""

from __future__ import annotations

import math
import numbers
from typing import Any

import torch
from torch import Tensor

from llmopt.compiler.errors import InputError
from llmopt.compiler.quant.scales import E4M3_MAX, E4M3_TINY
from llmopt.compiler.quant.schemes import Scheme

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# the block with the largest element: below, its scale would round to 0; above, less than half of the element is left
_E4M3_SPAN = (E4M3_TINY / 2, E4M3_MAX * 2)


def check_tensor(value: Any, what: str, wanted: str) -> None:
    """Raise `InputError` unless `value` is a dense tensor of real numbers that are there; `what` says whose it is."""
    if not isinstance(value, Tensor):
        raise InputError(
            f"{what} is a {type(value).__name__}; wanted a tensor {wanted}: make it one with torch.tensor(...)"
        )
    if value.is_meta:
        raise InputError(f"{what} is on the meta device, without numbers; wanted {wanted} with them: load it first")
    if value.layout is not torch.strided or value.is_nested:
        layout = "nested" if value.is_nested else str(value.layout)
        raise InputError(f"{what} is {layout}; wanted a dense tensor {wanted}: call .to_dense() on it")
    if value.is_complex():
        raise InputError(f"{what} is {value.dtype}; wanted real numbers {wanted}: give real and imaginary part apart")


def check_matrix(tensor: Any) -> None:
    """Raise `InputError` unless `tensor` is a matrix of floats with something in it."""
    check_tensor(tensor, "quantize: the matrix", "[N, K]")
    seen = f"got {tensor.dtype} {list(tensor.shape)}"
    if tensor.dtype not in _FLOATS:
        raise InputError(
            f"quantize: only float16, bfloat16, float32 and float64 can be quantised; {seen}: convert it with .float()"
        )
    if tensor.dim() != 2 or not tensor.numel():
        raise InputError(f"quantize: only matrices [N, K] with elements can be quantised; {seen}: reshape it")


def check_options(scheme: Scheme, global_scale: Any, scale_max: Any, rows_at_once: Any) -> None:
    """Raise `InputError` for options that `scheme` cannot have, and for numbers that are none."""
    if not _is_number(scale_max) or not 0 < scale_max <= E4M3_MAX:
        raise InputError(
            f"quantize: scale_max is {scale_max!r}; wanted above 0 and at most {E4M3_MAX}, the largest e4m3 number: "
            "leave it out for that one"
        )
    if not scheme.has_global and (global_scale is not None or scale_max != E4M3_MAX):
        raise InputError(f"quantize: {scheme.name} has no global scale; leave out global_scale and scale_max")
    if rows_at_once is not None and not (isinstance(rows_at_once, int) and rows_at_once > 0):
        raise InputError(f"quantize: rows_at_once is {rows_at_once!r}; wanted a whole number of rows, or None")


def checked_weight(weight: Any, scale: str, columns: int) -> Tensor:
    """The importance of each column, float64 [columns], as shares of the largest (all 0 if that is 0).

    Raises `InputError`: another shape, not finite, negative, or a rule `scale` that looks at no errors.
    """
    check_tensor(weight, "quantize: weight", f"[{columns}]")
    wanted = f"wanted [{columns}], finite and not negative: an importance for each column, such as X.square().mean(0)"
    if list(weight.shape) != [columns]:
        raise InputError(f"quantize: weight is of shape {list(weight.shape)}; {wanted}")
    wide = weight.double()
    if not bool((wide.isfinite() & (wide >= 0)).all()):
        raise InputError(f"quantize: weight goes from {wide.min().item()} to {wide.max().item()}; {wanted}")
    if scale == "max":
        raise InputError(
            "quantize: weight says how much errors count, and scale 'max' looks at the largest element alone; wanted a "
            "rule that searches: give scale='search', or leave weight out"
        )
    largest = wide.amax()
    return wide / torch.where(largest > 0, largest, 1.0)


def checked_global_scale(value: Any, device: torch.device) -> Tensor:
    """A global scale given as a number or a tensor of one, float32 []; raises `InputError` unless it is positive."""
    wanted = "wanted one positive number, a multiplier: a float or a tensor []"
    if isinstance(value, Tensor):
        check_tensor(value, "quantize: global_scale", "[]")
        if value.numel() != 1:
            raise InputError(f"quantize: global_scale is of shape {list(value.shape)}; {wanted}")
        value = value.item()
    elif not _is_number(value):
        raise InputError(f"quantize: global_scale is a {type(value).__name__}, {value!r}; {wanted}")
    held = torch.tensor(float(value), dtype=torch.float32, device=device)
    if not 0 < held.item() < math.inf:
        raise InputError(f"quantize: global_scale is {value}, in float32 {held.item()}; {wanted}")
    return held


def check_reach(global_scale: Tensor, amax: Tensor, scheme: Scheme) -> None:
    """Raise `InputError` where the block with `amax`, the largest element, has a scale far from what e4m3 can hold."""
    best = float(amax) / (E4M3_MAX * scheme.element.max)
    scale = best * E4M3_MAX / float(global_scale)
    low, high = _E4M3_SPAN
    if amax > 0 and not low <= scale <= high:
        raise InputError(
            f"quantize: global_scale {float(global_scale):.3g} is too {'small' if scale > high else 'large'} for a "
            f"largest element of {float(amax):.3g}, whose block would have the scale {scale:.3g}; wanted one from "
            f"{best:.3g} on, so that it is at most {E4M3_MAX:g}, and not so large that it is 0: give the same to "
            "layers that share it, a multiplier and no divisor, or leave it out"
        )


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)
