"""A bank of earlier batches' items, to serve as negatives."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from . import checks, logq
from .candidates import Candidates
from .checks import NDArray
from .interop import Array, as_array, borrow, view_of
from .logq import FrequencyEstimator
from .popularity import Law, stream_words, uniforms
from .sampling import Draw, InBatchSampler, as_popularity, given_positives


class CachedSampler:
    """A bank of earlier batches' items as negatives: first in, first out.

    Cross-batch negatives (Wang et al. 2021): embeddings of items move slowly, so those of the last
    batches stand in for as many more negatives, at no cost but their memory. They are constants:
    gradients do not go back to the towers that made them.

    Parameters
    ----------
    capacity : C, the number of items kept.
    popularity : how often each item is a positive, as for `InBatchSampler`. None leaves log q
        unknown.
    unique : False keeps every copy: log q = log(C·f). True keeps each id once, at its last coming,
        which leaves more places to the tail. The bank is then the last C distinct ids of the
        stream of positives, a unique sample of them: log q is its log inclusion probability, and
        `popularity` must be a law or counts.
    num_sampled : None gives the whole bank; otherwise so many of its items, drawn uniformly without
        replacement, or all while there are fewer.
    seed : of that draw.

    Notes
    -----
    `sample` changes nothing: call `update` with each batch after its step. Every copy keeps the f
    of its coming, which matters where a `FrequencyEstimator` goes on learning; in a mixture all log
    q are those of the popularity now.

    Examples
    --------
    >>> import numpy as np
    >>> from zipfneg import CachedSampler, Candidates, LogUniform
    >>> law = LogUniform(1000)
    >>> bank = CachedSampler(300, law)
    >>> for step in range(4):
    ...     batch = Candidates(law.draw(100, seed=1, step=step), embeddings=np.ones((100, 8)))
    ...     draw = bank.sample(batch, step=step)
    ...     bank.update(batch)
    >>> draw.negatives.embeddings.shape
    (300, 8)
    """

    def __init__(
        self,
        capacity: int,
        popularity: Any = None,
        *,
        unique: bool = False,
        num_sampled: int | None = None,
        seed: int = 0,
    ) -> None:
        self.capacity = checks.integer("capacity", capacity, 1, 2**40)
        self.popularity = as_popularity(popularity)
        self.unique = bool(unique)
        if num_sampled is not None:
            num_sampled = checks.integer("num_sampled", num_sampled, 1, self.capacity)
        self.num_sampled = num_sampled
        self.seed = checks.integer("seed", seed, 0, 2**64 - 1)
        if unique and not isinstance(self.popularity, Law | None):
            raise ValueError(
                f"popularity: expected a law or counts for unique=True, got {popularity!r}"
            )
        # Oldest first, log_q being log f; None before the first update.
        self._bank: Candidates | None = None

    def __len__(self) -> int:
        return 0 if self._bank is None else len(self._bank.ids)  # type: ignore[arg-type]

    def update(self, items: Candidates | Array) -> None:
        """Put a batch's items into the bank, and the oldest out.

        Parameters
        ----------
        items : ids (B,) or `Candidates` with ids and, always or never, embeddings (B, D) and bias
            (B,). They are copied.
        """
        _, items, ids = given_positives(items, None)
        if items is None or ids is None:
            raise ValueError("items: expected the batch's items, got None")
        _, views = borrow({"items.embeddings": items.embeddings, "items.bias": items.bias})
        e, bias = views["items.embeddings"], views["items.bias"]
        if e is not None and e.ndim != 2:
            raise ValueError(f"items.embeddings: expected shape (B, D), got {e.shape}")
        for name, x in (("embeddings", e), ("bias", bias)):
            if x is not None:
                checks.floating(f"items.{name}", x)
                lead = x if x.ndim == 1 else x[:, 0] if x.shape[1] else ids
                checks.shape(f"items.{name}", lead, ids.shape, "(B,) or (B, D) as items.ids")
        if ids.dtype == np.uint64 and ids.size and ids.max() >= 2**63:
            raise ValueError(f"items.ids: expected ids below 2**63, got {ids.max()}")
        log_f = None if self.popularity is None else self._log_f(ids)
        new = Candidates(ids.astype(np.int64), e, log_f, bias)
        old = self._bank or _empty_like(new)
        for name, before, x in zip(new._fields, old, new, strict=True):
            if (before is None) != (x is None):
                raise ValueError(
                    f"items.{name}: expected {'None' if before is None else 'an array'}, as in the "
                    f"items before, got {'None' if x is None else 'an array'}"
                )
            if x is not None and before is not None:
                checks.shape(f"items.{name}", x, (len(ids), *before.shape[1:]), "as those before")
                if x.dtype != before.dtype:
                    raise TypeError(
                        f"items.{name}: expected {before.dtype}, as in the items before, got "
                        f"{x.dtype}"
                    )
        ids = np.concatenate([old.ids, new.ids])
        keep = np.arange(len(ids))
        if self.unique:  # the last copy of each: the first from behind
            keep = np.sort(len(ids) - 1 - np.unique(ids[::-1], return_index=True)[1])
        keep = keep[-self.capacity :]

        def joined(before: NDArray | None, x: NDArray | None) -> NDArray | None:
            if before is None or x is None:
                return None
            both = np.concatenate([before, x])[keep]
            both.flags.writeable = False  # what `sample` gives is a view
            return both

        self._bank = Candidates(*map(joined, old, new))

    def sample(
        self,
        positives: Candidates | Array | None = None,
        *,
        step: int = 0,
        device: str | None = None,
        stream: int = 0,
    ) -> Draw:
        """The bank's items with their embeddings and log q; arguments as for `PopularitySampler`.

        In NumPy these are read-only views of the bank.
        """
        place, positives, ids = given_positives(positives, device)
        bank = self._bank
        if bank is None:
            bank = _empty_like(positives or Candidates(np.empty(0, np.int64)))
            bank = bank._replace(log_q=None if self.popularity is None else np.empty(0))
        if self._num_given < len(self):
            order = np.argsort(uniforms(len(self), stream_words(self.seed, step, stream)))
            chosen = np.sort(order[: self._num_given])
            bank = Candidates(*(None if x is None else x[chosen] for x in bank))
        if bank.log_q is not None:
            log_q = logq.log_count(np.asarray(bank.log_q), self._num_given)
            bank = bank._replace(log_q=self.log_q(bank.ids) if self.unique else log_q)
            if positives is not None and ids is not None:
                # With no negatives the loss is 0, whatever the positives' log q.
                of_positives = self.log_q(ids) if len(self) else np.zeros(len(ids))
                positives = positives._replace(log_q=place.give(of_positives))
        negatives = Candidates(*(None if x is None else place.give(x) for x in bank))
        return Draw(positives, negatives, self._num_given)

    def log_q(self, ids: Array, *, batch_size: int | None = None) -> Array:
        """log of the expected number of each id's copies in a draw, by its popularity now.

        In float64; `batch_size` is taken for the samplers' common signature, and not used.
        """
        if self.popularity is None:
            raise ValueError("CachedSampler has no popularity, hence no log q: pass popularity=")
        place, view = view_of("ids", ids)
        if not len(self):
            return place.give(np.full(view.shape, -np.inf))
        if not self.unique:
            return place.give(logq.log_count(self._log_f(view), self._num_given))
        prob, weights = self.popularity.spectrum()
        time = logq.sampling_time(prob, weights, len(self))
        share = np.log(self._num_given / len(self))
        return place.give(logq.log_inclusion(self.popularity, view, time) + share)

    def state(self) -> dict[str, Any]:
        """The settings and the bank as plain numbers and arrays; the popularity as it was given."""
        return {
            "capacity": self.capacity,
            "popularity": self.popularity,
            "unique": self.unique,
            "num_sampled": self.num_sampled,
            "seed": self.seed,
            **(self._bank or Candidates())._asdict(),
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> "CachedSampler":
        """A sampler that goes on where the one of `state` stood."""
        settings = dict(state)
        names = ("capacity", "popularity", *Candidates._fields)
        missing = [name for name in names if name not in settings]
        if missing:
            raise ValueError(f"state: expected {', '.join(names)}, missing {', '.join(missing)}")
        bank = Candidates(*(settings.pop(name) for name in Candidates._fields))
        sampler = cls(settings.pop("capacity"), settings.pop("popularity"), **settings)
        if bank.ids is not None:
            arrays = {name: np.array(x) for name, x in bank._asdict().items() if x is not None}
            size = len(arrays["ids"])
            for name, x in arrays.items():
                x.flags.writeable = False
                if len(x) != size or size > sampler.capacity:
                    raise ValueError(
                        f"state: expected {name} for {size} items, at most {sampler.capacity}, got "
                        f"{len(x)}"
                    )
            sampler._bank = Candidates(**arrays)
        return sampler

    @property
    def _num_given(self) -> int:
        return len(self) if self.num_sampled is None else min(self.num_sampled, len(self))

    def _log_f(self, ids: NDArray) -> NDArray:
        """log of the share of each id among positives."""
        if isinstance(self.popularity, FrequencyEstimator):
            return np.asarray(self.popularity.log_q(ids)) - np.log(self.popularity.batch_size)
        return np.asarray(InBatchSampler(self.popularity).log_q(ids, batch_size=1))


def _empty_like(items: Candidates) -> Candidates:
    return Candidates(*(None if x is None else as_array(x)[:0] for x in items))
