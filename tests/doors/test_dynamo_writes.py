"""Graphs that write into memory, seen by the backend: results, arguments and sharing are eager PyTorch's."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from llmopt.backend import llmopt, reports
from llmopt.compiler.aliasing import sharing

Program = Callable[..., tuple[Tensor, ...]]


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    llmopt.reset()
    yield
    torch._dynamo.reset()


def norm(x: Tensor, w: Tensor) -> Tensor:
    return w * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5))


def reads_around_a_write(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    """The two products look equal, and are not."""
    before = x * 2
    x.add_(1)
    return before, x * 2, x


def write_inside_a_norm(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    """Written as one op where it ends, the norm would read x too late."""
    normed = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)
    x.add_(3)
    return (w * normed,)


def write_inside_a_gate(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    act, up = silu(x), x + 1
    x.zero_()
    return (act * up,)


def copy_before_a_write(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    kept = x.clone()
    x.add_(1)
    return norm(kept, w), norm(x, w)


def write_through_a_view(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    first = norm(x, w)
    x.view(-1)[::2] = 0
    x[0].copy_(x[1])
    return first, norm(x, w), x.t()


def unused_write(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    x.select(0, 0).fill_(5)
    return (norm(w.expand(3, -1) + 1, w),)


def returned_copies(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    """Fresh memory for the caller to write to, and memory of the argument."""
    return x.clone(), x, x.view(-1), x.contiguous(), x.to(torch.float32), norm(x, w).clone()


def residual_in_place(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    h = x + 1
    for _ in range(3):
        h += norm(h, w)
    return (h,)


def cache_like(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    """What a static cache does: count, write at the count, read everything."""
    store, at = torch.zeros(6, x.shape[1]), torch.zeros((), dtype=torch.int64)
    for step in range(2):
        where = torch.arange(x.shape[0] // 2) + at
        at.add_(x.shape[0] // 2)
        store.index_copy_(0, where, norm(x[: x.shape[0] // 2] + step, w))
    return norm(store, w), store, at


WRITES = [
    reads_around_a_write, write_inside_a_norm, write_inside_a_gate, copy_before_a_write, write_through_a_view,
    unused_write, returned_copies, residual_in_place, cache_like,
]  # fmt: skip


def check(program: Program, recipe: str, strict: bool = True) -> None:
    """Same results, same changes of the arguments, and the same sharing of memory among all of them."""
    inputs = torch.randn(4, 6, generator=torch.Generator().manual_seed(3)), nn.Parameter(torch.linspace(0.5, 1.5, 6))
    ours = copy.deepcopy(inputs)
    compiled = torch.compile(program, backend="llmopt", options={"recipe": recipe, "strict": strict}, fullgraph=True)
    with torch.no_grad():
        want, got = program(*inputs), compiled(*ours)
    torch.testing.assert_close((*got, *ours), (*want, *inputs))
    assert sharing((*ours, *got)) == sharing((*inputs, *want))


@pytest.mark.parametrize("program", WRITES, ids=lambda f: f.__name__)
def test_writes(program: Program):
    check(program, "reference")


def test_writes_through_inductor():
    check(cache_like, "default")


def test_norms_beside_writes_are_still_found():
    block = Block()
    x = torch.randn(4, 6)
    with torch.no_grad():
        want, seen = block(x), block.seen.clone()
        block.seen.zero_()
        torch.testing.assert_close(torch.compile(block, backend="llmopt", options={"recipe": "reference"})(x), want)
    torch.testing.assert_close(block.seen, seen)
    assert reports[-1].rules == {"rms-norm": 2, "linear": 1}  # and not the norm over `seen`, which is written to
    assert reports[-1].hidden > 0


class Block(nn.Module):
    """Norms of pure values beside a buffer that each call adds to."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.mix = nn.Parameter(torch.rand(6) + 0.5), nn.Linear(6, 6)
        self.register_buffer("seen", torch.zeros(4, 6))

    def forward(self, x: Tensor) -> Tensor:
        """x [4, 6] -> [4, 6]."""
        self.seen.add_(norm(x, self.scale))
        return self.mix(norm(x * 2, self.scale)) + norm(self.seen, self.scale)


def random_program(seed: int) -> Program:
    """A straight-line program of norms, gates, products, views, copies and writes over values made so far."""
    draw = random.Random(seed)
    steps = [(draw.randrange(len(STEPS)), draw.randrange(n), draw.randrange(n)) for n in range(2, 16)]
    kept = draw.sample(range(2, 16), 4)

    def run(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        values = [x, x + w]
        for op, i, j in steps:
            values.append(STEPS[op](values[i], values[j], w))
        return tuple(values[i] for i in kept)

    return run


STEPS: list[Callable[[Tensor, Tensor, Tensor], Tensor]] = [
    lambda a, b, w: norm(a, w),
    lambda a, b, w: silu(a) * b,
    lambda a, b, w: a.add_(b.mean()),
    lambda a, b, w: a.mul_(0.5),
    lambda a, b, w: a.clone(),
    lambda a, b, w: a.view(a.shape),
    lambda a, b, w: a.contiguous(),
    lambda a, b, w: (a[1:3].copy_(b[:2].clone()), a)[1],
    lambda a, b, w: torch.cat((a[:2], b[2:])),
    lambda a, b, w: nn.functional.linear(a, w.outer(w)),
    lambda a, b, w: a.tanh(),
    lambda a, b, w: a.to(torch.float32) + 0,
]


@pytest.mark.parametrize("seed", range(24))
def test_random_programs(seed: int):
    check(random_program(seed), "reference", strict=False)
