"""What is handed to the driver and what is made of its answers, with a driver that only writes down its calls."""

from __future__ import annotations

import ctypes
import dataclasses

import pytest
import torch

from llmopt.codegen.cubin import Cubin
from llmopt.compiler.errors import BuildError, DeviceError, DeviceMemoryError
from llmopt.runtime import cuda
from llmopt.runtime.cuda import LoadedKernel

real = pytest.importorskip("cuda.bindings.driver", reason="needs cuda-bindings")
OK = real.CUresult.CUDA_SUCCESS
CPU = -1  # the number of the device that tensors here are on
KINDS = ("*fp32", "*fp32", "i32", "i64", "fp32")
CUBIN = Cubin(b"cubin", "toy", 1000, 4, KINDS, False, "sm_90", "12.8", 30, 0)


class Driver:
    """Launches answer with `results`, then with success; what they were given is in `seen`."""

    def __init__(self):
        self.results, self.seen, self.calls = [], [], []
        for name in ("CUresult", "CUlaunchConfig", "CUlaunchAttribute", "CUlaunchAttributeID", "CUfunction_attribute"):
            setattr(self, name, getattr(real, name))

    def cuLaunchKernelEx(self, config, function, where, extra):
        places = (ctypes.c_void_p * 7).from_address(where)
        types = [
            ctypes.c_void_p,
            ctypes.c_void_p,
            ctypes.c_int32,
            ctypes.c_int64,
            ctypes.c_float,
            *[ctypes.c_void_p] * 2,
        ]
        values = tuple(t.from_address(p).value for t, p in zip(types, places, strict=True))
        grid = config.gridDimX, config.gridDimY, config.gridDimZ
        attributes = [(a.id.name, a.value.programmaticStreamSerializationAllowed) for a in config.attrs]
        self.seen.append((grid, (config.blockDimX, config.blockDimY, config.blockDimZ), values, attributes))
        self.seen[-1] += (config.sharedMemBytes, int(config.hStream), function)
        return (self.results.pop(0) if self.results else OK,)

    def cuGetErrorString(self, result):
        return OK, f"words for {int(result)}".encode()

    def cuDriverGetVersion(self):
        return OK, 12040

    def cuModuleLoadData(self, data):
        self.calls.append(("load", data))
        return self.results.pop(0) if self.results else OK, "module"

    def cuModuleGetFunction(self, module, name):
        return OK, f"{module}.{name.decode()}"

    def cuFuncSetAttribute(self, function, attribute, value):
        self.calls.append((function, attribute.name, value))
        return (OK,)

    def cuCtxSetCurrent(self, context):
        self.calls.append(("current", context))
        return (OK,)


@pytest.fixture
def driver(monkeypatch):
    made = Driver()
    monkeypatch.setattr(cuda, "_driver", lambda: made)
    monkeypatch.setattr(cuda, "current_stream", lambda device: 77)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(cuda, "_load", lambda cubin, device: ("function", "context"))
    return made


def kernel(**changes):
    return LoadedKernel(dataclasses.replace(CUBIN, **changes), CPU)


def test_arguments_grid_and_stream_arrive(driver):
    x = torch.zeros(4)
    kernel()((5, 6), [x, None, -3, 1 << 40, 0.25])
    values = (x.data_ptr(), None, -3, 1 << 40, 0.25, None, None)
    assert driver.seen == [((5, 6, 1), (128, 1, 1), values, [], 1000, 77, "function")]


def test_slots_are_filled_anew(driver):
    x, y = torch.zeros(4), torch.zeros(4)
    ready = kernel()
    ready((2,), [y, x, 4, 5, 6.0])
    ready((3, 1, 2), [None, None, 7, 8, 9.0])
    assert [s[0] for s in driver.seen] == [(2, 1, 1), (3, 1, 2)]
    assert [s[2][:5] for s in driver.seen] == [
        (y.data_ptr(), x.data_ptr(), 4, 5, 6.0), (None, None, 7, 8, 9.0)
    ]  # fmt: skip


def test_overlap_is_asked_for_where_the_kernel_says_so(driver):
    kernel(pdl=True)((1,), [None, None, 1, 2, 3.0])
    assert driver.seen[0][3] == [("CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION", 1)]


def test_nothing_to_do_is_not_launched(driver):
    kernel()((0, 8), [None, None, 1, 2, 3.0])
    assert driver.seen == []


def test_a_thread_of_its_own_is_given_the_context(driver):
    driver.results = [real.CUresult.CUDA_ERROR_INVALID_CONTEXT]
    kernel()((1,), [None, None, 1, 2, 3.0])
    assert driver.calls == [("current", "context")]
    assert len(driver.seen) == 2


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([None], "takes 5 arguments, got 1"),
        ([7, None, 1, 2, 3.0], "takes tensors on cuda:-1, got 7"),
        (
            [torch.zeros(4)[1:], None, 1, 2, 3.0],
            r"multiples of 16 bytes, got one of shape \(3,\)",
        ),
    ],
)
def test_arguments_that_do_not_fit(driver, args, message):
    with pytest.raises(BuildError, match=message):
        kernel()((1,), args)
    assert driver.seen == []


def test_a_tensor_elsewhere_is_refused(driver):
    with pytest.raises(BuildError, match="got a tensor on meta"):
        LoadedKernel(CUBIN, 0)((1,), [torch.zeros(4, device="meta"), None, 1, 2, 3.0])


def test_types_that_cannot_be_passed_are_refused_when_loaded(driver):
    with pytest.raises(BuildError, match="takes a fp16"):
        kernel(params=("fp16",))


@pytest.mark.parametrize(
    ("name", "kind", "words"),
    [
        ("CUDA_ERROR_OUT_OF_MEMORY", DeviceMemoryError, "free some memory"),
        ("CUDA_ERROR_ILLEGAL_ADDRESS", DeviceError, "the process must be started again"),
        ("CUDA_ERROR_INVALID_VALUE", DeviceError, r"for 1\)$"),
    ],
)
def test_a_launch_that_fails_says_where_and_in_the_drivers_words(driver, name, kind, words):
    driver.results = [getattr(real.CUresult, name)]
    with pytest.raises(kind, match=rf"^launching kernel toy over grid \(2, 1, 1\): {name} \(words.*{words}"):
        kernel()((2,), [None, None, 1, 2, 3.0])


def test_loading_asks_for_shared_memory_once(driver):
    cuda._function.cache_clear()
    large = dataclasses.replace(CUBIN, data=b"large", shared=100_000)
    assert [cuda._function(large, 0), cuda._function(large, 0)] == ["module.toy"] * 2
    attribute = "CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES"
    assert driver.calls == [("load", b"large"), ("module.toy", attribute, 100_000)]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("CUDA_ERROR_NO_BINARY_FOR_GPU", "it is for sm_100 and this GPU is sm_90; compile the model for cuda:sm_90"),
        ("CUDA_ERROR_INVALID_IMAGE", r"made by CUDA 12.8 for sm_100, and this driver is of CUDA 12.4 on sm_90; update"),
        ("CUDA_ERROR_UNSUPPORTED_PTX_VERSION", "update the driver"),
    ],
)
def test_a_cubin_that_does_not_load_says_what_it_is_and_what_is_here(driver, name, words):
    cuda._function.cache_clear()
    driver.results = [getattr(real.CUresult, name)]
    with pytest.raises(DeviceError, match=rf"^loading kernel toy: {name} \(words.*{words}"):
        cuda._function(dataclasses.replace(CUBIN, isa="sm_100"), 0)
