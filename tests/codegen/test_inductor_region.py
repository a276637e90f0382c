"""Regions through Inductor against the same function run eagerly; loaded afresh in a process without a compiler."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import textwrap

import pytest
import torch
from torch.nn.functional import silu

from llmopt.codegen.cpp import attend_cpp, cpp_available, kv_write_cpp, library_path, linear_cpp
from llmopt.codegen.inductor import CompiledRegion, compile_region, load_region
from llmopt.compiler._torch import fake_mode, fake_tensor
from llmopt.compiler.errors import BuildError
from llmopt.compiler.op import OPS

reason = cpp_available()
pytestmark = [pytest.mark.skipif(reason is not None, reason=str(reason)), pytest.mark.timeout(240)]

HQ, HKV, D, C, PAGE = 4, 2, 16, 48, 8
rms_norm, rope = OPS["rms_norm"].fn, OPS["rope"].fn


def layer(x, cos, sin, slots, seqs, tables, at, k_pages, v_pages, norm, qkv, out, norm2, up, down):
    n = x.shape[1]
    q, k, v = (
        t.view(1, n, -1, D).transpose(1, 2)
        for t in linear_cpp(rms_norm(x, norm, 1e-6), qkv).split([HQ * D, HKV * D, HKV * D], -1)
    )
    k_pages = kv_write_cpp(k_pages, rope(k, cos, sin), slots)
    v_pages = kv_write_cpp(v_pages, v, slots)
    mixed = attend_cpp(rope(q, cos, sin), k_pages, v_pages, tables, seqs, at, None, D**-0.5, 0, 0.0)
    x = x + linear_cpp(mixed.transpose(1, 2).reshape(1, n, HQ * D), out)
    gate, value = linear_cpp(rms_norm(x, norm2, 1e-6), up).chunk(2, -1)
    return [x + linear_cpp(silu(gate) * value, down)]


SHAPES = [
    (1, "N", C), (1, "N", D), (1, "N", D), ("N",), ("N",), ("S", "M"), (1, "N"),
    ("P", HKV, PAGE, D), ("P", HKV, PAGE, D),
    (C,), ((HQ + 2 * HKV) * D, C), (C, HQ * D), (C,), (4 * C, C), (C, 2 * C),
]  # fmt: skip


def fakes(shapes, single=False, ints=()):
    mode, symbols = fake_mode(), {}

    def fake(i, shape):
        sizes = [1 if single and s == "N" else s for s in shape]
        return fake_tensor(mode, sizes, torch.int64 if i in ints else torch.float32, symbols)

    return [fake(i, s) for i, s in enumerate(shapes)]


def layer_arguments(n, seed=0):
    """n tokens, two sequences taking turns, each behind 5 tokens that stand in the pages already."""
    g = torch.Generator().manual_seed(seed)
    seqs = torch.arange(n) % 2
    at = 5 + torch.arange(n) // 2
    width = -(-(6 + n // 2) // PAGE)
    tables = torch.randperm(2 * width, generator=g).add(1).view(2, width)
    slots = tables[seqs, at // PAGE] * PAGE + at % PAGE
    sizes = {"N": n, "P": 2 * width + 1}
    made = {3: slots, 4: seqs, 5: tables, 6: at[None]}
    return [
        made[i] if i in made else torch.randn(*(sizes.get(s, s) for s in shape), generator=g) * 0.3
        for i, shape in enumerate(SHAPES)
    ]


@pytest.fixture(scope="module")
def layers():
    return {single: compile_region(layer, fakes(SHAPES, single, ints=(3, 4, 5, 6)), single) for single in (True, False)}


@pytest.mark.parametrize("n", [1, 2, 3, 8, 16, 17, 45])
def test_a_layer_is_the_same_function_and_writes_its_pages_in_place(layers, n):
    call = load_region(layers[n == 1])
    for seed in (0, 1):  # one region serves layers with other weights and pages
        args, plain = layer_arguments(n, seed), layer_arguments(n, seed)
        (want,) = layer(*plain)
        given = list(args)
        (got,) = call(given)
        assert given == []
        torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-6)
        for i in (7, 8):
            torch.testing.assert_close(args[i], plain[i], rtol=2e-5, atol=2e-6)
            assert not torch.equal(args[i], layer_arguments(n, seed)[i])


def test_the_thread_count_is_taken_when_the_region_runs(layers):
    call, before = load_region(layers[False]), torch.get_num_threads()
    args = layer_arguments(40)
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(call([a.clone() for a in args])[0])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(r, results[0]) for r in results)


def test_a_stored_region_holds_one_library_and_no_way_back_to_the_compiler(layers):
    for region in layers.values():
        assert len(region.libraries) == 1
        assert "async_compile" not in region.source
        assert "assert_size_stride" not in region.source


FRESH = """
    import pickle, sys, torch
    from llmopt.codegen.inductor import load_region
    region, args, want = pickle.load(open(sys.argv[1], "rb"))
    (got,) = load_region(region)(args)
    torch.testing.assert_close(got, want)
"""


def test_a_fresh_process_runs_a_stored_region_without_a_compiler(layers, tmp_path):
    cache = tmp_path / "cache"
    (cache / "cpp").mkdir(parents=True)
    (cache / "cpp" / library_path().name).write_bytes(library_path().read_bytes())
    args = layer_arguments(6)
    (want,) = load_region(layers[False])([a.clone() for a in args])
    stored = tmp_path / "region.pkl"
    stored.write_bytes(pickle.dumps((layers[False], args, want)))
    env = {
        "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
        "PATH": "",
        "CXX": "false",
        "LLMOPT_CACHE": str(cache),
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor"),
        "HOME": str(tmp_path),
    }
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(FRESH), str(stored)],
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_sizes_may_come_as_arguments():
    x, w = fakes([(1, "N", 8), (8,)])
    n = x.shape[1]

    def scaled(x, w, n):
        return [(x * w).view(n, 8) / n, x.new_zeros(n, 3)]

    call = load_region(compile_region(scaled, [x, w, n]))
    for size in (2, 9):
        a, b = torch.randn(1, size, 8), torch.randn(8)
        got, zeros = call([a, b, size])
        torch.testing.assert_close(got, (a * b)[0] / size)
        assert zeros.shape == (size, 3)


def test_a_region_may_pass_inputs_on_and_need_no_kernel():
    call = load_region(compile_region(lambda x, y: [y, x], fakes([("N", 4), ("N",)])))
    x, y = torch.randn(3, 4), torch.randn(3)
    assert [id(t) for t in call([x, y])] == [id(y), id(x)]
    region = compile_region(lambda x, w: [linear_cpp(x, w)], fakes([("N", 8), (5, 8)]))
    assert region.libraries == {}
    a, w = torch.randn(3, 8), torch.randn(5, 8)
    assert torch.equal(load_region(region)([a, w])[0], linear_cpp(a, w))


def test_a_condition_on_a_symbolic_size_is_an_error_not_a_wrong_region():
    def two_ways(x):
        return [x.exp() if x.shape[0] > 100 else x.log()]

    with pytest.raises(BuildError, match=r"it holds only where .*100"):
        compile_region(two_ways, fakes([("N", 4)]))


def test_a_hidden_constant_is_an_error():
    table = torch.randn(100)
    with pytest.raises(BuildError, match="region: Inductor could not compile it"):
        compile_region(lambda x: [x + table], fakes([("N", 100)]))


def test_without_a_compiler_the_message_says_so(monkeypatch):
    monkeypatch.setenv("CXX", "absent-c++")
    with pytest.raises(BuildError, match="no C\\+\\+ compiler was found"):
        compile_region(lambda x: [x + 1], fakes([("N", 4)]))


def test_a_broken_compiler_is_one_line(monkeypatch):
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(BuildError) as caught:
        compile_region(lambda x: [x.exp() + 3.25], fakes([("N", 4)]))
    assert "\n" not in str(caught.value)


def test_a_damaged_library_is_told(tmp_path, monkeypatch):
    monkeypatch.setenv("LLMOPT_CACHE", str(tmp_path))
    region = CompiledRegion("def call(args):\n    return ()\n", {"region_broken.so": b"not a library"})
    with pytest.raises(BuildError, match="does not load"):
        load_region(region)
