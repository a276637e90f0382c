"""GPTQ: quantise a matrix column by column, and let the columns still to come make up for what each one lost.

    error_i = (w_i - q_i) / U_ii        w_j <- w_j - error_i U_ij   for j > i,   U upper, U^T U = H^-1

Frantar, Ashkboos, Hoefler, Alistarh: GPTQ (arXiv 2210.17323), algorithm 1. H = X^T X of the calibration tokens. The
scale of a group is chosen when its first column is reached, from the weights as updated so far, by any rule that
`quantize` knows. The updates are fp64, on the tensor's device.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from llmopt.compiler.errors import InputError, did_you_mean
from llmopt.compiler.quant.quantize import QuantizedTensor, quantize
from llmopt.compiler.quant.scales import decoded_scales
from llmopt.compiler.quant.schemes import Scheme, scheme_of

ORDERS = ("none", "activation")
_LEAST_DAMPING = 0.01  # where the wanted one was not enough; ten and a hundred times as much are tried after it


def gptq(
    tensor: Tensor,
    hessian: Tensor,
    scheme: str | Scheme,
    scale: str = "max",
    *,
    damping: float = 0.01,
    block: int = 128,
    order: str = "none",
    weight: Tensor | None = None,
    global_scale: Tensor | None = None,
    scale_max: float = 448.0,
    say: Callable[[str], None] = warnings.warn,
) -> QuantizedTensor:
    """Quantise a matrix [N, K] so that its products with the calibration tokens change little.

    `hessian` [K, K] is their second moment, a sum or a mean (float32 or float64). `damping` times its mean diagonal is
    added to the diagonal. Updates reach the columns beyond the next `block` in one product. `order` "activation" takes
    columns of large inputs first; scales are then those of `quantize`, as they are where a row or a tensor has one.
    `scale`, `weight`, `global_scale` and `scale_max` are `quantize`'s. A column that meets only zeros in the tokens is
    rounded to nearest.

    `say` is told of such columns, and of a damping that had to be raised. Raises InputError for what `quantize`
    refuses, a Hessian of another shape, one that is not finite, or one that is not positive semidefinite.
    """
    scheme = scheme_of(scheme) if isinstance(scheme, str) else scheme
    start = quantize(tensor, scheme, scale, weight=weight, global_scale=global_scale, scale_max=scale_max)
    diagonal = _checked_diagonal(hessian, start.shape[1])
    if order not in ORDERS:
        raise InputError(f"gptq: order {order!r} is unknown; {did_you_mean(order, ORDERS)}")
    if damping < 0 or block < 1:
        raise InputError(f"gptq: damping is {damping} and block {block}, wanted damping >= 0 and block >= 1")
    columns = torch.arange(start.shape[1], device=tensor.device)
    moment = hessian.to(tensor.device, torch.float64, copy=True)
    if order == "activation":
        columns = diagonal.argsort(descending=True, stable=True).to(tensor.device)
        moment = moment[columns][:, columns]
    upper = _inverse_factor(moment, damping, say)
    del moment
    grid = _Grid(start, scale, weight, scheme.group > 0 and order == "none")
    _sweep(tensor.double().T[columns].contiguous(), upper, columns.tolist(), grid, block)
    return grid.finished(tensor)


def output_error(tensor: Tensor, quantized: Tensor, hessian: Tensor) -> float:
    """tr(D H D^T) / tr(W H W^T), D = W - Q: what quantising changes in the products with the tokens behind H.

    `tensor` W and `quantized` Q are [N, K], `hessian` [K, K]; computed in fp64. 0 where the products are all zero.
    """
    moment, exact = hessian.double(), tensor.double()
    lost = exact - quantized.double()
    energy = float(((exact @ moment) * exact).sum())
    return float(((lost @ moment) * lost).sum()) / energy if energy else 0.0


def _checked_diagonal(hessian: Tensor, size: int) -> Tensor:
    if tuple(hessian.shape) != (size, size) or not hessian.is_floating_point():
        raise InputError(
            f"gptq: the Hessian is {str(hessian.dtype).removeprefix('torch.')} {list(hessian.shape)}; wanted float "
            f"[{size}, {size}] for a matrix of {size} columns; give the second moment of this matrix's inputs"
        )
    diagonal = hessian.diagonal()
    if not bool(torch.isfinite(hessian).all()) or bool((diagonal < 0).any()):
        raise InputError("gptq: the Hessian is not finite or has a negative diagonal; give X^T X of finite inputs")
    return diagonal


def _inverse_factor(hessian: Tensor, damping: float, say: Callable[[str], None]) -> Tensor:
    """Upper U, fp64, with U^T U = (H + damping)^-1; `hessian` is overwritten.

    H = R R^T with R upper is Cholesky of H with rows and columns reversed, and then U = R^-1: H is never inverted.
    """
    diagonal = hessian.diagonal()
    dead = diagonal == 0
    if bool(dead.any()):
        say(
            f"gptq: {int(dead.sum())} of {len(dead)} columns meet zeros only in the tokens; they are rounded to nearest"
        )
    mean = float(diagonal.sum()) / max(1, int((~dead).sum())) or 1.0
    hessian[dead], hessian[:, dead] = 0.0, 0.0
    diagonal[dead] = mean
    added = 0.0
    for share in (damping, *(_LEAST_DAMPING * 10.0**n for n in range(3))):
        if share < damping:
            continue
        diagonal.add_((share - added) * mean)
        added = share
        factor, failed = torch.linalg.cholesky_ex(hessian.flip(0, 1))
        if not bool(failed):
            if share > damping:
                say(f"gptq: the Hessian is not positive definite with damping {damping}; it was raised to {share}")
            identity = torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device)
            return torch.linalg.solve_triangular(factor.flip(0, 1), identity, upper=True)
    raise InputError("gptq: the Hessian is not positive semidefinite; give X^T X of the matrix's inputs, or their mean")


def _sweep(work: Tensor, upper: Tensor, columns: list[int], grid: _Grid, block: int) -> None:
    """Round row after row of `work` (fp64 [K, N], overwritten): the matrix's columns in the order of `columns`."""
    count, group = len(columns), grid.made.scheme.group
    if grid.chooses:  # a group lies within one block, so that all updates have reached it when its scale is chosen
        block = max(block // group, 1) * group
    for first in range(0, count, block):
        end = min(first + block, count)
        errors = torch.empty(end - first, work.shape[1], dtype=work.dtype, device=work.device)
        for at in range(first, end):
            if grid.chooses and at % group == 0:
                grid.choose(work[at : min(at + group, end)].T, at)
            error = (work[at] - grid.round(work[at], columns[at])) / upper[at, at]
            work[at + 1 : end].addr_(upper[at, at + 1 : end], error, alpha=-1)
            errors[at - first] = error
        work[end:].addmm_(upper[first:end, end:].T, errors, alpha=-1)


@dataclass
class _Grid:
    """The result as it grows: scales of the groups reached so far, codes of the columns rounded so far."""

    made: QuantizedTensor
    rule: str
    weight: Tensor | None
    chooses: bool  # scales are chosen on the way

    def choose(self, group: Tensor, first: int) -> None:
        """The scales of a group from its columns as they are now, [N, n], of which `first` is the first."""
        made = self.made
        weight = None if self.weight is None else self.weight[first : first + group.shape[1]]
        part = quantize(
            group.float().contiguous(),
            made.scheme,
            self.rule,
            weight=weight,
            global_scale=made.global_scale,
        )
        at = first // made.scheme.group
        made.scales[:, at] = part.scales[:, 0]
        made.codes[:, first : first + part.codes.shape[1]] = part.codes  # for the padding's sake
        if made.zero_points is not None and part.zero_points is not None:
            made.zero_points[:, at] = part.zero_points[:, 0]

    def round(self, column: Tensor, index: int) -> Tensor:
        """Keep the codes of a column [N]; returns what they stand for, float32."""
        made, scheme = self.made, self.made.scheme
        at = index // scheme.group if scheme.group else 0
        steps = self._by_row(decoded_scales(made.scales[:, at], scheme, made.global_scale))
        units, shift = column.float() / steps, None
        if made.zero_points is not None:
            shift = self._by_row(made.zero_points[:, at]).float() - scheme.element.zero
            units = units + shift
        codes = scheme.element.encode(units)
        made.codes[:, index] = codes
        values = scheme.element.decode(codes)
        return (values if shift is None else values - shift) * steps

    def _by_row(self, shared: Tensor) -> Tensor:
        rows, together = self.made.shape[0], self.made.scheme.rows
        return shared.repeat_interleave(together or rows)[:rows] if together != 1 else shared

    def finished(self, tensor: Tensor) -> QuantizedTensor:
        """The result with its error against the matrix."""
        lost = tensor.double() - self.made.dequantize().double()
        return replace(
            self.made, squared_error=float(lost.square().sum()), energy=float(tensor.double().square().sum())
        )
