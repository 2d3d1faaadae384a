"""Draws per second of the samplers, against what else there is, in one process.

    python bench/sampling.py [--threads 1] [--out bench/results/sampling.jsonl]

zipfneg's draws are checked against the law before they are timed. Competitors run where they are
installed, on the threads they choose themselves: TensorFlow's candidate sampler, NumPy's inverse
transform and choice, torch.multinomial. One JSON line a case.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from measure import machine, seconds
from scipy import stats

from zipfneg import Empirical, LogUniform, PopularitySampler, Uniform, ZipfMandelbrot
from zipfneg.reference import log_uniform_prob


def deviation(ids: np.ndarray[Any, Any], law: Any) -> float:
    """Largest distance of the drawn and the expected cumulative distribution, in units of 1/√n."""
    at = np.unique(law.ppf(np.linspace(0, 1, 1001)[1:-1]))
    drawn = np.searchsorted(np.sort(ids), at, side="right") / len(ids)
    return float(np.abs(drawn - law.cdf(at)).max() * len(ids) ** 0.5)


def competitors(num_items: int, num_draws: int) -> dict[str, Callable[[], Any]]:
    """Draws with replacement from the log-uniform law, or one as close as the library has."""
    found: dict[str, Callable[[], Any]] = {}
    rng = np.random.default_rng(0)
    log_total = np.log1p(num_items)

    def inverse_transform() -> Any:
        return np.exp(rng.random(num_draws) * log_total).astype(np.int64) - 1

    found["numpy inverse transform"] = inverse_transform
    law = stats.loguniform(1, num_items + 1)
    found["scipy loguniform"] = lambda: (
        law.rvs(size=num_draws, random_state=rng).astype(np.int64) - 1
    )
    if num_items <= 10**6:
        p = log_uniform_prob(num_items)
        p /= p.sum()
        found["numpy choice"] = lambda: rng.choice(num_items, num_draws, p=p)
    try:
        import tensorflow as tf
    except ImportError:
        pass
    else:
        true = tf.zeros([1, 1], tf.int64)
        if num_items < 2**31:
            found["tensorflow log_uniform_candidate_sampler"] = lambda: (
                tf.random.log_uniform_candidate_sampler(true, 1, num_draws, False, num_items)[0]
            ).numpy()
    try:
        import torch
    except ImportError:
        pass
    else:
        if num_items <= 10**6:
            weights = torch.from_numpy(log_uniform_prob(num_items))
            found["torch multinomial"] = lambda: torch.multinomial(weights, num_draws, True).numpy()
    return found


def unique_competitors(num_items: int, num_sampled: int) -> dict[str, Callable[[], Any]]:
    found: dict[str, Callable[[], Any]] = {}
    try:
        import tensorflow as tf
    except ImportError:
        pass
    else:
        true = tf.zeros([1, 1], tf.int64)
        found["tensorflow log_uniform_candidate_sampler, unique"] = lambda: (
            tf.random.log_uniform_candidate_sampler(true, 1, num_sampled, True, num_items)[0]
        ).numpy()
    try:
        import torch
    except ImportError:
        pass
    else:
        weights = torch.from_numpy(log_uniform_prob(num_items))
        found["torch multinomial, without replacement"] = lambda: torch.multinomial(
            weights, num_sampled, False
        ).numpy()
    return found


def main(
    threads: Annotated[int, typer.Option(min=1, help="Threads of zipfneg.")] = 1,
    out: Annotated[Path | None, typer.Option(help="File to append the lines to.")] = None,
    draws: Annotated[int, typer.Option(min=1, help="Draws with replacement a run.")] = 1 << 20,
) -> None:
    os.environ["ZIPFNEG_NUM_THREADS"] = str(threads)
    about = {**machine(), "threads": threads}
    lines = []

    def report(
        case: dict[str, Any], run: Callable[[], Any], size: int, ours: float | None
    ) -> float:
        median, spread = seconds(run)
        line = {**case, "million_ids_per_s": size / median / 1e6, "seconds": median,
                "spread": spread, "ratio": None if ours is None else median / ours}  # fmt: skip
        lines.append({**line, **about})
        ratio = "" if ours is None else f"{median / ours:10.1f}x slower"
        typer.echo(f"{case['case']:34}{case['who']:52}{line['million_ids_per_s']:10.2f} M/s{ratio}")
        return median

    buffer = np.empty(draws, np.int64)
    for num_items in (10**4, 10**6, 10**8, 10**9):
        law = LogUniform(num_items)
        case = f"log-uniform, N = {num_items:.0e}"
        assert deviation(law.draw(draws, seed=1), law) < 2.6, case
        ours = report(
            {"case": case, "who": "zipfneg"}, lambda law=law: law.draw(draws, seed=1, out=buffer),
            draws, None,
        )  # fmt: skip
        for who, run in competitors(num_items, draws).items():
            report({"case": case, "who": who}, run, draws, ours)
    for law in (
        Uniform(10**9), ZipfMandelbrot(10**9, 1.2, 2.0), Empirical(log_uniform_prob(10**6)),
    ):  # fmt: skip
        case = f"{type(law).__name__}, N = {law.num_items:.0e}"
        assert deviation(law.draw(draws, seed=1), law) < 2.6, case
        report(
            {"case": case, "who": "zipfneg"}, lambda law=law: law.draw(draws, seed=1, out=buffer),
            draws, None,
        )  # fmt: skip
    for num_sampled in (8192, 65_536):
        sampler = PopularitySampler(LogUniform(10**6), num_sampled)
        case = f"unique {num_sampled} of 1e6, log q"
        ids = sampler.sample(step=1).negatives.ids
        assert len(np.unique(ids)) == num_sampled
        ours = report(
            {"case": case, "who": "zipfneg"}, lambda sampler=sampler: sampler.sample(step=1),
            num_sampled, None,
        )  # fmt: skip
        for who, run in unique_competitors(10**6, num_sampled).items():
            report({"case": case, "who": who}, run, num_sampled, ours)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        with out.open("a") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)


if __name__ == "__main__":
    typer.run(main)
