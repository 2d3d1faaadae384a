"""Static division of a range over threads.

Numba's own parallel layer is not used: it may not be entered from two Python threads at once, and
its pool competes with the one of BLAS. Kernels release the interpreter's lock instead.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any


def num_threads() -> int:
    """Threads to use: ``ZIPFNEG_NUM_THREADS``, else the CPUs this process may run on."""
    text = os.environ.get("ZIPFNEG_NUM_THREADS", "")
    if text:
        if not text.isdecimal() or int(text) == 0:
            raise ValueError(f"ZIPFNEG_NUM_THREADS: expected a positive integer, got {text!r}")
        return int(text)
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@cache
def _pool(size: int, pid: int) -> ThreadPoolExecutor:
    # Keyed by process: threads do not survive a fork.
    return ThreadPoolExecutor(size, thread_name_prefix="zipfneg")


def for_spans(kernel: Callable[..., None], total: int, grain: int, *args: Any) -> None:
    """Call ``kernel(start, stop, *args)`` on spans that cover ``range(total)``, one span a thread.

    Spans start at multiples of `grain` and hold at least `grain`: the smallest work that is worth
    a thread. The division never changes a result, since spans share nothing.
    """
    threads = min(num_threads(), total // grain)
    if threads <= 1:
        if total:
            kernel(0, total, *args)
        return
    width = -(-total // (threads * grain)) * grain
    starts = range(0, total, width)
    pool = _pool(num_threads(), os.getpid())
    others = [pool.submit(kernel, start, min(start + width, total), *args) for start in starts[1:]]
    kernel(0, width, *args)
    for other in others:
        other.result()
