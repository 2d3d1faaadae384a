"""Sampled softmax and its siblings: value, forward and backward, with gradients derived by hand.

The derivation stands in ``docs/loss.md``; the equations, one by one, in `zipfneg.reference`.
"""

import math
from typing import Any, NamedTuple, TypedDict, Unpack

import numpy as np

from . import checks
from .candidates import Candidates, as_candidates, as_temperature
from .checks import NDArray
from .cpu import pairwise, softmax
from .cpu.rows import add_products
from .interop import Array, Home, as_array, borrow
from .masking import Csr, FalseNegatives

CORRECTIONS = ("both", "negatives", "none")
REDUCTIONS = ("mean", "sum", "none")


class Kind(NamedTuple):
    """What log q and `loss_parameter` are to a loss."""

    log_q: str | None  # corrects the "scores", the "weights" of the negatives, or the "positive"
    parameter: str | None = None
    default: float = 0.0
    greatest: float = math.inf


LOSSES = {
    "softmax": Kind("scores"),
    "bpr": Kind("scores"),
    "bpr-max": Kind("weights", "λ", 1.0),
    "top1": Kind(None),
    "top1-max": Kind("weights"),
    "logistic": Kind("scores"),
    "hinge": Kind(None, "the margin", 1.0),
    "bce": Kind("scores", default=1.0),  # the weight of the positive's term
    "gbce": Kind("positive", "t", 0.75, 1.0),
}


class Options(TypedDict, total=False):
    """The keyword arguments that the functions of this module share; see `sampled_softmax_loss`."""

    temperature: float | Array
    known_positives: Csr | None
    mask: Array | None
    sample_weight: Array | None
    correction: str
    loss: str
    loss_parameter: float | None
    reduction: str
    validate: bool


class Grads(NamedTuple):
    """Gradients of the loss, shaped, typed and placed like the inputs; None for what was not given.

    `positives` and `negatives` are `Candidates` with `embeddings` and `bias`. That of the
    temperature has the dtype of the loss.
    """

    queries: Array
    positives: Candidates
    negatives: Candidates
    temperature: Array


class Diagnostics(NamedTuple):
    """What a softmax tells of each query, (B,) each.

    log_normalizer : logsumexp_j z_j over the negatives that are kept; −inf where there is none.
    positive_prob : the positive's share, e^(z_0) of all candidates.
    num_better, num_tied : kept negatives that score above the positive, before log q, or the same.
    effective_size : (Σ w)²/Σ w² of the negatives' weights w = e^z: as many weigh as this.
    num_dropped : negatives that were dropped.
    """

    log_normalizer: Array
    positive_prob: Array
    num_better: Array
    num_tied: Array
    effective_size: Array
    num_dropped: Array


class Prepared(NamedTuple):
    """A checked call: what to compute, and how its results go back."""

    engine: Any  # the module that computes it, `softmax` or `pairwise`
    problem: softmax.Problem | pairwise.Problem
    weight: NDArray  # (B,) dloss/dL_i
    reduction: str
    place: Home
    dtypes: dict[str, np.dtype[Any]]  # of the given arrays, by their name

    def loss(self, result: softmax.Pass | pairwise.Pass) -> Array:
        loss = result.loss * self.weight  # (B,)
        return self.place.give(loss if self.reduction == "none" else loss.sum())

    @property
    def scores(self) -> softmax.Problem:
        return self.problem.scores if isinstance(self.problem, pairwise.Problem) else self.problem

    def grads(self, gradients: softmax.Gradients) -> Grads:
        of_negatives, index = gradients.negatives, self.scores.negative_rows
        if index is not None:
            of_negatives = np.zeros_like(self.scores.negatives)
            add_products(of_negatives, index, gradients.negative_bias, self.scores.queries)

        def given(name: str, gradient: NDArray) -> Array:
            if name not in self.dtypes:
                return None
            return self.place.give(gradient.astype(self.dtypes[name], copy=False))

        return Grads(
            queries=given("queries", gradients.queries),
            positives=Candidates(
                embeddings=given("positives.embeddings", gradients.positives),
                bias=given("positives.bias", gradients.positive_bias),
            ),
            negatives=Candidates(
                embeddings=given("negatives.embeddings", of_negatives),
                bias=given("negatives.bias", gradients.negative_bias),
            ),
            temperature=self.place.give(gradients.temperature),
        )


class Saved(NamedTuple):
    """What `sampled_softmax_backward` needs of the forward: the inputs, and a few figures a row."""

    prepared: Prepared
    result: softmax.Pass | pairwise.Pass


def sampled_softmax_loss(
    queries: Array,
    positives: Candidates | Array,
    negatives: Candidates | Array,
    *,
    temperature: float | Array = 1.0,
    known_positives: Csr | None = None,
    mask: Array | None = None,
    sample_weight: Array | None = None,
    correction: str = "both",
    loss: str = "softmax",
    loss_parameter: float | None = None,
    reduction: str = "mean",
    validate: bool = False,
) -> Array:
    """Loss of each query's positive among the negatives, corrected by log q.

    By default the cross-entropy of a softmax::

        a_0 = (u·v_0 + b_0)/τ    z_0 = a_0 − c          c = log q_0 for "both", else 0
        a_j = (u·v_j + b_j)/τ    z_j = a_j − log q_j    (z_j = a_j for "none")
        L   = log(e^(z_0) + Σ_j e^(z_j)) − z_0

    Same value as cross-entropy over the (B, 1 + S) logits, which are never formed whole.

    Parameters
    ----------
    queries : (B, D) of float16, bfloat16, float32 or float64.
    positives : `Candidates` of one item a query: embeddings (B, D), ids, log_q and bias (B,) where
        known. A plain array means embeddings alone.
    negatives : `Candidates` shared by the batch, embeddings (S, D) and the rest (S,), or each
        query's own, (B, S, D) and (B, S). Each query's own may also be rows of a table: ids (B, S)
        with embeddings (N, D), row = id, which are never gathered into (B, S, D).
    temperature : τ > 0. Divides the scores before log q is subtracted.
    known_positives : ids of other true items of each query, dropped from its negatives: a pair
        (indptr (B + 1,), ids) or a SciPy CSR matrix. Needs negatives.ids.
    mask : bool (S,) or (B, S); True drops a negative.
    sample_weight : (B,), multiplies each example's loss.
    correction : "both" subtracts log q from the positive and the negatives, "negatives" from the
        negatives alone, "none" from neither. Without any log_q nothing is subtracted.
    loss : "softmax", or one of these, with the mean and Σ over the row's kept negatives and
        w = softmax_j(a_j − log q_j):

        - "bpr", also called "logistic": mean_j softplus(z_j − z_0)
        - "bpr-max": −log Σ_j w_j·σ(a_0 − a_j) + λ·Σ_j w_j·a_j²
        - "top1": mean_j f_j, "top1-max": Σ_j w_j·f_j, with f_j = σ(a_j − a_0) + σ(a_j²)
        - "hinge": mean_j max(0, margin + a_j − a_0)
        - "bce": softplus(−z_0) + Σ_j softplus(z_j); with log q = log(S·p) and hits kept it is
          noise-contrastive estimation
        - "gbce": β·softplus(−a_0) + Σ_j softplus(a_j), β = 1 − t·(1 − min(1, q_0)); log q of the
          positive is needed, and used for β alone

        Log q has no meaning in "hinge" and "top1": where it is given, pass correction="none".
    loss_parameter : λ of "bpr-max" (default 1), the margin of "hinge" (1), t of "gbce" (0.75, at
        most 1); at least 0.
    reduction : "mean" (the sum over B, whatever the weights), "sum" or "none".
    validate : also look for NaN and infinity in queries, embeddings and weights. Biases and log q
        must be finite in any case.

    Returns
    -------
    Scalar, or (B,) for "none", of the inputs' framework and device: float64 if any embedding is,
    else float32.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what was expected and what came: shapes, dtypes, mixed frameworks or
        devices, temperature ≤ 0, log_q on one side only, log_q that is not finite, a correction or
        a parameter that the loss does not have.

    Notes
    -----
    Where both sides have ids, negatives equal to the row's positive are dropped. A row whose
    negatives are all dropped has loss 0 and zero gradients, or the positive's term alone in "bce"
    and "gbce"; a batch without rows has loss 0.
    Arithmetic is float32, or float64 where an embedding is float64. Beyond float32 copies of half
    precision arrays (per-query negatives excepted), of biases, log q and ids of another dtype, and
    the results, it uses a workspace of at most 64 MiB, whatever B and S. NaN and infinity of
    embeddings pass through, into the gradients also those of a dropped negative. Results of the
    softmax are the same to the last bit for any number of threads.

    References
    ----------
    Bengio & Senécal 2008, Adaptive importance sampling to accelerate training of a neural
    probabilistic language model, eq. 9; Yi et al. 2019, Sampling-bias-corrected neural modeling
    for large corpus item recommendations, eq. 5. Those of the other losses are in ``docs/loss.md``,
    with their gradients.

    Examples
    --------
    >>> import numpy as np
    >>> from zipfneg import Candidates, sampled_softmax_loss
    >>> u, p, v = np.eye(3), np.eye(3), np.ones((4, 3))
    >>> negatives = Candidates(ids=np.array([5, 1, 7, 9]), embeddings=v)
    >>> sampled_softmax_loss(u, Candidates(np.arange(3), p), negatives, reduction="none").round(4)
    array([1.6094, 1.3863, 1.6094])
    >>> sampled_softmax_loss(u, p, negatives, loss="hinge", loss_parameter=0.5)
    np.float64(0.5)
    """
    value, _ = sampled_softmax_forward(
        queries,
        positives,
        negatives,
        temperature=temperature,
        known_positives=known_positives,
        mask=mask,
        sample_weight=sample_weight,
        correction=correction,
        loss=loss,
        loss_parameter=loss_parameter,
        reduction=reduction,
        validate=validate,
    )
    return value


def sampled_softmax_value_and_grad(
    queries: Array,
    positives: Candidates | Array,
    negatives: Candidates | Array,
    **options: Unpack[Options],
) -> tuple[Array, Grads]:
    """The loss and all its gradients, from one pass over the logits.

    Arguments as for `sampled_softmax_loss`. With reduction "none" the gradients are those of the
    sum. For the softmax, with D = logsumexp_j z_j − z_0, g_0 = −σ(D) and g_j = σ(D)·softmax_j(z);
    for every loss::

        dU_i = (g_i0·P_i + Σ_j g_ij·V_j)/τ    dP_i = g_i0·U_i/τ    dV_j = Σ_i g_ij·U_i/τ
        db_i0 = g_i0/τ    db_j = Σ_i g_ij/τ    dτ = −(1/τ)·Σ g·a

    Returns
    -------
    loss : as `sampled_softmax_loss`.
    grads : `Grads`, each in its input's dtype and place.

    Examples
    --------
    >>> import numpy as np
    >>> u, p, v = np.eye(3), np.eye(3), np.ones((4, 3))
    >>> loss, grads = sampled_softmax_value_and_grad(u, p, v, temperature=0.5)
    >>> round(float(loss), 4), grads.negatives.embeddings.shape, grads.negatives.bias
    (1.6094, (4, 3), None)
    """
    prepared = prepare(queries, positives, negatives, **options)
    result, gradients = prepared.engine.value_and_gradients(prepared.problem, prepared.weight)
    return prepared.loss(result), prepared.grads(gradients)


def sampled_softmax_diagnostics(
    queries: Array,
    positives: Candidates | Array,
    negatives: Candidates | Array,
    **options: Unpack[Options],
) -> tuple[Array, Grads, Diagnostics]:
    """`sampled_softmax_value_and_grad`, and in the same pass what it tells of each query.

    A small effective size says that few negatives carry the gradient: the temperature is low, or
    the log q wrong. Many dropped negatives say that positives are frequent among them.

    Examples
    --------
    >>> import numpy as np
    >>> from zipfneg import sampled_softmax_diagnostics
    >>> _, _, found = sampled_softmax_diagnostics(np.eye(3), np.eye(3), np.zeros((4, 3)))
    >>> found.positive_prob.round(4), found.effective_size
    (array([0.4046, 0.4046, 0.4046]), array([4., 4., 4.]))
    """
    prepared = prepare(queries, positives, negatives, **options)
    if prepared.engine is not softmax:
        raise ValueError(f'loss: expected "softmax" for diagnostics, got {options["loss"]!r}')
    found, gradients = softmax.value_and_gradients(prepared.scores, prepared.weight, ranks=True)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        columns = Diagnostics(
            log_normalizer=found.shift + np.log(found.total),
            positive_prob=1 / (1 + np.exp(found.excess)),
            num_better=found.num_better,
            num_tied=found.num_tied,
            effective_size=np.where(found.total > 0, found.total**2 / found.squares, 0.0).astype(
                found.total.dtype
            ),
            num_dropped=found.num_dropped,
        )
    place = prepared.place
    told = Diagnostics(*(place.give(x) for x in columns))
    return prepared.loss(found), prepared.grads(gradients), told


def sampled_softmax_forward(
    queries: Array,
    positives: Candidates | Array,
    negatives: Candidates | Array,
    **options: Unpack[Options],
) -> tuple[Array, Saved]:
    """The loss, and what the backward pass needs: for the hooks of custom gradients.

    Arguments as for `sampled_softmax_loss`. The saved value refers to the inputs: they must not
    be changed before the backward pass.
    """
    prepared = prepare(queries, positives, negatives, **options)
    result = prepared.engine.value(prepared.problem)
    return prepared.loss(result), Saved(prepared, result)


def sampled_softmax_backward(d_loss: float | Array, saved: Saved) -> Grads:
    """Gradients of Σ d_loss·loss, for any upstream gradient.

    Parameters
    ----------
    d_loss : a scalar; after reduction "none" also (B,), one for each example.
    saved : from `sampled_softmax_forward`.

    Examples
    --------
    >>> import numpy as np
    >>> u, p, v = np.eye(3), np.eye(3), np.ones((4, 3))
    >>> loss, saved = sampled_softmax_forward(u, p, v, reduction="none")
    >>> grads = sampled_softmax_backward(np.array([1.0, 0.0, 2.0]), saved)
    >>> grads.queries[1].tolist()
    [0.0, 0.0, 0.0]
    """
    upstream = np.asarray(d_loss if isinstance(d_loss, int | float) else as_array(d_loss, "d_loss"))
    prepared, result = saved
    if upstream.dtype.kind not in "iu":
        checks.floating("d_loss", upstream)
    if upstream.ndim:
        if prepared.reduction != "none":
            raise ValueError(
                f'd_loss: expected a scalar after reduction="{prepared.reduction}", got shape '
                f"{upstream.shape}"
            )
        checks.shape("d_loss", upstream, prepared.weight.shape, "(B,)")
    weight = (prepared.weight * upstream).astype(prepared.weight.dtype)
    _, gradients = prepared.engine.value_and_gradients(prepared.problem, weight, known=result)
    return prepared.grads(gradients)


def prepare(
    queries: Array,
    positives: Candidates | Array,
    negatives: Candidates | Array,
    *,
    temperature: float | Array = 1.0,
    known_positives: Csr | None = None,
    mask: Array | None = None,
    sample_weight: Array | None = None,
    correction: str = "both",
    loss: str = "softmax",
    loss_parameter: float | None = None,
    reduction: str = "mean",
    validate: bool = False,
) -> Prepared:
    """All checks of this module, once."""
    checks.one_of("correction", correction, CORRECTIONS)
    parameter = check_loss(loss, loss_parameter)
    checks.one_of("reduction", reduction, REDUCTIONS)
    positives = as_candidates("positives", positives)
    negatives = as_candidates("negatives", negatives)
    place, given = borrow(
        {
            "queries": queries,
            **{f"positives.{field}": x for field, x in positives._asdict().items()},
            **{f"negatives.{field}": x for field, x in negatives._asdict().items()},
            "mask": mask,
            "sample_weight": sample_weight,
        }
    )
    _check_shapes(given)
    u, p, v = given["queries"], given["positives.embeddings"], given["negatives.embeddings"]
    rows = given["negatives.ids"] if _are_rows(given) else None
    num_queries, num_sampled = len(u), v.shape[-2] if rows is None else rows.shape[1]
    dtype = np.dtype(np.float64 if np.float64 in (u.dtype, p.dtype, v.dtype) else np.float32)

    def converted(name: str) -> NDArray | None:
        if given[name] is None:
            return None
        with np.errstate(over="ignore"):
            x = np.ascontiguousarray(given[name], dtype)
        # −inf would turn a correction or a score into NaN, and is no way to drop an item.
        hint = ": an id outside the law it was drawn from?" if name.endswith("log_q") else ""
        checks.finite(name, x, hint)
        return x

    drop = given["mask"]
    if drop is not None:
        if drop.dtype != np.bool_:
            raise TypeError(f"mask: expected bool, True to drop a negative, got {drop.dtype}")
        if drop.shape != (num_sampled,):
            checks.shape("mask", drop, (num_queries, num_sampled), "(B, S), or (S,)")
    corrected = _corrected(given, correction, loss)
    false_negatives = FalseNegatives.find(
        given["negatives.ids"], given["positives.ids"], known_positives, drop, num_queries
    )
    if validate:
        for name, x in given.items():
            if x is not None and name.endswith(("queries", "embeddings", "sample_weight")):
                checks.finite(name, x)
    problem = softmax.Problem(
        queries=np.ascontiguousarray(u, dtype),
        positives=np.ascontiguousarray(p, dtype),
        # Per-query negatives are large: converted block by block.
        negatives=np.ascontiguousarray(v, dtype) if v.ndim == 2 else v,
        positive_bias=converted("positives.bias"),
        negative_bias=converted("negatives.bias"),
        positive_log_q=converted("positives.log_q") if "positives" in corrected else None,
        negative_log_q=converted("negatives.log_q") if "negatives" in corrected else None,
        drop=false_negatives,
        temperature=as_temperature(temperature),
        negative_rows=None if rows is None else np.ascontiguousarray(rows, np.int64),
    )
    weight = np.ones(num_queries, dtype)
    if given["sample_weight"] is not None:
        weight = given["sample_weight"]
        checks.shape("sample_weight", weight, (num_queries,), "(B,)")
        if weight.dtype.kind not in "iu":
            checks.floating("sample_weight", weight)
        weight = weight.astype(dtype)
    if reduction == "mean":
        weight /= max(1, num_queries)
    dtypes = {name: x.dtype for name, x in given.items() if x is not None}
    if loss == "softmax":
        return Prepared(softmax, problem, weight, reduction, place, dtypes)
    other = pairwise.Problem(problem, loss, parameter)
    return Prepared(pairwise, other, weight, reduction, place, dtypes)


def _check_shapes(given: dict[str, Any]) -> None:
    """Embeddings of three sides, and ids, log q and bias shaped like them."""
    for name in ("queries", "positives.embeddings", "negatives.embeddings"):
        if given[name] is None:
            raise ValueError(f"{name}: expected an array, got None")
        checks.floating(name, given[name])
    u, p, v = given["queries"], given["positives.embeddings"], given["negatives.embeddings"]
    if u.ndim != 2:
        raise ValueError(f"queries: expected shape (B, D), got {u.shape}")
    num_queries, dim = u.shape
    columns: tuple[int, ...]
    if _are_rows(given):
        ids = given["negatives.ids"]
        columns, letters, whole = (num_queries, ids.shape[1]), "(B, S)", "(N, D)"
        checks.integral("negatives.ids", ids)
        if ids.size and not (ids.min() >= 0 and ids.max() < len(v)):
            raise ValueError(
                f"negatives.ids: expected rows of the table negatives.embeddings, 0 to "
                f"{len(v) - 1}, got {ids.min()} to {ids.max()}"
            )
    elif v.ndim == 2:
        columns, letters, whole = (len(v),), "(S,)", "(S, D)"
    elif v.ndim == 3:
        columns, letters, whole = (num_queries, v.shape[1]), "(B, S)", "(B, S, D)"
    else:
        raise ValueError(
            f"negatives.embeddings: expected shape (S, D), shared by the batch, or (B, S, D), got "
            f"{v.shape}"
        )
    checks.shape("positives.embeddings", p, (num_queries, dim), "(B, D) as queries")
    expected = (*columns, dim) if v.ndim == 3 else (len(v), dim)
    checks.shape("negatives.embeddings", v, expected, f"{whole} as queries")
    for side, shape, text in (
        ("positives", (num_queries,), "(B,)"),
        ("negatives", columns, letters),
    ):
        for field in ("ids", "log_q", "bias"):
            x = given[f"{side}.{field}"]
            if x is not None:
                checks.shape(f"{side}.{field}", x, shape, f"{text} as {side}.embeddings")
                (checks.integral if field == "ids" else checks.floating)(f"{side}.{field}", x)


def _are_rows(given: dict[str, Any]) -> bool:
    """Whether the negatives are rows of a table, each query's own."""
    ids, v = given["negatives.ids"], given["negatives.embeddings"]
    return ids is not None and ids.ndim == 2 and v.ndim == 2


def check_loss(loss: str, parameter: float | None) -> float:
    """The loss's parameter, checked, or its default."""
    checks.one_of("loss", loss, tuple(LOSSES))
    kind = LOSSES[loss]
    if parameter is None:
        return kind.default
    if kind.parameter is None:
        owners = ", ".join(
            f"{k.parameter} of {name!r}" for name, k in LOSSES.items() if k.parameter
        )
        raise ValueError(
            f"loss_parameter: expected None, since {loss!r} has none, got {parameter!r}; it is "
            f"{owners}"
        )
    if isinstance(parameter, bool) or not isinstance(
        parameter, int | float | np.integer | np.floating
    ):
        raise TypeError(f"loss_parameter: expected a number, got {parameter!r}")
    if not (0 <= parameter <= kind.greatest and parameter < math.inf):
        text = "from 0" if kind.greatest == math.inf else f"from 0 to {kind.greatest:g}"
        raise ValueError(
            f"loss_parameter: expected a finite number {text}, {kind.parameter} of {loss!r}, got "
            f"{parameter!r}"
        )
    return float(parameter)


def _corrected(given: dict[str, NDArray | None], correction: str, loss: str) -> tuple[str, ...]:
    """The sides whose log q is used: none where no log q is given at all."""
    positive, negative = given["positives.log_q"], given["negatives.log_q"]
    role = LOSSES[loss].log_q
    if role == "positive":
        if correction == "none":
            raise ValueError(
                f'correction: expected "both" or "negatives", since {loss!r} weighs the positive '
                f'by its log q, got "none"'
            )
        if positive is None:
            raise ValueError(
                f"positives.log_q: expected log q, by which {loss!r} weighs the positive, got None"
            )
        return ("positives",)
    if correction == "none" or (positive is None and negative is None):
        return ()
    if role is None:
        raise ValueError(
            f'correction: expected "none", since log q has no meaning in {loss!r}, got '
            f'{correction!r} with log q; pass correction="none" for plain scores'
        )
    if negative is None:
        raise ValueError(
            "negatives.log_q: expected log q, since positives.log_q is given, got None; pass it, "
            'or correction="none"'
        )
    if role == "weights" or correction == "negatives":
        return ("negatives",)
    if positive is None:
        raise ValueError(
            "positives.log_q: expected log q, since negatives.log_q is given, got None; pass it, "
            'or correction="negatives" to leave the positive uncorrected'
        )
    return ("positives", "negatives")
