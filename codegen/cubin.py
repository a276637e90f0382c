"""Kernels to cubins: Triton's compiler for a GPU that need not be there, behind a cache of what was compiled.

A cubin is found by everything it depends on: the kernel, the template's text, the GPU's architecture, Triton's version
and settings, and the assembler. Entries are checked when they are read, and written whole; a lock for each keeps two
processes from compiling one kernel twice.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.metadata
import inspect
import io
import json
import re
import tempfile
import threading
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from llmopt.codegen import hooks, machine_code
from llmopt.codegen.kernel import Kernel
from llmopt.compiler import knobs
from llmopt.compiler.errors import BuildError
from llmopt.compiler.target import Target

VERSION = 2
_ONE_AT_A_TIME = threading.Lock()  # Triton's settings and sys.stdout are the process's
# Triton's settings by part that change code and that its own list of environment variables lacks
_SETTINGS = {
    "nvidia": ("disable_ptxas_opt", "ptxas_options", "mock_ptx_version", "libdevice_path"),
    "compilation": ("override", "enable_asan", "instrumentation_mode"),
    "runtime": ("override_arch",),
}
TYPES = ("i32", "i64", "fp32")  # of runtime arguments that are no pointer


@dataclass(frozen=True)
class Cubin:
    """A compiled kernel: `data` is the cubin, the rest is what a launch and a reader need to know of it.

    `params` are the types of the runtime arguments in order; behind them the kernel takes two more pointers (scratch
    memory that it does not use). `shared` (bytes) is dynamic shared memory, `registers` are those of a thread, `spills`
    the bytes a thread stores and loads for want of registers, `toolkit` the version of CUDA that assembled it.
    """

    data: bytes
    entry: str
    shared: int
    num_warps: int
    params: tuple[str, ...]
    pdl: bool
    isa: str
    toolkit: str
    registers: int
    spills: int

    def facts(self) -> dict[str, Any]:
        """Everything but `data`, in JSON types; `from_facts` reads it back."""
        return {**asdict(replace(self, data=b"")), "data": None, "params": list(self.params)}

    @classmethod
    def from_facts(cls, facts: Mapping[str, Any], data: bytes) -> Cubin:
        """Read `facts`' form. Raises TypeError or KeyError if it is another."""
        return cls(**{**facts, "data": data, "params": tuple(facts["params"])})


def architecture(target: Target) -> int:
    """90 for isa sm_90. Raises BuildError: the target is no GPU."""
    found = re.fullmatch(r"sm_(\d+)", target.isa)
    if found is None:
        raise BuildError(f"target {target.name} is no GPU: kernels are compiled for an isa such as sm_90")
    return int(found[1])


def triton_version() -> str:
    """The version that compiles, found without importing it. Raises BuildError."""
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        raise BuildError("Triton is not installed, and GPU kernels need it: pip install triton (Linux)") from None


def settings(sm: int) -> dict[str, Any]:
    """What changes the code that Triton makes of a kernel, other than its version: the environment's and the process's
    settings, and the assembler. Triton must be there."""
    from triton import knobs as own
    from triton._C.libtriton import get_cache_invalidating_env_vars

    found = {**get_cache_invalidating_env_vars(), **own.language.knobs}
    found.pop("TRITON_DISABLE_LINE_INFO", None)  # set for every compilation
    for place, names in _SETTINGS.items():
        found.update((f"{place}.{name}", getattr(getattr(own, place), name, None)) for name in names)
    return {**found, "ptxas": _assembler(sm)}


def _assembler(sm: int) -> list[str]:
    """Version of ptxas, and where it is if it is not Triton's own; empty if there is none, which compiling says."""
    import triton
    from triton.backends.nvidia.compiler import get_ptxas

    try:
        tool = get_ptxas(sm)
    except RuntimeError:
        return []
    place = Path(tool.path)
    return [tool.version] if place.is_relative_to(Path(triton.__file__).parent) else [tool.version, str(place)]


def entry_path(kernel: Kernel, target: Target) -> Path:
    """Where the cache keeps this kernel's cubin."""
    made_by = (triton_version(), json.dumps(settings(architecture(target)), sort_keys=True))
    parts = (str(VERSION), kernel.digest(), hooks.template_text(kernel.template), target.isa, *made_by)
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]
    return knobs.cache() / "cubin" / f"{key}.cubin"


def cached(kernel: Kernel, target: Target) -> Cubin | None:
    """The cubin if the cache has it, whole. Raises BuildError: it needs more shared memory than the target has."""
    cubin = _read(entry_path(kernel, target))
    return None if cubin is None else _fitting(cubin, kernel, target)


def compile_kernel(kernel: Kernel, target: Target) -> Cubin:
    """The cubin, compiled unless the cache has it. Raises BuildError."""
    path = entry_path(kernel, target)
    cubin = _read(path)
    if cubin is None:
        with knobs.writing_cache():
            cubin = _made(kernel, target, path)
    return _fitting(cubin, kernel, target)


def _made(kernel: Kernel, target: Target, path: Path) -> Cubin:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        cubin = _read(path)  # another process may have compiled it while this one waited
        if cubin is None:
            cubin = _compile(kernel, architecture(target))
            hooks.write_new(path, _encoded(cubin))
    return cubin


def _fitting(cubin: Cubin, kernel: Kernel, target: Target) -> Cubin:
    if cubin.shared > target.shared_bytes:
        raise BuildError(
            f"{describe(kernel, target.isa)}: it uses {cubin.shared} bytes of shared memory, and {target.name} has "
            f"{target.shared_bytes} for a block; use smaller blocks or fewer stages"
        )
    return cubin


def describe(kernel: Kernel, isa: str) -> str:
    """A kernel in one line, for messages."""
    options = (("num_warps", kernel.num_warps), ("num_stages", kernel.num_stages))
    constants = ", ".join(f"{name}={value}" for name, value in (*kernel.constants, *options) if value is not None)
    return f"kernel {kernel.template}({constants}) for {isa}"


# entries: one line of JSON, then the cubin


def _encoded(cubin: Cubin) -> bytes:
    facts = {**cubin.facts(), "sha256": hashlib.sha256(cubin.data).hexdigest()}
    return json.dumps(facts).encode() + b"\n" + cubin.data


def _read(path: Path) -> Cubin | None:
    try:
        head, _, data = path.read_bytes().partition(b"\n")
        facts = json.loads(head)
        whole = facts.pop("sha256") == hashlib.sha256(data).hexdigest()
        return Cubin.from_facts(facts, data) if whole else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None  # none, or damaged: it is compiled again


# compiling


def _compile(kernel: Kernel, sm: int) -> Cubin:
    isa = f"sm_{sm}"
    where = describe(kernel, isa)
    function = hooks.function(kernel)
    constants = {**_defaults(function), **hooks.constants(kernel)}
    _check(kernel, function, constants, sm)
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import get_ptxas
    from triton.compiler import ASTSource

    types = dict(kernel.types)
    signature = {name: types.get(name, "constexpr") for name in function.arg_names}
    pointers = [i for i, name in enumerate(function.arg_names) if signature[name].startswith("*")]
    source = ASTSource(function, signature, constants, {(i,): [["tt.divisibility", 16]] for i in pointers})
    options = {"num_warps": kernel.num_warps, "num_stages": kernel.num_stages}
    said = io.StringIO()
    try:
        toolkit = get_ptxas(sm).version
    except RuntimeError as error:
        raise BuildError(
            f"{where}: Triton has no assembler ({error}); reinstall triton, or name one in TRITON_PTXAS_PATH"
        ) from error
    try:
        with knobs.writing_cache(), _apart(said):
            made = triton.compile(source, target=GPUTarget("cuda", sm, 32), options=options)
    except BuildError:  # the cache, which is not this kernel's fault
        raise
    except Exception as error:  # Triton and MLIR raise whatever they raise
        raise BuildError(f"{where}: {_first_line(error)}") from error
    meta = made.metadata
    if meta.global_scratch_size or meta.profile_scratch_size:
        raise BuildError(f"{where}: it needs scratch memory, which launches do not give; use pointers")
    if "wgmma" in made.asm["ptx"]:
        _check_assembly(where, made.asm["cubin"], toolkit)
    registers, spills = _resources(said.getvalue())
    params = tuple(types[name] for name in function.arg_names if name in types)
    return Cubin(
        made.asm["cubin"], meta.name, meta.shared, meta.num_warps, params, kernel.pdl, isa, toolkit, registers, spills
    )


def _check_assembly(where: str, cubin: bytes, toolkit: str) -> None:
    if odd := machine_code.never_written(machine_code.instructions(cubin)):
        raise BuildError(
            f"{where}: ptxas {toolkit} made code of it that reads a register nothing writes ({odd[0]}), which would "
            "multiply by whatever lies elsewhere; use other constants, or name an assembler of CUDA 13 in "
            "TRITON_PTXAS_PATH"
        )


def _defaults(function: Any) -> dict[str, Any]:
    """Of the template's parameters, which a kernel may leave out."""
    parameters = inspect.signature(getattr(function, "fn", function)).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty}


def _check(kernel: Kernel, function: Any, constants: Mapping[str, Any], sm: int) -> None:
    where = describe(kernel, f"sm_{sm}")
    if not hasattr(function, "arg_names") or type(function).__name__ == "InterpretedFunction":
        raise BuildError(f"{where}: TRITON_INTERPRET=1 interprets kernels; compile in a process started without it")
    given = [name for name, _ in kernel.types]
    wanted = [name for name in function.arg_names if name in given]
    if given != wanted:
        raise BuildError(f"{where}: its types are of {', '.join(given)}, wanted the order {', '.join(wanted)}")
    if missing := [name for name in function.arg_names if name not in given and name not in constants]:
        raise BuildError(f"{where}: no type and no constant for {', '.join(missing)}")
    if unknown := sorted(constants.keys() - set(function.arg_names) | (constants.keys() & set(given))):
        raise BuildError(f"{where}: {', '.join(unknown)} is no constant parameter of the template")
    if odd := [kind for _, kind in kernel.types if not kind.startswith("*") and kind not in TYPES]:
        raise BuildError(f"{where}: a runtime argument is of type {odd[0]}, wanted a pointer or {', '.join(TYPES)}")
    if kernel.pdl and sm < 90:
        raise BuildError(f"{where}: programmatic dependent launch needs sm_90 or newer; compile it without pdl")


@contextlib.contextmanager
def _apart(said: io.StringIO) -> Iterator[None]:
    """Triton with a cache of its own for one compilation, and with what it prints (whole programs, at errors) kept.

    Its own cache would hold everything a second time, and knows less than this one of what a cubin depends on.
    """
    import triton

    settings = triton.knobs
    folder = knobs.cache() / "triton"
    folder.mkdir(parents=True, exist_ok=True)
    with (
        _ONE_AT_A_TIME,
        tempfile.TemporaryDirectory(dir=folder) as place,
        settings.cache.scope(),
        settings.compilation.scope(),
        settings.nvidia.scope(),
        contextlib.redirect_stdout(said),
    ):
        settings.cache.dir = place
        settings.compilation.always_compile = True
        settings.compilation.disable_line_info = True  # absolute paths of this machine
        settings.nvidia.dump_ptxas_log = True  # registers and spills
        yield


def _resources(log: str) -> tuple[int, int]:
    """Registers and bytes spilled of a thread, from what ptxas -v said; 0 where it did not say."""
    registers = re.search(r"Used (\d+) registers", log)
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", log)
    return int(registers[1]) if registers else 0, sum(map(int, spills))


def _first_line(error: Exception) -> str:
    """The line that says what is wrong: of ptxas the first error, of Triton the innermost cause."""
    while isinstance(error.__cause__, Exception):
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if said := [line for line in lines if re.search(r"^ptxas.*(error|fatal)", line)]:
        return said[0][:300]
    # Triton quotes the source with a mark below it, and says what is wrong last
    return f"{type(error).__name__}: {lines[-1] if lines else 'no message'}"[:300]
