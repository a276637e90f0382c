"""Matrix times vector for one token: y = EPILOGUE(W x), with the RMSNorm of x taken on the way.

Each program owns BLOCK_J rows of the weights (of both halves when PARTS is 2) and walks their whole length, BLOCK_K
columns a step, on the CUDA cores: at one token the kernel only streams W, and loads of 16 bytes a thread are all it
needs. The products of one load are added up inside the thread, so that a row costs one register and not one per
column; threads are combined once, at the end.

Weights do not depend on the kernel ahead: with PREFETCH a step's weights are loaded one step early, the first ones
before the wait for that kernel, so that memory stays busy over the boundary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import triton
import triton.language as tl

from llmopt.codegen.templates.ahead import ask_rows
from llmopt.compiler.target import Target


@triton.jit
def _weights(w, first, row, k, K: tl.constexpr, BLOCK_K: tl.constexpr, EVICT: tl.constexpr):
    # the block's first row in 64 bits, as 256k rows of 16k exceed 2^31; rows last, as their distances are constants
    at = (w + first.to(tl.int64) * K + k)[None, :] + row[:, None] * K
    if K % BLOCK_K == 0:
        return tl.load(at, eviction_policy=EVICT)
    return tl.load(at, mask=(k < K)[None, :], other=0.0, eviction_policy=EVICT)


@triton.jit
def _inside(k, K: tl.constexpr, BLOCK_K: tl.constexpr):
    # a constant mask is folded away, a comparison is not
    if K % BLOCK_K == 0:
        return tl.full([BLOCK_K], True, tl.int1)
    return k < K


@triton.jit
def _add(total, a, b, V: tl.constexpr):
    # total [J, K // V] += a [J, K] * b [1, K]: V neighbouring columns lie in one thread, so no thread needs another
    return total + tl.sum(tl.reshape(a * b, [a.shape[0], a.shape[1] // V, V]), axis=2)


@triton.jit
def _add_squares(total, x, V: tl.constexpr):
    # one-dimensional, as x is loaded: a row of one would be laid out anew at every step
    return total + tl.sum(tl.reshape(x * x, [x.shape[0] // V, V]), axis=1)


@triton.jit(do_not_specialize=["N"])
def gemv(  # noqa: C901
    w, y, e0, e1, e2, e3, e4, e5, N,
    K: tl.constexpr, J: tl.constexpr, OFFSET0: tl.constexpr, OFFSET1: tl.constexpr, PARTS: tl.constexpr,
    NORM: tl.constexpr, EPS: tl.constexpr, LOAD_X: tl.constexpr, LOAD_G: tl.constexpr, EPILOGUE: tl.constexpr,
    BLOCK_J: tl.constexpr, BLOCK_K: tl.constexpr, PREFETCH: tl.constexpr, EARLY: tl.constexpr, EVICT: tl.constexpr,
    ASK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """y[m, j] = EPILOGUE of row OFFSET0 + j (and OFFSET1 + j) of w [F, K] with X[m]; grid (cdiv(J, BLOCK_J), N).

    X is LOAD_X, with NORM times LOAD_G over the root of the mean of its squares plus EPS; sums are fp32; y [N, J].
    PREFETCH: weights are loaded one step ahead. EARLY: the next kernel may start as soon as this one has, else after
    its last load. EVICT: "" or "evict_first", what the caches are told of the weights. ASK: the weights that PREFETCH
    does not hold come into L2 before the wait.
    """
    V: tl.constexpr = 128 // w.dtype.element_ty.primitive_bitwidth
    STEPS: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    m = tl.program_id(1)
    first = tl.program_id(0) * BLOCK_J
    row = tl.arange(0, BLOCK_J)
    n = first + row
    if J % BLOCK_J != 0:
        row = tl.minimum(row, J - 1 - first)  # rows past the end repeat the last one; they are not stored
    k = tl.arange(0, BLOCK_K)
    acc0 = tl.zeros([BLOCK_J, BLOCK_K // V], tl.float32)
    acc1 = acc0
    squares = tl.zeros([BLOCK_K // V], tl.float32)
    if PREFETCH:
        w0 = _weights(w, first + OFFSET0, row, k, K, BLOCK_K, EVICT)
        if PARTS == 2:
            w1 = _weights(w, first + OFFSET1, row, k, K, BLOCK_K, EVICT)
        if NORM:
            g = LOAD_G(k, _inside(k, K, BLOCK_K), e0, e1, e2, e3, e4, e5)
    if PDL:
        REST: tl.constexpr = K - PREFETCH * BLOCK_K
        if ASK and REST > 0:
            ask_rows(w, first + OFFSET0, K - REST, BLOCK_J, REST, K, OFFSET0 + J - 1)
            if PARTS == 2:
                ask_rows(w, first + OFFSET1, K - REST, BLOCK_J, REST, K, OFFSET1 + J - 1)
        if EARLY:
            tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    for step in range(STEPS - PREFETCH):
        k = step * BLOCK_K + tl.arange(0, BLOCK_K)
        ahead = k + PREFETCH * BLOCK_K
        ok = _inside(k, K, BLOCK_K)
        next0 = _weights(w, first + OFFSET0, row, ahead, K, BLOCK_K, EVICT)
        if PARTS == 2:
            next1 = _weights(w, first + OFFSET1, row, ahead, K, BLOCK_K, EVICT)
        if NORM:
            next_g = LOAD_G(ahead, _inside(ahead, K, BLOCK_K), e0, e1, e2, e3, e4, e5)
        x = LOAD_X(m, k, ok, e0, e1, e2, e3, e4, e5)
        if NORM:
            squares = _add_squares(squares, x, V)
            x = x * (g if PREFETCH else next_g)
        acc0 = _add(acc0, (w0 if PREFETCH else next0).to(tl.float32), x[None, :], V)
        if PARTS == 2:
            acc1 = _add(acc1, (w1 if PREFETCH else next1).to(tl.float32), x[None, :], V)
        if PREFETCH:
            w0 = next0
            if PARTS == 2:
                w1 = next1
            if NORM:
                g = next_g
    if PREFETCH:
        k = (STEPS - 1) * BLOCK_K + tl.arange(0, BLOCK_K)
        x = LOAD_X(m, k, _inside(k, K, BLOCK_K), e0, e1, e2, e3, e4, e5)
        if NORM:
            squares = _add_squares(squares, x, V)
            x = x * g
        acc0 = _add(acc0, w0.to(tl.float32), x[None, :], V)
        if PARTS == 2:
            acc1 = _add(acc1, w1.to(tl.float32), x[None, :], V)
    if PDL and not EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    sum0 = tl.sum(acc0, axis=1)
    sum1 = sum0
    if PARTS == 2:
        sum1 = tl.sum(acc1, axis=1)
    if NORM:
        scale = tl.rsqrt(tl.sum(squares, axis=0) / K + EPS)
        sum0 = sum0 * scale
        sum1 = sum1 * scale
    value = EPILOGUE(sum0, sum1, m, n, n < J, e0, e1, e2, e3, e4, e5)
    tl.store(y + m * J + n, value.to(y.dtype.element_ty), mask=n < J)


def grid(shape: Mapping[str, int], config: Mapping[str, Any]) -> tuple[int | str, ...]:
    """Programs of a launch, as sizes of `codegen.kernel`."""
    return (-(-shape["J"] // config["BLOCK_J"]), "N")


def supports(shape: Mapping[str, int], dtype: str, target: Target) -> str | None:
    """None if this template takes the product, else the reason why not. `shape`: K, J, PARTS, NORM, N."""
    if dtype not in ("bfloat16", "float16", "float32"):
        return f"dtype {dtype}: sums are fp32"
    if "triton" not in target.features:
        return "the target has no Triton"
    return None


def configs(shape: Mapping[str, int], dtype: str, target: Target) -> list[dict[str, Any]]:
    """Constants worth trying, the default first.

    Weights ahead (PREFETCH) make the assembler issue a step's loads at once; it would else put each beside its use, to
    save registers, and wait for them one by one.
    """
    wide = 4 if dtype == "float32" else 8  # columns of one load, which a block holds at least
    rows_in_all = shape["J"] * shape["PARTS"]
    whole = max(wide, triton.next_power_of_2(shape["K"]))
    few = rows_in_all <= 16 * target.cores
    # few rows: small blocks, so that every multiprocessor has some; a whole row in few steps
    first = (4, 256) if few else (8, 128)
    tiles = [(*first, 4, 1)]
    tiles += [
        (r, n, 4, ahead) for r, n in ((8, 128), (4, 256), (4, 128), (16, 128), (2, 256), (8, 256)) for ahead in (1, 0)
    ]
    tiles += [(8, 32, 1, 1), (4, 64, 1, 1), (8, 64, 2, 1)]
    found = [
        {
            "BLOCK_J": r // shape["PARTS"], "BLOCK_K": min(n * wide, whole), "PREFETCH": ahead, "EARLY": 0, "EVICT": "",
            "ASK": 0, "num_warps": max(1, min(warps, whole // (32 * wide))), "num_stages": 1,
        }
        for r, n, warps, ahead in tiles
    ]  # fmt: skip
    return list({repr(c): c for c in found}.values())
