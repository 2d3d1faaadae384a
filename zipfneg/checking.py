"""Is a sampler's log q what its draws say it is?"""

from collections.abc import Callable
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np

from . import checks
from .candidates import Candidates
from .checks import NDArray
from .interop import Array, as_array


class Check(NamedTuple):
    """One identity: what was observed, what was expected, and how far apart chance may put them."""

    name: str
    observed: float
    expected: float
    allowed: float

    @property
    def passed(self) -> bool:
        # Not so for NaN, nor for an infinity on both sides.
        return abs(self.observed - self.expected) <= self.allowed < np.inf


class SamplerReport(NamedTuple):
    """All checks of a sampler; true if every one passed, and a table as text."""

    checks: tuple[Check, ...]

    @property
    def failures(self) -> tuple[Check, ...]:
        return tuple(check for check in self.checks if not check.passed)

    def __bool__(self) -> bool:
        return not self.failures

    def __str__(self) -> str:
        lines = [f"{'':6}{'check':44}{'observed':>14}{'expected':>14}{'allowed ±':>14}"]
        for check in self.checks:
            state = "ok" if check.passed else "FAILED"
            numbers = "".join(f"{x:14.6g}" for x in check[1:])
            lines.append(f"{state:6} {check.name:43}{numbers}")
        return "\n".join(lines)


def check_sampler(
    sampler: Any,
    *,
    ids: Array | None = None,
    positives: Callable[[int], Array] | None = None,
    num_draws: int = 1000,
    num_groups: int = 10,
    error_rate: float = 1e-6,
    tolerance: float = 0.003,
) -> SamplerReport:
    """Run the identities that log q must satisfy on any sampler, also one of your own.

    A correct log q is the log of the expected number of times that an id is among the negatives.
    So over many steps, for any group of ids, the mean number of its copies must be Σ_group q; and
    the mean of Σ_sample 1/q must be the number of ids.

    Parameters
    ----------
    sampler : with `sample(positives, *, step)` that returns a `Draw`, and `log_q(ids, *,
        batch_size)`.
    ids : every id that the sampler can give; None takes them from `sampler.law`.
    positives : for samplers that need a batch, its item ids as a function of the step. They must be
        drawn independently, as often as the sampler believes.
    num_draws : steps to sample.
    num_groups : groups of ids, by falling q, of equally many ids; the ten most likely ids are
        checked one by one.
    error_rate : chance that a correct sampler fails any of the checks.
    tolerance : relative error of q that is forgiven: that of the inclusion probabilities of unique
        samples is below 0.001 from about 100 negatives on.

    Returns
    -------
    `SamplerReport`: true or false, and printable.

    Examples
    --------
    >>> from zipfneg import LogUniform, PopularitySampler
    >>> report = check_sampler(PopularitySampler(LogUniform(1000), 100))
    >>> bool(report), len(report.checks)
    (True, 27)
    """
    checks.integer("num_draws", num_draws, 2, 2**40)
    checks.integer("num_groups", num_groups, 1, 2**40)
    if not 0 < error_rate < 1:
        raise ValueError(f"error_rate: expected a probability, got {error_rate}")
    if not 0 <= tolerance < 1:
        raise ValueError(f"tolerance: expected a number from 0 to 1, got {tolerance}")
    if ids is None:
        law = getattr(sampler, "law", None)
        if law is None:
            raise ValueError("ids: expected all ids that the sampler can give, got None")
        ids = np.arange(law.first_id, law.first_id + law.num_items)
    all_ids = np.unique(as_array(ids, "ids"))
    batch_size = None
    if positives is not None:
        batch: Any = positives(0)
        batch_size = len(as_array(batch.ids if isinstance(batch, Candidates) else batch))
    log_q = np.asarray(sampler.log_q(all_ids, batch_size=batch_size))
    # −inf says that the sampler never draws an id; NaN and +inf say nothing.
    nonsense = int(np.count_nonzero(np.isnan(log_q) | (log_q == np.inf)))
    is_number = Check("ids whose log q is NaN or infinite", nonsense, 0, 0)
    all_ids, log_q = all_ids[np.isfinite(log_q)], log_q[np.isfinite(log_q)]
    if not len(all_ids):
        first = sampler.sample(None if positives is None else positives(0), step=0)
        num_drawn = as_array(first.negatives.ids).size
        return SamplerReport((is_number, Check("ids outside the sampler's range", num_drawn, 0, 0)))
    q = np.exp(log_q)

    by_q = np.argsort(-q, kind="stable")
    num_single = min(10, len(by_q))
    groups = [by_q[i : i + 1] for i in range(num_single)]
    groups += [group for group in np.array_split(by_q, num_groups) if len(group)]
    group_of = np.full((2, len(q)), -1)  # an id's group of one, if any, and its group of many
    for number, group in enumerate(groups):
        group_of[int(number >= num_single), group] = number

    def draw(step: int) -> Any:
        return sampler.sample(None if positives is None else positives(step), step=step)

    counts = np.zeros((num_draws, len(groups)))
    inverse = np.zeros(num_draws)
    outside = disagreement = of_positives = 0.0
    for step in range(num_draws):
        drawn_positives, negatives, _ = draw(step)
        if drawn_positives is not None:
            given_log_q = np.asarray(drawn_positives.log_q)
            known_log_q = sampler.log_q(drawn_positives.ids, batch_size=batch_size)
            with np.errstate(invalid="ignore"):
                apart = np.abs(given_log_q - np.asarray(known_log_q))
                # An excluded positive is never drawn, and is a candidate once, for certain.
                certain = (given_log_q == 0) & (np.asarray(known_log_q) == -np.inf)
                apart = np.where(certain, 0.0, apart).max(initial=0.0)
            of_positives = float(np.maximum(of_positives, apart))
        # Of negatives for each query, the mean over queries counts.
        rows = len(negatives.ids) if np.ndim(negatives.ids) == 2 else 1
        drawn, drawn_log_q = as_array(negatives.ids).ravel(), as_array(negatives.log_q).ravel()
        place = np.searchsorted(all_ids, drawn).clip(max=len(all_ids) - 1)
        known = all_ids[place] == drawn
        outside += np.count_nonzero(~known)
        place, drawn_log_q = place[known], drawn_log_q[known]
        if len(place):
            with np.errstate(invalid="ignore"):
                apart = np.abs(drawn_log_q - log_q[place]).max()
            disagreement = float(np.maximum(disagreement, apart))  # NaN stays NaN
        for numbers in group_of[:, place]:
            counts[step] += np.bincount(numbers[numbers >= 0], minlength=len(groups)) / rows
        inverse[step] = np.exp(-log_q[place]).sum() / rows

    again, other = draw(0).negatives.ids, draw(1).negatives.ids
    same = np.array_equal(as_array(again), as_array(draw(0).negatives.ids))
    differ = not np.array_equal(as_array(again), as_array(other))
    everything = len(as_array(again)) == len(all_ids)  # a permutation of all, or all in order
    found = [
        is_number,
        Check("ids outside the sampler's range", outside, 0, 0),
        Check("log q of the negatives against log_q(ids)", disagreement, 0, 1e-5),
        Check("log q of the positives against log_q(ids)", of_positives, 0, 1e-5),
        Check("a step drawn again gives the same ids", float(same), 1, 0),
        Check("another step gives other ids", float(differ or everything), 1, 0),
    ]
    quantile = -NormalDist().inv_cdf(error_rate / (2 * (len(groups) + 1)))

    def mean_of(name: str, samples: NDArray, expected: float, largest: float) -> Check:
        # Bernstein's inequality: what rare events add to a normal deviation.
        deviation = quantile * samples.std(ddof=1) / num_draws**0.5
        rare = quantile**2 * largest / (6 * num_draws)
        return Check(name, samples.mean(), expected, deviation + rare + tolerance * expected)

    for number, group in enumerate(groups):
        single = number < num_single
        if single:
            label = f"copies of id {all_ids[group[0]]}"
        else:
            label = f"copies of ids of group {number - num_single + 1} of {num_groups} by q"
        found.append(mean_of(label, counts[:, number], float(q[group].sum()), 1.0))
    found.append(
        mean_of("sum of 1/q over a draw: number of ids", inverse, float(len(q)), float(1 / q.min()))
    )
    return SamplerReport(tuple(found))
