"""The cpu target's own kernels: built once per machine, and offered as provider `cpp` of linear, attend and kv_write.

The schemas are declared here, so the ops exist (and can be traced) whether or not the library can be built; the
library only adds their CPU kernels. It is found by its key in the cache folder before any compiler is looked for.
"""

from __future__ import annotations

import errno
import fcntl
import functools
import hashlib
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmopt.compiler import knobs
from llmopt.compiler.errors import BuildError
from llmopt.compiler.ops.attention import attend, attend_unpacked, kv_write, write_packed
from llmopt.compiler.ops.linear import linear
from llmopt.compiler.ops.near import attend_near, near_write
from llmopt.compiler.quant.kv import Packing
from llmopt.compiler.target import cxx

SOURCES = Path(__file__).parent / "templates"
MAIN = "cpu_kernels.cpp"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ANY = (*DTYPES, torch.float64)

_SCHEMAS = torch.library.Library("llmopt", "FRAGMENT")
_SCHEMAS.define("linear_cpp(Tensor x, Tensor weight, Tensor? bias=None) -> Tensor")
_SCHEMAS.define(
    "attend_cpp(Tensor q, Tensor k_pages, Tensor v_pages, Tensor block_tables, Tensor seq_ids, Tensor positions, "
    "Tensor? sinks, float scale, int window, float softcap) -> Tensor"
)
_SCHEMAS.define("kv_write_(Tensor(a!) pages, Tensor x, Tensor slots) -> ()")
# packed pages: torch packs and unpacks them around the kernel, out of sight of whoever traces a region
_SCHEMAS.define(
    "attend_packed_cpp(Tensor q, Tensor k_pages, Tensor v_pages, Tensor block_tables, Tensor seq_ids, "
    "Tensor positions, Tensor? sinks, float scale, int window, float softcap, str k_packing, str v_packing) -> Tensor"
)
_SCHEMAS.define("kv_write_packed_(Tensor(a!) pages, Tensor x, Tensor slots, str packing) -> ()")
_SCHEMAS.define(
    "near_write_(Tensor(a!) pages, Tensor x, Tensor block_tables, Tensor seq_ids, Tensor positions, Tensor attended, "
    "int first, int recent) -> ()"
)


@torch.library.register_fake("llmopt::linear_cpp", lib=_SCHEMAS)
def _linear_fake(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@torch.library.register_fake("llmopt::attend_cpp", lib=_SCHEMAS)
def _attend_fake(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    block_tables: Tensor,
    seq_ids: Tensor,
    positions: Tensor,
    sinks: Tensor | None,
    scale: float,
    window: int,
    softcap: float,
) -> Tensor:
    # token by token in memory, so that the projection behind it reads its rows in place
    return q.new_empty((1, q.shape[2], q.shape[1], v_pages.shape[3])).transpose(1, 2)


@torch.library.register_fake("llmopt::attend_packed_cpp", lib=_SCHEMAS)
def _attend_packed_fake(q: Tensor, k_pages: Tensor, v_pages: Tensor, *rest: Any) -> Tensor:
    width = v_pages.shape[3] if not rest[-1] else Packing.parse(rest[-1]).channels(v_pages.shape[3])
    return q.new_empty((*q.shape[:-1], width))


def _attend_packed(q: Tensor, *rest: Any) -> Tensor:
    return attend_unpacked(torch.ops.llmopt.attend_cpp.default, q, *rest).contiguous()


@torch.library.register_fake("llmopt::kv_write_", lib=_SCHEMAS)
@torch.library.register_fake("llmopt::kv_write_packed_", lib=_SCHEMAS)
def _kv_write_fake(pages: Tensor, x: Tensor, slots: Tensor, packing: str = "") -> None:
    return None


def _kv_write_packed(pages: Tensor, x: Tensor, slots: Tensor, packing: str) -> None:
    write_packed(pages, x, slots, packing)


@torch.library.register_fake("llmopt::near_write_", lib=_SCHEMAS)
def _near_write_fake(pages: Tensor, *rest: Any) -> None:
    return None


def _near_write(*given: Any) -> None:
    near_write.in_place_fn(*given)  # type: ignore[misc]


_SCHEMAS.impl("near_write_", _near_write, "CPU")
_SCHEMAS.impl("attend_packed_cpp", _attend_packed, "CPU")
_SCHEMAS.impl("kv_write_packed_", _kv_write_packed, "CPU")


def _dtype_reason(*tensors: Tensor | None, allowed: tuple[torch.dtype, ...] = DTYPES) -> str | None:
    given = [t for t in tensors if t is not None]
    if any(t.device.type != "cpu" for t in given):
        return f"needs tensors on the cpu, got {given[0].device}"
    dtypes = {t.dtype for t in given}
    if len(dtypes) > 1 or not dtypes <= set(allowed):
        seen, wanted = (", ".join(sorted(str(d).removeprefix("torch.") for d in ds)) for ds in (dtypes, allowed))
        return f"needs one of {wanted} throughout, got {seen}"
    return None


def _linear_supports(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> str | None:
    return _dtype_reason(x, weight, bias)


def _attend_supports(q: Tensor, k_pages: Tensor, v_pages: Tensor, *rest: object) -> str | None:
    # packed pages are unpacked beforehand, into fp32
    plain = [p for p, packing in zip((k_pages, v_pages), rest[7:] or ("", ""), strict=True) if not packing]
    return _dtype_reason(q, *plain)


def _kv_write_supports(pages: Tensor, x: Tensor, slots: Tensor, packing: str = "") -> str | None:
    return _dtype_reason(*([] if packing else [pages]), x, allowed=ANY)


@linear.provider("cpp", needs={"cpp"}, supports=_linear_supports)
def linear_cpp(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`linear`; up to 16 rows by a kernel that streams the weight once, more by torch.

    A row's bits do not depend on the other rows of a call of up to 16.
    """
    return torch.ops.llmopt.linear_cpp.default(x, weight, bias)


@attend.provider("cpp", needs={"cpp"}, supports=_attend_supports)
def attend_cpp(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    block_tables: Tensor,
    seq_ids: Tensor,
    positions: Tensor,
    sinks: Tensor | None,
    scale: float,
    window: int,
    softcap: float,
    k_packing: str = "",
    v_packing: str = "",
) -> Tensor:
    """`attend`; a row's bits do not depend on the other rows. The result is a transposed view of [1, N, Hq, D]."""
    given = q, k_pages, v_pages, block_tables, seq_ids, positions, sinks, scale, window, softcap
    if k_packing or v_packing:
        return torch.ops.llmopt.attend_packed_cpp.default(*given, k_packing, v_packing)
    return torch.ops.llmopt.attend_cpp.default(*given)


@kv_write.provider("cpp", needs={"cpp"}, supports=_kv_write_supports)
def kv_write_cpp(pages: Tensor, x: Tensor, slots: Tensor, packing: str = "") -> Tensor:
    """`kv_write` in place: overwrites `pages` and returns it."""
    if packing:
        torch.ops.llmopt.kv_write_packed_.default(pages, x, slots, packing)
    else:
        torch.ops.llmopt.kv_write_.default(pages, x, slots)
    return pages


@attend_near.provider("cpp", needs={"cpp"}, supports=lambda *given: _dtype_reason(given[0], allowed=ANY))
def attend_near_cpp(*given: Any) -> Tensor:
    """`attend_near` by torch, out of sight of whoever traces a region."""
    return torch.ops.llmopt.attend_near.default(*given)


@near_write.provider("cpp", needs={"cpp"}, supports=lambda *given: _dtype_reason(given[1], allowed=ANY))
def near_write_cpp(pages: Tensor, *given: Any) -> Tensor:
    """`near_write` in place, by torch: overwrites `pages` and returns it."""
    torch.ops.llmopt.near_write_.default(pages, *given)
    return pages


def cpp_available() -> str | None:
    """None if the kernels are loaded (building them now if need be), else the reason why not, in one line."""
    try:
        load_library()
    except BuildError as error:
        return str(error)
    return None


def compiler_fails() -> str | None:
    """None if the C++ compiler starts and answers, else why not: regions need it even if the kernels are cached."""
    command = cxx()
    if command is None:
        return "no C++ compiler was found: install g++ or clang++, or let CXX name one"
    try:
        done = subprocess.run([*command, "--version"], capture_output=True, text=True, check=False)
    except OSError as error:
        return f"C++ compiler {command[0]} does not start ({error})"
    return (
        None
        if done.returncode == 0
        else f"C++ compiler {command[0]} failed with exit code {done.returncode}; let CXX name a working one"
    )


@functools.cache
def load_library() -> Path:
    """Load the kernels, building them unless the cache has them; returns the library's path. Raises BuildError."""
    path = library_path()
    if not path.exists():
        with knobs.writing_cache():
            _build(path)
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        raise BuildError(
            f"kernel library {path} does not load ({_one_line(str(error))}); delete it to have it built anew"
        ) from error
    return path


def library_path() -> Path:
    """Where the library for this source, these flags, this torch and this CPU lies in the cache."""
    digest = hashlib.sha256()
    for file in sorted(SOURCES.glob("cpu_*")):
        digest.update(file.read_bytes())
    digest.update("\0".join(machine_key()).encode())
    return knobs.cache() / "cpp" / f"cpu_kernels_{digest.hexdigest()[:20]}.so"


def machine_key() -> list[str]:
    """What built code depends on besides its source: compiler flags, torch, and this CPU."""
    return [*_flags(), torch.__version__, _cpu()]


def install_library(name: str, data: bytes) -> None:
    """Put a library built elsewhere (`load_library().name`, its bytes) into the cache if it is the one for here.

    Raises BuildError: the cache cannot be written.
    """
    path = library_path()
    if path.name == name and not path.exists():
        with knobs.writing_cache():
            path.parent.mkdir(parents=True, exist_ok=True)
            _write_new(path, data)


def _build(path: Path) -> None:
    compiler = cxx()
    if compiler is None:
        raise BuildError("no C++ compiler was found: install g++ or clang++, or let CXX name one")
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if path.exists():  # another process built it while this one waited
            return
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            made = Path(folder) / path.name
            _compile([*compiler, *_flags(), *_places(), str(SOURCES / MAIN), "-o", str(made), *_links()])
            os.replace(made, path)


def _compile(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise BuildError(f"C++ compiler {command[0]} does not start ({error}); let CXX name a working one") from error
    if done.returncode != 0:
        if full := [line for line in done.stderr.splitlines() if os.strerror(errno.ENOSPC) in line]:
            raise BuildError(
                f"C++ compiler {command[0]} failed ({_one_line(full[0])}); set LLMOPT_CACHE, and TMPDIR for the "
                "compiler's own files, to a writable folder with free space"
            )
        said = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()
        raise BuildError(
            f"C++ compiler {command[0]} failed with exit code {done.returncode} "
            f"({_one_line(said[0]) if said else 'no message'}); let CXX name g++ 10 or clang++ 12, or newer ones"
        )


def _one_line(text: str) -> str:
    return " ".join(text.split())[:300]


def _write_new(path: Path, data: bytes) -> None:
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        file.write(data)
    os.replace(file.name, path)


def _flags() -> list[str]:
    machine = "-mcpu=native" if platform.machine() in ("aarch64", "arm64") else "-march=native"
    # fused multiply-adds are written out; a compiler that makes them at its own choice decides the bits of a sum
    flags = ["-std=c++20", "-O3", machine, "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-w"]
    flags += ["-fPIC", "-shared", f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"]
    return [*flags, "-undefined", "dynamic_lookup"] if sys.platform == "darwin" else [*flags, "-fopenmp"]


def _places() -> list[str]:
    include = Path(torch.__file__).parent / "include"
    return [f"-I{include}", f"-I{include / 'torch' / 'csrc' / 'api' / 'include'}"]


def _links() -> list[str]:
    return [f"-L{Path(torch.__file__).parent / 'lib'}", "-lc10", "-ltorch_cpu"]


def _cpu() -> str:
    """What -march=native looks at: the machine and, where the system tells, its instruction set extensions."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    flags = next((line for line in lines if line.lower().startswith(("flags", "features"))), "")
    return f"{platform.machine()} {' '.join(sorted(flags.split()))}"
