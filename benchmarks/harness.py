# SPDX-License-Identifier: MIT
"""Timing, the machine's own limits, and a record of every figure with where it came from."""

import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch

import bitsandbytes

__all__ = ["Record", "captured", "time_cpu", "time_cuda", "time_host"]


def time_cuda(work: Callable[[], object], repeats: int = 15, inner: int = 1) -> float:
    """Returns the median time of `work` on the current stream in milliseconds.

    Args:
        work: What to time; called `inner` times between two events.
        repeats: Number of measurements.
        inner: Calls per measurement, for work shorter than a launch.
    """
    for _ in range(3):
        work()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(inner):
            work()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / inner)
    return statistics.median(times)


def captured(work: Callable[[], object]) -> Callable[[], None]:
    """Returns the replay of a CUDA graph of `work`."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def time_host(work: Callable[[], object], repeats: int = 15) -> float:
    """Returns the median time in milliseconds until `work` has handed everything to the device.

    Args:
        work: What to time; the device is idle when it is called.
        repeats: Number of measurements.
    """
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        times.append((time.perf_counter() - start) * 1e3)
    torch.cuda.synchronize()
    return statistics.median(times)


def time_cpu(
    *works: Callable[[], object], repeats: int = 11, budget: float = 8.0
) -> tuple[float, ...]:
    """Returns the median times in milliseconds of several works, interleaved.

    Taking turns lets the machine's noise fall on all of them, so their ratios hold.

    Args:
        works: What to time.
        repeats: Number of turns.
        budget: Seconds after which the turns end, once there were three.
    """
    for work in works:
        work()
    times: list[list[float]] = [[] for _ in works]
    deadline = time.perf_counter() + budget
    for turn in range(repeats):
        for work, measured in zip(works, times, strict=True):
            start = time.perf_counter()
            work()
            measured.append((time.perf_counter() - start) * 1e3)
        if time.perf_counter() > deadline and turn >= 2:
            break
    return tuple(statistics.median(measured) for measured in times)


class Record:
    """Rows of a benchmark, printed as they come and written as JSON with their circumstances."""

    def __init__(self, device: str):
        self.rows: dict[str, dict] = {}
        self.circumstances = {
            "device": torch.cuda.get_device_name() if device == "cuda" else _processor(),
            "threads": torch.get_num_threads(),
            # More than this program's own threads: others were computing, too.
            "load_average": round(os.getloadavg()[0], 1),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "bitsandbytes": bitsandbytes.__version__,
            "commit": _commit(),
            "date": time.strftime("%Y-%m-%d"),
        }
        print(json.dumps(self.circumstances))

    def add(self, name: str, milliseconds: float, **facts) -> None:
        """Adds one row; `facts` are ratios and rates that belong to it."""
        self.rows[name] = {"ms": milliseconds, **facts}
        text = "  ".join(
            f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}"
            for key, value in facts.items()
        )
        print(f"{name:58s} {milliseconds:9.4f} ms  {text}", flush=True)

    def write(self, path: Path) -> None:
        """Writes everything to `path`."""
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {"circumstances": self.circumstances, "rows": self.rows}
        path.write_text(json.dumps(content, indent=1) + "\n")


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":")[1].strip()
    return platform.processor()


def _commit() -> str:
    folder = Path(__file__).parent
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
