"""The logQ mathematics: how often each id is expected among the candidates.

Which expected count belongs to which sample is tabulated in ``docs/logq.md``.
"""

import numpy as np

from .checks import NDArray


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
        if abs(step) <= 1e-13 * t:
            break
    return t


def log_inclusion(log_prob: NDArray, time: float) -> NDArray:
    """log π = log(1 − e^(−p·t)): the probability that a unique sample holds the id.

    Sampling S ids without replacement is close to letting each arrive by time t: exact for a
    Poissonised sample; for one of fixed size within 0.1 % from about S = 100 on, 0.4 % at S = 20,
    2 % at S = 5 (log-uniform, N = 1000).
    """
    if np.isinf(time):
        return np.where(log_prob > -np.inf, 0.0, -np.inf)
    with np.errstate(divide="ignore"):
        return np.log(-np.expm1(-np.exp(log_prob) * time))


def log_count(log_prob: NDArray, num_sampled: int) -> NDArray:
    """log(S·p): the expected number of copies among S draws with replacement, or batch slots."""
    with np.errstate(divide="ignore"):
        return log_prob + np.log(num_sampled)
