"""Kernels compiled, loaded and launched on a GPU: arguments, streams, shared memory, overlapped launches in a graph."""

from __future__ import annotations

import dataclasses
import itertools
import threading

import pytest
import torch
from toy_kernels import DOUBLE, PLUS_Z, SQUARE, product, toy, toys

from llmopt.codegen.cubin import compile_kernel
from llmopt.codegen.kernel import Kernel
from llmopt.compiler import knobs
from llmopt.compiler.errors import BuildError, DeviceError
from llmopt.compiler.target import Target
from llmopt.runtime import cuda

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
ROWS = 1000
GRID = (-(-ROWS // 128),)


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with knobs.scope(cache=tmp_path_factory.mktemp("cache")), toys():
        yield


def ready(kernel: Kernel):
    return cuda.launcher(lambda k: compile_kernel(k, Target.detect("cuda")))(kernel)


def overlaps() -> bool:
    return "pdl" in Target.detect("cuda").features


def tensors():
    x = torch.randn(ROWS, device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    return x, torch.full((ROWS,), torch.nan, device="cuda")


def test_arguments_of_every_type_arrive():
    x, y = tensors()
    ready(toy(DOUBLE))(GRID, [x, None, y, ROWS - 1, -3, 0.25])
    torch.testing.assert_close(y[:-1], 2 * x[:-1] * 0.25 - 3)
    assert y[-1].isnan()
    ready(toy(PLUS_Z))(GRID, [x, torch.full((4,), 7.0, device="cuda"), y, ROWS, 1 << 40, 1.0])
    torch.testing.assert_close(y, x + 7 + 2.0**40)


def test_launches_go_to_torchs_current_stream():
    x, y = tensors()
    launch, side = ready(toy(DOUBLE)), torch.cuda.Stream()
    x.fill_(1.0)
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)  # work on another stream would overtake the filling below
        x.fill_(4.0)
        launch(GRID, [x, None, y, ROWS, 0, 1.0])
    side.synchronize()
    assert y.unique().tolist() == [8.0]


def test_a_new_thread_launches():
    x, y = tensors()
    launch, errors = ready(toy(DOUBLE)), []

    def run():
        try:
            launch(GRID, [x, None, y, ROWS, 0, 1.0])
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    torch.cuda.synchronize()
    assert errors == []
    torch.testing.assert_close(y, 2 * x)


def test_more_than_48_kilobytes_of_shared_memory():
    kernel = product(k=512)
    assert compile_kernel(kernel, Target.detect("cuda")).shared > 48 * 1024
    a, b = (torch.randn(s, device="cuda").half() for s in ((128, 512), (512, 128)))
    c = torch.empty(128, 128, device="cuda")
    ready(kernel)((1,), [a, b, c])
    exact = a.double() @ b.double()
    wrong, torchs = ((m.double() - exact).abs().max() for m in (c, a.float() @ b.float()))
    assert wrong <= 4 * torchs + 1e-4


@pytest.mark.parametrize("pdl", [False, True])
def test_a_chain_in_a_graph_is_right_at_every_replay(pdl):
    """40 kernels, each reading what the one ahead wrote: an early start that does not wait is seen as a wrong value."""
    if pdl and not overlaps():
        pytest.skip("this GPU has no programmatic dependent launch")
    count, rows = 40, 132 * 128 * 3
    launch = ready(toy(DOUBLE, pdl=pdl))
    grid = (rows // 128,)
    held = [torch.zeros(rows, device="cuda") for _ in range(count + 1)]

    def chain():
        for x, y in itertools.pairwise(held):
            launch(grid, [x, None, y, rows, 1, 0.5])  # y = x + 1

    chain()  # loading is no part of a capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        chain()
    wrong = torch.zeros((), dtype=torch.int64, device="cuda")
    for step in range(300):
        held[0].fill_(float(step))
        graph.replay()
        wrong += (held[-1] != step + count).sum()
    assert int(wrong) == 0


def test_captured_kernels_outlive_their_launcher():
    x, y = tensors()
    launch = ready(toy(SQUARE))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch(GRID, [x, None, y, ROWS, 0, 1.0])
    del launch
    graph.replay()
    torch.testing.assert_close(y, x * x)


def test_what_does_not_fit_is_refused_before_the_launch():
    x, y = tensors()
    launch = ready(toy(DOUBLE))
    with pytest.raises(BuildError, match="got a tensor on cpu"):
        launch(GRID, [x.cpu(), None, y, ROWS, 0, 1.0])
    with pytest.raises(BuildError, match="multiples of 16 bytes"):
        launch(GRID, [x[1:], None, y, ROWS, 0, 1.0])
    with pytest.raises(DeviceError, match="CUDA_ERROR_INVALID_VALUE"):
        launch((1, 1 << 20), [x, None, y, ROWS, 0, 1.0])


def test_a_cubin_for_another_gpu_and_one_that_is_none_do_not_load():
    isa = Target.detect("cuda").isa
    other = "sm_100" if isa != "sm_100" else "sm_90"
    strange = compile_kernel(toy(DOUBLE), Target.parse(f"cuda:{other}"))
    with pytest.raises(DeviceError, match=f"for {other}"):
        cuda.LoadedKernel(strange, 0)
    with pytest.raises(DeviceError, match=r"^loading kernel toy: CUDA_ERROR"):
        cuda.LoadedKernel(dataclasses.replace(strange, data=b"\0" * 4096), 0)
