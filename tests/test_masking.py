"""False negatives: which are dropped, and what a ragged set of ids must look like."""

import numpy as np
import pytest
import scipy.sparse
from hypothesis import given, settings
from hypothesis import strategies as st

from zipfneg import Candidates, reference, sampled_softmax_loss
from zipfneg.masking import FalseNegatives, csr


def _dropped(false_negatives, num_queries, num_sampled, height):
    """What `drop` writes −inf over, applied to blocks of `height` rows."""
    logits = np.zeros((num_queries, num_sampled))
    for first in range(0, num_queries, height):
        false_negatives(logits[first : first + height], first)
    assert np.isin(logits, [0, -np.inf]).all()
    return logits == -np.inf


def test_drops_own_known_and_masked_by_hand():
    found = FalseNegatives.find(
        np.array([7, 3, 7, 5]),
        np.array([7, 8]),
        (np.array([0, 0, 2]), np.array([5, 3])),
        np.array([[False, True, False, False], [False] * 4]),
        2,
    )
    expected = [[True, True, True, False], [False, True, False, True]]
    assert _dropped(found, 2, 4, 2).tolist() == expected


def test_csr_takes_a_pair_or_a_scipy_matrix():
    indptr, ids = csr("x", (np.array([0, 2, 2], np.int32), np.array([4, 1], np.uint8)), 2)
    assert (indptr.tolist(), ids.tolist()) == ([0, 2, 2], [4, 1])
    matrix = scipy.sparse.csr_array(np.array([[0, 1, 1], [0, 0, 0], [1, 0, 0]]))
    indptr, ids = csr("x", matrix, 3)
    assert (indptr.tolist(), ids.tolist()) == ([0, 2, 2, 3], [1, 2, 0])
    assert indptr.dtype == ids.dtype == np.int64


@st.composite
def _batches(draw):
    num_queries = draw(st.integers(0, 6))
    num_sampled = draw(st.integers(0, 9))
    some_ids = st.integers(-1, 5)  # few, so that they repeat
    shape = (num_sampled,) if draw(st.booleans()) else (num_queries, num_sampled)
    size = int(np.prod(shape))
    negative_ids = np.array(draw(st.lists(some_ids, min_size=size, max_size=size)), np.int64)
    positive_ids = np.array(
        draw(st.lists(some_ids, min_size=num_queries, max_size=num_queries)), np.int64
    )
    rows = draw(
        st.lists(st.lists(some_ids, max_size=4), min_size=num_queries, max_size=num_queries)
    )
    known = (
        np.cumsum([0, *map(len, rows)]),
        np.array([x for row in rows for x in row], np.int64),
    )
    flags = draw(st.lists(st.booleans(), min_size=size, max_size=size))
    return {
        "negative_ids": negative_ids.reshape(shape),
        "positive_ids": draw(st.sampled_from([None, positive_ids])),
        "known_positives": draw(st.sampled_from([None, known])),
        "mask": draw(st.sampled_from([None, np.array(flags, bool).reshape(shape)])),
        "num_queries": num_queries,
    }


@settings(deadline=None, max_examples=200)
@given(batch=_batches(), height=st.integers(1, 6))
def test_drop_equals_the_comparison_of_every_pair(batch, height):
    num_sampled = batch["negative_ids"].shape[-1]
    got = _dropped(FalseNegatives.find(**batch), batch["num_queries"], num_sampled, height)
    np.testing.assert_array_equal(got, reference.dropped_negatives(**batch))


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        ([0, 1], TypeError, r"x: expected the pair \(indptr, ids\).* got list"),
        ((np.zeros(3, int),), TypeError, r"x: expected the pair"),
        (np.zeros((2, 3)), TypeError, r"x: expected the pair.* got ndarray"),
        (([0, 0, 0], np.zeros(0, int)), TypeError, r"x\.indptr: expected an array"),
        ((np.zeros(3), np.zeros(0, int)), TypeError, r"x\.indptr: expected an integer dtype"),
        ((np.zeros(3, int), np.zeros(0)), TypeError, r"x\.ids: expected an integer dtype"),
        (
            (np.zeros(2, int), np.zeros(0, int)),
            ValueError,
            r"x\.indptr: expected shape \(B \+ 1,\)",
        ),
        ((np.array([0, 1, 1]), np.zeros((1, 1), int)), ValueError, "x: expected indptr to rise"),
        ((np.array([1, 1, 2]), np.zeros(2, int)), ValueError, "rise from 0 .* ids 2, got 1 to 2"),
        ((np.array([0, 1, 1]), np.zeros(2, int)), ValueError, "rise from 0 .* ids 2, got 0 to 1"),
        ((np.array([0, 3, 2]), np.zeros(2, int)), ValueError, "x: expected indptr to rise"),
        # An unsigned difference would wrap, and the kernels read past the ids.
        ((np.array([0, 9, 2], np.uint32), np.zeros(2, int)), ValueError, "expected indptr to rise"),
        ((np.array([0, 9, 2], np.uint64), np.zeros(2, int)), ValueError, "expected indptr to rise"),
    ],
)
def test_malformed_csr_is_refused(value, error, text):
    with pytest.raises(error, match=text):
        csr("x", value, 2)


def test_known_positives_need_negative_ids():
    known = (np.zeros(3, int), np.zeros(0, int))
    with pytest.raises(ValueError, match=r"known_positives: needs negatives\.ids"):
        FalseNegatives.find(None, None, known, None, 2)


def test_columns_are_not_taken_for_rows():
    with pytest.raises(TypeError, match=r"known: expected rows \(CSR\), got csc; pass .tocsr\(\)"):
        csr("known", scipy.sparse.csc_array(np.eye(3, dtype=int)), 3)


@pytest.mark.parametrize("per_query", [False, True])
def test_wide_unsigned_ids_are_found(per_query):
    ids = np.array([2**64 - 1, 5, 2**63 + 9, 2**63], np.uint64)
    x = np.random.default_rng(0).normal(size=(4, 3))
    own = np.tile(ids, (4, 1)) if per_query else ids
    v = np.broadcast_to(x, (4, 4, 3)) if per_query else x
    known = (np.array([0, 1, 1, 2, 2]), np.array([2**63, 2**64 - 1], np.uint64))

    def loss(positive_ids, negative_ids, known):
        return sampled_softmax_loss(
            x, Candidates(positive_ids, x), Candidates(negative_ids, v), known_positives=known,
            reduction="none",
        )  # fmt: skip

    numbered = {x: k for k, x in enumerate(ids.tolist())}
    plain = np.arange(4)
    plain_known = known[0], np.array([numbered[x] for x in known[1].tolist()])
    plain_own = np.tile(plain, (4, 1)) if per_query else plain
    assert loss(ids, own, known) == pytest.approx(loss(plain, plain_own, plain_known), rel=1e-13)
