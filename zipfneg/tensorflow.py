"""The loss, the samplers and a Keras layer for TensorFlow, eager and in graphs."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Unpack

import numpy as np

from . import contrastive
from . import loss as core
from .candidates import Candidates, as_candidates
from .checks import NDArray
from .interop import Array, as_array
from .metrics import ranking_metrics
from .sampling import Draw, PopularitySampler
from .state import from_state, to_state

try:
    import keras
    import tensorflow as tf
except ImportError as error:
    raise ImportError(
        "zipfneg.tensorflow needs TensorFlow and Keras: pip install 'zipfneg[tensorflow]'"
    ) from error

# The leaves of the inputs in the order of tf.nest; those of the other arguments follow.
SIDE = Candidates("ids", "embeddings", "log_q", "bias")
LEAVES = tf.nest.flatten(core.Grads("queries", SIDE, SIDE, "temperature"))
DIFFERENTIABLE = {i for i, name in enumerate(LEAVES) if name not in ("ids", "log_q")}
EMBEDDINGS = {i for i, name in enumerate(LEAVES) if name in ("queries", "embeddings")}
CONSTANTS = ("known_positives", "mask", "sample_weight")

SETTINGS = {f.name for f in dataclasses.fields(contrastive.ContrastiveOutput) if f.kw_only}
SETTINGS -= {"store_negative_ids"}


def sampled_softmax_loss(
    queries: Array,
    positives: Candidates | Array,
    negatives: Candidates | Array,
    **options: Unpack[core.Options],
) -> Array:
    """`zipfneg.sampled_softmax_loss`, differentiable by TensorFlow, eager or in a ``tf.function``.

    Same arguments: tensors, variables, or what ``tf.convert_to_tensor`` takes; `known_positives`
    is the pair (indptr, ids). Gradients are those of queries, of embeddings and biases of both
    sides, and of the temperature; log q and weights are constants. A variable from which
    embeddings are gathered gets ``tf.IndexedSlices``.

    Raises
    ------
    TypeError, ValueError
        As the core's; in a graph an ``InvalidArgumentError`` or ``UnknownError`` with its text.
    NotImplementedError
        For gradients of gradients.

    Notes
    -----
    In a graph the host computes it, by ``tf.numpy_function``: without copies of the inputs, not in
    XLA, not in a SavedModel, and for tensors on a GPU by way of the host. Gradients of half
    precision inputs are rounded once, after the upstream gradient.

    Examples
    --------
    >>> import tensorflow as tf
    >>> from zipfneg.tensorflow import sampled_softmax_loss
    >>> queries = tf.Variable(tf.eye(3))
    >>> with tf.GradientTape() as tape:
    ...     loss = sampled_softmax_loss(queries, tf.eye(3), tf.ones((4, 3)))
    >>> round(float(loss), 4), tape.gradient(loss, queries).shape
    (1.6094, TensorShape([3, 3]))
    """
    settings: dict[str, Any] = {**options}
    inputs = core.Grads(
        queries,
        as_candidates("positives", positives),
        as_candidates("negatives", negatives),
        settings.pop("temperature", 1.0),
    )
    structure = (inputs, {name: settings.pop(name, None) for name in CONSTANTS})
    leaves = tf.nest.flatten(structure)
    tensors = {i: _tensor(x) for i, x in enumerate(leaves) if x is not None}

    def arguments(views: tuple[NDArray, ...]) -> dict[str, Any]:
        given = dict(zip(tensors, views, strict=True))
        packed = tf.nest.pack_sequence_as(structure, [given.get(i) for i in range(len(leaves))])
        return {**packed[0]._asdict(), **packed[1], **settings}

    def value(*views: NDArray) -> list[NDArray]:
        return [core.sampled_softmax_loss(**arguments(views))]

    def gradients(d_loss: NDArray, *views: NDArray) -> list[NDArray]:
        given = arguments(views)
        weight = np.ones(len(given["queries"]), d_loss.dtype) * d_loss  # (B,)
        if given["sample_weight"] is not None:
            weight *= given["sample_weight"]
        _, grads = core.sampled_softmax_value_and_grad(**{**given, "sample_weight": weight})
        return _leaves(grads)

    def backward(d_loss: Array) -> list[Array]:
        specs = [tf.TensorSpec(x.shape, x.dtype) for i, x in tensors.items() if i in DIFFERENTIABLE]
        found = iter(_on_host(gradients, [d_loss, *tensors.values()], specs))
        return [next(found) if i in DIFFERENTIABLE else None for i in tensors]

    @tf.custom_gradient
    def loss(*given: Array) -> tuple[Array, Callable[[Array], list[Array]]]:
        wide = any(x.dtype == tf.float64 for i, x in tensors.items() if i in EMBEDDINGS)
        shape = tensors[0].shape[:1] if settings.get("reduction") == "none" else ()
        spec = tf.TensorSpec(shape, tf.float64 if wide else tf.float32)
        return _on_host(value, given, [spec])[0], backward

    return loss(*tensors.values())


def sample(
    sampler: Any, positive_ids: Array | None = None, step: Array = 0, *, stream: Array = 0
) -> Draw:
    """`sampler.sample` of tensors, eager or in a ``tf.function``: the draw of a step.

    Parameters
    ----------
    sampler : whose draws are a pure function of ids and step: not a `CachedSampler`.
    positive_ids : (B,), to receive their log q.
    step, stream : integers, tensors or variables.

    Returns
    -------
    `Draw` of tensors, ids and log q.

    Examples
    --------
    >>> import tensorflow as tf
    >>> from zipfneg import LogUniform, PopularitySampler
    >>> from zipfneg.tensorflow import sample
    >>> sampler = PopularitySampler(LogUniform(1000), 64)
    >>> tf.function(lambda step: sample(sampler, step=step).negatives.ids)(3).shape
    TensorShape([64])
    """
    tensors = [_tensor(x) for x in (step, stream, positive_ids) if x is not None]

    def draw(step: NDArray, stream: NDArray, *ids: NDArray) -> Draw:
        return sampler.sample(*ids, step=int(step), stream=int(stream))

    if tf.executing_eagerly():
        return _map(_tensor, draw(*map(as_array, tensors)))
    trial = draw(*(np.zeros(1 if x.shape.rank else (), x.dtype.as_numpy_dtype) for x in tensors))
    specs = _leaves(_map(lambda x: tf.TensorSpec([None] * np.ndim(x), np.asarray(x).dtype), trial))
    results = iter(_on_host(lambda *views: _leaves(draw(*views)), tensors, specs))
    drawn = _map(lambda _: next(results), trial)
    if isinstance(sampler, PopularitySampler) and sampler.unique != "poisson":
        for x in (drawn.negatives.ids, drawn.negatives.log_q):
            x.set_shape([*x.shape[:-1], sampler.num_sampled])
    return drawn


@keras.saving.register_keras_serializable("zipfneg")
class ContrastiveOutput(keras.layers.Layer):
    """The last layer of a retrieval model: `zipfneg.ContrastiveOutput` inside Keras.

    Called with queries and the ids of their items, it adds the mean loss against sampled negatives
    (``add_loss``: compile the model without a loss), keeps the metrics, and passes the queries
    through. Called with queries alone, it scores all items: (B, N).

    Parameters
    ----------
    samplers : as for `zipfneg.ContrastiveOutput`, and so are its settings, by name. Without
        ``store_negative_ids``: a step's negatives are ``layer.head.sampler.sample(step=step)``.
    num_items : rows of a table of items of its own, row = id.
    items : instead, a ``keras.layers.Embedding`` whose table is used (weight tying). With neither,
        every call brings the positives' own embeddings (B, D), for in-batch samplers.
    use_bias : a bias for each item of its own table.
    embeddings_initializer : of its own table.

    Notes
    -----
    The table's gradient is ``tf.IndexedSlices``, each touched row once. Calls with
    ``training=True`` count the steps; others see the negatives of the step reached. The step is
    saved with the weights, the settings with the configuration: after loading, the draws go on as
    they would have. Gradients are computed with the loss, in evaluation too.

    Examples
    --------
    >>> import keras, numpy as np
    >>> from zipfneg import LogUniform, PopularitySampler
    >>> from zipfneg.tensorflow import ContrastiveOutput
    >>> features, item_ids = keras.Input((8,)), keras.Input((), dtype="int64")
    >>> sampler = PopularitySampler(LogUniform(1000, first_id=1), 64)
    >>> output = ContrastiveOutput(sampler, num_items=1001, temperature=0.5)
    >>> queries = output(keras.layers.Dense(16)(features), item_ids)
    >>> model = keras.Model([features, item_ids], queries)
    >>> model.compile("adam")
    >>> history = model.fit([np.ones((32, 8)), np.arange(1, 33)], verbose=0).history
    >>> sorted(history)[:2], int(output.step)
    (['loss', 'map@10'], 1)
    """

    def __init__(
        self,
        samplers: Any,
        *,
        num_items: int | None = None,
        items: Any = None,
        use_bias: bool = False,
        embeddings_initializer: Any = "uniform",
        **kwargs: Any,
    ) -> None:
        if keras.backend.backend() != "tensorflow":
            raise RuntimeError(
                f"Keras runs on {keras.backend.backend()}, and this layer on TensorFlow alone: set "
                f"KERAS_BACKEND=tensorflow"
            )
        settings = {name: kwargs.pop(name) for name in SETTINGS & kwargs.keys()}
        super().__init__(**kwargs)
        # Mixed precision would round the whole table, and gradients before the loss is scaled.
        self.dtype_policy = keras.DTypePolicy(self.variable_dtype)
        self.supports_jit = False
        self.head = contrastive.ContrastiveOutput(samplers, **settings)
        self.num_items, self.items, self.use_bias = num_items, items, use_bias
        self.embeddings_initializer = keras.initializers.get(embeddings_initializer)
        names = ranking_metrics([0], self.head.top_ks)
        self.ranking = [keras.metrics.Mean(name) for name in names]
        self.table = self.bias = None

    def build(self, queries_shape: Any, *_: Any, **__: Any) -> None:
        self.step = self.add_weight(
            name="step", dtype="int64", initializer="zeros", trainable=False
        )
        if self.items is not None:
            if not self.items.built:
                self.items.build()
            self.table = self.items.embeddings
        elif self.num_items is not None:
            shape = (self.num_items, queries_shape[-1])
            self.table = self.add_weight(shape, self.embeddings_initializer, name="table")
            if self.use_bias:
                self.bias = self.add_weight(shape[:1], "zeros", name="bias")

    def call(
        self,
        queries: Array,
        positive_ids: Array | None = None,
        positives: Array | None = None,
        training: bool | None = None,
    ) -> Array:
        side = self.table if positives is None else positives
        if side is None:
            raise ValueError("positives: expected embeddings (B, D), or num_items= or items= for a "
                             "table of items")  # fmt: skip
        if positive_ids is None:
            return self.scores(queries)
        bias: list[Any] = [] if self.bias is None or positives is not None else [self.bias]
        loss, metrics = self._contrast(positive_ids, positives is None)(
            *map(_tensor, (queries, side, *bias))
        )
        self.add_loss(loss)
        for k, metric in enumerate(self.ranking):
            metric.update_state(metrics[k], tf.shape(queries)[0])
        if training:
            self.step.assign_add(1)
        return queries

    def _contrast(self, positive_ids: Array, tied: bool) -> Callable[..., Any]:
        """(queries, side, bias) to the loss, with its gradients, and the metrics."""
        constants = [_tensor(self.step), _tensor(positive_ids)]

        def on_host(step: NDArray, ids: NDArray, u: NDArray, side: NDArray, *bias: NDArray) -> Any:
            given: dict[str, Any] = {
                "items" if tied else "positives": Candidates(None, side, None, *bias)
            }
            out = self.head(u, ids, **given, step=int(step))
            grads = _leaves(out.grads[1:3])  # of the items or the positives
            return [out.loss, list(out.metrics.values()), out.grads.queries, *grads]

        @tf.custom_gradient
        def contrast(queries: Array, side: Array, *bias: Array) -> Any:
            wide = tf.float64 in (queries.dtype, side.dtype)
            rows = [tf.TensorSpec([None, *x.shape[1:]], x.dtype) for x in (side, *bias)]
            specs = [
                tf.TensorSpec([], tf.float64 if wide else tf.float32),
                tf.TensorSpec([len(self.ranking)], tf.float32),
                tf.TensorSpec(queries.shape, queries.dtype),
                *([tf.TensorSpec([None], tf.int64)] if tied else []),
                *rows,
            ]
            loss, metrics, d_queries, *grads = _on_host(
                on_host, [*constants, queries, side, *bias], specs
            )

            def backward(d_loss: Array, _: Array) -> list[Array]:
                scaled = [tf.cast(d_loss, g.dtype) * g for g in (d_queries, *grads[tied:])]
                if tied:
                    shapes = [tf.shape(x, tf.int64) for x in (side, *bias)]
                    scaled[1:] = map(tf.IndexedSlices, scaled[1:], [grads[0]] * 2, shapes)
                return scaled

            return (loss, metrics), backward

        return contrast

    def scores(self, queries: Array) -> Array:
        """(u·v + b)/τ of every item, (B, N), by TensorFlow's own operations."""
        table = tf.convert_to_tensor(self.table)
        scores = tf.matmul(tf.cast(queries, table.dtype), table, transpose_b=True)
        return (scores if self.bias is None else scores + self.bias) / self.head.temperature

    def get_config(self) -> dict[str, Any]:
        state = to_state(self.head)
        own = {
            "num_items": self.num_items,
            "items": self.items,
            "use_bias": self.use_bias,
            "embeddings_initializer": self.embeddings_initializer,
            **{name: state[name] for name in ("samplers", *SETTINGS)},
        }
        return {**super().get_config(), **keras.saving.serialize_keras_object(own)}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "ContrastiveOutput":
        config = keras.saving.deserialize_keras_object(config)
        return cls(**{**config, "samplers": from_state(config["samplers"])})


def _tensor(x: Array) -> Array:
    """Python's numbers with all their digits."""
    return tf.convert_to_tensor(x, {int: tf.int64, float: tf.float64}.get(type(x)))


def _leaves(structure: Any) -> list[Any]:
    return [x for x in tf.nest.flatten(structure) if x is not None]


def _map(function: Callable[[Any], Any], structure: Any) -> Any:
    return tf.nest.map_structure(lambda x: x if x is None else function(x), structure)


def _on_host(
    compute: Callable[..., Sequence[Any]], tensors: Sequence[Array], specs: Sequence[Any]
) -> list[Array]:
    """compute(NumPy views of `tensors`) as specified, without a derivative."""

    def call(*views: NDArray) -> list[NDArray]:
        results = compute(*views)
        return [np.asarray(x, s.dtype.as_numpy_dtype) for x, s in zip(results, specs, strict=True)]

    @tf.custom_gradient
    def operation(*tensors: Array) -> tuple[list[Array], Callable[..., Any]]:
        if tf.executing_eagerly():
            results = list(map(tf.convert_to_tensor, call(*map(as_array, tensors))))
        else:
            results = tf.numpy_function(call, tensors, [s.dtype for s in specs])
            for result, spec in zip(results, specs, strict=True):
                result.set_shape(spec.shape)

        def refuse(*_: Array) -> Any:
            raise NotImplementedError(
                "zipfneg.tensorflow: gradients of gradients are not offered; differentiate the "
                "loss once"
            )

        return results, refuse

    return operation(*tensors)
