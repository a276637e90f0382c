"""GPUs: a table of what each architecture offers, and what torch and the driver say of the one in this machine.

The table serves targets whose GPU is not at hand; on a machine that has it, the facts are torch's. The sizes of a row
are those of the first product it names. Sources: CUDA C++ Programming Guide, "Compute Capabilities" (shared memory of a
block is the multiprocessor's less 1 KB; fp8 from 8.9, PDL and TMA from 9.0), PTX ISA (`scaled_mma`, products of codes
with block scales: tcgen05.mma of sm_100a, mma.sync of sm_120a) and "Binary Compatibility"; NVIDIA's data
sheets of A100 SXM 80 GB, L40S, H200 SXM, HGX B200 and RTX 5090 (multiprocessors, bandwidth); L2 as drivers report it.
"""

from __future__ import annotations

import os
import re
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llmopt.compiler.errors import did_you_mean

OLDEST = (8, 0)

# CUDA's major version -> the first Linux driver that runs it (CUDA release notes, "minor version compatibility")
DRIVERS = {12: "525.60.13", 13: "580.65.06"}


@dataclass(frozen=True)
class Gpu:
    """An architecture: its products, multiprocessors, bytes of shared memory a block may have (opted in), bytes of L2,
    bytes a second from memory, what the hardware can do, and the compute capabilities that its binaries run on.

    CUDA's rule: a binary for X.y runs on X.z with z >= y, Tegra (8.7, 8.8) left out. But from sm_90 on Triton compiles
    for `sm_90a`, `sm_100a`, ..., and a binary of such a name runs on that capability alone: sm_100's not on 10.3,
    sm_120's not on 12.1.
    """

    products: tuple[str, ...]
    cores: int
    shared_bytes: int
    l2_bytes: int
    bandwidth: int
    features: frozenset[str]
    runs_on: tuple[tuple[int, int], ...]


GPUS: dict[str, Gpu] = {
    "sm_80": Gpu(
        ("A100", "A800", "A30"), 108, 166912, 40 << 20, 2_039_000_000_000,
        frozenset({"bf16"}), ((8, 0), (8, 6), (8, 9)),
    ),
    "sm_89": Gpu(
        ("L40S", "L40", "L4", "RTX 4090"), 142, 101376, 96 << 20, 864_000_000_000,
        frozenset({"bf16", "fp8"}), ((8, 9),),
    ),
    "sm_90": Gpu(
        ("H200", "H100", "H800", "GH200"), 132, 232448, 60 << 20, 4_800_000_000_000,
        frozenset({"bf16", "fp8", "pdl", "tma", "wgmma"}), ((9, 0),),
    ),
    "sm_100": Gpu(
        ("B200", "GB200"), 148, 232448, 132_644_864, 7_700_000_000_000,
        frozenset({"bf16", "fp8", "fp4", "pdl", "tma", "tcgen05", "scaled_mma"}), ((10, 0),),
    ),
    "sm_120": Gpu(
        ("RTX 5090", "RTX 5080", "RTX PRO 6000"), 170, 101376, 96 << 20, 1_792_000_000_000,
        frozenset({"bf16", "fp8", "fp4", "pdl", "tma", "scaled_mma"}), ((12, 0),),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Seen:
    """What torch and the system say of GPUs, unjudged.

    `torch` and `cuda` are versions (`cuda` None: torch built without it), `driver` the loaded kernel driver's; `nodes`:
    this process sees NVIDIA device files; `visible` is CUDA_VISIBLE_DEVICES; `properties` are the current device's,
    None with torch's reason in `error`.
    """

    torch: str
    cuda: str | None
    driver: str | None = None
    nodes: bool = False
    visible: str | None = None
    error: str = ""
    properties: Any = None


def look() -> Seen:
    """Ask torch for the current CUDA device; the one place that does, so that tests can stand in for a machine."""
    import torch  # here, so that naming a target does not take the seconds of importing torch

    seen = Seen(
        torch.__version__,
        torch.version.cuda,
        _driver(),
        any(Path("/dev").glob("nvidia[0-9]*")),
        os.environ.get("CUDA_VISIBLE_DEVICES"),
    )
    if seen.cuda is None:
        return seen
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on old drivers and devices: `fault` says it, with a remedy
        try:
            properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        except (RuntimeError, AssertionError, torch.cuda.DeferredCudaCallError) as error:
            return replace(seen, error=str(error).strip().partition("\n")[0])
    return replace(seen, properties=properties)


def _driver() -> str | None:
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        return None
    found = re.search(r"Kernel Module.*?\s(\d+(?:\.\d+)+)", text)
    return found.group(1) if found else None


def fault(seen: Seen) -> str | None:
    """Why the GPU of this machine cannot be a target, with the remedy; None if it can."""
    if seen.properties is not None:
        return _unfit(seen.properties)
    if seen.cuda is None:
        return f"torch {seen.torch} is built without CUDA; install a CUDA build of torch (see pytorch.org)"
    if seen.visible is not None and seen.visible.strip() in ("", "-1"):
        return f"CUDA_VISIBLE_DEVICES is {seen.visible!r}, which hides every GPU; unset it"
    old = re.search(r"driver .* too old \(found version (\d+)\)", seen.error)
    if old or "no NVIDIA driver" in seen.error:
        return _bad_driver(seen, int(old.group(1)) if old else None)
    if not seen.nodes:
        return f"no NVIDIA GPU is visible (torch says: {seen.error}); start the container with its GPUs"
    return f"torch cannot use CUDA (it says: {seen.error}); see whether nvidia-smi runs, and CUDA_VISIBLE_DEVICES"


def _bad_driver(seen: Seen, serves: int | None) -> str:
    """`serves` is the CUDA version the driver knows, 11040 for 11.4; None: torch found no driver at all."""
    first = DRIVERS.get(int((seen.cuda or "0").split(".")[0]))
    wanted = f"wanted {first} or newer" if first else "wanted a newer one"
    built = f"torch {seen.torch} is built for CUDA {seen.cuda}"
    if serves is not None:
        driver = f"the NVIDIA driver{f' is {seen.driver} and' if seen.driver else ''} knows CUDA up to {_cuda(serves)}"
        return f"{driver}, and {built}: {wanted}; install such a driver, or a torch built for an older CUDA"
    if seen.driver:
        return (
            f"the NVIDIA driver {seen.driver} is loaded, but its library libcuda.so.1 is not visible to this process; "
            "start the container with its GPUs, or install the driver's libraries"
        )
    if seen.nodes:
        return f"no NVIDIA driver is loaded, and {built}: {wanted}; install such a driver"
    return f"no NVIDIA GPU or driver was found, and {built}: {wanted}; install such a driver"


def _cuda(version: int) -> str:
    return f"{version // 1000}.{version % 1000 // 10}"


def _unfit(properties: Any) -> str | None:
    capability = (properties.major, properties.minor)
    if isa_for(capability) is not None:
        return None
    why = f"{_foreign(capability)} (it has {', '.join(GPUS)})"
    if capability < OLDEST:
        why = f"wanted {_dotted(OLDEST)} (A100) or newer"
    return (
        f"GPU {properties.name!r} has compute capability {_dotted(capability)}, {why}; "
        "pick another GPU with CUDA_VISIBLE_DEVICES, or use target cpu"
    )


def _foreign(capability: tuple[int, int]) -> str:
    """What keeps a newer capability from being served."""
    sibling = next((isa for isa, gpu in GPUS.items() if gpu.runs_on[0][0] == capability[0]), None)
    why = f", and code for {sibling} does not run on it" if sibling else ""
    return f"which this version of llmopt has no code for{why}"


def isa_for(capability: tuple[int, int]) -> str | None:
    """The best row whose code a GPU of this capability runs: 8.6 -> `sm_80`; None if there is none."""
    return next((isa for isa in reversed(GPUS) if capability in GPUS[isa].runs_on), None)


def included(isa: str) -> frozenset[str]:
    """The rows whose code the GPUs of a row run, itself included: sm_89 -> sm_80, sm_89."""
    own = GPUS[isa].runs_on[0]
    return frozenset(other for other, gpu in GPUS.items() if own in gpu.runs_on)


def bandwidth(properties: Any) -> int:
    """Bytes a second: two transfers a clock (kHz) over the bus (bits). Of the whole board, also on a slice of it."""
    return int(properties.memory_clock_rate) * 1000 * 2 * int(properties.memory_bus_width) // 8


def meant(text: str) -> str | None:
    """The remedy for a name of a GPU that is no target, `did you mean 'cuda:sm_90'?`; None if it names no GPU."""
    text = text.strip().lower()
    if text in ("gpu", "nvidia", "cuda:", "gpu:"):
        return f"did you mean 'cuda'? It is this machine's GPU; others are {_names()}."
    if re.fullmatch(r"(cuda|gpu):\d", text):
        return "a target is no device: did you mean 'cuda'? CUDA_VISIBLE_DEVICES picks among several GPUs."
    named = re.sub(r"^(cuda|gpu|nvidia)[:\s]*|[\s_-]", "", text)
    for isa, gpu in GPUS.items():
        if named in (product.replace(" ", "").lower() for product in gpu.products):
            return f"did you mean 'cuda:{isa}'?"
    digits = re.fullmatch(r"(?:sm|cc|compute)?(\d{1,2})\.?(\d)[af]?", named)
    return _numbered((int(digits.group(1)), int(digits.group(2)))) if digits else _worded(text)


def _numbered(capability: tuple[int, int]) -> str:
    isa = isa_for(capability)
    if isa is not None and capability == GPUS[isa].runs_on[0]:
        return f"did you mean 'cuda:{isa}'?"
    said = f"compute capability {_dotted(capability)}"
    if isa is not None:  # not simply `isa`: that row's GPU may have more shared memory
        return f"{said} has no target of its own: on a machine with such a GPU, 'cuda' compiles code of {isa} for it."
    if capability < OLDEST:
        return f"{said} is too old, wanted {_dotted(OLDEST)} or newer: use one of {_names()}, or cpu."
    return f"that is {said}, {_foreign(capability)}: use one of {_names()}, or cpu."


def _worded(text: str) -> str | None:
    return did_you_mean(text, [f"cuda:{isa}" for isa in GPUS]) if text.startswith(("cuda:", "sm_")) else None


def _names() -> str:
    return ", ".join(f"cuda:{isa}" for isa in GPUS)


def _dotted(capability: tuple[int, int]) -> str:
    return f"{capability[0]}.{capability[1]}"
