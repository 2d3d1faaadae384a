"""Samplers, losses and the head on PyTorch tensors: differentiable, and whole under compilation.

Each computation is one operator that PyTorch does not look into, within an `autograd.Function`: so
eager mode, `torch.compile`, `torch.export` and `torch.func.grad` all take it. The gradients are
those of the core, which come with the loss; only their wiring is here.
"""

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import numpy as np

from . import contrastive, loss, retrieval
from .cached import CachedSampler
from .candidates import Candidates, as_candidates
from .interop import Home, as_array
from .masking import Csr
from .metrics import TOP_K_METRICS
from .sampling import Draw, InBatchSampler, MixtureSampler, PopularitySampler
from .state import from_state, to_state

try:
    import torch
    from torch import Tensor
except ImportError as error:
    raise ImportError(
        "zipfneg.torch needs PyTorch; install it by: pip install 'zipfneg[torch]'"
    ) from error

__all__ = ["ContrastiveOutput", "Output", "sample", "sampled_softmax_loss"]


# -- The loss


def _sampled_softmax(
    queries: Tensor,
    positives: Tensor,
    negatives: Tensor,
    temperature: Tensor,
    positive_bias: Tensor | None,
    negative_bias: Tensor | None,
    positive_ids: Tensor | None,
    negative_ids: Tensor | None,
    positive_log_q: Tensor | None,
    negative_log_q: Tensor | None,
    indptr: Tensor | None,
    known_ids: Tensor | None,
    mask: Tensor | None,
    sample_weight: Tensor | None,
    correction: str,
    kind: str,
    parameter: float | None,
    reduction: str,
    validate: bool,
    gradients: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The loss, and the gradients of the first six arguments: empty if not given or not asked."""
    p = Candidates(positive_ids, positives.detach(), positive_log_q, _detached(positive_bias))
    v = Candidates(negative_ids, negatives.detach(), negative_log_q, _detached(negative_bias))
    options: loss.Options = {
        "temperature": temperature.detach(),
        "known_positives": _pair(indptr, known_ids),
        "mask": mask,
        "sample_weight": _detached(sample_weight),
        "correction": correction,
        "loss": kind,
        "loss_parameter": parameter,
        "reduction": reduction,
        "validate": validate,
    }
    if not gradients:
        value = loss.sampled_softmax_loss(queries.detach(), p, v, **options)
        return value, *(queries.new_empty(0) for _ in range(6))
    value, d = loss.sampled_softmax_value_and_grad(queries.detach(), p, v, **options)
    return (
        value, d.queries, d.positives.embeddings, d.negatives.embeddings,
        d.temperature.to(temperature.dtype),
        _or_empty(d.positives.bias, queries), _or_empty(d.negatives.bias, queries),
    )  # fmt: skip


_operator = torch.library.custom_op("zipfneg::sampled_softmax", _sampled_softmax, mutates_args=())


@_operator.register_fake
def _(*problem: Any) -> tuple[Tensor, ...]:
    queries, reduction, gradients = problem[0], problem[-3], problem[-1]
    wide = any(x.dtype == torch.float64 for x in problem[:3])
    value = queries.new_empty(
        queries.shape[:1] if reduction == "none" else (),
        dtype=torch.float64 if wide else torch.float32,
    )
    given = (x if gradients else None for x in problem[:6])
    return value, *(queries.new_empty(0) if x is None else x.new_empty(x.shape) for x in given)


def _run(*problem: Any) -> tuple[Tensor, ...]:
    # The dispatcher is for those who trace: a small batch would wait for it.
    return (_operator if torch.compiler.is_compiling() else _sampled_softmax)(*problem)


def _inspected_once(forward: Callable[..., Any]) -> Callable[..., Any]:
    # PyTorch inspects a forward's signature at every call, and a small batch would wait for it.
    forward.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined]
    return forward


class _Reduced(torch.autograd.Function):
    """The mean or the sum: one upstream number scales gradients that came with the loss.

    Forward and backward at once take three matrix products, in turn four.
    """

    @staticmethod
    @_inspected_once
    def forward(*problem: Any) -> tuple[Tensor, ...]:
        return _run(*problem, True)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*output[1:])

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor | None, *d_grads: Tensor | None) -> tuple[Any, ...]:
        _refuse_second(d_grads)
        needed = zip(ctx.saved_tensors, ctx.needs_input_grad[:6], strict=True)
        return *_scaled(d_loss, needed), *(None for _ in ctx.needs_input_grad[6:])


class _PerExample(torch.autograd.Function):
    """One loss an example: its upstream gradient weighs it, in a backward pass of its own."""

    @staticmethod
    @_inspected_once
    def forward(*problem: Any) -> Tensor:
        return _run(*problem, False)[0]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:14])
        ctx.correction, ctx.kind, ctx.parameter, *_ = inputs[14:]

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Any, ...]:
        *tensors, weight = ctx.saved_tensors
        weight = d_loss if weight is None else d_loss * weight
        problem = (*tensors, weight, ctx.correction, ctx.kind, ctx.parameter, "sum", False)
        # Through `_Reduced`, which refuses to be differentiated again, as compilation itself does.
        compiling = torch.compiler.is_compiling()
        grads = (_operator(*problem, True) if compiling else _Reduced.apply(*problem))[1:]
        needed = zip(grads, ctx.needs_input_grad[:6], strict=True)
        return *(x if need else None for x, need in needed), *(None for _ in range(13))


def sampled_softmax_loss(
    queries: Tensor,
    positives: Candidates | Tensor,
    negatives: Candidates | Tensor,
    *,
    temperature: float | Tensor = 1.0,
    known_positives: Csr | None = None,
    mask: Tensor | None = None,
    sample_weight: Tensor | None = None,
    correction: str = "both",
    loss: str = "softmax",
    loss_parameter: float | None = None,
    reduction: str = "mean",
    validate: bool = False,
) -> Tensor:
    """`zipfneg.sampled_softmax_loss` of tensors, differentiable.

    In queries, in the embeddings and biases of both sides and in the temperature, where it is a
    tensor. Arguments, options, value and errors are those of the core.

    Raises
    ------
    TypeError, ValueError
        As `zipfneg.sampled_softmax_loss`; also for log q or `sample_weight` that requires grad:
        they are constants here.
    RuntimeError
        In a backward pass through the backward pass.

    Notes
    -----
    Where no gradient is wanted (``torch.no_grad``, or nothing requires grad) none is computed.
    Otherwise the gradients of "mean" and "sum" are computed with the loss, those of "none", and of
    float16, by a second pass, exactly for any upstream gradient.
    Under autocast nothing is cast: tensors of any floating dtype go together, arithmetic is float32
    (float64 where an embedding is float64), each gradient has its tensor's dtype.

    Examples
    --------
    >>> import torch
    >>> from zipfneg.torch import sampled_softmax_loss
    >>> queries, positives = torch.eye(3, requires_grad=True), torch.eye(3)
    >>> loss = sampled_softmax_loss(queries, positives, torch.ones(4, 3))
    >>> loss.backward()
    >>> round(loss.item(), 4), queries.grad.shape
    (1.6094, torch.Size([3, 3]))
    """
    p, v = as_candidates("positives", positives), as_candidates("negatives", negatives)
    indptr, known_ids = _csr(known_positives)
    tensors = {
        "queries": queries,
        "positives.embeddings": p.embeddings,
        "negatives.embeddings": v.embeddings,
        "temperature": _temperature(temperature),
        "positives.bias": p.bias,
        "negatives.bias": v.bias,
        "positives.ids": p.ids,
        "negatives.ids": v.ids,
        "positives.log_q": p.log_q,
        "negatives.log_q": v.log_q,
        "known_positives.indptr": indptr,
        "known_positives.ids": known_ids,
        "mask": mask,
        "sample_weight": sample_weight,
    }
    _check_tensors(tensors, 4, ("positives.log_q", "negatives.log_q", "sample_weight"))
    given = _apart(tensors.values())
    problem = (*given, correction, loss, loss_parameter, reduction, validate)
    if not _differentiated(given[:6]):
        return _run(*problem, False)[0]
    if reduction == "none":
        return _PerExample.apply(*problem)
    narrow = any(x is not None and x.dtype == torch.float16 for x in given[:6])
    if narrow and reduction in ("mean", "sum"):
        # A scaled loss (`torch.amp.GradScaler`) keeps small gradients from vanishing only if its
        # factor reaches them before they are rounded.
        losses = _PerExample.apply(*given, correction, loss, loss_parameter, "none", validate)
        return losses.sum() / (max(1, len(queries)) if reduction == "mean" else 1)
    return _Reduced.apply(*problem)[0]


# -- Samplers

# Operators take numbers and tensors: a sampler or head goes in as its identity. Whoever calls
# keeps it alive, and so does a compiled graph, which holds only while it lives.
_LIVE: WeakValueDictionary[int, Any] = WeakValueDictionary()


@torch.compiler.assume_constant_result
def _key(x: Any) -> int:
    _LIVE[id(x)] = x
    return id(x)


@torch.library.custom_op("zipfneg::sample", mutates_args=())
def _sample(
    sampler: int, positive_ids: Tensor | None, step: Tensor, stream: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ids, their log q, that of the positives, and the number of tries."""
    draw = _live(sampler).sample(positive_ids, step=int(step), stream=stream)

    def own(x: Any) -> Tensor:
        # In-batch sampling gives its argument back, on both sides: an operator may not.
        x = np.empty(0) if x is None else x
        return torch.as_tensor(x).clone()

    of_positives = None if draw.positives is None else draw.positives.log_q
    ids, log_q = draw.negatives.ids, draw.negatives.log_q
    return own(ids), own(log_q), own(of_positives), torch.tensor(draw.num_tries)


@_sample.register_fake
def _(
    sampler: int, positive_ids: Tensor | None, step: Tensor, stream: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch = () if positive_ids is None else positive_ids.shape
    like = step if positive_ids is None else positive_ids
    shape, x = _sample_shape(_live(sampler), batch), _live(sampler)
    in_batch = isinstance(x, InBatchSampler)
    return (
        like.new_empty(shape, dtype=like.dtype if in_batch else torch.int64),
        like.new_empty(shape if _has_log_q(x) else (0,), dtype=torch.float64),
        like.new_empty(batch if batch and _has_log_q(x) else (0,), dtype=torch.float64),
        step.new_empty((), dtype=torch.int64),
    )


def sample(
    sampler: Any,
    positives: Candidates | Tensor | None = None,
    *,
    step: int | Tensor = 0,
    stream: int = 0,
) -> Draw:
    """The draw of any sampler as tensors: ids, and log q as constants.

    Parameters
    ----------
    sampler : of zipfneg, or your own with their `sample`.
    positives : ids (B,) or `Candidates` with ids.
    step : training step; as a tensor it does not make `torch.compile` compile again.
    stream : for instance the rank of the process.

    Returns
    -------
    `Draw`, its num_tries a tensor. Of an `InBatchSampler` the negatives have the positives' own
    embeddings and bias, through which gradients flow. Those of a bank (`CachedSampler`) are left to
    `ContrastiveOutput`.

    Notes
    -----
    A compiled or exported graph refers to the sampler itself: it draws only in this process.

    Examples
    --------
    >>> import torch
    >>> from zipfneg import LogUniform, PopularitySampler
    >>> from zipfneg.torch import sample
    >>> draw = sample(PopularitySampler(LogUniform(1000), 64), torch.tensor([3, 14]), step=7)
    >>> draw.negatives.ids.shape, draw.positives.log_q.dtype
    (torch.Size([64]), torch.float64)
    """
    given = None
    if positives is not None:
        given = positives if isinstance(positives, Candidates) else Candidates(ids=positives)
    ids, log_q, of_positives, num_tries = _sample(
        _key(sampler), None if given is None else given.ids, _step(step), stream
    )
    negatives = Candidates(ids, log_q=log_q if _has_log_q(sampler) else None)
    if given is not None:
        if isinstance(sampler, InBatchSampler):
            negatives = negatives._replace(embeddings=given.embeddings, bias=given.bias)
        given = given._replace(log_q=of_positives if _has_log_q(sampler) else None)
    return Draw(given, negatives, num_tries)


def _has_log_q(sampler: Any) -> bool:
    bank = isinstance(sampler, InBatchSampler | CachedSampler)
    return not bank or sampler.popularity is not None


def _sample_shape(sampler: Any, batch: tuple[int, ...]) -> tuple[int, ...]:
    """Of the negatives' ids; a size that only the draw knows is a symbol of the compiler."""
    if isinstance(sampler, InBatchSampler):
        return batch
    if isinstance(sampler, PopularitySampler) and sampler.unique != "poisson":
        return (*(batch if sampler.per_query else ()), sampler.num_sampled)
    if isinstance(sampler, MixtureSampler):
        return (sum(_sample_shape(member, batch)[0] for member in sampler.samplers),)
    return (torch.library.get_ctx().new_dynamic_size(),)


# -- The head


@torch.library.custom_op("zipfneg::contrastive", mutates_args=())
def _contrastive(
    queries: Tensor,
    embeddings: Tensor,
    bias: Tensor | None,
    temperature: Tensor,
    positive_ids: Tensor,
    indptr: Tensor | None,
    known_ids: Tensor | None,
    sample_weight: Tensor | None,
    head: int,
    tied: bool,
    step: Tensor,
    stream: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The loss; gradients of the first four arguments, of a table its touched rows alone; the ids
    of these rows, the metrics, and the negatives' ids, each empty where there are none.
    """
    side = Candidates(embeddings=embeddings.detach(), bias=_detached(bias))
    out = replace(_live(head), temperature=temperature.detach())(
        queries.detach(), positive_ids, **{"items" if tied else "positives": side},
        step=int(step), stream=stream, known_positives=_pair(indptr, known_ids),
        sample_weight=sample_weight,
    )  # fmt: skip
    d = out.grads
    ids, rows = (d.items.ids, d.items.rows) if tied else (None, d.positives.embeddings)
    return (
        out.loss, d.queries, rows, _or_empty(d.items.bias if tied else d.positives.bias, queries),
        d.temperature.to(temperature.dtype), _or_empty(ids, step),
        torch.tensor(list(out.metrics.values()), dtype=torch.float64),
        _or_empty(out.negative_ids, step).to(torch.int64),
    )  # fmt: skip


@_contrastive.register_fake
def _(*given: Any) -> tuple[Tensor, ...]:
    queries, embeddings, bias, temperature, positive_ids, *_, key, tied, _, _ = given
    head = _live(key)
    wide = torch.float64 in (queries.dtype, embeddings.dtype)
    num_rows = torch.library.get_ctx().new_dynamic_size() if tied else embeddings.shape[0]
    stored = _sample_shape(head.sampler, positive_ids.shape) if head.store_negative_ids else (0,)
    return (
        queries.new_empty((), dtype=torch.float64 if wide else torch.float32),
        queries.new_empty(queries.shape),
        embeddings.new_empty((num_rows, embeddings.shape[1])),
        queries.new_empty(0) if bias is None else bias.new_empty(num_rows),
        temperature.new_empty(()),
        positive_ids.new_empty(num_rows if tied else 0, dtype=torch.int64),
        queries.new_empty(len(head.top_ks) * len(TOP_K_METRICS), dtype=torch.float64),
        positive_ids.new_empty(stored, dtype=torch.int64),
    )


class _Head(torch.autograd.Function):
    """The head's gradients, scaled; those of a table's rows put into a table or left sparse."""

    @staticmethod
    def forward(sparse: bool, *given: Any) -> tuple[Tensor, ...]:
        return _contrastive(*given)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*output[5:])
        ctx.save_for_backward(*output[1:6])
        ctx.sparse, ctx.tied, ctx.num_items = inputs[0], inputs[10], inputs[2].shape[0]

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor | None, *d_grads: Tensor | None) -> tuple[Any, ...]:
        _refuse_second(d_grads)
        *grads, ids = ctx.saved_tensors
        needed = zip(grads, ctx.needs_input_grad[1:5], strict=True)
        d_queries, d_rows, d_bias, d_temperature = _scaled(d_loss, needed)
        if ctx.tied:
            d_rows, d_bias = (
                None if x is None else _table(x, ids, ctx.num_items, ctx.sparse)
                for x in (d_rows, d_bias)
            )
        return None, d_queries, d_rows, d_bias, d_temperature, *(None for _ in range(8))


def _table(rows: Tensor, ids: Tensor, num_items: int, sparse: bool) -> Tensor:
    """A gradient (N, …) of which `rows` stand at `ids`, each once and ascending."""
    shape = (num_items, *rows.shape[1:])
    if sparse:
        return torch.sparse_coo_tensor(
            ids[None], rows, shape, is_coalesced=True, check_invariants=False
        )
    return rows.new_zeros(shape).index_copy_(0, ids, rows)


class Output(NamedTuple):
    """One step of the head: the mean loss, metrics by name as tensors, negative ids (S,)."""

    loss: Tensor
    metrics: dict[str, Tensor]
    negative_ids: Tensor | None


class ContrastiveOutput(torch.nn.Module):
    """`zipfneg.ContrastiveOutput` as a module.

    Parameters
    ----------
    samplers, temperature and further settings : as for `zipfneg.ContrastiveOutput`.
    learn_temperature : make the temperature a parameter, by its logarithm: it stays positive.
    sparse : give an item table sparse gradients, of the touched rows alone, as ``nn.Embedding``
        does; for the optimisers that take them, and not under `torch.compile`.

    Notes
    -----
    In training mode the module counts its steps, each with its own negatives. Give `step` where
    one batch goes through it twice, as under activation checkpointing: it must draw the same.
    The state dict has all settings of the head and its samplers, with their state, and the step.
    The gradients come with the loss and the metrics in one pass, wanted or not.

    Examples
    --------
    >>> import torch
    >>> from zipfneg import LogUniform, PopularitySampler
    >>> from zipfneg.torch import ContrastiveOutput
    >>> items, encoder = torch.nn.Embedding(1001, 16), torch.nn.Linear(8, 16)
    >>> head = ContrastiveOutput(PopularitySampler(LogUniform(1000, first_id=1), 64))
    >>> out = head(encoder(torch.randn(32, 8)), torch.randint(1, 1001, (32,)), items=items.weight)
    >>> out.loss.backward()
    >>> items.weight.grad.shape, sorted(out.metrics)[-1]
    (torch.Size([1001, 16]), 'recall@10')
    """

    log_temperature: torch.nn.Parameter | None
    step: Tensor

    def __init__(
        self,
        samplers: Any,
        *,
        temperature: float = 1.0,
        learn_temperature: bool = False,
        sparse: bool = False,
        **settings: Any,
    ) -> None:
        super().__init__()
        self.head = contrastive.ContrastiveOutput(samplers, temperature=temperature, **settings)
        self.sparse = sparse
        log_temperature = torch.nn.Parameter(torch.tensor(self.head.temperature).log())
        self.register_parameter("log_temperature", log_temperature if learn_temperature else None)
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    @property
    def temperature(self) -> Tensor:
        if self.log_temperature is None:
            return _temperature(self.head.temperature)
        return self.log_temperature.exp()

    def forward(
        self,
        queries: Tensor,
        positive_ids: Tensor,
        *,
        items: Tensor | Candidates | None = None,
        positives: Tensor | Candidates | None = None,
        step: int | Tensor | None = None,
        stream: int = 0,
        known_positives: Csr | None = None,
        sample_weight: Tensor | None = None,
    ) -> Output:
        """Sample negatives for a batch; its loss and metrics.

        Arguments as for `zipfneg.ContrastiveOutput`, `step` being the module's own where None.
        """
        if (items is None) == (positives is None):
            raise ValueError("items, positives: expected exactly one of them")
        tied = items is not None
        name = "items" if tied else "positives"
        side = as_candidates(name, items if tied else positives)
        if side.ids is not None or side.log_q is not None:
            raise ValueError(f"{name}: expected embeddings and bias alone, got ids or log_q too")
        indptr, known_ids = _csr(known_positives)
        named = {
            "queries": queries,
            f"{name}.embeddings": side.embeddings,
            "positive_ids": positive_ids,
            f"{name}.bias": side.bias,
            "sample_weight": sample_weight,
        }
        _check_tensors(named, 3, ("sample_weight",))
        tensors = (
            queries, side.embeddings, side.bias, self.temperature, positive_ids, indptr, known_ids,
            sample_weight,
        )  # fmt: skip
        step_now = self.step if step is None else _step(step)
        given = (*_apart(tensors), _key(self.head), tied, step_now, stream)
        if _differentiated(given[:4]):
            out = _Head.apply(self.sparse, *given)
        else:
            out = _contrastive(*given)
        if self.training and step is None:
            self.step += 1
        names = [f"{metric}@{k}" for k in self.head.top_ks for metric in TOP_K_METRICS]
        metrics = dict(zip(names, out[6].unbind(), strict=True))
        return Output(out[0], metrics, out[7] if self.head.store_negative_ids else None)

    def scores(self, queries: Tensor, items: Tensor | Candidates) -> Tensor:
        """As `zipfneg.ContrastiveOutput.scores`, at the temperature learned; no gradient."""
        return self._now().scores(queries.detach(), _without_graph(items))

    def top_k(
        self, queries: Tensor, items: Tensor | Candidates, k: int, *, exclude: Csr | None = None
    ) -> retrieval.TopK:
        """As `zipfneg.ContrastiveOutput.top_k`."""
        return self._now().top_k(queries.detach(), _without_graph(items), k, exclude=exclude)

    def _now(self) -> contrastive.ContrastiveOutput:
        return replace(self.head, temperature=self.temperature.detach())

    def get_extra_state(self) -> Any:
        # Tensors in place of arrays: `torch.load` takes them without trusting the file.
        give = Home("torch", torch.device("cpu")).give
        return _converted(to_state(self._now()), np.ndarray, give)

    def set_extra_state(self, state: Any) -> None:
        self.head = from_state(_converted(state, Tensor, as_array))

    def extra_repr(self) -> str:
        return f"{self.head}, sparse={self.sparse}"


# -- What they share


def _live(key: int) -> Any:
    if key not in _LIVE:
        raise RuntimeError("the sampler or head of this graph is gone: it lived in another process")
    return _LIVE[key]


def _detached(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.detach()


def _or_empty(x: Tensor | None, like: Tensor) -> Tensor:
    return like.new_empty(0) if x is None else x


def _pair(indptr: Tensor | None, ids: Tensor | None) -> Csr | None:
    return None if indptr is None else (indptr, ids)


def _csr(known_positives: Csr | None) -> tuple[Any, Any]:
    """indptr and ids, of SciPy's matrices as tensors."""
    if known_positives is None:
        return None, None
    if hasattr(known_positives, "indptr"):
        known_positives = (known_positives.indptr, known_positives.indices)
    indptr, ids = map(torch.as_tensor, known_positives)
    return indptr, ids


def _temperature(value: float | Tensor) -> Tensor:
    return value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)


def _step(value: int | Tensor) -> Tensor:
    return value if isinstance(value, Tensor) else torch.full((), value, dtype=torch.int64)


def _check_tensors(given: dict[str, Any], num_required: int, constants: tuple[str, ...]) -> None:
    for place, (name, x) in enumerate(given.items()):
        if not isinstance(x, Tensor) and (x is not None or place < num_required):
            raise TypeError(f"{name}: expected a torch.Tensor, got {type(x).__name__}")
    for name in constants:
        if given[name] is not None and given[name].requires_grad:
            raise ValueError(
                f"{name}: expected a constant, got a tensor that requires grad; pass "
                f'{name}.detach(), or weigh the losses of reduction="none" yourself'
            )


def _differentiated(tensors: Any) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def _apart(tensors: Iterable[Tensor | None]) -> list[Tensor | None]:
    """Views while compiling, which cannot trace one tensor in two places: in-batch negatives."""
    given = list(tensors)
    if not torch.compiler.is_compiling():
        return given
    if torch._C._are_functorch_transforms_active():
        # Compiled, a second derivative could not be told from a first, and would come out as 0.
        raise RuntimeError("torch.func transforms of zipfneg's losses run, but cannot be compiled")
    return [None if x is None else x.view_as(x) for x in given]


# Whether the graph of the running backward pass stays for another one.
_graph_is_kept = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)


def _scaled(d_loss: Tensor | None, grads: Any) -> list[Tensor | None]:
    """d_loss times each of the pairs (gradient, whether it is needed)."""
    if d_loss is None:
        return [None for _ in grads]
    # After `loss.backward()` they go out as they are, without another pass over their memory. They
    # are then the caller's to change: a graph that is kept, or made of this very pass, gets copies.
    again = torch.compiler.is_compiling() or torch.is_grad_enabled() or _graph_is_kept()
    copied = again or d_loss.item() != 1
    return [None if not need else d_loss * x if copied else x.detach() for x, need in grads]


def _refuse_second(d_grads: tuple[Tensor | None, ...]) -> None:
    # While compiling, which allows no second derivative, every upstream gradient is a tensor.
    if not torch.compiler.is_compiling() and any(d is not None for d in d_grads):
        raise RuntimeError(
            "zipfneg's losses have first derivatives only: their gradients cannot be "
            "differentiated again"
        )


def _without_graph(items: Tensor | Candidates) -> Candidates:
    return Candidates(*map(_detached, as_candidates("items", items)))


def _converted(state: Any, kind: type, convert: Callable[[Any], Any]) -> Any:
    """Plain data with every value of a kind converted."""
    if isinstance(state, Mapping):
        return {name: _converted(value, kind, convert) for name, value in state.items()}
    if isinstance(state, list):
        return [_converted(value, kind, convert) for value in state]
    return convert(state) if isinstance(state, kind) else state
