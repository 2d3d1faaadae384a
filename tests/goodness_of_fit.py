"""Whether a sample follows a law, with one error budget for all tests that ask it."""

import numpy as np
from scipy import stats

# The chance that a correct library fails any of the suite's statistical tests, were the seeds
# drawn afresh, split over the p-values that are asked to be above LEVEL.
TOTAL_ERROR = 1e-6
NUM_P_VALUES = 100
LEVEL = TOTAL_ERROR / NUM_P_VALUES
MIN_EXPECTED = 50


def merged(expected):
    """The first index of each cell: neighbouring outcomes, together expected at least 50 times."""
    starts, total = [0], 0.0
    for k, e in enumerate(expected):
        if total >= MIN_EXPECTED:
            starts.append(k)
            total = 0.0
        total += e
    return np.array(starts if total >= MIN_EXPECTED or len(starts) == 1 else starts[:-1])


def chi_square(observed, prob):
    """p-value of the counts `observed` of the outcomes 0, 1, … under their probabilities."""
    assert np.isclose(prob.sum(), 1, rtol=1e-12)
    expected = prob * observed.sum()
    starts = merged(expected)
    assert len(starts) > 1
    observed, expected = np.add.reduceat(observed, starts), np.add.reduceat(expected, starts)
    statistic = ((observed - expected) ** 2 / expected).sum()
    return stats.chi2.sf(statistic, len(starts) - 1)


def mean(values, expected):
    """p-value of the mean of independent `values`, by their own standard error."""
    values = np.asarray(values, np.float64)
    error = values.std(ddof=1) / np.sqrt(len(values))
    return 2 * stats.norm.sf(abs(values.mean() - expected) / error)


def uniform(u):
    """p-value of values that should be independent uniforms of (0, 1): Kolmogorov-Smirnov."""
    return stats.kstest(u, "uniform").pvalue
