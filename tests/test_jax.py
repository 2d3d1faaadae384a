"""The JAX adapter: the core's values and gradients inside every transformation."""

import os
import subprocess
import sys
import warnings
from functools import partial

import numpy as np
import pytest

import zipfneg
from zipfneg import (
    Candidates,
    InBatchSampler,
    LogUniform,
    MixtureSampler,
    PopularitySampler,
    reference,
    sampled_softmax_value_and_grad,
)
from zipfneg.loss import LOSSES

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what frameworks do while they are imported
    jax = pytest.importorskip("jax")

import jax.numpy as jnp

import zipfneg.jax
from zipfneg.jax import sample, sampled_softmax_loss

pytestmark = pytest.mark.frameworks

SHAPES = [(1, 1, 1), (2, 3, 5), (7, 13, 3), (31, 1, 17), (33, 65, 31)]
NO_LOG_Q = ("hinge", "top1")
LAW = LogUniform(1000)


def problem(B, S, D, dtype=np.float32, *, loss="softmax", negatives="shared"):
    """Arguments with every option of the loss: queries, positives, negatives and keywords."""
    rng = np.random.default_rng([B, S, D])
    columns = (S,) if negatives == "shared" else (B, S)

    def side(shape, rows=None):
        return Candidates(
            ids=rng.integers(0, 2 * S, shape).astype(np.int32),
            embeddings=rng.normal(size=(*(rows or shape), D)).astype(dtype),
            log_q=None if loss in NO_LOG_Q else rng.uniform(-4, 0, shape).astype(np.float32),
            bias=rng.normal(size=shape).astype(dtype),
        )

    indptr = np.arange(0, 2 * B + 1, 2, dtype=np.int32)
    options = {
        "temperature": np.float32(0.7),
        "known_positives": (indptr, rng.integers(0, 2 * S, 2 * B).astype(np.int32)),
        "mask": rng.random((B, S)) < 0.2,
        "sample_weight": rng.uniform(0, 2, B).astype(np.float32),
    }
    queries = rng.normal(size=(B, D)).astype(dtype)
    rows = (2 * S,) if negatives == "rows of a table" else None
    return (queries, side((B,)), side(columns, rows)), options, {"loss": loss}


def differentiable(args, options):
    """The arrays with a gradient, and the loss as a function of them."""
    u, p, v = args
    values = (u, p.embeddings, p.bias, v.embeddings, v.bias, options["temperature"])

    def call(u, p_embeddings, p_bias, v_embeddings, v_bias, temperature, *, upstream=1, **settings):
        loss = sampled_softmax_loss(
            u,
            p._replace(embeddings=p_embeddings, bias=p_bias),
            v._replace(embeddings=v_embeddings, bias=v_bias),
            **{**options, "temperature": temperature},
            **settings,
        )
        return (loss * upstream).sum()

    return values, call


def core(args, options, **settings):
    """The same from the core, in NumPy: the loss, and the gradients in that order."""
    loss, g = sampled_softmax_value_and_grad(*args, **options, **settings)
    p, v = g.positives, g.negatives
    return loss, (g.queries, p.embeddings, p.bias, v.embeddings, v.bias, g.temperature)


def assert_close(got, expected, rtol=1e-5):
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        np.testing.assert_allclose(x, y, rtol=rtol, atol=rtol * np.abs(y).max(initial=1e-6))


def grad_of(call, **settings):
    return jax.value_and_grad(partial(call, **settings), argnums=tuple(range(6)))


def run(script):
    """In a process with two CPU devices."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([os.path.dirname(__file__), *sys.path]),
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
    }
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]


# -- By hand


def test_three_queries_by_hand():
    u, v = jnp.eye(3), jnp.ones((4, 3))
    loss, d_u = jax.value_and_grad(sampled_softmax_loss)(u, u, v)  # z_0 = z_j = 1
    np.testing.assert_allclose(loss, np.log(5), rtol=1e-6)
    np.testing.assert_allclose(d_u, 0.8 * (1 - np.eye(3)) / 3, atol=1e-7)


# -- Against the core, the reference and JAX's own gradients


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("negatives", ["shared", "per query", "rows of a table"])
def test_every_option(shape, reduction, negatives):
    args, options, settings = problem(*shape, negatives=negatives)
    settings["reduction"] = reduction
    values, call = differentiable(args, options)
    loss, grads = jax.jit(grad_of(call, **settings))(*values)
    expected_loss, expected = core(args, options, **settings)
    assert_close(loss, expected_loss.sum())
    assert_close(grads, expected)
    assert_close(sampled_softmax_loss(*args, **options, **settings), expected_loss)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_every_loss(loss, reduction):
    args, options, settings = problem(7, 13, 3, loss=loss)
    settings["reduction"] = reduction
    values, call = differentiable(args, options)
    value, grads = grad_of(call, **settings)(*values)
    expected_loss, expected = core(args, options, **settings)
    assert_close((value, grads), (expected_loss.sum(), expected))


def test_an_upstream_gradient_for_each_row():
    args, options, _ = problem(7, 13, 3)
    values, call = differentiable(args, options)
    upstream = np.linspace(-1, 2, 7, dtype=np.float32)
    _, grads = grad_of(call, reduction="none", upstream=upstream)(*values)
    options["sample_weight"] = options["sample_weight"] * upstream
    assert_close(grads, core(args, options, reduction="sum")[1])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("correction", ["both", "negatives", "none"])
def test_jax_differentiates_the_plain_loss_alike(shape, correction):
    args, options, _ = problem(*shape, np.float64)
    del options["known_positives"]
    _, p, v = args
    dropped = options["mask"] | (p.ids[:, None] == v.ids)

    def plain(u, p_embeddings, p_bias, v_embeddings, v_bias, temperature):
        z_0 = ((u * p_embeddings).sum(1) + p_bias) / temperature
        z = (u @ v_embeddings.T + v_bias) / temperature
        z_0 = z_0 - p.log_q if correction == "both" else z_0
        z = z - v.log_q if correction != "none" else z
        z = jnp.concatenate([z_0[:, None], jnp.where(dropped, -jnp.inf, z)], 1)
        return (options["sample_weight"] * (jax.nn.logsumexp(z, 1) - z_0)).mean()

    values, call = differentiable(args, options)
    with jax.enable_x64(True):
        values = [jnp.asarray(x, np.float64) for x in values]
        expected = jax.value_and_grad(plain, argnums=tuple(range(6)))(*values)
        got = grad_of(call, correction=correction)(*values)
        assert_close(got, expected, 1e-12)
        for x, y in zip(jax.tree.leaves(got), [values[0][0, 0], *values], strict=True):
            assert x.dtype == y.dtype


def test_the_reference():
    args, options, _ = problem(7, 13, 3)
    u, p, v = args
    oracle = {
        "queries": u, "positives": p.embeddings, "negatives": v.embeddings,
        "positive_bias": p.bias, "negative_bias": v.bias, "positive_log_q": p.log_q,
        "negative_log_q": v.log_q, "temperature": options["temperature"],
    }  # fmt: skip
    dropped = reference.dropped_negatives(
        v.ids, p.ids, options["known_positives"], options["mask"], 7
    )
    exact, _ = reference.sampled_softmax(
        **{k: np.asarray(x, np.float64) for k, x in oracle.items()}, dropped=dropped
    )
    got = sampled_softmax_loss(*args, **options, reduction="none")
    assert_close(got, exact * options["sample_weight"], 2e-6)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16], ids=lambda d: np.dtype(d).name)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_half_precision(dtype, reduction):
    args, options, _ = problem(7, 13, 3, dtype)
    values, call = differentiable(args, options)
    loss, grads = grad_of(call, reduction=reduction)(*values)
    expected_loss, expected = core(args, options, reduction=reduction)
    assert loss.dtype == np.float32
    assert_close(loss, expected_loss.sum())
    for x, y in zip(grads, expected, strict=True):
        assert x.dtype == y.dtype
    assert_close(grads, expected, float(jnp.finfo(dtype).eps))


def test_a_scaled_loss_keeps_small_half_precision_gradients():
    u, p, v = (np.full(shape, 2e-5, np.float16) for shape in [(4096, 2), (4096, 2), (8, 2)])
    v[:, 1] *= -1
    scaled = jax.grad(lambda u: 2.0**16 * sampled_softmax_loss(u, p, v))(u)
    exact = sampled_softmax_value_and_grad(*(x.astype(np.float64) for x in (u, p, v)))[1].queries
    assert (np.abs(exact) < 2.0**-25).all()  # nothing is left of them in float16
    np.testing.assert_allclose(scaled, 2.0**16 * exact, rtol=1e-3, atol=2.0**-25)


# -- Transformations


def test_log_q_and_weights_are_constants():
    args, options, _ = problem(7, 13, 3)
    u, p, v = args

    def call(log_q, weight):
        return sampled_softmax_loss(
            u, p, v._replace(log_q=log_q), **{**options, "sample_weight": weight}
        )

    for gradient in jax.grad(call, argnums=(0, 1))(v.log_q, options["sample_weight"]):
        assert not gradient.any()


@pytest.mark.parametrize("fallback", [False, True], ids=["buffer_callback", "pure_callback"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_transformations(monkeypatch, fallback, reduction):
    if fallback:
        monkeypatch.setattr(zipfneg.jax, "buffer_callback", None)
    jax.clear_caches()
    args, options, _ = problem(7, 13, 3)
    values, call = differentiable(args, options)
    call = partial(call, reduction=reduction)
    value, grads = core(args, options, reduction=reduction)
    value = value.sum()
    transformed = grad_of(call)
    assert_close(transformed(*values), (value, grads))
    assert_close(jax.jit(transformed)(*values), (value, grads))
    assert_close(jax.jit(jax.checkpoint(transformed))(*values), (value, grads))

    u = np.stack([values[0], 2 * values[0], -values[0]])
    axes = (0, *[None] * 5)
    expected = [core((x, *args[1:]), options, reduction=reduction) for x in u]
    losses, batched = jax.jit(jax.vmap(transformed, axes))(u, *values[1:])
    assert_close(losses, np.array([loss.sum() for loss, _ in expected]))
    assert_close(batched, tuple(map(np.stack, zip(*(g for _, g in expected), strict=True))))
    total = jax.grad(lambda *values: jax.vmap(call, axes)(u, *values).sum())(*values[1:])
    assert_close(total, sum(g[1] for _, g in expected))

    def descend(u, _):
        loss, d_u = jax.value_and_grad(call)(u, *values[1:])
        return u - 0.1 * d_u, loss

    u, losses = values[0], []
    for _ in range(5):
        loss, g = core((u, *args[1:]), options, reduction=reduction)
        u = u - 0.1 * g[0]
        losses.append(loss.sum())
    got_u, got_losses = jax.jit(lambda u: jax.lax.scan(descend, u, length=5))(values[0])
    assert_close((got_u, got_losses), (u, np.array(losses)))

    def summed(u):
        return jax.lax.scan(lambda c, s: (c + call(u * s, *values[1:]), None), 0.0, u_scales)[0]

    u_scales = np.array([1.0, 2.0], np.float32)
    expected = [
        core((s * values[0], *args[1:]), options, reduction=reduction)[1][0] for s in (1, 2)
    ]
    assert_close(jax.jit(jax.grad(summed))(values[0]), expected[0] + 2 * expected[1])
    jax.clear_caches()


def test_the_gradient_of_a_table_meets_its_rows():
    rng = np.random.default_rng(0)
    table, u = rng.normal(size=(20, 3)).astype("f"), rng.normal(size=(5, 3)).astype("f")
    ids, negative_ids = np.array([3, 1, 3, 0, 9]), np.array([3, 4, 4, 1])

    def call(table):
        return sampled_softmax_loss(
            u, Candidates(ids, table[ids]), Candidates(negative_ids, table[negative_ids])
        )

    _, g = sampled_softmax_value_and_grad(
        u, Candidates(ids, table[ids]), Candidates(negative_ids, table[negative_ids])
    )
    expected = np.zeros_like(table)
    np.add.at(expected, ids, g.positives.embeddings)
    np.add.at(expected, negative_ids, g.negatives.embeddings)
    assert_close(jax.jit(jax.grad(call))(jnp.asarray(table)), expected)


def test_two_devices():
    run("""
import jax, numpy as np, zipfneg.jax
from functools import partial
from jax.sharding import Mesh, PartitionSpec as P
from test_jax import LAW, PopularitySampler, assert_close, core, problem
from zipfneg.jax import sample, sampled_softmax_loss
assert len(jax.devices()) == 2
args, options, _ = problem(8, 13, 3)
u, p, v = args
mesh = Mesh(np.array(jax.devices()), ("rows",))
weight, mask = options["sample_weight"], options["mask"]
for checked in (True, False):
    for reduction in ("mean", "none"):
        def call(u, p, v, temperature, mask, weight):
            loss = sampled_softmax_loss(u, p, v, temperature=temperature, mask=mask,
                                        sample_weight=weight, reduction=reduction)
            return jax.lax.pmean(loss.mean(), "rows")

        of_rows = (P("rows"), P("rows"), P(), P(), P("rows"), P("rows"))
        parted = jax.shard_map(call, mesh=mesh, in_specs=of_rows, out_specs=P(), check_vma=checked)
        loss, grads = jax.jit(jax.value_and_grad(parted, argnums=(0, 1, 2, 3), allow_int=True))(
            u, p, v, options["temperature"], mask, weight)
        expected_loss, expected = core(
            args, {"temperature": options["temperature"], "mask": mask, "sample_weight": weight})
        grads = (grads[0], grads[1].embeddings, grads[1].bias, grads[2].embeddings, grads[2].bias,
                 grads[3])
        assert_close((loss, grads), (expected_loss, expected))

sampler = PopularitySampler(LAW, 16)
def draw(step):
    drawn = sample(sampler, step=step, stream=jax.lax.axis_index("rows"))
    return drawn.negatives.ids
ids = jax.jit(jax.shard_map(draw, mesh=mesh, in_specs=P(), out_specs=P("rows")))(5)
for stream in (0, 1):
    expected = sampler.sample(step=5, stream=stream).negatives.ids
    np.testing.assert_array_equal(ids[16 * stream:][:16], expected)
""")


def test_inputs_are_not_copied(monkeypatch):
    seen = []

    def spy(queries, positives, negatives, **options):
        seen.append([x.ctypes.data for x in (queries, positives.embeddings, negatives.embeddings)])
        return np.float32(0)

    monkeypatch.setattr(zipfneg.jax.core, "sampled_softmax_loss", spy)
    jax.clear_caches()
    given = [jnp.ones((64, 32)), jnp.ones((64, 32)), jnp.ones((128, 32))]
    jax.block_until_ready(jax.jit(sampled_softmax_loss)(*given))
    assert seen == [[x.unsafe_buffer_pointer() for x in given]]
    jax.clear_caches()


# -- Draws


@pytest.mark.parametrize(
    "sampler",
    [
        PopularitySampler(LAW, 16, seed=3),
        PopularitySampler(LAW, 16, unique=False),
        PopularitySampler(LAW, 16, per_query=True),
        PopularitySampler(LAW, 16, by_tries=True),
        InBatchSampler(LAW),
        InBatchSampler(),
        MixtureSampler([InBatchSampler(LAW), PopularitySampler(LAW, 16)]),
    ],
    ids=repr,
)
def test_a_traced_step_draws_what_the_core_draws(sampler):
    ids = np.array([1, 999, 5])
    for step in (0, 7):
        expected = sampler.sample(ids, step=step)
        eager = sample(sampler, ids, step)
        traced = jax.jit(partial(sample, sampler))(ids, step)
        for draw in (eager, traced):
            assert draw.negatives.ids.dtype == np.int32
            np.testing.assert_array_equal(draw.positives.ids, ids)
            assert_close(draw, expected)
            if draw.negatives.log_q is not None:
                assert draw.negatives.log_q.dtype == np.float32


def test_draws_within_a_scan_of_training_steps():
    sampler, ids = PopularitySampler(LAW, 16), np.arange(5)
    table = np.random.default_rng(0).normal(size=(1000, 4)).astype("f")

    def loss(table, step, draw):
        drawn = draw(ids, step=step)
        p, v = drawn.positives, drawn.negatives
        return sampled_softmax_loss(
            table[ids], p._replace(embeddings=table[p.ids]), v._replace(embeddings=table[v.ids])
        )

    def train(table, step):
        return table - 0.1 * jax.grad(loss)(table, step, partial(sample, sampler)), None

    got = jax.jit(lambda table: jax.lax.scan(train, table, jnp.arange(3))[0])(table)
    expected = jnp.asarray(table)
    for step in range(3):
        expected = expected - 0.1 * jax.grad(loss)(expected, step, sampler.sample)
    assert_close(got, expected)


def test_ids_both_ways_of_x64():
    wide = PopularitySampler(LogUniform(9, first_id=2**31), 4)
    with pytest.raises(OverflowError, match="enable jax_enable_x64"):
        jax.jit(lambda step: sample(wide, step=step))(1)
    with pytest.raises(OverflowError, match="enable jax_enable_x64"):
        sample(wide, step=1)
    u, ids = np.eye(2, dtype=np.float32), np.array([2**31, 5])
    with pytest.raises(OverflowError, match="enable jax_enable_x64"):
        sampled_softmax_loss(u, Candidates(ids, u), Candidates(np.array([5, 2**31 + 2**32]), u))
    with jax.enable_x64(True):
        draw = jax.jit(lambda step: sample(wide, step=step))(1)
        assert draw.negatives.ids.dtype == np.int64
        assert draw.negatives.log_q.dtype == np.float64
        assert_close(draw.negatives, wide.sample(step=1).negatives)
        args = u, Candidates(ids, u), Candidates(np.array([5, 2**31 + 2**32]), u)
        expected = zipfneg.sampled_softmax_loss(*args, reduction="none")
        assert_close(sampled_softmax_loss(*args, reduction="none"), expected)


# -- Errors


def test_shapes_and_settings_are_refused_while_tracing():
    u = jnp.ones((2, 3))
    traced = jax.jit(sampled_softmax_loss, static_argnames=("loss", "correction"))
    with pytest.raises(ValueError, match=r"positives.embeddings: expected shape \(B, D\)"):
        traced(u, u[:1], u)
    with pytest.raises(ValueError, match="loss: expected one of"):
        traced(u, u, u, loss="l2")
    with pytest.raises(ValueError, match=r"negatives.log_q: expected log q"):
        traced(u, Candidates(embeddings=u, log_q=u[:, 0]), u)
    with pytest.raises(TypeError, match="mask: expected bool"):
        traced(u, u, u, mask=u[:, 0])
    with pytest.raises(TypeError, match="unexpected keyword argument 'tau'"):
        sampled_softmax_loss(u, u, u, tau=1)
    with pytest.raises(ValueError, match="temperature: expected a finite number above 0"):
        sampled_softmax_loss(u, u, u, temperature=0)
    with pytest.raises(TypeError, match="positives: expected Candidates or an array"):
        sampled_softmax_loss(u, (u, u), u)


@pytest.mark.parametrize("fallback", [False, True], ids=["buffer_callback", "pure_callback"])
def test_values_are_refused_by_the_callback(monkeypatch, fallback):
    if fallback:
        monkeypatch.setattr(zipfneg.jax, "buffer_callback", None)
    jax.clear_caches()
    u = jnp.ones((2, 3))
    with pytest.raises(jax.errors.JaxRuntimeError, match="temperature: expected a finite number"):
        sampled_softmax_loss(u, u, u, temperature=jnp.float32(-1)).block_until_ready()
    infinite = Candidates(embeddings=u, log_q=jnp.array([0, -jnp.inf]))
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"negatives.log_q: expected finite"):
        sampled_softmax_loss(u, infinite, infinite, correction="negatives").block_until_ready()
    jax.clear_caches()


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradients_of_gradients_are_refused(reduction):
    u = jnp.ones((2, 3))

    def call(u):
        return sampled_softmax_loss(u, u, u, reduction=reduction).sum()

    def squared(u):
        return (jax.grad(call)(u) ** 2).sum()

    for transformed in (jax.grad(squared), jax.jit(jax.grad(squared)), jax.hessian(call)):
        with pytest.raises(NotImplementedError, match="gradients of gradients are not offered"):
            transformed(u)
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(call, (u,), (u,))


def test_a_draw_of_varying_size_is_refused():
    sampler = PopularitySampler(LAW, 64, unique="poisson")
    sizes = [sampler.sample(step=step).negatives.ids.size for step in range(20)]
    other = next(step for step in range(20) if sizes[step] != sizes[0])
    with pytest.raises(jax.errors.JaxRuntimeError, match="expected a draw of one size"):
        jax.block_until_ready(jax.jit(partial(sample, sampler))(None, other))
    assert sample(sampler, step=other).negatives.ids.shape == (sizes[other],)  # it is not traced


def test_without_jax_the_command_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "jax", None)  # its import fails
    monkeypatch.delitem(sys.modules, "zipfneg.jax")
    with pytest.raises(ImportError, match=r"pip install 'zipfneg\[jax\]'"):
        import zipfneg.jax  # noqa: F401
