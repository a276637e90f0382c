"""Sampling on the device: logits [R, V] to one token a row, and the state of the rows moved on by that token.

Greedy rows (temperature 0) take the largest logit, others argmax(logit / temperature + Gumbel noise), with the noise
and the fp32 formula of `runtime.sampler`; equal values go to the lowest index. The vocabulary is cut into blocks, one
CTA each; the last CTA of a row to arrive compares the blocks' winners, writes the token and moves the row on, so a
decoding step ends where the next one begins, on the device.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def gumbel(index, position, sequence, seed):
    """Noise fp32 [BLOCK] for vocabulary indices 4*index .. 4*index + 3, index int32 [BLOCK / 4]."""
    zero = tl.zeros_like(index)
    block, place, number = index.to(tl.uint32), (zero + position).to(tl.uint32), (zero + sequence).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed.to(tl.uint64), block, place, number, zero.to(tl.uint32))
    bits = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), [index.shape[0] * 4])
    u = tl.minimum(bits.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10, 0.9999999403953552)
    # log1p(-u) by log: what rounding 1 - u lost is put back by the factor
    rest = 1.0 - u
    exact = rest == 1.0
    minus = tl.where(exact, -u, tl.log(rest) * tl.div_rn(-u, tl.where(exact, 1.0, rest - 1.0)))
    return -tl.log(-minus)


@triton.jit
def advance(row, token, M, tokens, positions, slots, tables, moves, PAGE: tl.constexpr):
    """Store a row's token and put the row one position on, unless it is padding (moves 0).

    The slot is right where the table already has the page; who adds a page later writes the slot with it.
    """
    tl.store(tokens + row, token.to(tl.int64))
    place = tl.load(positions + row) + tl.load(moves + row)
    tl.store(positions + row, place)
    page = tl.load(tables + row * M + tl.minimum(place // PAGE, M - 1))
    tl.store(slots + row, page * PAGE + place % PAGE)


@triton.jit
def sample(
    logits,
    temperature,
    seeds,
    sequences,
    moves,
    tables,
    tokens,
    positions,
    slots,
    best,
    places,
    tickets,
    M,
    V: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    ROOM: tl.constexpr,
    PAGE: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (R, BLOCKS), BLOCKS = cdiv(V, BLOCK), ROOM the power of two at or above it.

    logits [R, V] contiguous; temperature fp32 [R]; seeds, sequences, moves, tokens, positions, slots int64 [R]; tables
    int64 [R, M]; best fp32 and places i32 [R * BLOCKS] temporaries; tickets i32 [R], zero before and after.
    """
    row, block = tl.program_id(0), tl.program_id(1)
    if PDL:
        tl.extra.cuda.gdc_wait()
    index = block * BLOCK + tl.arange(0, BLOCK)
    score = tl.load(logits + row.to(tl.int64) * V + index, mask=index < V, other=float("-inf")).to(tl.float32)
    warmth = tl.load(temperature + row)
    if warmth > 0:
        quads = block * (BLOCK // 4) + tl.arange(0, BLOCK // 4)
        noise = gumbel(quads, tl.load(positions + row) + 1, tl.load(sequences + row), tl.load(seeds + row))
        score = tl.div_rn(score, tl.maximum(warmth, 1e-30)) + noise
    top, at = tl.max(score, axis=0, return_indices=True, return_indices_tie_break_left=True)
    tl.store(best + row * BLOCKS + block, top)
    tl.store(places + row * BLOCKS + block, block * BLOCK + at)
    if tl.atomic_add(tickets + row, 1, sem="acq_rel", scope="gpu") == BLOCKS - 1:
        lane = tl.arange(0, ROOM)
        tops = tl.load(best + row * BLOCKS + lane, mask=lane < BLOCKS, other=float("-inf"), cache_modifier=".cg")
        _, winner = tl.max(tops, axis=0, return_indices=True, return_indices_tie_break_left=True)
        token = tl.minimum(tl.load(places + row * BLOCKS + winner, cache_modifier=".cg"), V - 1)
        advance(row, token, M, tokens, positions, slots, tables, moves, PAGE)
        tl.store(tickets + row, 0)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
