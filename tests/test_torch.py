"""The PyTorch adapter: against the reference, against torch's own autograd, and under its tools."""

import copy
import io
import subprocess
import sys

import numpy as np
import pytest

import zipfneg
from zipfneg import (
    CachedSampler,
    Candidates,
    Empirical,
    InBatchSampler,
    LogUniform,
    MixtureSampler,
    PopularitySampler,
    reference,
)
from zipfneg.loss import LOSSES

torch = pytest.importorskip("torch")
F = torch.nn.functional
adapter = pytest.importorskip("zipfneg.torch")
sampled_softmax_loss, sample = adapter.sampled_softmax_loss, adapter.sample

pytestmark = [
    pytest.mark.frameworks,
    # What PyTorch's compiler says of itself.
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch"),
    # Its optimisers build sparse tensors without a word on their checks.
    pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning"),
]

N = 60
LAW = LogUniform(N)
PARAMETERS = {"bpr-max": 0.3, "hinge": 0.7, "gbce": 0.6}
NAMES = ("queries", "positives", "negatives", "positive_bias", "negative_bias", "temperature")


@pytest.fixture(autouse=True)
def _forget_compiled_functions():
    torch.compiler.reset()


def problem(seed=0, B=5, S=7, D=3, dtype=torch.float64, shared=True, bias=True, grad=True):
    """Tensors by name; the six of NAMES require grad."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    columns = (S,) if shared else (B, S)
    x = {
        "queries": normal(B, D),
        "positives": normal(B, D),
        "negatives": normal(*columns, D),
        "positive_bias": normal(B) if bias else None,
        "negative_bias": normal(*columns) if bias else None,
        "temperature": torch.tensor(0.7, dtype=dtype),
    }
    for name in NAMES if grad else ():
        if x[name] is not None:
            x[name].requires_grad_()
    ids = torch.randint(0, 2 * S, (B,), generator=generator)
    x["positive_ids"], x["negative_ids"] = (
        ids,
        torch.randint(0, 2 * S, columns, generator=generator),
    )
    x["positive_log_q"] = -torch.rand(B, generator=generator, dtype=torch.float64)
    x["negative_log_q"] = -torch.rand(*columns, generator=generator, dtype=torch.float64)
    x["indptr"] = torch.arange(0, 2 * B + 1, 2)
    x["known_ids"] = torch.randint(0, 2 * S, (2 * B,), generator=generator)
    x["mask"] = torch.rand(B, S, generator=generator) < 0.2
    x["sample_weight"] = torch.rand(B, generator=generator, dtype=torch.float64)
    return x


def compute(x, *, log_q=True, **options):
    """The adapter's loss of a problem, all its options given."""
    positives = Candidates(
        x["positive_ids"], x["positives"], x["positive_log_q"] if log_q else None,
        x["positive_bias"],
    )  # fmt: skip
    negatives = Candidates(
        x["negative_ids"], x["negatives"], x["negative_log_q"] if log_q else None,
        x["negative_bias"],
    )  # fmt: skip
    given = {
        "temperature": x["temperature"],
        "known_positives": (x["indptr"], x["known_ids"]),
        "mask": x["mask"],
        "sample_weight": x["sample_weight"],
    }
    return sampled_softmax_loss(x["queries"], positives, negatives, **{**given, **options})


def log_q_of(loss):
    return {"log_q": False} if LOSSES[loss].log_q is None else {}


def numbers(x):
    return 0.0 if x is None else x.detach().double().numpy()


def oracle(x, loss, correction="both", d_loss=1.0):
    """The reference's loss (B,) and gradients; d_loss (B,) includes the weights."""
    known = (x["indptr"].numpy(), x["known_ids"].numpy())
    dropped = reference.dropped_negatives(
        x["negative_ids"].numpy(), x["positive_ids"].numpy(), known, x["mask"].numpy(),
        len(x["queries"]),
    )  # fmt: skip
    used = LOSSES[loss].log_q is not None
    return reference.sampled_softmax(
        *(numbers(x[name]) for name in NAMES[:3]),
        positive_bias=numbers(x["positive_bias"]),
        negative_bias=numbers(x["negative_bias"]),
        positive_log_q=numbers(x["positive_log_q"]) if used and correction == "both" else 0.0,
        negative_log_q=numbers(x["negative_log_q"]) if used and correction != "none" else 0.0,
        dropped=dropped,
        temperature=x["temperature"].item(),
        loss=loss,
        parameter=PARAMETERS.get(loss, LOSSES[loss].default),
        d_loss=d_loss,
    )


def close(got, expected, tolerance=1e-10):
    np.testing.assert_allclose(numbers(got), expected, rtol=tolerance, atol=tolerance)


def parameters():
    return [torch.nn.Parameter(torch.randn(N, 4)) for _ in range(2)]


# -- The loss


def test_by_hand():
    queries = torch.eye(3, requires_grad=True)
    negatives = torch.ones(4, 3, requires_grad=True)
    loss = sampled_softmax_loss(queries, torch.eye(3), negatives)
    loss.backward()
    assert loss.item() == pytest.approx(np.log(5))  # five equal scores
    torch.testing.assert_close(queries.grad, (0.8 * (1 - torch.eye(3))) / 3)
    torch.testing.assert_close(negatives.grad, torch.full((4, 3), 0.2 / 3))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("loss", LOSSES)
def test_equals_the_reference(loss, shared, reduction):
    x = problem(1, shared=shared)
    options = {"loss": loss, "loss_parameter": PARAMETERS.get(loss), **log_q_of(loss)}
    value = compute(x, reduction=reduction, **options)
    upstream = torch.linspace(-1, 2, len(value), dtype=value.dtype) if value.ndim else 1.7
    (value * upstream).sum().backward()
    weight = x["sample_weight"].numpy() / (len(x["queries"]) if reduction == "mean" else 1)
    expected, grads = oracle(x, loss, d_loss=weight * np.asarray(upstream))
    losses = expected * weight
    close(value, losses if reduction == "none" else losses.sum())
    for name in NAMES:
        close(x[name].grad, getattr(grads, name))


@pytest.mark.parametrize("correction", ["both", "negatives", "none"])
@pytest.mark.parametrize(
    ("B", "S", "D"), [(1, 1, 1), (13, 31, 7), (33, 5, 17), (0, 3, 2), (3, 0, 2)]
)
def test_awkward_shapes(B, S, D, correction):
    x = problem(B, B, S, D, bias=B != 13) if S else problem(B, B, 1, D)
    if not S:
        for name in ("negatives", "negative_ids", "negative_log_q", "negative_bias"):
            x[name] = x[name].detach()[:0].requires_grad_(name in NAMES)
        x["mask"] = x["mask"][:, :0]
    value = compute(x, correction=correction, reduction="sum")
    value.backward()
    expected, grads = oracle(x, "softmax", correction, x["sample_weight"].numpy())
    close(value, (expected * x["sample_weight"].numpy()).sum())
    for name in NAMES:
        if x[name] is not None:
            assert x[name].grad.shape == x[name].shape
            close(x[name].grad, getattr(grads, name))


def logits(x):
    """The (B, 1 + S) corrected scores, and which of them count, as one writes them in torch."""
    u, v = x["queries"], x["negatives"]
    a_0 = ((u * x["positives"]).sum(1) + x["positive_bias"]) / x["temperature"]
    a = (u @ v.T + x["negative_bias"]) / x["temperature"]
    z = torch.cat([(a_0 - x["positive_log_q"])[:, None], a - x["negative_log_q"]], 1)
    own = x["negative_ids"] == x["positive_ids"][:, None]
    known = x["negative_ids"][None, None] == x["known_ids"].view(-1, 2)[:, :, None]
    return z, ~(own | known.any(1) | x["mask"])


PLAIN = {
    "softmax": lambda z, kept: F.cross_entropy(
        torch.cat([z[:, :1], z[:, 1:].masked_fill(~kept, -torch.inf)], 1),
        torch.zeros(len(z), dtype=torch.int64), reduction="none",
    ),
    "bpr": lambda z, kept: (
        (F.softplus(z[:, 1:] - z[:, :1]) * kept).sum(1) / kept.sum(1).clamp(min=1)
    ),
    "bce": lambda z, kept: F.binary_cross_entropy_with_logits(
        z, F.one_hot(torch.zeros(len(z), dtype=torch.int64), z.shape[1]).to(z.dtype),
        torch.cat([kept[:, :1] | True, kept], 1).to(z.dtype), reduction="none",
    ).sum(1),
}  # fmt: skip


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("loss", PLAIN)
def test_equals_autograd_of_a_plain_implementation(loss, seed):
    B, S, D = torch.randint(1, 40, (3,), generator=torch.Generator().manual_seed(seed)).tolist()
    x, y = problem(seed, B, S, D), problem(seed, B, S, D)
    ours = compute(x, loss=loss)
    theirs = (PLAIN[loss](*logits(y)) * y["sample_weight"]).mean()
    torch.testing.assert_close(ours, theirs)
    ours.backward()
    theirs.backward()
    for name in NAMES:
        torch.testing.assert_close(x[name].grad, y[name].grad)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_dtypes(dtype, reduction):
    x = problem(2, dtype=dtype)
    value = compute(x, reduction=reduction)
    value.sum().backward()
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    weight = x["sample_weight"].numpy() / (5 if reduction == "mean" else 1)
    _, grads = oracle(x, "softmax", d_loss=weight)
    for name in NAMES:
        assert x[name].grad.dtype == dtype
        close(x[name].grad, getattr(grads, name), 4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_scaled_losses_keep_small_float16_gradients(reduction):
    x, scale = problem(2, dtype=torch.float16), 2.0**16
    x["sample_weight"] *= 1e-7
    value = compute(x, reduction=reduction)
    (scale * value).sum().backward()
    weight = scale * x["sample_weight"].numpy() / (5 if reduction == "mean" else 1)
    _, grads = oracle(x, "softmax", d_loss=weight)
    expected = np.asarray(grads.queries)
    assert np.abs(x["queries"].grad.numpy() - expected).max() < 1e-3 * np.abs(expected).max()
    assert compute(x, reduction=reduction).dtype == torch.float32


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("loss", LOSSES)
def test_gradcheck(loss, reduction):
    x = problem(3, B=3, S=4, D=2)
    options = {"loss": loss, "reduction": reduction, **log_q_of(loss)}
    assert torch.autograd.gradcheck(
        lambda *six: compute({**x, **dict(zip(NAMES, six, strict=True))}, **options),
        [x[name] for name in NAMES],
    )


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradients_are_no_part_of_the_graph(reduction):
    x = problem(4)
    (grad,) = torch.autograd.grad(compute(x, reduction=reduction).sum(), x["queries"])
    assert (grad.requires_grad, grad.grad_fn) == (False, None)


def test_only_what_requires_grad_gets_one():
    x = problem(4)
    for name in NAMES[1:]:
        x[name].requires_grad_(False)
    compute(x).backward()
    assert x["queries"].grad is not None
    assert all(x[name].grad is None for name in NAMES[1:])


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_no_gradients_are_computed_in_vain(monkeypatch, reduction):
    calls = []

    def counted(name, function):
        def call(*args, **options):
            calls.append(name)
            return function(*args, **options)

        return call

    for name in ("sampled_softmax_loss", "sampled_softmax_value_and_grad"):
        monkeypatch.setattr(zipfneg.loss, name, counted(name, getattr(zipfneg.loss, name)))
    with torch.no_grad():
        expected = compute(problem(5), reduction=reduction)
    compute(problem(5, grad=False), reduction=reduction)
    assert calls == 2 * ["sampled_softmax_loss"]
    calls.clear()
    value = compute(problem(5), reduction=reduction)
    torch.testing.assert_close(value.detach(), expected)
    forward = list(calls)
    value.sum().backward()
    both = ["sampled_softmax_loss", "sampled_softmax_value_and_grad"]
    assert (forward, calls) == ((both[1:], both[1:]) if reduction == "mean" else (both[:1], both))


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_tensors_go_in_and_gradients_come_out_where_they_are(monkeypatch, reduction):
    x, seen = problem(6, dtype=torch.float32), {}
    prepare = zipfneg.loss.prepare

    def watched(*args, **options):
        prepared = prepare(*args, **options)
        seen.update(prepared.problem._asdict())
        engine = prepared.engine

        class Engine:
            value = engine.value

            @staticmethod
            def value_and_gradients(*args, **options):
                result, gradients = engine.value_and_gradients(*args, **options)
                seen["gradients"] = gradients
                return result, gradients

        return prepared._replace(engine=Engine)

    monkeypatch.setattr(zipfneg.loss, "prepare", watched)
    compute(x, reduction=reduction).sum().backward()
    for name in NAMES[:5]:
        assert seen[name].ctypes.data == x[name].data_ptr(), name
        assert getattr(seen["gradients"], name).ctypes.data == x[name].grad.data_ptr(), name


def test_not_contiguous():
    x, y = problem(7), problem(7)
    leaf = x["queries"].detach().T.contiguous().requires_grad_()
    compute({**x, "queries": leaf.T}).backward()
    compute(y).backward()
    torch.testing.assert_close(leaf.grad.T, y["queries"].grad)


def test_numbers_and_matrices_as_options():
    scipy_sparse = pytest.importorskip("scipy.sparse")
    x = problem(8)
    pair = (np.ones(len(x["known_ids"])), x["known_ids"].numpy(), x["indptr"].numpy())
    matrix = scipy_sparse.csr_array(pair, (5, 14))
    torch.testing.assert_close(compute(x, temperature=0.7, known_positives=matrix), compute(x))
    plain = sampled_softmax_loss(x["queries"], x["positives"], x["negatives"], temperature=2)
    expected = core_loss_of(x["queries"], x["positives"], x["negatives"], temperature=2)
    torch.testing.assert_close(plain.detach(), expected)


def core_loss_of(*tensors, **options):
    return zipfneg.sampled_softmax_loss(*(x.detach() for x in tensors), **options)


# -- PyTorch's tools


def first_three(x, **options):
    def loss(queries, positives, negatives):
        given = {**x, "queries": queries, "positives": positives, "negatives": negatives}
        return compute(given, **options).sum()

    return loss, [x[name] for name in NAMES[:3]]


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compile_whole(reduction):
    x, y = problem(9), problem(9)
    loss, given = first_three(x, reduction=reduction)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    value = compiled(*given)
    value.backward()
    expected = compute(y, reduction=reduction).sum()
    expected.backward()
    torch.testing.assert_close(value, expected)
    for name in NAMES[:3]:
        torch.testing.assert_close(x[name].grad, y[name].grad)
    with torch.no_grad():
        torch.testing.assert_close(compiled(*given), expected.detach())


@pytest.mark.slow
def test_compile_by_inductor():
    encoder = torch.nn.Linear(3, 3)
    x = problem(10, dtype=torch.float32)

    def step(batch):
        return compute({**x, "queries": encoder(batch), "temperature": 0.7})

    batch = torch.randn(5, 3)
    expected = torch.autograd.grad(step(batch), encoder.weight)
    got = torch.autograd.grad(torch.compile(step, fullgraph=True)(batch), encoder.weight)
    torch.testing.assert_close(got, expected)


def compiled_once(function, calls, **options):
    """Results of a function compiled in the first call alone."""
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", **options)
    results = [compiled(*calls[0])]
    with torch.compiler.set_stance("fail_on_recompile"):
        return results + [compiled(*given) for given in calls[1:]]


def test_compile_once_for_all_batch_sizes():
    given = [(torch.randn(B, 3, requires_grad=True), torch.randn(B + 1, 3)) for B in (4, 5, 9)]
    values = compiled_once(lambda u, v: sampled_softmax_loss(u, u, v), given, dynamic=True)
    for value, (u, v) in zip(values, given, strict=True):
        torch.testing.assert_close(value.detach(), core_loss_of(u, u, v))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_func_grad(reduction):
    x = problem(11)
    loss, given = first_three(x, reduction=reduction)
    expected = torch.autograd.grad(loss(*given), given)
    got = torch.func.grad(loss, argnums=(0, 1, 2))(*(y.detach() for y in given))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_export(reduction, strict):
    loss, given = first_three(problem(12, grad=False), reduction=reduction)

    class Model(torch.nn.Module):
        def forward(self, *tensors):
            return loss(*tensors)

    given[0].requires_grad_()
    program = torch.export.export(Model(), tuple(given), strict=strict)
    assert "torch.ops.zipfneg.sampled_softmax" in str(program)
    torch.testing.assert_close(program.module()(*given), loss(*given))


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("gradients", [True, False])
def test_operators_keep_their_promises(reduction, gradients):
    """Schema, aliasing and fake tensors, as PyTorch checks them."""
    tests = ("test_schema", "test_faketensor")
    x = problem(13, grad=False)
    order = (
        "queries", "positives", "negatives", "temperature", "positive_bias", "negative_bias",
        "positive_ids", "negative_ids", "positive_log_q", "negative_log_q", "indptr", "known_ids",
        "mask", "sample_weight",
    )  # fmt: skip
    options = ("both", "softmax", None, reduction, False, gradients)
    torch.library.opcheck(adapter._operator, (*(x[k] for k in order), *options), test_utils=tests)
    step, ids = torch.tensor(3), x["positive_ids"]
    for sampler in SAMPLERS.values():
        torch.library.opcheck(
            adapter._sample, (adapter._key(sampler), ids, step, 1), test_utils=tests
        )
    head = zipfneg.ContrastiveOutput(SAMPLERS["unique"], store_negative_ids=True)
    table = torch.randn(N, 3)
    torch.library.opcheck(
        adapter._contrastive,
        (x["queries"], table, table[:, 0].clone(), torch.tensor(0.5), ids, None, None, None,
         adapter._key(head), True, step, 0),
        test_utils=tests,
    )  # fmt: skip


def test_autocast_casts_nothing():
    x, y = problem(14, dtype=torch.float32), problem(14, dtype=torch.float32)
    encoder = torch.nn.Linear(3, 3)
    with torch.autocast("cpu", torch.bfloat16):
        queries = encoder(x["queries"])
        value = compute({**x, "queries": queries})
    assert (queries.dtype, value.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(value, compute({**y, "queries": queries}))
    value.backward()
    assert encoder.weight.grad.dtype == x["negatives"].grad.dtype == torch.float32


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_second_derivatives_are_refused(reduction):
    loss, given = first_three(problem(15), reduction=reduction)
    text = "have first derivatives only"
    (grad,) = torch.autograd.grad(loss(*given), given[0], create_graph=True)
    with pytest.raises(RuntimeError, match=text):
        grad.sum().backward()

    def norm(queries):
        return torch.func.grad(loss)(queries, *(x.detach() for x in given[1:])).sum()

    with pytest.raises(RuntimeError, match=text):
        torch.func.grad(norm)(given[0].detach())
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    (grad,) = torch.autograd.grad(compiled(*given), given[0], create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        grad.sum().backward()


# PyTorch scripts its own forward-mode decompositions.
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
def test_other_transforms_are_refused():
    loss, given = first_three(problem(15, grad=False))
    with pytest.raises(TypeError, match=r"negatives.embeddings: cannot view this"):
        torch.func.vmap(loss, in_dims=(None, None, 0))(*given[:2], given[2][None])
    with pytest.raises(TypeError, match=r"queries: cannot view this"):
        torch.func.jvp(loss, tuple(given), tuple(given))
    compiled = torch.compile(torch.func.grad(loss), fullgraph=True, backend="aot_eager")
    with pytest.raises(
        RuntimeError, match="transforms of zipfneg's losses run, but cannot be compiled"
    ):
        compiled(*given)


def test_weights_in_a_graph_beside_the_loss():
    """An upstream gradient that itself requires grad."""
    x = problem(16)
    weight = torch.rand(5, dtype=torch.float64, requires_grad=True)
    value = compute(x, reduction="none")
    d_weight, d_queries = torch.autograd.grad(
        (weight * value).sum(), (weight, x["queries"]), create_graph=True
    )
    torch.testing.assert_close(d_weight, value)
    assert d_queries.shape == x["queries"].shape


def test_backward_twice_over_one_graph():
    x = problem(17)
    value = compute(x)
    value.backward(retain_graph=True)
    first = x["queries"].grad.clone()
    value.backward(retain_graph=True)
    torch.testing.assert_close(x["queries"].grad, 2 * first)
    x["queries"].grad.zero_()
    value.backward()
    torch.testing.assert_close(x["queries"].grad, first)


# -- Samplers

SAMPLERS = {
    "unique": PopularitySampler(LAW, 8, seed=3),
    "repeats": PopularitySampler(LAW, 8, unique=False),
    "per query": PopularitySampler(LAW, 8, per_query=True),
    "poisson": PopularitySampler(LAW, 8, unique="poisson"),
    "in-batch": InBatchSampler(LAW),
    "in-batch without log q": InBatchSampler(),
    "mixture": MixtureSampler([InBatchSampler(LAW), PopularitySampler(LAW, 8)]),
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_samples_as_the_core(name):
    sampler, ids = SAMPLERS[name], torch.tensor([3, 1, 41, 3])

    def draw(ids, step):
        return sample(sampler, ids, step=step, stream=2)

    compiled = torch.compile(draw, fullgraph=True, backend="aot_eager")
    for step in (5, torch.tensor(6)):
        expected = sampler.sample(ids, step=int(step), stream=2)
        for got in (draw(ids, step), compiled(ids, step)):
            assert torch.equal(got.negatives.ids, expected.negatives.ids)
            for side in ("positives", "negatives"):
                a, b = (getattr(d, side).log_q for d in (got, expected))
                assert (a is None and b is None) or torch.equal(a, b)
            assert int(got.num_tries) == expected.num_tries


def test_steps_do_not_compile_again():
    sampler, steps = SAMPLERS["unique"], [(torch.tensor(step),) for step in range(4)]
    drawn = compiled_once(lambda step: sample(sampler, step=step).negatives.ids, steps)
    for ids, (step,) in zip(drawn, steps, strict=True):
        assert torch.equal(ids, torch.from_numpy(sampler.sample(step=int(step)).negatives.ids))


def test_in_batch_negatives_have_gradients():
    items = torch.randn(4, 3, requires_grad=True)
    batch = Candidates(torch.tensor([3, 1, 41, 7]), items)
    draw = sample(SAMPLERS["in-batch"], batch)
    assert draw.negatives.embeddings is items
    sampled_softmax_loss(torch.randn(4, 3), draw.positives, draw.negatives).backward()
    assert items.grad.abs().sum() > 0


def test_training_step_compiled_whole():
    """Sampling, lookup and loss in one graph."""
    sampler, table = SAMPLERS["unique"], torch.nn.Embedding(N, 4)
    queries, ids = torch.randn(5, 4), torch.randint(0, N, (5,))

    def step(queries, ids, step):
        draw = sample(sampler, ids, step=step)
        return sampled_softmax_loss(
            queries,
            draw.positives._replace(embeddings=table(ids)),
            draw.negatives._replace(embeddings=table(draw.negatives.ids)),
        )

    expected = torch.autograd.grad(step(queries, ids, 2), table.weight)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(queries, ids, 2), table.weight)
    torch.testing.assert_close(got, expected)


def test_a_graph_outlives_its_sampler_with_a_clear_error():
    sampler = PopularitySampler(LAW, 3)
    key = adapter._key(sampler)
    del sampler
    with pytest.raises(RuntimeError, match="sampler or head of this graph is gone"):
        adapter._sample(key, None, torch.tensor(0), 0)


# -- The head


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_the_head_is_the_cores(sparse, bias):
    core = zipfneg.ContrastiveOutput(
        SAMPLERS["mixture"], temperature=0.3, top_ks=(1, 5), store_negative_ids=True
    )
    head = adapter.ContrastiveOutput(
        SAMPLERS["mixture"], temperature=0.3, learn_temperature=True, sparse=sparse, top_ks=(1, 5),
        store_negative_ids=True,
    )  # fmt: skip
    queries, table = torch.randn(6, 4, requires_grad=True), torch.randn(N, 4, requires_grad=True)
    b = torch.randn(N, requires_grad=True) if bias else None
    ids, weight = torch.randint(0, N, (6,)), torch.rand(6)
    given = {"sample_weight": weight, "known_positives": (torch.arange(7), ids.flip(0))}
    out = head(queries, ids, items=Candidates(embeddings=table, bias=b), step=4, **given)
    (3 * out.loss).backward()
    items = Candidates(embeddings=table.detach(), bias=None if b is None else b.detach())
    expected = core(queries.detach(), ids, items=items, step=4, **given)
    d = expected.grads
    torch.testing.assert_close(out.loss.detach(), expected.loss)
    assert torch.equal(out.negative_ids, expected.negative_ids)
    assert {k: float(x) for k, x in out.metrics.items()} == pytest.approx(expected.metrics)
    torch.testing.assert_close(queries.grad, 3 * d.queries)
    torch.testing.assert_close(head.log_temperature.grad, 3 * d.temperature * 0.3)  # τ·dL/dτ
    for grad, rows in ((table.grad, d.items.rows), *([(b.grad, d.items.bias)] if bias else ())):
        assert grad.is_sparse == sparse
        dense = grad.to_dense()
        torch.testing.assert_close(dense[d.items.ids], 3 * rows)
        assert dense.abs().sum() == pytest.approx(float(dense[d.items.ids].abs().sum()))


def test_sparse_gradients_train_as_dense_ones():
    torch.manual_seed(0)
    queries, ids = torch.randn(6, 4), torch.randint(0, N, (6,))
    tables = []
    for sparse in (False, True):
        torch.manual_seed(1)
        table = torch.nn.Embedding(N, 4, sparse=sparse)
        head = adapter.ContrastiveOutput(SAMPLERS["unique"], sparse=sparse)
        optimizer = torch.optim.Adagrad(table.parameters(), 0.1)
        for _ in range(5):
            optimizer.zero_grad()
            head(queries, ids, items=table.weight).loss.backward()
            optimizer.step()
        tables.append(table.weight.detach())
    torch.testing.assert_close(*tables)


@pytest.mark.parametrize("sparse", [False, True])
def test_tied_weights_accumulate(sparse):
    """A table read by the encoder and by the head."""
    table = torch.nn.Embedding(N, 4, sparse=sparse)
    history, ids = torch.randint(0, N, (6, 3)), torch.randint(0, N, (6,))
    head = adapter.ContrastiveOutput(SAMPLERS["unique"], sparse=sparse)
    head(table(history).mean(1), ids, items=table.weight, step=1).loss.backward()
    draw = sample(SAMPLERS["unique"], ids, step=1)
    weight = table.weight.detach().clone().requires_grad_()
    z_0 = (weight[history].mean(1) * weight[ids]).sum(1) - draw.positives.log_q
    z = weight[history].mean(1) @ weight[draw.negatives.ids].T - draw.negatives.log_q
    z = z.masked_fill(draw.negatives.ids == ids[:, None], -torch.inf)
    F.cross_entropy(
        torch.cat([z_0[:, None], z], 1).float(), torch.zeros(6, dtype=torch.int64)
    ).backward()
    torch.testing.assert_close(table.weight.grad.to_dense(), weight.grad)


@pytest.mark.parametrize("samplers", [InBatchSampler(LAW), [InBatchSampler(LAW), "bank"]])
def test_two_towers_with_a_bank(samplers):
    queries, items = (torch.randn(6, 4, requires_grad=True) for _ in range(2))
    ids = torch.randint(0, N, (6,))
    if isinstance(samplers, list):
        bank = CachedSampler(20, LAW)
        bank.update(Candidates(torch.arange(9), torch.randn(9, 4)))
        samplers = [samplers[0], bank]
    out = adapter.ContrastiveOutput(samplers)(queries, ids, positives=items)
    out.loss.backward()
    core = zipfneg.ContrastiveOutput(samplers)
    expected = core(queries.detach(), ids, positives=items.detach())
    torch.testing.assert_close(queries.grad, expected.grads.queries)
    torch.testing.assert_close(items.grad, expected.grads.positives.embeddings)


def test_the_head_compiled_whole():
    queries, ids = torch.randn(6, 4), torch.randint(0, N, (6,))
    table = torch.randn(N, 4, requires_grad=True)
    results = []
    for compiled in (False, True):
        head = adapter.ContrastiveOutput(SAMPLERS["unique"], learn_temperature=True)

        def call(table, head=head):
            return head(queries, ids, items=table)

        calls = 3 * [(table,)]
        outs = compiled_once(call, calls) if compiled else [call(*given) for given in calls]
        assert int(head.step) == 3
        for out in outs:
            grads = torch.autograd.grad(out.loss, (table, head.log_temperature))
            results.append((out.loss, *grads, out.metrics["mrr@10"]))
    for a, b in zip(results[:3], results[3:], strict=True):
        torch.testing.assert_close(a, b)


def test_steps_are_counted_in_training_alone():
    head = adapter.ContrastiveOutput(SAMPLERS["unique"], store_negative_ids=True)
    queries, ids, table = torch.randn(6, 4), torch.randint(0, N, (6,)), torch.randn(N, 4)

    def drawn(**given):
        return head(queries, ids, items=table, **given).negative_ids.tolist()

    first, second = drawn(), drawn()
    assert first != second
    assert drawn(step=0) == first
    assert drawn(step=0, stream=1) != first  # the rank's own
    assert int(head.step) == 2
    head.eval()
    assert drawn() == drawn()
    assert int(head.step) == 2


@pytest.mark.parametrize("law", [LAW, Empirical(np.arange(1.0, N + 1))], ids=["law", "counts"])
def test_saved_and_loaded_it_goes_on(law):
    torch.manual_seed(2)
    bank = CachedSampler(20, law)
    bank.update(Candidates(torch.arange(9), None))
    head = adapter.ContrastiveOutput(
        [PopularitySampler(law, 8, seed=5), bank], temperature=0.2, learn_temperature=True,
        loss="bpr",
    )  # fmt: skip
    queries, ids, table = torch.randn(6, 4), torch.randint(0, N, (6,)), torch.randn(N, 4)
    for _ in range(2):
        head(queries, ids, items=table)
    with torch.no_grad():
        head.log_temperature += 0.3
    file = io.BytesIO()
    torch.save(head.state_dict(), file)
    file.seek(0)
    other = adapter.ContrastiveOutput(PopularitySampler(LogUniform(9), 2), learn_temperature=True)
    other.load_state_dict(torch.load(file))  # of which only plain data and tensors are trusted
    twin = copy.deepcopy(head)
    expected = head(queries, ids, items=table).loss
    assert torch.equal(other(queries, ids, items=table).loss, expected)
    assert torch.equal(twin(queries, ids, items=table).loss, expected)


def test_inference():
    head = adapter.ContrastiveOutput(
        PopularitySampler(LogUniform(N - 1, first_id=1), 8), temperature=0.5, learn_temperature=True
    )
    queries, table = torch.randn(3, 4, requires_grad=True), torch.nn.Embedding(N, 4)
    scores = head.scores(queries, table.weight)
    torch.testing.assert_close(scores, (queries @ table.weight.T / 0.5).detach())
    best = head.top_k(queries, table.weight, 4)
    assert torch.equal(best.ids, scores[:, 1:].topk(4).indices + 1)


def two_towers(seed=0):
    torch.manual_seed(seed)
    towers = torch.nn.ModuleDict(
        {"user": torch.nn.Embedding(40, 8), "item": torch.nn.Embedding(N, 8)}
    )
    users = torch.randint(0, 40, (512,))
    return towers, users, (users * 7 + torch.randint(0, 3, (512,))) % N


def test_training_two_towers_reduces_the_loss():
    towers, users, items = two_towers()
    head = adapter.ContrastiveOutput(InBatchSampler(Empirical(torch.bincount(items, minlength=N))))
    optimizer = torch.optim.Adam(towers.parameters(), 0.05)
    losses = []
    for _ in range(60):
        batch = torch.randint(0, 512, (128,))
        optimizer.zero_grad()
        loss = head(
            towers["user"](users[batch]), items[batch], positives=towers["item"](items[batch])
        ).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert np.mean(losses[-10:]) < 0.7 * np.mean(losses[:5])


def batch_of_towers(towers, users, items, sampler, step):
    draw = sample(sampler, items, step=step)
    positives = draw.positives._replace(embeddings=towers["item"](items))
    negatives = draw.negatives._replace(embeddings=towers["item"](draw.negatives.ids))
    return towers["user"](users), positives, negatives


def grads_of(towers):
    grads = [p.grad.clone() for p in towers.parameters()]
    towers.zero_grad()
    return grads


def test_gradient_accumulation():
    """Four parts of a batch with the same negatives, each weighed by its share."""
    towers, users, items = two_towers()
    for part in torch.arange(512).chunk(4):
        queries, p, v = batch_of_towers(towers, users[part], items[part], SAMPLERS["unique"], 7)
        (sampled_softmax_loss(queries, p, v) * len(part) / 512).backward()
    got = grads_of(towers)
    sampled_softmax_loss(*batch_of_towers(towers, users, items, SAMPLERS["unique"], 7)).backward()
    torch.testing.assert_close(got, grads_of(towers))


def test_two_passes_with_cached_gradients():
    """GradCache: embeddings without a graph, the loss's gradients of them, the towers in parts."""
    towers, users, items = two_towers()
    sampler = InBatchSampler(LAW)
    with torch.no_grad():
        queries, embeddings = towers["user"](users), towers["item"](items)
    queries.requires_grad_()
    embeddings.requires_grad_()
    draw = sample(sampler, Candidates(items, embeddings))
    sampled_softmax_loss(queries, draw.positives, draw.negatives).backward()
    for part in torch.arange(512).chunk(4):
        towers["user"](users[part]).backward(queries.grad[part])
        towers["item"](items[part]).backward(embeddings.grad[part])
    got = grads_of(towers)
    draw = sample(sampler, Candidates(items, towers["item"](items)))
    sampled_softmax_loss(towers["user"](users), draw.positives, draw.negatives).backward()
    torch.testing.assert_close(got, grads_of(towers))


# -- Errors


def test_errors():
    x = problem(18)
    u, p, v = (x[name] for name in NAMES[:3])
    with pytest.raises(TypeError, match=r"queries: expected a torch.Tensor, got ndarray"):
        sampled_softmax_loss(u.detach().numpy(), p, v)
    with pytest.raises(TypeError, match=r"negatives.embeddings: expected a torch.Tensor, got None"):
        sampled_softmax_loss(u, p, Candidates(x["negative_ids"]))
    with pytest.raises(ValueError, match=r"sample_weight: expected a constant, .*requires grad"):
        compute(x, sample_weight=torch.ones(5, requires_grad=True))
    log_q = x["positive_log_q"].clone().requires_grad_()
    with pytest.raises(ValueError, match=r"positives.log_q: expected a constant"):
        compute({**x, "positive_log_q": log_q})
    with pytest.raises(ValueError, match="temperature: expected a finite number above 0, got -1"):
        compute(x, temperature=-1.0)
    with pytest.raises(ValueError, match="loss: expected one of"):
        compute(x, loss="triplet")
    with pytest.raises(ValueError, match=r"positives.embeddings: expected shape"):
        sampled_softmax_loss(u, p[:3], v)
    head = adapter.ContrastiveOutput(SAMPLERS["unique"])
    with pytest.raises(ValueError, match="items, positives: expected exactly one"):
        head(u, x["positive_ids"])
    with pytest.raises(ValueError, match="items: expected embeddings and bias alone"):
        head(u, x["positive_ids"], items=Candidates(x["positive_ids"], p))
    with pytest.raises(TypeError, match=r"positive_ids: expected a torch.Tensor, got list"):
        head(u, [1, 2], items=p)
    with pytest.raises(ValueError, match="items: expected a row for every id"):
        head(u, x["positive_ids"], items=p)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_other_devices_are_refused():
    u = torch.eye(3, device="cuda", requires_grad=True)
    with pytest.raises((TypeError, NotImplementedError), match=r"queries: .*cuda:0"):
        sampled_softmax_loss(u, u, u)


def test_without_torch():
    script = "import sys; sys.modules['torch'] = None; import zipfneg; import zipfneg.torch"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert "ImportError: zipfneg.torch needs PyTorch; install it by: pip install" in done.stderr
