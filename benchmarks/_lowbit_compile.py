"""Kernels of `lowbit_gemm.py`, compiled before anything is measured, in processes beside each other."""

from __future__ import annotations

import contextlib
import functools
import queue
import threading
import time

from _lowbit_cases import H200, Variant

from llmopt.codegen.cubin import cached
from llmopt.codegen.kernel import Kernel
from llmopt.compiler.errors import BuildError


def compile_all(wanted: list[Variant], workers: int, seconds: float) -> None:
    """Fill the cache, most wanted first; what does not compile is said and left out."""
    kernels = list(dict.fromkeys(v.kernel() for v in wanted))
    todo: queue.SimpleQueue[Kernel] = queue.SimpleQueue()
    for kernel in kernels:
        if not there(kernel):
            todo.put(kernel)
    print(f"{len(kernels)} kernels, {todo.qsize()} to compile", flush=True)
    failed: list[str] = []
    end = time.perf_counter() + seconds
    threads = [threading.Thread(target=_compile, args=(todo, workers, failed, end)) for _ in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print(f"{sum(there(k) for k in kernels)} are there, {len(failed)} do not compile", flush=True)
    for text in failed[:9]:
        print("  ", text)


def _compile(todo: queue.SimpleQueue[Kernel], workers: int, failed: list[str], end: float) -> None:
    """Take some kernels at a time, in a process of their own, until there are none or time is up."""
    from llmopt.codegen.cubin_parallel import fill_cache

    while time.perf_counter() < end:
        some: list[Kernel] = []
        with contextlib.suppress(queue.Empty):
            for _ in range(min(48, max(1, todo.qsize() // workers))):
                some.append(todo.get_nowait())
        if not some:
            return
        while some:
            done: list[None] = []
            try:
                fill_cache(some, H200, 1, functools.partial(done.append, None))
                break
            except BuildError as error:
                failed.append(str(error)[:300])
                some = some[len(done) + 1 :]


def there(kernel: Kernel) -> bool:
    """Is it compiled?"""
    try:
        return cached(kernel, H200) is not None
    except BuildError:  # it does not fit
        return False
