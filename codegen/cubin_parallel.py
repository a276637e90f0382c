"""Kernels compiled side by side: each worker is a fresh Python that fills the cache of `cubin`, one kernel at a time.

Fresh, as a process that already has threads (torch, CUDA) must not be forked, and not by `multiprocessing`, whose
workers would run the user's own script again. Run as a module, this is the worker: a target and then kernels come in as
lines of JSON, and an error or null goes out for each.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Sequence

from llmopt.codegen.cubin import Cubin, cached, compile_kernel
from llmopt.codegen.kernel import Kernel
from llmopt.compiler.errors import BuildError, LlmoptError
from llmopt.compiler.target import Target

_FEW = 2  # kernels that are compiled sooner than a process starts
_MOST_WORKERS = 16  # each takes 0.5 GB


def compile_all(
    kernels: Iterable[Kernel],
    target: Target,
    jobs: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[Kernel, Cubin]:
    """The cubins of all kernels, in order; more than a few that the cache lacks are compiled by `jobs` processes.

    `jobs` is one a core by default. `progress` is told how many are there, of how many. Raises BuildError of the first
    that fails.
    """
    wanted = list(dict.fromkeys(kernels))
    found = {kernel: cubin for kernel in wanted if (cubin := cached(kernel, target)) is not None}
    missing = [kernel for kernel in wanted if kernel not in found]
    workers = min(jobs or _cores(), _MOST_WORKERS, len(missing))
    count = len(found)

    def one_more() -> None:
        nonlocal count
        count += 1
        progress(count, len(wanted))

    progress(count, len(wanted))
    if workers > 1 and len(missing) > _FEW:
        fill_cache(missing, target, workers, one_more)
        found.update((kernel, compile_kernel(kernel, target)) for kernel in missing)
    else:
        for kernel in missing:
            found[kernel] = compile_kernel(kernel, target)
            one_more()
    return {kernel: found[kernel] for kernel in wanted}


def fill_cache(kernels: Sequence[Kernel], target: Target, workers: int, done: Callable[[], None]) -> None:
    """Compile `kernels` into the cache; `done` is called here after each. Raises BuildError of the first that fails."""
    waiting: queue.SimpleQueue[Kernel] = queue.SimpleQueue()
    for kernel in kernels:
        waiting.put(kernel)
    errors: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    stop = threading.Event()
    threads = [threading.Thread(target=_feed, args=(waiting, errors, target, stop)) for _ in range(workers)]
    for thread in threads:
        thread.start()
    try:
        for _ in kernels:
            error = errors.get()
            if error is not None:
                raise BuildError(error)
            done()
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def _feed(
    waiting: queue.SimpleQueue[Kernel], errors: queue.SimpleQueue[str | None], target: Target, stop: threading.Event
) -> None:
    """Give one worker kernels until there are none; what goes wrong is an error of the kernel it had."""
    with contextlib.ExitStack() as stack:
        try:
            said = stack.enter_context(tempfile.TemporaryFile())
        except OSError as error:  # told, as this is a thread, and whoever waits for an answer would wait forever
            errors.put(f"no temporary file can be made ({error}); set TMPDIR to a writable folder with free space")
            return
        try:
            with _start(said.fileno()) as worker:
                _converse(worker, waiting, errors, target, stop)
        except (OSError, ValueError, EOFError) as error:
            said.seek(0)
            lines = said.read().decode(errors="replace").split("\n")
            last = next((line for line in reversed(lines) if line.strip()), f"{type(error).__name__}: {error}")
            errors.put(f"a process that compiles kernels for {target.name} ended early ({last.strip()[:300]})")


def _converse(
    worker: subprocess.Popen[str],
    waiting: queue.SimpleQueue[Kernel],
    errors: queue.SimpleQueue[str | None],
    target: Target,
    stop: threading.Event,
) -> None:
    assert worker.stdin is not None
    assert worker.stdout is not None
    worker.stdin.write(target.to_json() + "\n")
    while not stop.is_set():
        try:
            kernel = waiting.get_nowait()
        except queue.Empty:
            return
        worker.stdin.write(json.dumps(kernel.to_data()) + "\n")
        worker.stdin.flush()
        answer = worker.stdout.readline()
        if not answer:
            raise EOFError("it sent no answer")
        errors.put(json.loads(answer))


def _start(errors: int) -> subprocess.Popen[str]:
    places = os.pathsep.join(p for p in sys.path if p)
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "llmopt.codegen.cubin_parallel"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=errors,
        text=True,
        env={**os.environ, "PYTHONPATH": places, "OMP_NUM_THREADS": "1"},
    )


def work() -> None:
    """Read a target and kernels from stdin, and answer each kernel."""
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)  # what a compiler prints is no answer
        target = Target.from_json(sys.stdin.readline())
        for line in sys.stdin:
            answer = None
            try:
                compile_kernel(Kernel.from_data(json.loads(line)), target)
            except LlmoptError as error:
                answer = str(error)
            print(json.dumps(answer), file=answers, flush=True)


def _cores() -> int:
    # a container's share may be smaller than the machine
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


if __name__ == "__main__":
    work()
