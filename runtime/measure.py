"""What every measurement records: the command, the code, the machine, and the bandwidth it had at that moment."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch


def environment() -> dict[str, Any]:
    """Command line, commit, date, CPU, threads, and versions of what a figure may depend on."""
    return {
        "command": " ".join(["python", *(_local(a) for a in sys.argv)]),
        "commit": commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": metadata.version("transformers"),
        **gpu(),
    }


def gpu() -> dict[str, Any]:
    """Name, memory, driver and versions of the current GPU; empty without one."""
    if not torch.cuda.is_available():
        return {}
    facts = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "gpu": {
            "name": facts.name,
            "capability": f"{facts.major}.{facts.minor}",
            "multiprocessors": facts.multi_processor_count,
            "memory_bytes": facts.total_memory,
            "driver": _driver(),
            "cuda": torch.version.cuda,
        },
        "triton": metadata.version("triton"),
    }


def _driver() -> str:
    """The driver's version as NVIDIA's tool says it, the same for all GPUs of a machine."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return said.split("\n")[0].strip() or "unknown"


def _local(argument: str) -> str:
    """Absolute paths by their last part: where a folder lies on one machine says nothing on another."""
    return Path(argument).name if argument.startswith(("/", "~")) else argument


def commit() -> str:
    """The checkout's commit, with `+changes` if files differ from it; `unknown` outside of a checkout."""
    here = Path(__file__).resolve().parent
    try:
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=True)
        changed = subprocess.run(
            ["git", "status", "--porcelain", "-uno"], cwd=here, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.strip() + ("+changes" if changed.stdout.strip() else "")


def cpu_name() -> str:
    """The processor's own name where the system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


class ReadBandwidth:
    """Measures plain reading: calling it gives bytes per second of the fastest of a few sums over a large tensor.

    The tensor (fp32, all threads) is far larger than the caches. A shared machine's bandwidth moves from minute to
    minute, so a benchmark calls this in each of its rounds and takes the median.
    """

    def __init__(self, megabytes: int = 512) -> None:
        self.data = torch.ones(megabytes * 2**18)
        self.seen: list[float] = []

    def __call__(self, repeats: int = 4) -> float:
        best = float("inf")
        for _ in range(repeats):
            started = time.perf_counter()
            self.data.sum()
            best = min(best, time.perf_counter() - started)
        self.seen.append(self.data.numel() * 4 / best)
        return self.seen[-1]

    def median(self) -> float:
        """Of all calls so far."""
        return statistics.median(self.seen)


def write_json(path: Path, figures: Mapping[str, Any]) -> None:
    """Write figures to `path`, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False) as file:
        json.dump(figures, file, indent=1)
        file.write("\n")
    os.chmod(file.name, 0o644)  # a temporary file is private; a result is not
    os.replace(file.name, path)
