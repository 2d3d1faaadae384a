"""The TensorFlow adapter against the core, and against TensorFlow's own sampler and losses."""

import os
import sys
import warnings

import ml_dtypes
import numpy as np
import pytest
from goodness_of_fit import LEVEL, chi_square

import zipfneg
from zipfneg import (
    Candidates,
    Empirical,
    InBatchSampler,
    LogUniform,
    MixtureSampler,
    PopularitySampler,
    sampled_softmax_value_and_grad,
)
from zipfneg.logq import log_count_by_tries
from zipfneg.loss import LOSSES

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what frameworks do while they are imported
    tf = pytest.importorskip("tensorflow")
    import keras

import zipfneg.tensorflow
from zipfneg.tensorflow import ContrastiveOutput, sample, sampled_softmax_loss

pytestmark = pytest.mark.frameworks

SHAPES = [(1, 1, 1), (2, 3, 5), (7, 13, 3), (31, 1, 17), (33, 65, 31)]
NO_LOG_Q = ("hinge", "top1")
LAW = LogUniform(1000)


@pytest.fixture(params=[False, True], ids=["eager", "graph"])
def run(request):
    """Calls a function at once, or in a graph whose arguments have no known sizes."""

    def call(function, *args):
        if not request.param:
            return function(*args)
        specs = [tf.TensorSpec([None] * np.ndim(x), tf.as_dtype(x.dtype)) for x in args]
        return tf.function(function, input_signature=specs, autograph=False)(*args)

    call.in_graph = request.param
    return call


def problem(B, S, D, dtype=np.float32, *, loss="softmax", negatives="shared"):
    """What has a gradient, by name; the ids and log q of both sides; and the other options."""
    rng = np.random.default_rng([B, S, D])
    columns = (S,) if negatives == "shared" else (B, S)
    rows = (2 * S,) if negatives == "rows of a table" else columns
    indptr = np.arange(0, 2 * B + 1, 2)

    def normal(*shape):
        return tf.constant(rng.normal(size=shape).astype(dtype))

    differentiable = [
        normal(B, D), normal(B, D), normal(B), normal(*rows, D), normal(*columns),
        tf.constant(0.7),
    ]  # fmt: skip
    constants = [
        (
            tf.constant(rng.integers(0, 2 * S, shape)),
            None if loss in NO_LOG_Q else tf.constant(rng.uniform(-4, 0, shape)),
        )
        for shape in ((B,), columns)
    ]
    options = {
        "known_positives": (tf.constant(indptr), tf.constant(rng.integers(0, 2 * S, 2 * B))),
        "mask": tf.constant(rng.random((B, S)) < 0.2),
        "sample_weight": tf.constant(rng.uniform(0, 2, B).astype(np.float32)),
        "loss": loss,
    }
    return differentiable, constants, options


def arguments(differentiable, constants):
    u, p, p_bias, v, v_bias, temperature = differentiable
    (p_ids, p_log_q), (v_ids, v_log_q) = constants
    args = u, Candidates(p_ids, p, p_log_q, p_bias), Candidates(v_ids, v, v_log_q, v_bias)
    return args, {"temperature": temperature}


def core(differentiable, constants, options):
    """Loss and gradients from the core, the latter in the order of `differentiable`."""
    args, temperature = arguments(differentiable, constants)
    loss, g = sampled_softmax_value_and_grad(*args, **temperature, **options)
    p, v = g.positives, g.negatives
    return loss, [g.queries, p.embeddings, p.bias, v.embeddings, v.bias, g.temperature]


def value_and_grad(constants, options, upstream=1.0):
    def call(*differentiable):
        with tf.GradientTape() as tape:
            tape.watch(differentiable)
            args, temperature = arguments(differentiable, constants)
            loss = sampled_softmax_loss(*args, **temperature, **options)
            total = tf.reduce_sum(loss * upstream)
        return loss, tape.gradient(total, differentiable)

    return call


def dense(x):
    return np.asarray(tf.convert_to_tensor(x)).astype(np.float64)


def assert_close(got, expected, rtol=1e-5):
    for x, y in zip(tf.nest.flatten(got), tf.nest.flatten(expected), strict=True):
        x, y = dense(x), dense(y)
        np.testing.assert_allclose(x, y, rtol=rtol, atol=rtol * np.abs(y).max(initial=1e-6))


# -- By hand


def test_three_queries_by_hand(run):
    def call(u, v):
        with tf.GradientTape() as tape:
            tape.watch(u)
            loss = sampled_softmax_loss(u, u, v)  # z_0 = z_j = 1
        return loss, tape.gradient(loss, u)

    loss, d_u = run(call, tf.eye(3), tf.ones((4, 3)))
    np.testing.assert_allclose(loss, np.log(5), rtol=1e-6)
    # Of the queries and, which are the same, the positives.
    np.testing.assert_allclose(d_u, (0.8 * (1 - np.eye(3)) - 0.8 * np.eye(3)) / 3, atol=1e-7)


# -- Against the core


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("negatives", ["shared", "per query", "rows of a table"])
def test_every_option(run, shape, reduction, negatives):
    differentiable, constants, options = problem(*shape, negatives=negatives)
    options["reduction"] = reduction
    got = run(value_and_grad(constants, options), *differentiable)
    assert_close(got, core(differentiable, constants, options))


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss(run, loss):
    differentiable, constants, options = problem(7, 13, 3, loss=loss)
    got = run(value_and_grad(constants, options), *differentiable)
    assert_close(got, core(differentiable, constants, options))


def test_an_upstream_gradient_for_each_row(run):
    differentiable, constants, options = problem(7, 13, 3)
    upstream = tf.linspace(-1.0, 2.0, 7)
    call = value_and_grad(constants, {**options, "reduction": "none"}, upstream)
    _, grads = run(call, *differentiable)
    weighted = {**options, "sample_weight": options["sample_weight"] * upstream, "reduction": "sum"}
    assert_close(grads, core(differentiable, constants, weighted)[1])


@pytest.mark.parametrize(
    "dtype", [np.float16, ml_dtypes.bfloat16, np.float64], ids=lambda d: np.dtype(d).name
)
def test_dtypes(run, dtype):
    differentiable, constants, options = problem(7, 13, 3, dtype)
    loss, grads = run(value_and_grad(constants, options), *differentiable)
    expected_loss, expected = core(differentiable, constants, options)
    assert loss.dtype == (tf.float64 if dtype == np.float64 else tf.float32)
    for x, y in zip(grads, differentiable, strict=True):
        assert x.dtype == y.dtype
    assert_close(loss, expected_loss)
    assert_close(grads, expected, float(ml_dtypes.finfo(dtype).eps) + 1e-7)


def test_a_scaled_loss_keeps_small_half_precision_gradients(run):
    u, p, v = (
        tf.fill(shape, tf.constant(2e-5, tf.float16)) for shape in [(4096, 2), (4096, 2), (8, 2)]
    )
    v *= tf.constant([1, -1], tf.float16)

    def call(u):
        with tf.GradientTape() as tape:
            tape.watch(u)
            loss = 2.0**16 * sampled_softmax_loss(u, p, v)
        return tape.gradient(loss, u)

    exact = sampled_softmax_value_and_grad(*(x.numpy().astype(np.float64) for x in (u, p, v)))[
        1
    ].queries
    assert (np.abs(exact) < 2.0**-25).all()  # nothing is left of them in float16
    np.testing.assert_allclose(run(call, u), 2.0**16 * exact, rtol=1e-3, atol=2.0**-25)


def test_numbers_keep_their_digits():
    u = np.eye(2)
    got = sampled_softmax_loss(u, u, u, temperature=0.7)
    expected = zipfneg.sampled_softmax_loss(u, u, u, temperature=0.7)
    np.testing.assert_allclose(got, expected, rtol=1e-14)


# -- Variables, tables and shapes


def test_variables_and_tables(run):
    rng = np.random.default_rng(0)
    table = tf.Variable(rng.normal(size=(20, 3)).astype("f"))
    bias = keras.Variable(rng.normal(size=20).astype("f"))
    queries, temperature = tf.Variable(rng.normal(size=(5, 3)).astype("f")), tf.Variable(0.7)
    ids, negative_ids = tf.constant([3, 1, 3, 0, 9]), tf.constant([3, 4, 4, 1])

    def sides(ids):
        return Candidates(ids, tf.gather(table, ids), None, tf.gather(bias.value, ids))

    def call():
        with tf.GradientTape() as tape:
            loss = sampled_softmax_loss(
                queries, sides(ids), sides(negative_ids), temperature=temperature
            )
        return tape.gradient(loss, [queries, table, bias.value, temperature])

    d_queries, d_table, d_bias, d_temperature = run(call)
    assert isinstance(d_table, tf.IndexedSlices)
    assert isinstance(d_bias, tf.IndexedSlices)
    _, g = sampled_softmax_value_and_grad(
        queries.value(), sides(ids), sides(negative_ids), temperature=0.7
    )
    expected = np.zeros((20, 3)), np.zeros(20)
    for x, field in zip(expected, ("embeddings", "bias"), strict=True):
        np.add.at(x, ids, getattr(g.positives, field))
        np.add.at(x, negative_ids, getattr(g.negatives, field))
    assert_close([d_queries, d_table, d_bias, d_temperature], [g.queries, *expected, g.temperature])


def test_static_shapes():
    u, v = tf.TensorSpec([None, 8]), tf.TensorSpec([16, 8])

    @tf.function(autograph=False)
    def call(u, v):
        with tf.GradientTape() as tape:
            tape.watch((u, v))
            each = sampled_softmax_loss(u, u, v, reduction="none")
            mean = sampled_softmax_loss(u, u, v)
        d_u, d_v = tape.gradient(mean, (u, v))
        draw = sample(PopularitySampler(LAW, 64), tf.zeros(5, tf.int32), 0)
        return each, mean, d_u, d_v, draw.negatives.ids, draw.positives.log_q

    shapes = [x.shape.as_list() for x in call.get_concrete_function(u, v).outputs]
    assert shapes == [[None], [], [None, 8], [16, 8], [64], [None]]


def test_inputs_are_not_copied(run, monkeypatch):
    seen = []

    def spy(queries, positives, negatives, **options):
        seen.append([x.ctypes.data for x in (queries, positives.embeddings, negatives.embeddings)])
        return np.float32(0)

    monkeypatch.setattr(zipfneg.tensorflow.core, "sampled_softmax_loss", spy)
    given = [tf.ones((64, 32)), tf.ones((64, 32)), tf.ones((128, 32))]
    run(sampled_softmax_loss, *given)
    assert seen == [[zipfneg.as_array(x).ctypes.data for x in given]]


# -- Draws


@pytest.mark.parametrize(
    "sampler",
    [
        PopularitySampler(LAW, 16, seed=3),
        PopularitySampler(LAW, 16, unique="poisson"),
        PopularitySampler(LAW, 16, per_query=True),
        InBatchSampler(LAW),
        InBatchSampler(),
        MixtureSampler([InBatchSampler(LAW), PopularitySampler(LAW, 16)]),
    ],
    ids=repr,
)
def test_draws(run, sampler):
    ids = tf.constant([1, 999, 5])
    for step in (0, 7):
        draw = run(lambda ids, step: sample(sampler, ids, step), ids, tf.constant(step))
        expected = sampler.sample(ids.numpy(), step=step)
        for side in (0, 1):
            for x, y in zip(draw[side], expected[side], strict=True):
                assert (x is None) == (y is None)
                if x is not None:
                    np.testing.assert_array_equal(x, y)
        assert int(draw.num_tries) == expected.num_tries


def test_draws_without_positives(run):
    sampler = PopularitySampler(LAW, 16)
    draw = run(lambda step: sample(sampler, step=step, stream=2), tf.constant(5))
    assert draw.positives is None
    np.testing.assert_array_equal(
        draw.negatives.ids, sampler.sample(step=5, stream=2).negatives.ids
    )


# -- TensorFlow's own


def candidates_of_tensorflow(true_ids, num_sampled, unique, num_items, seed):
    return tf.random.log_uniform_candidate_sampler(
        true_classes=tf.constant(true_ids, tf.int64)[:, None], num_true=1,
        num_sampled=num_sampled, unique=unique, range_max=num_items, seed=seed,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("num_items", "num_sampled"), [(50, 5), (1000, 5), (1000, 300), (10**6, 64)]
)
def test_expected_counts_of_tensorflow(num_items, num_sampled):
    law = LogUniform(num_items)
    true_ids = np.array([0, 1, 7, num_items // 2, num_items - 1])
    for seed in range(3):
        ids, of_true, of_sampled = candidates_of_tensorflow(
            true_ids, num_sampled, True, num_items, seed
        )
        # It does not tell its number of tries, but every count does, one near a half best.
        some = np.concatenate([true_ids, ids])
        counts = np.concatenate([of_true[:, 0], of_sampled]).astype(np.float64)
        nearest = np.abs(counts - 0.5).argmin()
        log_prob = law.log_prob(some)
        tries = round(np.log1p(-counts[nearest]) / np.log1p(-np.exp(log_prob[nearest])))
        if np.isclose(counts[nearest], num_sampled * np.exp(log_prob[nearest]), rtol=1e-5):
            tries = num_sampled  # its count is then another
        got = np.exp(log_count_by_tries(log_prob, num_sampled, tries))
        np.testing.assert_allclose(got, counts, rtol=1e-5)

        ids, of_true, of_sampled = candidates_of_tensorflow(
            true_ids, num_sampled, False, num_items, seed
        )
        sampler = PopularitySampler(law, num_sampled, unique=False)
        np.testing.assert_allclose(np.exp(sampler.log_q(true_ids)), of_true[:, 0], rtol=1e-5)
        np.testing.assert_allclose(np.exp(sampler.log_q(ids.numpy())), of_sampled, rtol=1e-5)


def test_the_option_by_tries_gives_tensorflows_count():
    sampler = PopularitySampler(LAW, 300, by_tries=True)
    draw = sampler.sample(np.arange(1000), step=4)
    assert draw.num_tries > 300
    p = np.exp(LAW.log_prob(np.arange(1000)))
    np.testing.assert_allclose(
        np.exp(draw.positives.log_q), 1 - (1 - p) ** draw.num_tries, rtol=1e-9
    )


def test_tensorflow_draws_from_the_law():
    ids, _, _ = candidates_of_tensorflow([0], 400_000, False, 1000, 7)
    counts = np.bincount(ids.numpy(), minlength=1000)
    assert chi_square(counts, np.exp(LAW.log_prob(np.arange(1000)))) > LEVEL
    shifted = np.exp(LogUniform(1001).log_prob(np.arange(1, 1001)))
    assert chi_square(counts, shifted / shifted.sum()) < LEVEL


def inclusion(draw, num_draws):
    """How many of the draws hold each of 100 ids."""
    return np.bincount(np.concatenate([draw(seed) for seed in range(num_draws)]), minlength=100)


def test_unique_draws_hold_ids_as_often_as_tensorflows():
    sampler, num_draws = PopularitySampler(LogUniform(100), 20), 4000
    ours = inclusion(lambda step: sampler.sample(step=step).negatives.ids, num_draws)
    theirs = inclusion(
        lambda seed: candidates_of_tensorflow([0], 20, True, 100, seed + 1)[0].numpy(), num_draws
    )
    share = np.exp(sampler.log_q(np.arange(100)))
    for counts in (ours, theirs):
        error = np.sqrt(num_draws * share * (1 - share))
        # Within 0.1 % of the share, and six standard errors.
        assert (np.abs(counts - num_draws * share) < 6 * error + 1e-3 * num_draws * share).all()


@pytest.mark.parametrize("kind", ["softmax", "bce"])
@pytest.mark.parametrize("hits", [False, True], ids=["hits dropped", "hits kept"])
@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (2, 3, 5), (7, 13, 3), (33, 64, 31), (64, 200, 16)], ids=str
)
def test_losses_of_tensorflow(run, shape, hits, kind):
    """`tf.nn.sampled_softmax_loss` and `tf.nn.nce_loss`, from the same draw."""
    B, S, D = shape
    N = 2 * S + 5
    rng = np.random.default_rng([B, S, D])
    table, bias = (tf.Variable(rng.normal(size=s).astype("f")) for s in ((N, D), (N,)))
    queries = tf.Variable(rng.normal(size=(B, D)).astype("f"))
    true_ids = tf.constant(rng.integers(0, N, B))
    drawn = candidates_of_tensorflow(true_ids, S, True, N, 3)
    ids, of_true, of_sampled = drawn
    if B > 2:
        assert np.isin(true_ids, ids).any()  # there is something to drop
    weights = [queries, table, bias]

    def theirs():
        loss = tf.nn.sampled_softmax_loss if kind == "softmax" else tf.nn.nce_loss
        with tf.GradientTape() as tape:
            each = loss(
                table, bias, true_ids[:, None], queries, S, N, num_true=1, sampled_values=drawn,
                remove_accidental_hits=not hits,
            )  # fmt: skip
            total = tf.reduce_mean(each)
        return each, tape.gradient(total, weights)

    def ours():
        def side(ids, counts, known):
            return Candidates(
                ids if known else None,
                tf.gather(table, ids),
                tf.math.log(counts),
                tf.gather(bias, ids),
            )

        with tf.GradientTape() as tape:
            each = sampled_softmax_loss(
                queries, side(true_ids, of_true[:, 0], not hits), side(ids, of_sampled, True),
                loss=kind, reduction="none",
            )  # fmt: skip
            total = tf.reduce_mean(each)
        return each, tape.gradient(total, weights)

    assert_close(run(ours), run(theirs), 2e-5)


# -- Keras


def model(num_items=50, dim=8, tied=False, sampler=None, **settings):
    """Learns the item that follows an item; the layer stands last."""
    keras.utils.set_random_seed(1)
    sampler = sampler or PopularitySampler(LogUniform(num_items, first_id=1), 16)
    embedding = keras.layers.Embedding(num_items + 1, dim, name="items")
    previous, item = (keras.Input((), dtype="int64", name=name) for name in ("previous", "item"))
    queries = keras.layers.Dense(dim)(embedding(previous))
    own = {"items": embedding} if tied else {"num_items": num_items + 1, "use_bias": True}
    output = ContrastiveOutput(sampler, name="output", **own, **settings)
    built = keras.Model([previous, item], output(queries, item))
    built.compile(keras.optimizers.Adam(0.02))
    return built


def pairs(num_items=50, size=2048):
    previous = np.random.default_rng(0).integers(1, num_items + 1, size)
    return [previous, previous * 7 % num_items + 1]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("eager", [False, True])
def test_the_layer_learns_in_fit(tied, eager):
    learner = model(tied=tied, temperature=0.5, top_ks=(1, 5))
    learner.compile(keras.optimizers.Adam(0.02), run_eagerly=eager)
    history = learner.fit(pairs(), batch_size=64, epochs=3, verbose=0).history
    assert history["loss"][-1] < 0.5 * history["loss"][0]
    assert history["recall@1"][-1] > 0.8
    assert set(history) >= {"loss", "recall@1", "recall@5", "mrr@5"}
    assert int(learner.get_layer("output").step) == 3 * 2048 // 64
    before = learner.get_layer("output").step.numpy()
    result = learner.evaluate(pairs(), verbose=0, return_dict=True)
    assert result["recall@1"] > 0.8
    assert learner.get_layer("output").step.numpy() == before


@pytest.mark.parametrize("tied", [False, True])
def test_a_step_of_the_layer_is_the_heads(run, tied):
    learner = model(
        tied=tied,
        temperature=0.5,
        sampler=[
            PopularitySampler(LogUniform(50, first_id=1), 8),
            PopularitySampler(LogUniform(50, first_id=1), 5),
        ],
    )
    output = learner.get_layer("output")
    queries = tf.constant(np.random.default_rng(0).normal(size=(6, 8)).astype("f"))
    ids = tf.constant([1, 5, 1, 50, 9, 7])
    output.step.assign(3)
    of_layer = [x.value for x in output.trainable_variables]

    def call(queries, ids):
        with tf.GradientTape() as tape:
            tape.watch(queries)
            passed = output(queries, ids)
            loss = 3 * output.losses[-1]
        return passed, loss, tape.gradient(loss, [queries, *of_layer])

    passed, loss, (d_queries, *d_table) = run(call, queries, ids)
    bias = None if tied else output.bias.numpy()
    expected = output.head(
        queries.numpy(),
        ids.numpy(),
        items=Candidates(None, output.table.numpy(), None, bias),
        step=3,
    )
    np.testing.assert_array_equal(passed, queries)
    assert_close([loss, d_queries], [3 * expected.loss, 3 * expected.grads.queries])
    items = expected.grads.items
    for got, rows in zip(d_table, [items.rows] if tied else [items.rows, items.bias], strict=True):
        assert isinstance(got, tf.IndexedSlices)
        np.testing.assert_array_equal(got.indices, items.ids)
        assert_close(got.values, 3 * rows)
        assert got.dense_shape[0] == 51


def test_two_towers(run):
    rng = np.random.default_rng(0)
    output = ContrastiveOutput(InBatchSampler(LogUniform(50)), temperature=0.5)
    u, v = (tf.constant(rng.normal(size=(6, 8)).astype("f")) for _ in range(2))
    ids = tf.constant([1, 5, 1, 49, 9, 7])

    def call(u, v):
        with tf.GradientTape() as tape:
            tape.watch((u, v))
            output(u, ids, positives=v)
            loss = output.losses[-1]
        return loss, tape.gradient(loss, (u, v))

    output(u, ids, positives=v)  # builds it
    loss, grads = run(call, u, v)
    expected = output.head(u.numpy(), ids.numpy(), positives=v.numpy())
    d_positives = expected.grads.positives.embeddings
    assert_close([loss, *grads], [expected.loss, expected.grads.queries, d_positives])
    with pytest.raises(ValueError, match="positives: expected embeddings"):
        output(u, ids)


# Keras saves variables by a NumPy protocol that is out of date.
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "sampler",
    [
        PopularitySampler(LogUniform(50, first_id=1), 16, seed=2**64 - 1, exclude=(3, 4)),
        MixtureSampler([
            PopularitySampler(Empirical(np.arange(1, 51), power=0.75, first_id=1), 7, unique=False),
            PopularitySampler(LogUniform(50, first_id=1), 16),
        ]),
    ],
    ids=["popularity", "mixture"],
)  # fmt: skip
def test_save_and_load(tmp_path, sampler, tied):
    settings = {
        "temperature": 0.3, "correction": "negatives", "mask_accidental_hits": False,
        "loss": "bpr-max", "loss_parameter": 2.0, "top_ks": (3, 7),
    }  # fmt: skip
    first = model(sampler=sampler, tied=tied, **settings)
    first.fit(pairs(), batch_size=64, epochs=1, verbose=0)
    first.save(tmp_path / "model.keras")
    second = keras.models.load_model(tmp_path / "model.keras")
    output = second.get_layer("output")
    assert repr(zipfneg.to_state(output.head)) == repr(
        zipfneg.to_state(first.get_layer("output").head)
    )
    assert {name: getattr(output.head, name) for name in settings} == settings
    assert int(output.step) == 32
    assert (output.items is second.get_layer("items")) == tied
    assert output.use_bias == (not tied)
    further = [
        m.fit(pairs(), batch_size=64, shuffle=False, verbose=0).history for m in (first, second)
    ]
    assert further[0] == further[1]


def test_scores_of_all_items(run):
    learner = model(temperature=0.5)
    output = learner.get_layer("output")
    output.bias.assign(np.arange(51))
    queries = np.random.default_rng(0).normal(size=(4, 8)).astype("f")
    expected = output.head.scores(
        queries, Candidates(embeddings=output.table.numpy(), bias=output.bias.numpy())
    )
    assert_close(run(output, tf.constant(queries)), expected)


def test_mixed_precision():
    keras.config.set_dtype_policy("mixed_float16")
    try:
        learner = model(temperature=0.5, top_ks=(1,))
        learner.compile(keras.optimizers.Adam(0.02))
        history = learner.fit(pairs(), batch_size=64, epochs=3, verbose=0).history
        output = learner.get_layer("output")
        output.table.assign(output.table * 1e-3)
        queries = tf.fill((4096, 8), tf.constant(2e-3, tf.float16))
        ids = np.arange(4096) % 50 + 1
        with tf.GradientTape() as tape:
            tape.watch(queries)
            output(queries, ids)  # as float32
            loss = 2.0**16 * output.losses[-1]
        d_queries = tape.gradient(loss, queries)
    finally:
        keras.config.set_dtype_policy("float32")
    # Neither the table nor, before the loss is scaled, the gradient is rounded.
    items = Candidates(embeddings=output.table.numpy(), bias=output.bias.numpy())
    step = int(output.step)
    expected = output.head(queries.numpy().astype(np.float32), ids, items=items, step=step)
    np.testing.assert_allclose(loss, 2.0**16 * expected.loss, rtol=1e-6)
    exact = expected.grads.queries
    assert np.abs(exact).max() < 2.0**-20
    np.testing.assert_allclose(d_queries, 2.0**16 * exact, rtol=1e-3, atol=2.0**-24)
    assert history["recall@1"][-1] > 0.8


# -- Errors


def test_refusals(run):
    u = tf.ones((2, 3))
    refusals = tf.errors.OpError if run.in_graph else (TypeError, ValueError)
    with pytest.raises(refusals, match=r"positives.embeddings: expected shape \(B, D\)"):
        run(lambda u: sampled_softmax_loss(u, u[:1], u), u)
    with pytest.raises(refusals, match="temperature: expected a finite number"):
        run(lambda u: sampled_softmax_loss(u, u, u, temperature=-1.0), u)
    with pytest.raises(refusals, match="mask: expected bool"):
        run(lambda u: sampled_softmax_loss(u, u, u, mask=u[:, 0]), u)
    with pytest.raises(TypeError, match="positives: expected Candidates or an array"):
        sampled_softmax_loss(u, (u, u), u)


def test_gradients_of_gradients_are_refused(run):
    def squared(u):
        with tf.GradientTape() as outer:
            outer.watch(u)
            with tf.GradientTape() as inner:
                inner.watch(u)
                loss = sampled_softmax_loss(u, u, u)
            total = tf.reduce_sum(inner.gradient(loss, u) ** 2)
        return outer.gradient(total, u)

    with pytest.raises(NotImplementedError, match="gradients of gradients are not offered"):
        run(squared, tf.ones((2, 3)))


def test_without_tensorflow_the_command_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow", None)  # its import fails
    monkeypatch.delitem(sys.modules, "zipfneg.tensorflow")
    with pytest.raises(ImportError, match=r"pip install 'zipfneg\[tensorflow\]'"):
        import zipfneg.tensorflow  # noqa: F401
