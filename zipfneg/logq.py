"""The logQ mathematics: how often each id is expected among the candidates.

Which expected count belongs to which sample is tabulated in ``docs/logq.md``.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from . import checks
from .checks import NDArray
from .interop import Array, borrow, view_of


def sampling_time(prob: NDArray, weights: NDArray, num_sampled: int) -> float:
    """The t that solves Σ_ids (1 − e^(−P(id)·t)) = S, given the law's `spectrum`.

    If every id arrives at its own Poisson rate P(id), t is when S distinct ids are expected to
    have come, and about the number of tries that unique sampling takes. Infinite for S = N.
    """
    present = prob > 0
    prob, weights = prob[present], weights[present]
    num_items = weights.sum()
    if num_sampled >= num_items * (1 - 1e-12):
        return np.inf
    # The left side is concave and rising, and t = S lies below the solution, so Newton's method
    # rises to it without overshooting.
    t = float(num_sampled)
    for _ in range(10_000):
        decay = np.exp(-prob * t)
        missing = num_sampled - (weights * -np.expm1(-prob * t)).sum()
        step = missing / (weights * prob * decay).sum()
        t += step
        if step <= 1e-13 * t:  # a step back is rounding
            break
    return t


def log_inclusion(law: Any, ids: NDArray, time: float) -> NDArray:
    """`Law.log_inclusion`, and 0 for all ids that can be drawn where the time is infinite."""
    if np.isinf(time):
        return np.where(law.log_prob(ids) > -np.inf, 0.0, -np.inf)
    return law.log_inclusion(ids, time)


def log_count(log_prob: NDArray, num_sampled: float) -> NDArray:
    """log(S·p): the expected number of copies among S draws with replacement, or batch slots."""
    with np.errstate(divide="ignore"):
        return log_prob + np.log(num_sampled)


def log_count_by_tries(log_prob: NDArray, num_sampled: int, num_tries: int) -> NDArray:
    """TensorFlow's expected count of its candidate samplers: log(1 − (1 − p)**num_tries).

    It takes the draw's own num_tries where `sampling_time` has their mean, and jumps to log(S·p)
    where S tries were enough.
    """
    if num_tries == num_sampled:
        return log_count(log_prob, num_sampled)
    with np.errstate(divide="ignore"):
        return np.log(-np.expm1(num_tries * np.log1p(-np.exp(log_prob))))


class FrequencyEstimator:
    """How often each item comes in a batch, estimated from the stream of batches itself.

    For every hashed bucket the estimator keeps the step A at which it was last seen and a moving
    average G of the steps between sightings. When c copies of the bucket's items come at step t::

        G ← (1 − α)^c·G + (1 − (1 − α)^c)·(t − A)/c,    A ← t,    estimate = 1/G

    For c = 1 that is the paper's rule. For more, the copies share the gap: one after the other, as
    the paper has it, c − 1 gaps of zero would come last and count for most.

    An item's estimate is the lowest of its buckets': collisions only ever shorten G. Like any
    moving average it carries noise, and a bias, of relative order α.

    Parameters
    ----------
    num_buckets : of each hash; several times the number of items that matter.
    decay : α in (0, 1]. The estimate averages over about 1/α sightings of an item.
    num_hashes : independent hashes, each with its own buckets.
    mode : "count" estimates the expected number of an item's copies in a batch, which is what a
        loss that keeps repeats as slots needs; "probability" that of its being there at all, for
        one that deduplicates the batch.
    prior : the estimate for an item never seen; None takes 1/(steps seen + 1).
    seed : of the hashes.

    References
    ----------
    Yi et al. 2019, Sampling-bias-corrected neural modeling for large corpus item recommendations,
    algorithms 2 and 3.

    Examples
    --------
    >>> import numpy as np
    >>> estimator = FrequencyEstimator(1000, decay=0.01)
    >>> for step in range(1000):
    ...     estimator.update(np.array([1, 1, 2 + step % 4]), step)
    >>> np.exp(estimator.log_q(np.array([1, 3]))).round(2)
    array([2.  , 0.26])
    """

    def __init__(
        self,
        num_buckets: int,
        *,
        decay: float,
        num_hashes: int = 1,
        mode: str = "count",
        prior: float | None = None,
        seed: int = 0,
    ) -> None:
        self.num_buckets = checks.integer("num_buckets", num_buckets, 1, 2**40)
        self.num_hashes = checks.integer("num_hashes", num_hashes, 1, 64)
        self.seed = checks.integer("seed", seed, 0, 2**64 - 1)
        checks.one_of("mode", mode, ("count", "probability"))
        if not (isinstance(decay, int | float | np.number) and 0 < decay <= 1):
            raise ValueError(f"decay: expected a number in (0, 1], got {decay!r}")
        if prior is not None and not 0 < prior < np.inf:
            raise ValueError(f"prior: expected a positive number or None, got {prior}")
        self.decay, self.mode, self.prior = float(decay), mode, prior
        self.first_step = self.last_step = -1  # before the first update
        self.num_updates = self.num_seen = 0
        self._seen_at = np.full((self.num_hashes, self.num_buckets), -1)  # A
        self._gap = np.full((self.num_hashes, self.num_buckets), np.inf)  # G; infinite if unseen

    def update(self, ids: Array, step: int) -> None:
        """Take in the ids of the batch of one step; steps must rise.

        Raises
        ------
        ValueError
            If `step` is not above the last one.
        """
        _, views = borrow({"ids": ids})
        checks.integral("ids", views["ids"])
        step = checks.integer("step", step, 0, 2**62)
        if step <= self.last_step:
            raise ValueError(f"step: expected above {self.last_step}, the last one, got {step}")
        if self.last_step < 0:
            self.first_step = step
        batch = views["ids"].ravel()
        self.num_updates, self.num_seen = self.num_updates + 1, self.num_seen + len(batch)
        if self.mode == "probability":
            batch = np.unique(batch)
        for seen_at, gap, buckets in zip(
            self._seen_at, self._gap, self._buckets(batch), strict=True
        ):
            here, copies = np.unique(buckets, return_counts=True)
            # The first sighting counts from the step before the stream began.
            since = step - np.maximum(seen_at[here], self.first_step - 1)
            old = np.where(np.isinf(gap[here]), since / copies, gap[here])
            keep = (1 - self.decay) ** copies
            gap[here] = keep * old + (1 - keep) * since / copies
            seen_at[here] = step
        self.last_step = step

    def log_q(self, ids: Array, *, batch_size: int | None = None) -> Array:
        """log of the estimate for each id, float64; `batch_size` is taken and not used."""
        place, view = view_of("ids", ids)
        checks.integral("ids", view)
        buckets = self._buckets(view.ravel())
        gaps = np.take_along_axis(self._gap, buckets, axis=1).max(axis=0)
        steps_seen = self.last_step - self.first_step + 1 if self.last_step >= 0 else 0
        unseen = 1 / (steps_seen + 1) if self.prior is None else self.prior
        with np.errstate(divide="ignore"):
            log_q = np.where(np.isinf(gaps), np.log(unseen), -np.log(gaps))
        if self.mode == "probability":
            log_q = np.minimum(log_q, 0.0)
        return place.give(log_q.reshape(view.shape))

    @property
    def batch_size(self) -> float:
        """The mean number of ids in a batch; 1 before the first."""
        return max(1.0, self.num_seen / max(1, self.num_updates))

    def merge(self, other: "FrequencyEstimator") -> "FrequencyEstimator":
        """The estimator of both streams together: two workers' halves of every batch.

        Expected counts add up, and so do the logs of staying away.
        """
        if self._settings() != other._settings():
            raise ValueError(
                f"other: expected the settings {self._settings()}, got {other._settings()}"
            )
        merged = self.from_state(self.state())
        merged.last_step = max(self.last_step, other.last_step)
        merged.first_step = min(self.first_step, other.first_step)
        merged.num_updates = max(self.num_updates, other.num_updates)
        merged.num_seen = self.num_seen + other.num_seen
        merged._seen_at = np.maximum(self._seen_at, other._seen_at)
        rate, other_rate = 1 / self._gap, 1 / other._gap
        if self.mode == "count":
            total = rate + other_rate
        else:
            total = 1 - (1 - np.minimum(rate, 1)) * (1 - np.minimum(other_rate, 1))
        with np.errstate(divide="ignore"):
            merged._gap = 1 / total
        return merged

    def state(self) -> dict[str, Any]:
        """Everything as plain numbers and arrays, the settings included."""
        return {
            **self._settings(),
            "first_step": self.first_step,
            "last_step": self.last_step,
            "num_updates": self.num_updates,
            "num_seen": self.num_seen,
            "seen_at": self._seen_at.copy(),
            "gap": self._gap.copy(),
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> "FrequencyEstimator":
        """An estimator that goes on where the one of `state` stood."""
        settings = dict(state)
        names = ("first_step", "last_step", "num_updates", "num_seen", "seen_at", "gap")
        missing = [name for name in names if name not in settings]
        if missing:
            raise ValueError(f"state: expected {', '.join(names)}, missing {', '.join(missing)}")
        first_step, last_step, updates, seen, seen_at, gap = (settings.pop(x) for x in names)
        estimator = cls(**settings)
        checks.shape("seen_at", seen_at, estimator._seen_at.shape, "(num_hashes, num_buckets)")
        checks.shape("gap", gap, estimator._gap.shape, "(num_hashes, num_buckets)")
        estimator.first_step, estimator.last_step = int(first_step), int(last_step)
        estimator.num_updates, estimator.num_seen = int(updates), int(seen)
        estimator._seen_at[...], estimator._gap[...] = seen_at, gap
        return estimator

    def _settings(self) -> dict[str, Any]:
        names = ("num_buckets", "decay", "num_hashes", "mode", "prior", "seed")
        return {name: getattr(self, name) for name in names}

    def _buckets(self, ids: NDArray) -> NDArray:
        """(num_hashes, len(ids)), by the finaliser of SplitMix64 (Steele et al. 2014)."""
        start = (
            self.seed + 0x9E3779B97F4A7C15 * np.arange(1, self.num_hashes + 1, dtype=object)
        ) & (2**64 - 1)
        x = ids.astype(np.uint64) + start.astype(np.uint64)[:, None]
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x ^= x >> np.uint64(31)
        return (x % np.uint64(self.num_buckets)).astype(np.int64)
