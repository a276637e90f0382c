"""The C++ kernels against the ops' bodies: error measured in fp64, bits independent of the batch, missing compilers."""

from __future__ import annotations

import errno
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmopt.codegen.cpp import attend_cpp, cpp_available, install_library, kv_write_cpp, library_path, linear_cpp
from llmopt.compiler.errors import BuildError
from llmopt.compiler.op import OPS
from llmopt.compiler.ops.attention import attend
from llmopt.compiler.ops.linear import linear

reason = cpp_available()
needs_kernels = pytest.mark.skipif(reason is not None, reason=str(reason))
pytestmark = pytest.mark.timeout(120)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def error(got, exact):
    """Largest error in units of the largest value."""
    return ((got.double() - exact).abs().max() / exact.abs().max().clamp_min(1e-30)).item()


def no_worse(got, eager, exact, terms=None):
    """Twice eager's error, or two roundings where eager happens to be exact: of the result, or of the terms it sums."""
    size = 1.0 if terms is None else (terms.abs().max() / exact.abs().max()).item()
    assert error(got, exact) <= max(2 * error(eager, exact), 2 * size * torch.finfo(got.dtype).eps)


# ---- linear


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "k"), [(33, 512), (7, 80), (40, 17), (1, 3), (64, 1408)])
@pytest.mark.parametrize("m", [1, 2, 3, 5, 7, 8, 9, 16, 17])
def test_linear_errs_no_more_than_eager(dtype, n, k, m):
    torch.manual_seed(m * n + k)
    x, weight, bias = (torch.randn(*s).to(dtype) for s in ((1, m, k), (n, k), (n,)))
    exact = linear.fn(x.double(), weight.double(), bias.double())
    got = linear_cpp(x, weight, bias)
    assert (got.dtype, got.shape) == (dtype, (1, m, n))
    no_worse(got, linear.fn(x, weight, bias), exact)


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "k"), [(300, 512), (61, 100)])
def test_a_row_of_linear_has_the_same_bits_in_any_company(dtype, n, k):
    x, weight = torch.randn(16, k).to(dtype), torch.randn(n, k).to(dtype)
    alone = torch.cat([linear_cpp(row[None], weight) for row in x])
    for m in range(2, 17):
        for start in {0, 16 - m}:
            assert torch.equal(linear_cpp(x[start : start + m], weight), alone[start : start + m])


@needs_kernels
def test_linear_reads_strided_rows_and_leaves_wide_types_to_torch():
    weight = torch.randn(9, 32)
    wide = torch.randn(4, 96)
    assert torch.equal(linear_cpp(wide[:, 32:64], weight), linear_cpp(wide[:, 32:64].contiguous(), weight))
    columns = torch.randn(32, 4).t()
    assert torch.equal(linear_cpp(columns, weight), linear_cpp(columns.contiguous(), weight))
    x, transposed = torch.randn(3, 32).double(), torch.randn(32, 9).double().t()
    assert torch.equal(linear_cpp(x, transposed), torch.nn.functional.linear(x, transposed))
    assert linear_cpp(torch.empty(0, 32), weight).shape == (0, 9)


@needs_kernels
def test_linear_says_what_does_not_fit():
    with pytest.raises(RuntimeError, match=r"linear_cpp: x \[2, 3\] does not fit weight \[5, 4\]"):
        linear_cpp(torch.randn(2, 3), torch.randn(5, 4))
    with pytest.raises(RuntimeError, match="x is Float, weight is BFloat16"):
        linear_cpp(torch.randn(2, 4), torch.randn(5, 4).bfloat16())


# ---- attend


def paged(lengths, new, heads, kv_heads, dim, page, dtype=torch.float32, dim_v=None, seed=0):
    """Arguments of attend: `new[i]` tokens at the end of a sequence of lengths[i], pages in random order."""
    g = torch.Generator().manual_seed(seed)
    width = max(-(-n // page) for n in lengths)
    count = 1 + sum(-(-n // page) for n in lengths)
    free = (torch.randperm(count - 1, generator=g) + 1).tolist()
    tables = torch.zeros(len(lengths), width, dtype=torch.int64)
    for row, n in enumerate(lengths):
        for i in range(-(-n // page)):
            tables[row, i] = free.pop()
    seqs = torch.cat([torch.full((m,), i) for i, m in enumerate(new)])
    at = torch.cat([torch.arange(n - m, n) for n, m in zip(lengths, new, strict=True)])[None]
    dim_v = dim_v or dim
    k, v = (torch.randn(count, kv_heads, page, d, generator=g).to(dtype) for d in (dim, dim_v))
    q = torch.randn(1, heads, seqs.numel(), dim, generator=g).to(dtype)
    return q, k, v, tables, seqs, at


def exact_attend(args, sinks, scale, window, softcap):
    q, k, v, *rest = args
    wide = None if sinks is None else sinks.double()
    return attend.fn(q.double(), k.double(), v.double(), *rest, wide, scale, window, softcap)


def check_attend(args, sinks=None, scale=None, window=0, softcap=0.0, terms=None):
    scale = args[0].shape[-1] ** -0.5 if scale is None else scale
    got = attend_cpp(*args, sinks, scale, window, softcap)
    eager = attend.fn(*args, sinks, scale, window, softcap)
    assert got.dtype == eager.dtype
    assert got.shape == eager.shape
    no_worse(got, eager, exact_attend(args, sinks, scale, window, softcap), terms)
    return got


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [16, 33, 64, 80, 128, 256])
@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (4, 2), (8, 1), (9, 3)])
def test_attend_errs_no_more_than_eager(dtype, dim, heads, kv_heads):
    check_attend(paged([70, 9, 1], [1, 9, 1], heads, kv_heads, dim, 16, dtype))


@needs_kernels
@pytest.mark.parametrize("window", [0, 1, 7, 64, 100])
@pytest.mark.parametrize("softcap", [0.0, 2.0, 30.0])
@pytest.mark.parametrize("sinks", [False, True])
def test_attend_attributes(window, softcap, sinks):
    args = paged([150, 40], [33, 1], 8, 2, 64, 16)
    check_attend(args, torch.randn(8) * 3 if sinks else None, 0.4, window, softcap)


@needs_kernels
def test_attend_with_values_of_another_width_and_strided_queries():
    q, *rest = paged([30], [5], 4, 2, 48, 8, dim_v=20)
    strided = q.transpose(1, 2).contiguous().transpose(1, 2)
    got = check_attend((strided, *rest))
    assert torch.equal(got, check_attend((q, *rest)))


@needs_kernels
@pytest.mark.parametrize("sink", [-200.0, 200.0])
def test_extreme_scores_stay_finite(sink):
    q, k, v, *rest = paged([100], [3], 2, 2, 32, 16)
    got = check_attend((q * 30, k * 30, v, *rest), torch.full((2,), sink), 1.0)
    assert got.isfinite().all()


@needs_kernels
def test_keys_out_of_sight_are_not_read():
    q, k, v, tables, seqs, at = paged([40], [1], 2, 1, 16, 16)
    want = attend_cpp(q, k, v, tables, seqs, at, None, 0.25, 10, 0.0)
    hidden = tables[0, 0]  # positions 0..15, outside the window of position 39
    k[hidden], v[hidden] = float("nan"), float("nan")
    k[tables[0, 2], :, 8:], v[tables[0, 2], :, 8:] = float("nan"), float("nan")  # positions 40..47, not yet written
    assert torch.equal(attend_cpp(q, k, v, tables, seqs, at, None, 0.25, 10, 0.0), want)


@needs_kernels
@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 140), min_size=1, max_size=4),
    fresh=st.lists(st.integers(1, 140), min_size=4, max_size=4),
    page=st.sampled_from([1, 3, 16, 100]),
    kv_heads=st.integers(1, 2),
    group=st.integers(1, 5),
    dim=st.sampled_from([4, 16, 40]),
    window=st.sampled_from([0, 0, 5, 70]),
    seed=st.integers(0, 1000),
)
def test_any_page_layout_and_rows_in_any_company(lengths, fresh, page, kv_heads, group, dim, window, seed):
    new = [min(a, b) for a, b in zip(lengths, fresh, strict=False)]
    q, k, v, tables, seqs, at = paged(lengths, new, kv_heads * group, kv_heads, dim, page, seed=seed)
    # outputs may be few here, and small by cancellation: then luck decides how exact eager is
    got = check_attend((q, k, v, tables, seqs, at), window=window, terms=v)
    n = seed % seqs.numel()
    alone = attend_cpp(
        q[:, :, n : n + 1], k, v, tables, seqs[n : n + 1], at[:, n : n + 1], None, dim**-0.5, window, 0.0
    )
    assert torch.equal(alone[0, :, 0], got[0, :, n])


@needs_kernels
def test_attend_refuses_what_would_read_foreign_memory():
    q, k, v, tables, seqs, at = paged([20], [1], 2, 1, 16, 16)
    for bad, message in [
        ((q, k, v, tables, seqs + 1, at), "block_tables has 1 rows"),
        ((q, k, v, tables, seqs, at + 20), "lies outside the 2 pages"),
        ((q, k, v, tables + 3, seqs, at), "block_tables names page"),
        ((q, k.double(), v, tables, seqs, at), "differ in dtype"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            attend_cpp(*bad, None, 1.0, 0, 0.0)


# ---- kv_write


@needs_kernels
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_kv_write_writes_in_place_what_the_body_writes(dtype):
    pages, x = torch.randn(5, 3, 4, 10).to(dtype), torch.randn(1, 6, 3, 10).to(dtype).transpose(1, 2)
    slots = torch.tensor([19, 4, 0, 7, 8, 11])
    want = OPS["kv_write"].fn(pages, x, slots)
    assert kv_write_cpp(pages, x, slots) is pages
    assert torch.equal(pages, want)


@needs_kernels
@pytest.mark.parametrize("slot", [-1, 20])
def test_kv_write_refuses_slots_that_are_not_there(slot):
    with pytest.raises(RuntimeError, match=f"slot {slot} of token 0 lies outside 20 slots"):
        kv_write_cpp(torch.zeros(5, 1, 4, 8), torch.zeros(1, 1, 1, 8), torch.tensor([slot]))


# ---- schemas, fakes, providers


@needs_kernels
@pytest.mark.parametrize("layout", ["fresh", "paged"])
def test_ops_agree_with_their_schemas_and_fakes(layout):
    tests = ("test_schema", "test_faketensor")
    args = paged([20, 3], [2, 3], 4, 2, 16, 8)
    if layout == "paged":
        torch.library.opcheck(torch.ops.llmopt.attend_cpp.default, (*args, None, 0.25, 0, 0.0), test_utils=tests)
        write = (args[1].clone(), torch.randn(1, 2, 2, 16), torch.tensor([8, 9]))
        torch.library.opcheck(torch.ops.llmopt.kv_write_.default, write, test_utils=tests)
    else:
        torch.library.opcheck(
            torch.ops.llmopt.linear_cpp.default, (torch.randn(2, 3, 8), torch.randn(5, 8)), test_utils=tests
        )


@needs_kernels
@pytest.mark.parametrize("name", ["linear", "attend", "kv_write"])
def test_providers_agree_with_the_bodies_on_the_declared_samples(name):
    for sample in OPS[name].samples_fn():
        copies = [a.clone() if isinstance(a, torch.Tensor) else a for a in sample]
        torch.testing.assert_close(OPS[name].providers["cpp"].fn(*copies), OPS[name].fn(*sample))


def test_providers_decline_what_they_cannot_do():
    supports = OPS["linear"].providers["cpp"].supports
    assert supports(torch.randn(2, 4), torch.randn(3, 4), None) is None
    assert "got float64" in supports(torch.randn(2, 4).double(), torch.randn(3, 4).double())
    assert "got bfloat16, float32" in supports(torch.randn(2, 4), torch.randn(3, 4).bfloat16())
    assert OPS["attend"].providers["cpp"].needs == {"cpp"}


# ---- building

ASK = "from llmopt.codegen.cpp import cpp_available; print(cpp_available())"


def ask(code=ASK, **env):
    full = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), **env}
    done = subprocess.run(
        [sys.executable, "-c", code], env=full, capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize(
    ("env", "said"),
    [
        ({"CXX": "", "PATH": ""}, "no C++ compiler was found"),
        ({"CXX": "absent-c++"}, "no C++ compiler was found"),
        ({"CXX": "false"}, "C++ compiler false failed with exit code 1"),
    ],
    ids=["no path", "absent", "broken"],
)
def test_without_a_compiler_there_is_one_line_and_no_crash(env, said, tmp_path):
    line = ask(LLMOPT_CACHE=str(tmp_path), **env)
    assert line.startswith(said)
    assert "\n" not in line
    assert not list(tmp_path.rglob("*.so"))


@needs_kernels
def test_a_cached_library_needs_no_compiler():
    assert ask(CXX="false", LLMOPT_CACHE=str(library_path().parent.parent)) == "None"


@needs_kernels
def test_a_library_built_elsewhere_is_taken_only_if_it_fits(tmp_path, monkeypatch):
    name, data = library_path().name, library_path().read_bytes()
    monkeypatch.setenv("LLMOPT_CACHE", str(tmp_path))
    install_library("cpu_kernels_0.so", data)
    assert not list(tmp_path.rglob("*.so"))
    install_library(name, data)
    assert ask(CXX="false", LLMOPT_CACHE=str(tmp_path)) == "None"


@needs_kernels
def test_a_damaged_library_is_told_in_one_line(tmp_path, monkeypatch):
    name = library_path().name
    monkeypatch.setenv("LLMOPT_CACHE", str(tmp_path))
    install_library(name, b"not a library")
    line = ask(LLMOPT_CACHE=str(tmp_path))
    assert "does not load" in line
    assert "delete it" in line
    assert "\n" not in line


def test_a_cache_that_cannot_be_written_is_one_line_with_the_remedy(tmp_path, monkeypatch):
    (tmp_path / "file").touch()  # in the default's place, which no one has looked at before
    monkeypatch.delenv("LLMOPT_CACHE", raising=False)
    line = ask(XDG_CACHE_HOME=str(tmp_path / "file"))
    assert line == (
        f"cache {tmp_path}/file/llmopt/cpp cannot be written (Not a directory); set LLMOPT_CACHE to a writable folder "
        "with free space"
    )


def test_a_library_built_elsewhere_needs_a_cache_that_can_be_written(tmp_path, monkeypatch):
    monkeypatch.setenv("LLMOPT_CACHE", str(tmp_path))
    monkeypatch.setattr("tempfile.NamedTemporaryFile", full_disk)
    with pytest.raises(BuildError, match=r"No space left on device.*set LLMOPT_CACHE to"):
        install_library(library_path().name, b"")


def test_a_compiler_without_space_is_told_with_the_remedy(tmp_path):
    compiler = tmp_path / "full-c++"
    compiler.write_text(
        "#!/bin/sh\necho 'ld: final link failed: No space left on device\nerror: ld failed' >&2; exit 1\n"
    )
    compiler.chmod(0o755)
    line = ask(LLMOPT_CACHE=str(tmp_path), CXX=str(compiler))
    assert line == (
        f"C++ compiler {compiler} failed (ld: final link failed: No space left on device); set LLMOPT_CACHE, and "
        "TMPDIR for the compiler's own files, to a writable folder with free space"
    )


def full_disk(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
