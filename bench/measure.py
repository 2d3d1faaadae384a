"""What the benchmarks share: time, memory, and the line that says where they ran."""

import ctypes
import importlib.metadata
import os
import platform
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np


def seconds(run: Callable[[], Any], budget: float = 1.0) -> tuple[float, float]:
    """Median and interquartile range of repeated runs."""
    times = alternating({"": run}, budget)[""]
    low, median, high = np.percentile(times, [25, 50, 75])
    return float(median), float(high - low)


def alternating(
    runs: dict[str, Callable[[], Any]], budget: float
) -> dict[str, "np.ndarray[Any, np.dtype[np.float64]]"]:
    """Seconds of each, one after another in rounds, so that all meet the same disturbances.

    Rounds go on for `budget` seconds for each of them, at least 5 and at most 200. Before each run
    comes a pause, in which the threads of the one before stop spinning, and runs that are not
    counted, for 0.1 s or more: a processor that was idle is slow at first, and training is not.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    end, rounds = time.perf_counter() + budget * len(runs), 0
    while rounds < 5 or (time.perf_counter() < end and rounds < 200):
        for name, run in runs.items():
            time.sleep(0.3 if len(runs) > 1 else 0)
            warm = time.perf_counter() + (0.1 if len(runs) > 1 else 0)
            run()
            while time.perf_counter() < warm:
                run()
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
        rounds += 1
    return {name: np.array(found) for name, found in times.items()}


def extra_memory(run: Callable[[], Any]) -> int | None:
    """Bytes by which memory grew at most while it ran; None where the system does not say."""
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not status.exists():
        return None

    def read(name: str) -> int:
        return int(status.read_text().split(name + ":")[1].split()[0]) * 1024

    # The C library may keep what was freed, and would then hide what is used again.
    getattr(ctypes.CDLL(None), "malloc_trim", int)(0)
    reset.write_text("5")  # the high water mark starts anew
    before = read("VmRSS")
    run()
    return read("VmHWM") - before


def machine() -> dict[str, Any]:
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    packages = {}
    for name in ("numpy", "numba", "tensorflow-cpu", "torch", "jax"):
        try:
            packages[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    cpu = platform.processor() or platform.machine()
    for text in Path("/proc/cpuinfo").read_text().splitlines() if os.name == "posix" else ():
        if text.startswith("model name"):
            cpu = text.partition(":")[2].strip()
    return {"cpu": cpu, "cpus": os.cpu_count(), "commit": commit, **packages}
