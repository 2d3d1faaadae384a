"""A Zipf-Mandelbrot law for given counts, beside the laws that have nothing to fit."""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from .checks import NDArray
from .files import replacing
from .popularity import Law, LogUniform, Uniform, ZipfMandelbrot

# Nats per draw below which a fit is not worth its two parameters.
WORTH_FITTING = 0.01


class Fit(NamedTuple):
    """Counts by rank, the law fitted to them, and how far each law is from them."""

    counts: NDArray  # (N,) the largest first
    law: ZipfMandelbrot
    laws: dict[str, Law]  # by name, the fitted law first
    kl: dict[str, float]  # nats by which the counts' own shares explain a draw better
    ks: dict[str, float]  # largest distance of the cumulative distributions


def fit(counts: NDArray) -> Fit:
    """The law of maximum likelihood, with log-uniform and uniform to compare it to."""
    law = ZipfMandelbrot.fit(counts)
    counts = np.sort(counts)[::-1].astype(np.float64)
    share = counts / counts.sum()
    seen = share > 0
    ids = np.arange(counts.size)
    laws: dict[str, Law] = {
        "Zipf-Mandelbrot": law,
        "log-uniform": LogUniform(counts.size),
        "uniform": Uniform(counts.size),
    }
    kl, ks = {}, {}
    for name, one in laws.items():
        kl[name] = float(share[seen] @ (np.log(share[seen]) - one.log_prob(ids[seen])))
        ks[name] = float(np.abs(np.cumsum(share) - one.cdf(ids)).max())
    return Fit(counts, law, laws, kl, ks)


def report(found: Fit) -> list[str]:
    """What there is to say of a fit, line by line."""
    law, fitted = found.law, found.law.fitted
    assert fitted is not None
    lines = [
        f"{law.num_items:,} ids, {round(fitted.num_counted, 6):,.15g} occurrences",
        "",
        f"exponent {law.exponent:.4f} ± {fitted.exponent_error:.2g}",
        f"shift    {law.shift:.4f} ± {fitted.shift_error:.2g}",
    ]
    if law.exponent > 49.9:  # where the search ends
        lines.append("the counts fall faster than any power of the rank: no such law fits them")
    lines += ["", f"{'':16}{'KL (nats per draw)':>20}{'KS distance':>14}"]
    for name in found.laws:
        lines.append(f"{name:16}{found.kl[name]:20.4f}{found.ks[name]:14.4f}")
    simple = min(("log-uniform", "uniform"), key=lambda name: found.kl[name])
    gain = found.kl[simple] - found.kl["Zipf-Mandelbrot"]
    if gain > WORTH_FITTING:
        advice = f"Zipf-Mandelbrot, {gain:.3g} nats per draw closer than {simple}"
    else:
        advice = f"{simple}: fitting gains only {gain:.2g} nats per draw"
    return [
        *lines,
        "",
        "which law: Empirical(counts) where the counts are at hand, for it is exact;",
        f"           else {advice}",
        "",
        "law = "
        f"ZipfMandelbrot({law.num_items}, {law.exponent:.8g}, shift={law.shift:.8g})"
        "  # id 0 the most frequent",
    ]


def binned_residuals(
    counts: NDArray, law: Law, num_bins: int = 48
) -> tuple[NDArray, NDArray, NDArray]:
    """log(count/expected) summed over bins of equal width in log rank; NaN where none occurred.

    Single ranks of the tail would show chance alone. Also gives the bins' first and last ranks,
    counted from 1.
    """
    edges = np.unique(np.geomspace(1, counts.size + 1, num_bins + 1).round().astype(np.int64))
    starts = edges[:-1] - 1
    seen = np.add.reduceat(counts, starts) / counts.sum()
    # A steep law's tail is too thin for exp.
    log_expected = np.logaddexp.reduceat(law.log_prob(np.arange(counts.size)), starts)
    return np.log(np.where(seen > 0, seen, np.nan)) - log_expected, edges[:-1], edges[1:] - 1


def draw_picture(path: Path, found: Fit) -> None:
    """Counts and laws by rank, and what the laws miss."""
    from matplotlib.figure import Figure

    counts, total = found.counts, found.counts.sum()
    # Thousands of points look like millions.
    ids = np.unique(np.geomspace(1, counts.size, 4000).astype(np.int64)) - 1
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.loglog(ids + 1, np.where(counts[ids] > 0, counts[ids], np.nan), "k.", ms=4, label="counts")
    right.axhline(0, color="grey", linestyle=":")
    for (name, law), style in zip(found.laws.items(), ("C0-", "C1--"), strict=False):
        left.loglog(ids + 1, total * np.exp(law.log_prob(ids)), style, label=name)
        residual, first, last = binned_residuals(counts, law)
        right.semilogx(
            np.sqrt(first * last), residual, style, marker=".",
            label=f"{name}: KL {found.kl[name]:.3f}",
        )  # fmt: skip
    left.set(xlabel="popularity rank (id + 1)", ylabel="count", title="Counts and laws by rank")
    left.set_ylim(bottom=counts[counts > 0].min() / 2)
    left.legend()
    right.set(
        xlabel="popularity rank (id + 1)",
        ylabel="log(count / expected)",
        title="What the laws miss: above 0, drawn too seldom",
    )
    right.legend()
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=110)
