"""The oracle itself, against hand calculation and finite differences."""

import numpy as np
import pytest

from zipfneg import reference


def test_loss_of_one_row_by_hand():
    # Scores 2, 0 and 1.
    loss, _ = reference.sampled_softmax([[1.0]], [[2.0]], [[0.0], [1.0]])
    assert loss == pytest.approx([np.log(1 + np.exp(-2) + np.exp(-1))], rel=1e-15)
    # log q and the temperature: z = 4 + ln 2 against ln 4; the second negative is dropped.
    loss, grads = reference.sampled_softmax(
        [[1.0]],
        [[2.0]],
        [[0.0], [1.0]],
        positive_log_q=[np.log(0.5)],
        negative_log_q=[np.log(0.25), -5.0],
        dropped=[[False, True]],
        temperature=0.5,
    )
    share = 4 / (4 + 2 * np.exp(4))
    assert loss == pytest.approx([-np.log1p(-share)], rel=1e-13)
    assert grads.negatives.ravel() == pytest.approx([2 * share, 0], rel=1e-13)
    assert grads.positives.ravel() == pytest.approx([-2 * share], rel=1e-13)
    assert grads.queries.ravel() == pytest.approx([-4 * share], rel=1e-13)
    # −(1/τ)·(g_0·a_0) with a_0 = 4
    assert grads.temperature == pytest.approx(8 * share, rel=1e-13)


SIGMA = {0.5: 1 / (1 + np.exp(-0.5)), 1.0: 1 / (1 + np.exp(-1)), 4.0: 1 / (1 + np.exp(-4))}
LN2 = np.log(2)


@pytest.mark.parametrize(
    ("loss", "scores", "parameter", "expected"),
    [
        # Scores of the positive and of the negatives, of which the last is dropped.
        ("bpr", (0, [0, np.log(3), 50]), 0, (np.log(2) + np.log(4)) / 2),
        ("logistic", (0, [0, np.log(3), 50]), 0, (np.log(2) + np.log(4)) / 2),
        ("hinge", (1, [-3, 0.5, 2, 50]), 1.5, (0 + 1 + 2.5) / 3),
        ("top1", (1, [1, 2, 50]), 0, (0.5 + SIGMA[1.0] + SIGMA[1.0] + SIGMA[4.0]) / 2),
        ("bce", (0, [0, np.log(3), 50]), 0, LN2 + LN2 + np.log(4)),
        # β = 1 − t·(1 − α) with α = e^0 = 1
        ("gbce", (0, [0, np.log(3), 50]), 0.75, LN2 + LN2 + np.log(4)),
        # w = (1/4, 3/4), σ(a_0 − a_j) = (1/2, 1/4)
        ("bpr-max", (0, [0, np.log(3), 50]), 2, -np.log(5 / 16) + 1.5 * np.log(3) ** 2),
        # Equal negatives: the weights do not matter.
        ("top1-max", (0.5, [1, 1, 50]), 0, SIGMA[0.5] + SIGMA[1.0]),
    ],
)
def test_the_other_losses_of_one_row_by_hand(loss, scores, parameter, expected):
    positive, negatives = scores
    value, grads = reference.sampled_softmax(
        [[1.0]],
        [[positive]],
        np.reshape(negatives, (-1, 1)),
        dropped=np.arange(len(negatives)) == len(negatives) - 1,
        loss=loss,
        parameter=parameter,
    )
    assert value == pytest.approx([expected], rel=1e-14)
    assert grads.negatives[-1] == 0


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        # q_0 = 1/2 and q = (1/4, 1/8): z_0 = ln 2, z = (ln 4, ln 8)
        ("bpr", (np.log(3) + np.log(5)) / 2),
        ("bce", np.log(1.5) + np.log(5) + np.log(9)),
        # w = (1/3, 2/3)
        ("bpr-max", LN2),
        ("top1-max", 1.0),
        # α = 1/2, t = 1/2: β = 3/4
        ("gbce", 2.75 * LN2),
    ],
)
def test_what_log_q_does_by_hand(loss, expected):
    value, _ = reference.sampled_softmax(
        [[0.0]],
        [[0.0]],
        [[0.0], [0.0]],
        positive_log_q=[np.log(0.5)],
        negative_log_q=np.log([0.25, 0.125]),
        loss=loss,
        parameter=0.5,
    )
    assert value == pytest.approx([expected], rel=1e-14)


def test_the_weights_of_the_max_losses_are_those_of_the_full_softmax():
    # Drawn in proportion to q, with log q: the weights are e^a among the distinct items.
    a = np.array([[0.3, -1.0, 2.0]])
    counts = np.array([1, 4, 2])
    scores = reference.Scores(
        np.zeros(1), a, np.zeros(1), np.zeros((1, 3)), np.ones((1, 3), bool), 1.0
    )
    drawn = np.repeat(a, counts, axis=1)
    log_q = np.repeat(np.log(counts), counts)[None, :]
    repeated = scores._replace(a=drawn, log_q=log_q, kept=np.ones(drawn.shape, bool))
    for loss in (reference.bpr_max, reference.top1_max):
        assert loss(repeated)[0] == pytest.approx(loss(scores)[0], rel=1e-14)


def test_popularity_by_hand():
    assert reference.log_uniform_prob(3) == pytest.approx(
        [np.log(2) / np.log(4), np.log(1.5) / np.log(4), np.log(4 / 3) / np.log(4)]
    )
    # Equal items: each is in S of N samples. One far likelier item is in nearly all.
    assert reference.inclusion_prob(np.full(10, 0.1), 3) == pytest.approx(np.full(10, 0.3))
    skewed = reference.inclusion_prob(np.array([0.98, 0.01, 0.01]), 2)
    assert skewed.sum() == pytest.approx(2)
    assert skewed[0] > 0.999
    assert skewed[1] == skewed[2]


def test_dropped_negatives_by_hand():
    dropped = reference.dropped_negatives(
        np.array([4, 5, 4, 6]),
        positive_ids=np.array([4, 9]),
        known_positives=(np.array([0, 0, 2]), np.array([6, 5])),
        mask=np.array([False, False, False, True]),
        num_queries=2,
    )
    assert dropped.tolist() == [[True, False, True, True], [False, True, False, True]]


def test_full_softmax_is_the_sampled_one_over_all_other_items():
    rng = np.random.default_rng(1)
    queries, items, targets = rng.normal(size=(5, 3)), rng.normal(size=(9, 3)), np.arange(5)
    own = np.arange(9) == targets[:, None]
    sampled, _ = reference.sampled_softmax(
        queries, items[targets], items, dropped=own, temperature=0.7
    )
    full = reference.full_softmax_loss(queries, items, targets, temperature=0.7)
    assert full == pytest.approx(sampled, rel=1e-13)


def _differences(function, x, step=1e-5):
    """Central differences of a scalar function by every element of x."""
    out = np.zeros(x.shape)
    for at in np.ndindex(x.shape):
        ends = []
        for sign in (1, -1):
            moved = x.copy()
            moved[at] += sign * step
            ends.append(function(moved))
        out[at] = (ends[0] - ends[1]) / (2 * step)
    return out


@pytest.mark.parametrize("loss", reference.LOSSES)
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "per-query"])
@pytest.mark.parametrize("rich", [False, True], ids=["embeddings", "every-option"])
@pytest.mark.parametrize(("B", "S", "D"), [(1, 1, 1), (3, 5, 2), (4, 2, 3)])
def test_gradients_are_finite_differences(B, S, D, rich, shared, loss):
    rng = np.random.default_rng(B * 100 + S)
    columns = (S,) if shared else (B, S)
    inputs = {
        "queries": rng.normal(size=(B, D)),
        "positives": rng.normal(size=(B, D)),
        "negatives": rng.normal(size=(*columns, D)),
        "positive_bias": np.zeros(B),
        "negative_bias": np.zeros(columns),
        "temperature": np.ones(()),
    }
    fixed, d_loss = {"loss": loss, "parameter": 0.4}, np.ones(B)
    if rich:
        inputs["positive_bias"] = rng.normal(size=B)
        inputs["negative_bias"] = rng.normal(size=columns)
        inputs["temperature"] = np.array(0.6)
        d_loss = rng.normal(size=B)
        fixed |= {
            "positive_log_q": rng.normal(size=B),
            "negative_log_q": rng.normal(size=columns),
            "dropped": rng.random((B, S)) < 0.3,
        }

    def total(**changed):
        return (d_loss * reference.sampled_softmax(**{**inputs, **changed}, **fixed)[0]).sum()

    _, grads = reference.sampled_softmax(**inputs, **fixed, d_loss=d_loss)
    for name, x in inputs.items():
        expected = _differences(lambda moved, name=name: total(**{name: moved}), x)
        got = np.asarray(getattr(grads, name))
        assert got.shape == x.shape, name
        scale = max(1, np.abs(expected).max())
        assert np.abs(got - expected).max() < 1e-7 * scale, name
