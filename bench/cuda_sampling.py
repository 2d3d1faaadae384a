"""Draws per second of the samplers on a GPU, and the time of a whole unique sample.

    python bench/cuda_sampling.py [--out bench/results/cuda_sampling.jsonl]

Every case is checked against the CPU's ids before it is timed. One JSON line a case, with the
target that it is held to. Times are between CUDA events; "eager" counts the launches from Python,
"graph" replays a captured graph whose step is device data.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import cupy
import numpy as np
import sampling as bench
import typer

from zipfneg import Empirical, LogUniform, PopularitySampler, Uniform, ZipfMandelbrot
from zipfneg.cuda import sampling
from zipfneg.popularity import stream_words


def microseconds(run: Callable[[], Any], repeats: int = 200) -> tuple[float, float]:
    """Median and interquartile range of one run, from groups of ten between two events."""
    stream = cupy.cuda.get_current_stream()
    for _ in range(10):
        run()
    times = []
    for _ in range(repeats // 10):
        start, end = cupy.cuda.Event(), cupy.cuda.Event()
        stream.synchronize()
        start.record()
        for _ in range(10):
            run()
        end.record()
        end.synchronize()
        times.append(100 * cupy.cuda.get_elapsed_time(start, end))  # milliseconds of ten runs
    low, median, high = np.percentile(times, [25, 50, 75])
    return float(median), float(high - low)


def captured(run: Callable[[], Any]) -> Callable[[], Any]:
    """The run as a graph, in memory that nothing else takes; run once before."""
    stream = cupy.cuda.get_current_stream()
    stream.begin_capture()
    kept = run()
    graph = stream.end_capture()
    return lambda: (graph.launch(), kept)


def main(
    out: Annotated[Path | None, typer.Option(help="File to append the lines to.")] = None,
    draws: Annotated[int, typer.Option(help="Draws with replacement a run.")] = 1 << 26,
    alias_items: Annotated[int, typer.Option(help="Items of the alias table.")] = 10**8,
) -> None:
    name = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.Device().id)["name"].decode()
    about = {"gpu": name, "cupy": cupy.__version__, **bench.machine()}
    lines = []

    def report(
        case: str,
        how: str,
        run: Callable[[], Any],
        size: int,
        target: dict[str, float],
        **more: Any,
    ) -> None:
        median, spread = microseconds(run)
        line = {"case": case, "how": how, "us": median, "spread": spread,
                "giga_ids_per_s": size / median / 1e3, **target, **more}  # fmt: skip
        lines.append({**line, **about})
        typer.echo(f"{case:44}{how:8}{median:12.1f} us{line['giga_ids_per_s']:10.2f} G/s  {target}")

    pool = cupy.cuda.MemoryPool()
    with cupy.cuda.Stream(non_blocking=True), cupy.cuda.using_allocator(pool.malloc):
        words = sampling.device_words(stream_words(1, 2, 3))
        buffer = cupy.empty(draws, np.int64)
        # A permuted popularity: the table is read all over.
        counts = 1 / (1.0 + np.random.default_rng(0).permutation(alias_items))
        for law, target in (
            (LogUniform(10**6), 100),
            (LogUniform(10**9), 100),
            (Uniform(10**9), 100),
            (ZipfMandelbrot(10**9, 1.2, 2.0), 100),
            (Empirical(counts), 20),
        ):
            case = f"{type(law).__name__}, N = {law.num_items:.0e}"
            sampling.fill(law, buffer, words)
            first = 1 << 22
            ties = int(np.sum(buffer[:first].get() != law.draw(first, seed=1, step=2, stream=3)))
            assert ties <= 4, (case, ties)
            report(
                case, "eager", lambda law=law: sampling.fill(law, buffer, words), draws,
                {"target_giga_ids_per_s": target}, ties=ties, compared=first,
                gb_per_s_per_giga_id=8,
            )  # fmt: skip

        law, step = LogUniform(10**6), cupy.full(1, 5)
        positives = cupy.asarray(law.draw(4096, seed=9))
        for num_sampled, target in ((8192, 30), (65_536, 60)):
            sampler = PopularitySampler(law, num_sampled, seed=4)
            own = sampling.UniqueSampler(law, num_sampled, sampler._time)
            words = sampling.device_words(stream_words(4, 0, 0), step)

            def run(own: Any = own, words: Any = words) -> Any:
                return own.sample(words, positives)

            found, expected = run(), sampler.sample(step=5)
            assert (found.ids.get() == expected.negatives.ids).all()
            assert int(found.num_tries) == expected.num_tries
            hits = found.hit_columns.get()
            assert (found.ids.get()[hits[hits >= 0]] == positives.get()[hits >= 0]).all()
            assert (~np.isin(positives.get()[hits < 0], found.ids.get())).all()
            case = f"unique {num_sampled} of 1e6, log q, hits of 4096"
            for how, repeated in (("eager", run), ("graph", captured(run))):
                report(
                    case, how, repeated, num_sampled, {"target_us": target},
                    num_tries=own.workspace.num_tries,
                )  # fmt: skip
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        with out.open("a") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)


if __name__ == "__main__":
    typer.run(main)
