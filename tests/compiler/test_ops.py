"""Conformance of every IR op: schema, shape rule (also with symbolic sizes), providers and cost, on its own samples."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from llmopt import codegen
from llmopt.compiler._torch import fake_mode, fake_tensor
from llmopt.compiler.fake import is_alike
from llmopt.compiler.op import OPS, Op
from llmopt.compiler.target import Target

SAMPLES = [
    pytest.param(op, args, id=f"{op.name}-{i}")
    for op in OPS.values()
    for i, args in enumerate(op.samples_fn() if op.samples_fn else ())
]
PROVIDERS = [
    pytest.param(op, name, args, id=f"{op.name}-{name}-{i}")
    for op in OPS.values()
    for name in op.providers
    if name != "reference"
    for i, args in enumerate(op.samples_fn() if op.samples_fn else ())
]


@pytest.mark.parametrize("op", OPS.values(), ids=lambda op: op.name)
def test_every_op_has_samples_a_cost_a_docstring_and_a_reference(op: Op):
    assert op.samples_fn is not None
    assert list(op.samples_fn())
    assert op.cost_fn is not None
    assert op.fn.__doc__
    assert "reference" in op.providers


@pytest.mark.parametrize(("op", "args"), SAMPLES)
def test_opcheck(op: Op, args: tuple[Any, ...]):
    # the schema's check multiplies operands, which torch cannot do to float8; they are tested to stay as they are below
    float8 = any(isinstance(a, Tensor) and a.dtype == torch.float8_e4m3fn for a in args)
    opcheck(op.overload, args, test_utils=("test_faketensor",) if float8 else ("test_schema", "test_faketensor"))


@pytest.mark.parametrize(("op", "args"), SAMPLES)
def test_operands_stay_as_they_are(op: Op, args: tuple[Any, ...]):
    before = [a.clone() if isinstance(a, Tensor) else a for a in args]
    op(*args)
    for a, b in zip(args, before, strict=True):
        assert torch.equal(a, b) if isinstance(a, Tensor) else a == b


@pytest.mark.parametrize(("op", "args"), SAMPLES)
def test_shape_rule_with_symbolic_sizes(op: Op, args: tuple[Any, ...]):
    """Every size that several tensors share, or that is a row count, as a symbol: same rank, dtype, and sizes."""
    symbols: dict[str, Any] = {}
    mode = fake_mode()
    free = _free_sizes(op.name)

    def fake(a: Any, names: tuple[str | None, ...]) -> Any:
        if not isinstance(a, Tensor):
            return a
        shape = [name or size for name, size in zip(names, a.shape, strict=True)]
        return fake_tensor(mode, shape, a.dtype, symbols)

    given = [fake(a, free.get(i, (None,) * a.dim()) if isinstance(a, Tensor) else ()) for i, a in enumerate(args)]
    with mode:
        got = op(*given)
    want = op(*args)
    assert got.dtype == want.dtype
    assert got.dim() == want.dim()
    back = {str(symbol): size for name, symbol in symbols.items() for size in [_real(name, free, args)]}
    assert [back.get(str(d), d) for d in got.shape] == list(want.shape)


def _free_sizes(name: str) -> dict[int, tuple[str | None, ...]]:
    """Which sizes of which operand are symbols, by operand number."""
    tokens: dict[int, tuple[str | None, ...]] = {0: ("B", "T", None)}
    heads = ("B", None, "T", None)
    known = {
        "attention": {0: heads, 1: heads, 2: heads},
        "rope": {0: heads, 1: ("B", "T", None), 2: ("B", "T", None)},
        "gated": {0: ("B", "T", None), 1: ("B", "T", None)},
        "kv_write": {0: ("P", None, None, None), 1: (None, None, "N", None), 2: ("N",)},
        "attend": {
            0: (None, None, "N", None), 1: ("P", None, None, None), 2: ("P", None, None, None), 3: ("S", "M"),
            4: ("N",), 5: (None, "N"),
        },
        "near_write": {
            0: ("P", None, None, None), 1: (None, None, "N", None), 2: ("S", "M"), 3: ("N",), 4: (None, "N"),
            5: (None, None, "N", None),
        },
    }  # fmt: skip
    known["attend_near"] = {**known["attend"], 12: (None, None, "N", None), 13: (None, None, "N", None)}
    return known.get(name, tokens)


def _real(name: str, free: dict[int, tuple[str | None, ...]], args: tuple[Any, ...]) -> int:
    return next(int(args[i].shape[names.index(name)]) for i, names in free.items() if name in names)


@pytest.mark.parametrize(("op", "name", "args"), PROVIDERS)
def test_provider_against_the_reference(op: Op, name: str, args: tuple[Any, ...]):
    provider = op.providers[name]
    target = codegen.usable(Target.detect("cpu"), ("cpp",))
    if provider.needs - target.facts:
        pytest.skip(f"{target.name} lacks {', '.join(sorted(provider.needs - target.facts))}")
    why = provider.supports(*args)
    if why is not None:
        pytest.skip(f"not for these arguments: {why}")
    got = provider.fn(*(a.clone() if isinstance(a, Tensor) else a for a in args))
    want = op.fn(*args)
    assert is_alike(got, want)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize(("op", "args"), SAMPLES)
def test_cost_is_positive(op: Op, args: tuple[Any, ...]):
    cost = op.cost_fn(*args)
    assert int(cost.bytes) > 0
    assert int(cost.flops) > 0 or op.name in ("kv_write", "near_write")


@pytest.mark.parametrize(
    ("name", "args", "flops"),
    [
        ("linear", (torch.zeros(2, 3, 8), torch.zeros(5, 8)), 2 * 2 * 3 * 8 * 5),
        ("attention", (*(torch.zeros(1, 4, 10, 8),) * 3, None, 1.0, 0, 0.0), 4 * 10 * 10 * 8 * 4),
        ("attention", (*(torch.zeros(1, 4, 10, 8),) * 3, None, 1.0, 5, 0.0), 4 * 10 * 5 * 8 * 4),
    ],
)
def test_cost_of_products(name: str, args: tuple[Any, ...], flops: int):
    assert OPS[name].cost_fn(*args).flops == flops
