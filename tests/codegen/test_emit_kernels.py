"""Rows kernels of real pieces of models, interpreted, against torch; and compiled for GPUs that are not there."""

from __future__ import annotations

import pytest
import torch
from emitted import aten, calls_of, check, region, run, tensors

from llmopt.compiler.ops import gated, kv_write, rms_norm, rope, softcap
from llmopt.compiler.target import Target

bf16, f32, i64 = torch.bfloat16, torch.float32, torch.int64


def heads(x, d):
    return aten.transpose.int(aten.reshape.default(x, [1, aten.sym_size.int(x, 1), -1, d]), 1, 2)


def norm(x, y, w):
    total = aten.add.Tensor(x, y)
    return total, rms_norm(total, w, 1e-5)


def gemma_norm(x, w):
    wide = aten.to.dtype(x, f32)
    return (aten.type_as.default(rms_norm(wide, w, 1e-6, 1.0, True), x),)


def layer_norm(x, w, b):
    return (aten.layer_norm.default(x, [24], w, b, 1e-5),)


def head_norm_rope(x, w, cos, sin):
    q, k = aten.split_with_sizes.default(x, [128, 64], -1), aten.slice.Tensor(x, 2, 128, 192)
    q = heads(q[0], 32)
    return rope(rms_norm(q, w, 1e-6), cos, sin), rope(heads(k, 32), cos, sin)


def head_norm_by_token(x, w):
    by_head = aten.reshape.default(x, [1, aten.sym_size.int(x, 1), 4, 24])
    return (aten.reshape.default(rms_norm(by_head, w, 1e-6), [1, aten.sym_size.int(x, 1), 96]),)


def swiglu(x):
    gate, up = aten.slice.Tensor(x, 2, 0, 40), aten.slice.Tensor(x, 2, 40, 80)
    return gated(gate, up, "silu"), gated(gate, up, "gelu"), gated(gate, up, "gelu_tanh"), softcap(up, 2.5)


def cos_sin(positions, inv_freq):
    at = aten.to.dtype(aten.unsqueeze.default(aten.mul.Tensor(positions, 4099), 2), f32)
    angles = aten.mul.Tensor(at, inv_freq)
    both = aten.cat.default([angles, angles], -1)
    return aten.to.dtype(aten.cos.default(both), bf16), aten.to.dtype(aten.sin.default(both), bf16)


def embed(ids, table, scale):
    return (aten.mul.Tensor(aten.embedding.default(table, ids, 0), scale),)


def write(k, v, k_pages, v_pages, slots):
    return kv_write(k_pages, heads(k, 16), slots), kv_write(v_pages, heads(v, 16), slots)


def softmaxes(x):
    return (
        aten.softmax.int(x, -1),
        aten.log_softmax.int(x, -1),
        aten.div.Tensor(x, aten.linalg_vector_norm.default(x, 2, [-1], True)),
        aten.sub.Tensor(x, aten.mean.dim(x, [-1], True)),
    )


def row_results(x):
    return aten.amax.default(x, [-1]), aten.sum.dim_IntList(x, [-1], True), aten.var.correction(x, [-1], correction=0)


def as_many_results_as_elements(x):
    return aten.mean.dim(x, [-1]), aten.softmax.int(x, -1)


def pieces(x, y):
    joined = aten.cat.default([aten.slice.Tensor(x, 2, 5, 20), y, aten.neg.default(y)], -1)
    masked = aten.masked_fill.Scalar(joined, aten.lt.Scalar(joined, 0.25), float("-inf"))
    return aten.exp.default(masked), aten.clamp.default(joined, -0.5, 0.75), aten.relu.default(joined)


def pointwise(x, y):
    total = aten.add.Tensor(x, y, alpha=0.5)
    chosen = aten.where.self(aten.gt.Tensor(x, y), aten.pow.Tensor_Scalar(x, 3), aten.rsub.Scalar(y, 1.0))
    root = aten.rsqrt.default(aten.add.Scalar(aten.pow.Tensor_Scalar(total, 2), 1e-3))
    return chosen, aten.mul.Tensor(root, aten.sigmoid.default(y)), aten.tanh.default(x), aten.erf.default(x)


def ints(ids, x):
    near = aten.to.dtype(aten.mul.Scalar(x, 3.7), i64)
    positive = aten.logical_and.default(aten.ge.Scalar(ids, 2), aten.gt.Tensor(ids, near))
    steps = aten.mul.Tensor(aten.full_like.default(ids, 2), ids)
    return aten.add.Tensor(near, 3), positive, aten.to.dtype(positive, f32), steps


WIDE = ((1, "N", 96), bf16)
CASES = {
    "norm": (norm, {"x": WIDE, "y": WIDE, "w": ((96,), bf16)}),
    "gemma_norm": (gemma_norm, {"x": WIDE, "w": ((96,), bf16)}),
    "layer_norm": (layer_norm, {"x": ((1, "N", 24), f32), "w": ((24,), f32), "b": ((24,), f32)}),
    "head_norm_rope": (
        head_norm_rope,
        {"x": ((1, "N", 192), f32), "w": ((32,), f32), "cos": ((1, "N", 16), f32), "sin": ((1, "N", 16), f32)},
    ),
    "head_norm_by_token": (head_norm_by_token, {"x": WIDE, "w": ((24,), bf16)}),
    "swiglu": (swiglu, {"x": ((1, "N", 80), f32)}),
    "cos_sin": (cos_sin, {"positions": ((1, "N"), i64), "inv_freq": ((12,), f32)}),
    "embed": (embed, {"ids": ((1, "N"), i64), "table": ((7, 1100), bf16), "scale": ((), bf16)}),
    "softmaxes": (softmaxes, {"x": ((1, "N", 50), f32)}),
    "row_results": (row_results, {"x": ((1, "N", 4, 12), f32)}),
    "as_many_results": (as_many_results_as_elements, {"x": ((1, "N", 12, 4), f32)}),
    "pieces": (pieces, {"x": ((1, "N", 20), f32), "y": ((1, "N", 7), f32)}),
    "pointwise": (pointwise, {"x": WIDE, "y": ((96,), bf16)}),
    "ints": (ints, {"ids": ((1, "N", 6), i64), "x": ((1, "N", 6), f32)}),
}
WRITE = {
    "k": ((1, "N", 32), f32),
    "v": ((1, "N", 32), f32),
    "k_pages": (("P", 2, 4, 16), f32),
    "v_pages": (("P", 2, 4, 16), f32),
    "slots": (("N",), i64),
}


@pytest.mark.interp
@pytest.mark.parametrize("name", CASES)
def test_kernel_computes_what_torch_does(name: str):
    check(*CASES[name])


@pytest.mark.interp
def test_values_are_scattered_into_pages():
    args = tensors(WRITE)
    args[-1] = torch.tensor([5, 14, 2])
    got = run(region(write, WRITE), args)
    for one, two in zip(got, write(*args), strict=True):
        assert torch.equal(one, two)


@pytest.mark.interp
def test_queries_token_by_token():
    inputs = {"x": WIDE, "w": ((24,), bf16)}
    graph = region(lambda x, w: (rms_norm(heads(x, 24), w, 1e-6),), inputs)
    args = tensors(inputs)
    plain, by_token = (run(graph, args, by_token=by)[0] for by in ((), graph.outputs()))
    assert torch.equal(by_token.reshape(1, 3, 4, 24), plain.transpose(1, 2))


@pytest.mark.interp
def test_special_values():
    """What the fp32 forms do at the ends of their range is what torch does."""

    def ends(x):
        return (
            aten.tanh.default(x),
            aten.silu.default(x),
            aten.maximum.default(x, aten.neg.default(x)),
            softcap(x, 30.0),
        )

    inf, nan = float("inf"), float("nan")
    x = torch.tensor([[[0.0, -0.0, inf, -inf, nan, 1e30, -1e30, 1e-30, 0.25, -0.25, 88.0, -104.0]]])
    graph = region(ends, {"x": ((1, "N", 12), f32)})
    for one, two in zip(run(graph, [x], {"N": 1}), ends(x), strict=True):
        torch.testing.assert_close(one, two, equal_nan=True, rtol=1e-6, atol=0.0)


@pytest.mark.xcompile
@pytest.mark.parametrize("isa", ["sm_80", "sm_89", "sm_90", "sm_100", "sm_120"])
def test_kernels_compile_without_spills(isa: str, tmp_path, monkeypatch):
    from llmopt.codegen.cubin import compile_kernel

    monkeypatch.setenv("LLMOPT_CACHE", str(tmp_path))
    target = Target.parse(f"cuda:{isa}")
    names = list(CASES) if isa == "sm_90" else ["swiglu", "cos_sin", "head_norm_rope"]
    for name in names:
        for call in calls_of(region(*CASES[name])):
            assert compile_kernel(call.kernel, target).spills == 0
