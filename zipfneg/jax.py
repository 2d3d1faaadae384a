"""The loss and the samplers inside JAX's transformations, computed by callbacks to the host."""

from collections.abc import Callable
from functools import partial
from typing import Any, Unpack

import numpy as np

from . import loss as core
from .candidates import Candidates, as_candidates, as_temperature
from .interop import Array, narrowed
from .sampling import Draw

try:
    import jax
except ImportError as error:
    raise ImportError("zipfneg.jax needs JAX: pip install 'zipfneg[jax]'") from error

try:
    from jax.experimental.buffer_callback import buffer_callback
except ImportError:  # it is experimental; pure_callback gives the same, more slowly
    buffer_callback = None

Arrays = dict[str, Any]
Settings = tuple[tuple[str, Any], ...]  # options that are no arrays, hashable
ARRAY_OPTIONS = {"temperature": 1.0, "known_positives": None, "mask": None, "sample_weight": None}


def sampled_softmax_loss(
    queries: Array,
    positives: Candidates | Array,
    negatives: Candidates | Array,
    **options: Unpack[core.Options],
) -> Array:
    """`zipfneg.sampled_softmax_loss`, differentiable and compiled by JAX.

    Same arguments, of which `correction`, `loss`, `loss_parameter`, `reduction` and `validate` are
    static, and `known_positives` is the pair (indptr, ids). Gradients are those of queries, of
    embeddings and biases of both sides, and of the temperature; log q and weights are constants.

    Raises
    ------
    TypeError, ValueError
        For shapes, dtypes and settings, while tracing. What depends on values (a traced
        temperature ≤ 0, log q that is not finite) fails in the callback: a ``JaxRuntimeError``
        with the same text.
    OverflowError
        For NumPy ids of 2**31 and more without jax_enable_x64.
    NotImplementedError
        For gradients of gradients.

    Notes
    -----
    ``vmap`` calls the host once an element. Where a scalar loss is differentiated, loss and
    gradients come from one callback; with reduction "none" the backward pass is a second one. Half
    precision is widened to float32 before, so that gradients are rounded once, after the upstream
    gradient. On other backends than the CPU's, arrays go to the host and back.

    Examples
    --------
    >>> import jax, jax.numpy as jnp
    >>> from zipfneg.jax import sampled_softmax_loss
    >>> u, p, v = jnp.eye(3), jnp.eye(3), jnp.ones((4, 3))
    >>> loss, d_u = jax.jit(jax.value_and_grad(sampled_softmax_loss))(u, p, v)
    >>> round(float(loss), 4), d_u.shape
    (1.6094, (3, 3))
    """
    settings: dict[str, Any] = {**options}
    arrays: Arrays = {
        "queries": queries,
        "positives": as_candidates("positives", positives),
        "negatives": as_candidates("negatives", negatives),
        **{name: settings.pop(name, default) for name, default in ARRAY_OPTIONS.items()},
    }
    if isinstance(arrays["temperature"], int | float):
        as_temperature(arrays["temperature"])
    return _loss(_narrowed(arrays), tuple(sorted(settings.items())))


def sample(
    sampler: Any, positive_ids: Array | None = None, step: Array = 0, *, stream: Array = 0
) -> Draw:
    """`sampler.sample` of a traced batch and step: the draw that the step has everywhere.

    Parameters
    ----------
    sampler : whose draws are a pure function of ids and step, and of one size: not
        ``unique="poisson"``, nor a `CachedSampler`.
    positive_ids : (B,), to receive their log q.
    step, stream : integers, traced or not. ``jax.lax.axis_index`` is a good stream.

    Returns
    -------
    `Draw` of ids and log q, in int32 and float32 without jax_enable_x64; `num_tries` is an array,
    and at most what its dtype holds.

    Examples
    --------
    >>> import jax
    >>> from zipfneg import LogUniform, PopularitySampler
    >>> from zipfneg.jax import sample
    >>> sampler = PopularitySampler(LogUniform(1000), 64)
    >>> jax.jit(lambda step: sample(sampler, step=step).negatives.ids)(3).shape
    (64,)
    """

    max_tries = jax.numpy.iinfo(jax.dtypes.canonicalize_dtype(np.int64)).max

    def draw(given: Arrays) -> Any:
        step, stream = int(given["step"]), int(given["stream"])
        drawn = sampler.sample(given["positive_ids"], step=step, stream=stream)
        return _narrowed(drawn._replace(num_tries=np.array(min(drawn.num_tries, max_tries))))

    arrays = _narrowed({"positive_ids": positive_ids, "step": step, "stream": stream})
    if not any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(arrays)):
        return jax.tree.map(jax.numpy.asarray, draw(jax.tree.map(np.asarray, arrays)))
    arrays = jax.tree.map(jax.numpy.asarray, arrays)
    specs = _specs(draw(jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), arrays)))

    def draw_of_one_size(given: Arrays) -> Any:
        drawn, size = draw(given), specs.negatives.ids.shape
        if drawn.negatives.ids.shape != size:
            raise ValueError(
                f"sampler: expected a draw of one size, {size} as step 0, since shapes are static "
                f"under jit, got {drawn.negatives.ids.shape} from {sampler!r}"
            )
        return drawn

    return _on_host(draw_of_one_size, specs, _vary(arrays, _axes(arrays)))


@partial(jax.jit, static_argnums=1)
def _loss(arrays: Arrays, settings: Settings) -> Array:
    arrays = jax.tree.map(_widened, {**arrays, "temperature": arrays["temperature"] * 1.0})
    stand_ins = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), arrays)
    stand_ins |= {"temperature": 1.0, "known_positives": None}  # their values are checked later
    weight, reduction = core.prepare(**stand_ins, **dict(settings))[2:4]
    spec = jax.ShapeDtypeStruct(weight.shape if reduction == "none" else (), weight.dtype)
    return _differentiable(settings, spec, _vary(arrays, _axes(arrays)))


def _value(settings: Settings, spec: Any, arrays: Arrays) -> Array:
    def compute(given: Arrays) -> Array:
        return core.sampled_softmax_loss(**given, **dict(settings))

    return _on_host(compute, spec, arrays)


def _value_and_grads(settings: Settings, spec: Any, arrays: Arrays) -> tuple[Array, Arrays]:
    def compute(given: Arrays) -> tuple[Array, Arrays]:
        loss, grads = core.sampled_softmax_value_and_grad(**given, **dict(settings))
        return loss, grads._asdict()

    differentiable = {
        "queries": arrays["queries"],
        "positives": arrays["positives"]._replace(ids=None, log_q=None),
        "negatives": arrays["negatives"]._replace(ids=None, log_q=None),
        "temperature": arrays["temperature"],
    }
    return _on_host(compute, (spec, _specs(differentiable)), arrays)


def _forward(settings: Settings, spec: Any, arrays: Arrays) -> tuple[Array, Arrays]:
    if spec.shape:  # each row has its own upstream gradient, which is not known yet
        return _value(settings, spec, arrays), arrays
    return _value_and_grads(settings, spec, arrays)


def _backward(settings: Settings, spec: Any, saved: Arrays, d_loss: Array) -> tuple[Arrays]:
    if spec.shape:
        weight = saved["sample_weight"]
        weight = d_loss if weight is None else d_loss * weight
        _, grads = _value_and_grads(settings, spec, {**saved, "sample_weight": weight})
    else:
        grads = jax.tree.map(lambda g: d_loss.astype(g.dtype) * g, saved)
    return ({**grads, "known_positives": None, "mask": None, "sample_weight": None},)


_differentiable = jax.custom_vjp(_value, nondiff_argnums=(0, 1))
_differentiable.defvjp(_forward, _backward)


def _on_host(compute: Callable[[Arrays], Any], specs: Any, arrays: Arrays) -> Any:
    """compute(NumPy views of `arrays`), shaped as `specs`, without a derivative."""

    def in_place(context: Any, out: Any, given: Arrays) -> None:
        results = compute(jax.tree.map(np.asarray, given))
        jax.tree.map(lambda buffer, x: np.copyto(np.asarray(buffer), x), out, results)

    def by_value(given: Arrays) -> Any:
        results = compute(jax.tree.map(np.asarray, given))
        return jax.tree.map(lambda spec, x: np.asarray(x, spec.dtype), specs, results)

    pure = partial(jax.pure_callback, by_value, specs, vmap_method="sequential")

    @jax.custom_jvp
    def call(given: Arrays) -> Any:
        if buffer_callback is None:
            return pure(given)
        buffered = buffer_callback(in_place, specs, vmap_method="sequential")
        return jax.lax.platform_dependent(given, cpu=buffered, default=pure)

    @call.defjvp
    def refuse(primals: Any, tangents: Any) -> Any:
        raise NotImplementedError(
            "zipfneg.jax: gradients of gradients are not offered; differentiate the loss once, in "
            "reverse"
        )

    return _vary(call(arrays), _axes(arrays))


def _widened(x: Array) -> Array:
    return x.astype(np.float32) if x.dtype in (np.float16, jax.numpy.bfloat16) else x


def _specs(arrays: Any) -> Any:
    def spec(x: Array) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(np.shape(x), jax.dtypes.canonicalize_dtype(x.dtype))

    return jax.tree.map(spec, arrays)


def _narrowed(arrays: Any) -> Any:
    """NumPy ids that would wrap silently are an error."""
    x64 = jax.config.jax_enable_x64
    return jax.tree.map(lambda x: narrowed(x, x64) if isinstance(x, np.ndarray) else x, arrays)


# Under shard_map, operands and results of a callback vary over the same axes of the mesh; where an
# operand did not, the transpose of this sums its gradient over the devices.


def _axes(arrays: Any) -> frozenset[Any]:
    """The axes over which any of them varies."""

    def axes(x: Array) -> frozenset[Any]:
        aval = jax.typeof(x)
        return aval.manual_axis_type.varying if hasattr(aval, "manual_axis_type") else aval.vma

    return frozenset().union(*map(axes, jax.tree.leaves(arrays)))


def _vary(arrays: Any, axes: frozenset[Any]) -> Any:
    return jax.tree.map(lambda x: jax.lax.pcast(x, tuple(axes - _axes(x)), to="varying"), arrays)
