"""What the PyTorch adapter adds to the core's call: time, and copies, of which there are none.

    python bench/adapters.py [--threads 1] [--out bench/results/adapters.jsonl]

Forward and backward of the mean loss through autograd, against `sampled_softmax_value_and_grad` of
the same tensors, in turn. Gradients, and the addresses of what the core is given, are checked
first. One JSON line a case.
"""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from sampling import machine

import zipfneg
import zipfneg.torch

SHAPES = [(32, 64, 16), (256, 1024, 64), (1024, 1024, 64), (2048, 8192, 64)]


def in_turn(runs: list[Callable[[], Any]], budget: float = 3.0) -> np.ndarray[Any, Any]:
    """Quartiles in seconds (3, runs): each run once a round, so that all see the same noise."""
    for run in runs:
        run()
    rounds: list[list[float]] = []
    end = time.perf_counter() + budget
    while len(rounds) < 15 or (time.perf_counter() < end and len(rounds) < 3000):
        times = []
        for run in runs:
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
        rounds.append(times)
    return np.percentile(rounds, [25, 50, 75], axis=0)


def check(tensors: list[torch.Tensor], expected: tuple[torch.Tensor, ...]) -> None:
    """Same gradients as the core's, from the tensors' own memory."""
    seen = []
    prepare = zipfneg.loss.prepare

    def watched(*args: Any, **options: Any) -> Any:
        prepared = prepare(*args, **options)
        problem = prepared.problem
        seen.extend((problem.queries, problem.positives, problem.negatives))
        return prepared

    zipfneg.loss.prepare = watched
    try:
        zipfneg.torch.sampled_softmax_loss(*tensors).backward()
    finally:
        zipfneg.loss.prepare = prepare
    for x, view, gradient in zip(tensors, seen, expected, strict=True):
        assert view.ctypes.data == x.data_ptr(), "a copy of the input"
        torch.testing.assert_close(x.grad, gradient)


def main(
    threads: Annotated[int, typer.Option(min=1, help="Threads of PyTorch and of zipfneg.")] = 1,
    out: Annotated[Path | None, typer.Option(help="File to append the lines to.")] = None,
) -> None:
    os.environ["ZIPFNEG_NUM_THREADS"] = str(threads)
    torch.set_num_threads(threads)
    about = {**machine(), "threads": threads}
    lines = []
    for B, S, D in SHAPES:
        torch.manual_seed(0)
        plain = [torch.randn(n, D) * D**-0.25 for n in (B, B, S)]
        tensors = [x.clone().requires_grad_() for x in plain]
        _, d = zipfneg.sampled_softmax_value_and_grad(*plain)
        check(tensors, (d.queries, d.positives.embeddings, d.negatives.embeddings))

        def adapter(tensors: list[torch.Tensor] = tensors) -> None:
            for x in tensors:
                x.grad = None
            zipfneg.torch.sampled_softmax_loss(*tensors).backward()

        low, median, high = in_turn(
            [lambda plain=plain: zipfneg.sampled_softmax_value_and_grad(*plain), adapter]
        )
        line = {
            "case": f"torch, B = {B}, S = {S}, D = {D}",
            "who": "zipfneg.torch",
            "core_us": 1e6 * median[0],
            "adapter_us": 1e6 * median[1],
            "spread_us": 1e6 * (high[1] - low[1]),
            "overhead_us": 1e6 * (median[1] - median[0]),
            "copies": 0,
        }
        lines.append({**line, **about})
        typer.echo(
            f"{line['case']:34}core {line['core_us']:10.0f} µs, adapter "
            f"{line['adapter_us']:10.0f} µs, overhead {line['overhead_us']:6.0f} µs"
        )
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        with out.open("a") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)


if __name__ == "__main__":
    typer.run(main)
