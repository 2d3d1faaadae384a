"""Metrics against hand calculation, and against plain loops over ranked labels."""

from itertools import permutations

import numpy as np
import pytest

from zipfneg import metrics

FUNCTIONS = {
    "recall": metrics.recall,
    "precision": metrics.precision,
    "mrr": metrics.mrr,
    "ndcg": metrics.ndcg,
    "map": metrics.average_precision,
}


def _from_labels(name, labels, k):
    """The definition, over the labels (0 or 1) of all items in ranked order."""
    relevant, top = sum(labels), labels[:k]
    clipped = min(max(relevant, 1), k)
    if name == "recall":
        return sum(top) / clipped
    if name == "precision":
        return sum(top) / k
    if name == "mrr":
        return max((label / (place + 1) for place, label in enumerate(top)), default=0)
    if name == "ndcg":
        gain = sum(label / np.log2(place + 2) for place, label in enumerate(top))
        return gain / sum(1 / np.log2(place + 2) for place in range(clipped))
    found = total = 0
    for place, label in enumerate(top):
        found += label
        total += label * found / (place + 1)
    return total / clipped


def test_one_target_by_hand():
    ranks = np.array([0, 2, 3])
    assert metrics.recall(ranks, 3).tolist() == [1, 1, 0]
    assert metrics.precision(ranks, 4).tolist() == [0.25, 0.25, 0.25]
    assert metrics.mrr(ranks, 3) == pytest.approx([1, 1 / 3, 0])
    assert metrics.average_precision(ranks, 3) == pytest.approx([1, 1 / 3, 0])
    assert metrics.ndcg(ranks, 3) == pytest.approx([1, 0.5, 0])
    assert metrics.ranking_metrics(ranks, (1,)) == pytest.approx(
        {f"{name}@1": 1 / 3 for name in metrics.TOP_K_METRICS}
    )


def test_several_targets_by_hand():
    ranks = np.array([[3, 0, -1]])  # labels 1 0 0 1 0 …
    assert metrics.recall(ranks, 2) == pytest.approx([0.5])
    assert metrics.precision(ranks, 2) == pytest.approx([0.5])
    assert metrics.mrr(ranks, 4) == pytest.approx([1])
    assert metrics.average_precision(ranks, 4) == pytest.approx([(1 + 2 / 4) / 2])
    assert metrics.ndcg(ranks, 4) == pytest.approx([(1 + 1 / np.log2(5)) / (1 + 1 / np.log2(3))])


@pytest.mark.parametrize("k", [1, 2, 3, 7, 50])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_several_targets_equal_the_definition(name, k):
    rng = np.random.default_rng(k)
    num_items, width = 11, 5
    ranks = np.full((40, width), -1)
    for row in ranks:
        count = rng.integers(0, width + 1)
        row[rng.permutation(width)[:count]] = rng.permutation(num_items)[:count]
    expected = []
    for row in ranks:
        labels = [int(place in row) for place in range(num_items)]
        expected.append(_from_labels(name, labels, k))
    assert FUNCTIONS[name](ranks, k) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("k", [1, 2, 3, 9])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_ties_equal_the_mean_over_all_orders(name, k):
    # Item 0 is the target; every order of the items, then a stable sort, breaks ties evenly.
    for scores in ([1, 1, 1, 1, 1], [1, 2, 1, 0, 1], [1, 2, 3, 1, 0], [3, 1, 1, 0, 0]):
        expected = []
        for order in permutations(range(5)):
            ranked = sorted(order, key=lambda item: -scores[item])
            expected.append(_from_labels(name, [int(item == 0) for item in ranked], k))
        better = sum(score > scores[0] for score in scores)
        tied = sum(score == scores[0] for score in scores) - 1
        got = FUNCTIONS[name]([better], k, num_tied=[tied])
        assert got == pytest.approx([np.mean(expected)], abs=1e-12)


def test_a_constant_model_gets_what_guessing_gets():
    num_items, k = 1000, 10
    got = metrics.ranking_metrics(np.zeros(7, int), [k], num_tied=np.full(7, num_items - 1))
    places = np.arange(k)
    assert got == pytest.approx(
        {
            "recall@10": k / num_items,
            "precision@10": 1 / num_items,
            "mrr@10": (1 / (places + 1)).sum() / num_items,
            "ndcg@10": (1 / np.log2(places + 2)).sum() / num_items,
            "map@10": (1 / (places + 1)).sum() / num_items,
        }
    )


@pytest.mark.parametrize("name", FUNCTIONS)
def test_one_column_equals_one_target(name):
    ranks = np.array([0, 1, 4, 9, 2**61])
    one, column = (FUNCTIONS[name](x, 5) for x in (ranks, ranks[:, None]))
    assert one == pytest.approx(column)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_queries_without_relevant_items_get_zero(name):
    assert FUNCTIONS[name](np.full((2, 3), -1), 4).tolist() == [0, 0]
    assert FUNCTIONS[name](np.full((2, 0), -1), 4).tolist() == [0, 0]
    assert FUNCTIONS[name](np.array([-1]), 4).tolist() == [0]


def test_an_empty_batch_gets_zeros():
    got = metrics.ranking_metrics(np.zeros(0, int), [1, 5])
    assert got == {f"{name}@{k}": 0.0 for k in (1, 5) for name in metrics.TOP_K_METRICS}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize(
    ("ranks", "k", "num_tied", "error", "text"),
    [
        ([0.5], 1, None, TypeError, "ranks: expected an integer dtype"),
        (
            np.zeros((1, 1, 1), int),
            1,
            None,
            ValueError,
            r"ranks: expected shape \(B,\) or \(B, R\)",
        ),
        (np.array(0), 1, None, ValueError, r"ranks: expected shape .*, got \(\)"),
        ([0], 0, None, ValueError, "k: expected an integer from 1"),
        ([0], 1.5, None, TypeError, "k: expected an integer, got 1.5"),
        ([0], True, None, TypeError, "k: expected an integer, got True"),
        ([[0, 1]], 1, [1], ValueError, "num_tied: expected None with several relevant items"),
        ([0, 1], 1, [1], ValueError, r"num_tied: expected shape \(B,\) as ranks"),
    ],
)
def test_errors(name, ranks, k, num_tied, error, text):
    with pytest.raises(error, match=text):
        FUNCTIONS[name](ranks, k, num_tied=num_tied)


def test_the_largest_rank_and_ties_do_not_overflow():
    assert metrics.recall([2**63 - 1], 10).tolist() == [0]
    assert metrics.recall([0], 10, num_tied=[2**62]) == pytest.approx(10 / 2**62)
    with pytest.raises(ValueError, match="num_tied: expected numbers ≥ 0, got -1"):
        metrics.recall([0], 10, num_tied=[-1])
