"""GPTQ: quantise a matrix column by column, and let the columns still to come make up for what each one lost.

    error_i = (w_i - q_i) / U_ii        w_j <- w_j - error_i U_ij   for j > i,   U upper, U^T U = H^-1

Frantar, Ashkboos, Hoefler, Alistarh: GPTQ (arXiv 2210.17323), algorithm 1. H = X^T X of the calibration tokens. The
scale of a group is chosen when its first column is reached, from the weights as updated so far, by any rule that
`quantize` knows. The updates are fp64, on the tensor's device.

From few tokens H is mostly chance: updates then fit these tokens and make the products of others worse than rounding to
nearest does, up to three times from K/2 tokens. Where n, the number of tokens, is known, every product of two columns
is therefore scaled by

    (1 - g) n / (n + K)     g = min(1, sum (1 + r^2) / (n sum r^2)), over the correlations r of two different columns

g is the shrinkage to the diagonal with the least expected squared error if tokens were independent and normal: Schaefer
and Strimmer (Stat. Appl. Genet. Mol. Biol. 4, 2005, article 32) with (1 + r^2) / n as the variance of a product. Tokens
of a text are neither, and n / (n + K) is a rule of our own: tests/quant/test_gptq_tokens.py holds errors on unseen
tokens to those of rounding to nearest, from one token on. What it gives away: where columns really are sums of a few
others, that could be learned from fewer tokens than are asked for.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from llmopt.compiler.errors import InputError, did_you_mean
from llmopt.compiler.quant.checks import check_matrix, check_tensor, checked_weight
from llmopt.compiler.quant.quantize import QuantizedTensor, encode, quantize, quantized
from llmopt.compiler.quant.scales import decoded_scales
from llmopt.compiler.quant.schemes import Scheme, scheme_of

ORDERS = ("none", "activation")
_LEAST_DAMPING = 0.01  # where the wanted one was not enough; ten and a hundred times as much are tried after it
_SLACK = 1e-3  # how far from symmetric, or from a second moment, sums in low precision may be, of the diagonal
_ROWS = 512  # of a Hessian at a time, so that looking at it takes little memory


@torch.no_grad()
def gptq(
    tensor: Tensor,
    hessian: Tensor,
    scheme: str | Scheme,
    scale: str = "max",
    *,
    damping: float = 0.01,
    block: int = 128,
    order: str = "none",
    tokens: int | None = None,
    weight: Tensor | None = None,
    global_scale: float | Tensor | None = None,
    scale_max: float = 448.0,
    say: Callable[[str], None] = warnings.warn,
) -> QuantizedTensor:
    """Quantise a matrix [N, K] so that its products with the calibration tokens change little.

    `hessian` [K, K] is their second moment, a sum or a mean (symmetric; float32 or float64), and `tokens` their number:
    the fewer they are, the less products of different columns count (None: all they are worth; see above). `damping`
    times its mean diagonal is added to the diagonal. Updates reach the columns beyond the next `block` in one product.
    `order` "activation" takes columns of large inputs first; scales are then those of `quantize`, as they are where a
    row or a tensor has one. `scale`, `weight`, `global_scale` and `scale_max` are `quantize`'s. A column that meets
    only zeros in the tokens is rounded to nearest.

    `say` is told of such columns, and of a damping that had to be raised. Raises InputError for what `quantize`
    refuses, for options out of range, and for a Hessian of another shape, one that is not finite, not symmetric, or not
    positive semidefinite.
    """
    scheme = scheme_of(scheme)
    check_matrix(tensor)
    _check_options(damping, block, order, tokens)
    _check_hessian(hessian, tensor.shape[1])
    start = quantize(tensor, scheme, scale, weight=weight, global_scale=global_scale, scale_max=scale_max)
    columns = torch.arange(start.shape[1], device=tensor.device)
    moment = hessian.to(tensor.device, torch.float64, copy=True)
    if order == "activation":
        columns = hessian.diagonal().argsort(descending=True, stable=True).to(tensor.device)
        moment = moment[columns][:, columns]
    if tokens is not None:
        _shrink(moment, tokens)
    upper = _inverse_factor(moment, float(damping), say)
    del moment
    shares = None if weight is None else checked_weight(weight, scale, start.shape[1])
    grid = _Grid(start, scale, shares, scheme.group > 0 and order == "none")
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


def _check_options(damping: float, block: int, order: str, tokens: int | None) -> None:
    if order not in ORDERS:
        raise InputError(f"gptq: order {order!r} is unknown; {did_you_mean(str(order), ORDERS)}")
    if not isinstance(damping, (int, float)) or not 0 <= damping < math.inf:
        raise InputError(
            f"gptq: damping is {damping!r}; wanted a share of the Hessian's mean diagonal, 0 or more: 0.01 is usual"
        )
    if not isinstance(block, int) or block < 1:
        raise InputError(f"gptq: block is {block!r}; wanted a number of columns, 1 or more: 128 is usual")
    if tokens is not None and not (isinstance(tokens, int) and tokens > 0):
        raise InputError(
            f"gptq: tokens is {tokens!r}; wanted how many the Hessian is the second moment of, 1 or more, or None"
        )


def _check_hessian(hessian: Tensor, size: int) -> None:
    """Raise `InputError` for what is no second moment of `size` columns, as far as one can see without factors."""
    check_tensor(hessian, "gptq: the Hessian", f"[{size}, {size}]")
    if tuple(hessian.shape) != (size, size) or not hessian.is_floating_point():
        raise InputError(
            f"gptq: the Hessian is {str(hessian.dtype).removeprefix('torch.')} {list(hessian.shape)}; wanted float "
            f"[{size}, {size}] for a matrix of {size} columns; give the second moment of this matrix's inputs"
        )
    diagonal = hessian.diagonal().double()
    if not all(bool(part.isfinite().all()) for _, part in _parts(hessian)) or bool((diagonal < 0).any()):
        raise InputError("gptq: the Hessian is not finite or has a negative diagonal; give X^T X of finite inputs")
    least = float(diagonal.max()) * 1e-7  # where a small product has a float32, but not the squares
    for first, part in _parts(hessian):
        mirrored = hessian[:, first : first + len(part)].T
        bound = (diagonal[first : first + len(part), None] * diagonal).sqrt_() + least
        wrong = ((part - mirrored).abs() > _SLACK * bound).nonzero()
        if len(wrong):
            i, j = int(wrong[0, 0]) + first, int(wrong[0, 1])
            raise InputError(
                f"gptq: the Hessian is not symmetric: [{i}, {j}] is {hessian[i, j].item():.6g} and [{j}, {i}] is "
                f"{hessian[j, i].item():.6g}; give all of X^T X, not a triangle of it"
            )
        if bool((part.abs() > (1 + _SLACK) * bound).any()):
            raise InputError(_NOT_A_MOMENT)


_NOT_A_MOMENT = "gptq: the Hessian is not positive semidefinite; give X^T X of the matrix's inputs, or their mean"


def _parts(hessian: Tensor) -> Iterator[tuple[int, Tensor]]:
    """(first row, some rows) of it, in turn."""
    for first in range(0, len(hessian), _ROWS):
        yield first, hessian[first : first + _ROWS]


def _shrink(hessian: Tensor, tokens: int) -> None:
    """Scale what is not on the diagonal of a second moment of `tokens`, in place; see the module's docstring."""
    diagonal = hessian.diagonal().clone()
    alive = diagonal > 0
    inverse = torch.where(alive, diagonal, 1.0).reciprocal()
    count = int(alive.sum())
    squares = -float(count)
    for first, part in _parts(hessian):
        squares += float((part.square() @ inverse * inverse[first : first + len(part)]).sum())
    squares = max(squares, 0.0)
    pairs = count * (count - 1)
    chance = min(1.0, (pairs + squares) / (tokens * squares)) if squares else 1.0
    hessian.mul_((1 - chance) * tokens / (tokens + count))
    hessian.diagonal().copy_(diagonal)


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
    raise InputError(_NOT_A_MOMENT)


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
        part = quantized(group.float().contiguous(), made.scheme, self.rule, weight, made.global_scale)
        at = first // made.scheme.group
        made.scales[:, at] = part.scales[:, 0]
        made.codes[:, first : first + part.codes.shape[1]] = part.codes  # for the padding's sake
        if made.zero_points is not None and part.zero_points is not None:
            made.zero_points[:, at] = part.zero_points[:, 0]

    def round(self, column: Tensor, index: int) -> Tensor:
        """Keep the codes of a column [N]; returns what they stand for, float32."""
        made, scheme = self.made, self.made.scheme
        at = index // scheme.group if scheme.group else 0
        scales = self._by_row(made.scales[:, at])
        zeros = None if made.zero_points is None else self._by_row(made.zero_points[:, at])
        codes = encode(column.float()[:, None], scales, made.global_scale, zeros, scheme)[:, 0]
        made.codes[:, index] = codes
        values = scheme.element.decode(codes)
        if zeros is not None:
            values = values - (zeros.float() - scheme.element.zero)
        return values * decoded_scales(scales, scheme, made.global_scale)

    def _by_row(self, shared: Tensor) -> Tensor:
        rows, together = self.made.shape[0], self.made.scheme.rows
        return shared.repeat_interleave(together or rows)[:rows] if together != 1 else shared

    def finished(self, tensor: Tensor) -> QuantizedTensor:
        """The result with its error against the matrix."""
        lost = tensor.double() - self.made.dequantize().double()
        return replace(
            self.made, squared_error=float(lost.square().sum()), energy=float(tensor.double().square().sum())
        )
