"""Cubins on a GPU: loaded and launched through the driver on torch's current stream, where torch's graphs capture them.

A loaded cubin stays loaded for the life of the process: a captured graph refers to its kernels and does not keep them.
"""

from __future__ import annotations

import ctypes
import functools
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from llmopt.codegen.cubin import Cubin
from llmopt.codegen.kernel import Argument, Kernel, Launch, Launcher
from llmopt.compiler._torch import current_stream
from llmopt.compiler.errors import BuildError, DeviceError, DeviceMemoryError

_NUMBERS: dict[str, Any] = {"i32": ctypes.c_int32, "i64": ctypes.c_int64, "fp32": ctypes.c_float}
_SCRATCH = 2  # pointers behind the arguments: Triton's kernels take scratch memory, which these do not use
_ALIGNMENT = 16  # bytes, which compiled kernels rely on
_PLAIN_SHARED = 48 * 1024  # bytes a block may have without asking


def launcher(cubin: Callable[[Kernel], Cubin], device: torch.device | str = "cuda") -> Launcher:
    """What makes kernels ready to run on `device`; `cubin` gives a kernel compiled.

    Loading raises BuildError or DeviceError. Load before a graph is captured, as the driver may have to wait then.
    """
    place = torch.device(device)
    index = torch.cuda.current_device() if place.index is None else place.index

    def ready(kernel: Kernel) -> Launch:
        return LoadedKernel(cubin(kernel), index)

    return ready


class LoadedKernel:
    """One cubin on one GPU: call it with a grid and the arguments."""

    def __init__(self, cubin: Cubin, device: int) -> None:
        self.cubin, self.device = cubin, device
        self.function, self.context = _load(cubin, device)
        self.attributes = [_overlapped()] if cubin.pdl else []
        self._frame, self._lock = _Frame(self), threading.Lock()

    def __call__(self, grid: tuple[int, ...], args: Sequence[Argument]) -> None:
        """Launch on torch's current stream. Tensors must outlive the launch, as with any work on a stream.

        Raises BuildError (arguments that do not fit), DeviceError or DeviceMemoryError.
        """
        if all(grid):
            with self._lock:  # arguments are read when the launch is made, not later
                self._frame.fill(grid, args)
                self._launch(self._frame)

    def _launch(self, frame: _Frame) -> None:
        config = frame.config
        config.hStream = current_stream(self.device)
        (result,) = _driver().cuLaunchKernelEx(config, self.function, frame.where, 0)
        if result:
            self._failed(result, frame)

    def _failed(self, result: Any, frame: _Frame) -> None:
        driver = _driver()
        if result == driver.CUresult.CUDA_ERROR_INVALID_CONTEXT:  # the first call of a new thread
            _check(driver.cuCtxSetCurrent(self.context), "making the GPU current to this thread")
            (result,) = driver.cuLaunchKernelEx(frame.config, self.function, frame.where, 0)
        config = frame.config
        grid = config.gridDimX, config.gridDimY, config.gridDimZ
        _check((result,), f"launching kernel {self.cubin.entry} over grid {grid}")


class _Frame:
    """What one launch reads: its configuration, the values of the arguments, and their addresses at `where`."""

    def __init__(self, kernel: LoadedKernel) -> None:
        cubin = kernel.cubin
        self.entry, self.params, self.device = cubin.entry, cubin.params, kernel.device
        if odd := [kind for kind in cubin.params if kind[0] != "*" and kind not in _NUMBERS]:
            raise BuildError(f"kernel {cubin.entry} takes a {odd[0]}, which this llmopt cannot pass; compile it again")
        kinds = [ctypes.c_void_p if kind[0] == "*" else _NUMBERS[kind] for kind in cubin.params]
        self.values = [kind() for kind in (*kinds, *[ctypes.c_void_p] * _SCRATCH)]
        self.slots = list(zip(self.values, (kind[0] == "*" for kind in cubin.params), strict=False))
        self.addresses = (ctypes.c_void_p * len(self.values))(*map(ctypes.addressof, self.values))
        self.where = ctypes.addressof(self.addresses)
        self.config = _driver().CUlaunchConfig()
        self.config.blockDimX, self.config.blockDimY, self.config.blockDimZ = 32 * cubin.num_warps, 1, 1
        self.config.sharedMemBytes = cubin.shared
        if kernel.attributes:
            self.config.attrs, self.config.numAttrs = kernel.attributes, len(kernel.attributes)

    def fill(self, grid: tuple[int, ...], args: Sequence[Argument]) -> None:
        """Set grid and arguments."""
        if len(args) != len(self.params):
            raise BuildError(f"kernel {self.entry} takes {len(self.params)} arguments, got {len(args)}")
        config = self.config
        config.gridDimX, config.gridDimY, config.gridDimZ = (*grid, 1, 1)[:3]
        device = self.device
        for (slot, pointer), arg in zip(self.slots, args, strict=True):  # scratch stays null
            if not pointer or arg is None:
                slot.value = arg
            elif isinstance(arg, Tensor) and arg.get_device() == device and not (at := arg.data_ptr()) % _ALIGNMENT:
                slot.value = at
            else:
                raise self._refused(arg)

    def _refused(self, value: Argument) -> BuildError:
        if not isinstance(value, Tensor) or value.get_device() != self.device:
            seen = f"a tensor on {value.device}" if isinstance(value, Tensor) else repr(value)
            return BuildError(f"kernel {self.entry} takes tensors on cuda:{self.device}, got {seen}")
        return BuildError(
            f"kernel {self.entry} takes tensors at multiples of {_ALIGNMENT} bytes, got one of shape "
            f"{tuple(value.shape)} at {value.data_ptr():#x}; copy it"
        )


def _load(cubin: Cubin, device: int) -> tuple[Any, Any]:
    """The function and its context. Raises DeviceError."""
    with torch.cuda.device(device):
        # the first work of a thread makes torch's context current to it, and the driver loads into that
        torch.empty(1, device=f"cuda:{device}")
        driver = _driver()
        context = _check(driver.cuCtxGetCurrent(), "finding the GPU's context")
        return _function(cubin, device), context


@functools.cache
def _function(cubin: Cubin, device: int) -> Any:
    driver = _driver()
    what = f"loading kernel {cubin.entry}"
    result, module = driver.cuModuleLoadData(cubin.data)
    if result != driver.CUresult.CUDA_SUCCESS:
        raise _unloadable(cubin, device, result, what)
    function = _check(driver.cuModuleGetFunction(module, cubin.entry.encode()), what)
    if cubin.shared > _PLAIN_SHARED:
        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        _check(driver.cuFuncSetAttribute(function, attribute, cubin.shared), f"{what} with {cubin.shared} bytes shared")
    return function


def _unloadable(cubin: Cubin, device: int, result: Any, what: str) -> Exception:
    driver = _driver()
    codes = driver.CUresult
    here = f"sm_{''.join(map(str, torch.cuda.get_device_capability(device)))}"
    known = f"{what}: {_text(result)}"
    if result == codes.CUDA_ERROR_NO_BINARY_FOR_GPU:
        return DeviceError(f"{known}: it is for {cubin.isa} and this GPU is {here}; compile the model for cuda:{here}")
    if result in (codes.CUDA_ERROR_INVALID_IMAGE, codes.CUDA_ERROR_UNSUPPORTED_PTX_VERSION):
        _, number = driver.cuDriverGetVersion()
        return DeviceError(
            f"{known}: it was made by CUDA {cubin.toolkit} for {cubin.isa}, and this driver is of CUDA "
            f"{number // 1000}.{number % 1000 // 10} on {here}; update the driver, or compile the model on this machine"
        )
    return _error(result, what)


def _overlapped() -> Any:
    """The attribute that lets a kernel start before the one ahead has ended."""
    driver = _driver()
    attribute = driver.CUlaunchAttribute()
    attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
    attribute.value.programmaticStreamSerializationAllowed = 1
    return attribute


@functools.cache
def _driver() -> Any:
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise BuildError(
            f"kernels are launched through the package cuda-bindings, which cannot be imported ({error}); "
            "pip install cuda-bindings"
        ) from error
    return driver


def _check(answer: tuple[Any, ...], what: str) -> Any:
    """The driver's answer without its result code. Raises DeviceError or DeviceMemoryError."""
    result, *values = answer
    if result != _driver().CUresult.CUDA_SUCCESS:
        raise _error(result, what)
    return values[0] if values else None


def _error(result: Any, what: str) -> Exception:
    codes = _driver().CUresult
    text = f"{what}: {_text(result)}"
    if result == codes.CUDA_ERROR_OUT_OF_MEMORY:
        return DeviceMemoryError(f"{text}; free some memory of the GPU, or give the KV cache less of it")
    if result in (
        codes.CUDA_ERROR_ILLEGAL_ADDRESS,
        codes.CUDA_ERROR_LAUNCH_FAILED,
        codes.CUDA_ERROR_MISALIGNED_ADDRESS,
    ):
        return DeviceError(
            f"{text}; this kernel or one before it is at fault, and the process must be started again: "
            "CUDA_LAUNCH_BLOCKING=1 tells which"
        )
    return DeviceError(text)


def _text(result: Any) -> str:
    """`CUDA_ERROR_INVALID_VALUE (invalid argument)`"""
    driver = _driver()
    _, text = driver.cuGetErrorString(result)
    return f"{result.name} ({text.decode() if text else 'unknown to this driver'})"
