"""Popularity laws: P(id), its inverse, and draws from it.

Ids are frequency ranks: ``id = first_id + rank``, rank 0 the most popular.
"""

from dataclasses import dataclass, field
from functools import cached_property, partial
from numbers import Real
from typing import Any, ClassVar, NamedTuple

import numpy as np

from . import checks
from .checks import NDArray
from .cpu import sampling as kernels
from .cpu.sampling import THREAD_GRAIN
from .cpu.threads import for_spans
from .interop import Array, Home, as_array, on_device, view_of
from .scalar import HEAD, LOW, philox, u64, uniform_53

# The key of Philox, and the upper half of its counter: seed, step and stream.
Words = tuple[Any, Any, Any, Any]

# Beyond this, neighbouring ids are no longer told apart by a 53-bit uniform.
MAX_ITEMS = 2**40


class Law:
    """What all laws share; a subclass gives the law itself as functions of the rank."""

    num_items: int
    first_id: int

    # A subclass gives these: the name of its kernels in `cpu.sampling`, what its functions of the
    # scalar source take beside the uniform or the rank, and its distribution at float64 ranks.

    _kernels: ClassVar[str]

    def _rank_parameters(self) -> tuple[Any, ...]:
        raise NotImplementedError

    def _log_prob_parameters(self) -> tuple[Any, ...]:
        raise NotImplementedError

    def _cdf(self, ranks: NDArray) -> NDArray:
        raise NotImplementedError

    @property
    def _kernel(self) -> kernels.Kernel:
        return getattr(kernels, self._kernels)

    def _log_prob(self, ranks: NDArray) -> NDArray:
        """At float64 ranks, between the whole ones and beyond the last too."""
        out = np.empty(ranks.shape)
        self._kernel.log_prob(out, ranks, 0, np.inf, *self._log_prob_parameters())
        return out

    def _rank(self, u: NDArray) -> NDArray:
        """The inverse distribution of flat u, but for what rounding moves to the next rank."""
        ranks = np.empty(u.size, np.int64)
        self._kernel.invert(ranks, u, *self._rank_parameters())
        return ranks

    def spectrum(self) -> tuple[NDArray, NDArray]:
        """Probabilities p and weights w with Σ_ids f(P(id)) = Σ w·f(p) for every smooth f.

        For a closed form this takes a few thousand terms, whatever the number of items.
        """
        raise NotImplementedError

    def log_prob(self, ids: Array) -> Array:
        """log P(id) in nats, computed in float64; −inf for ids outside the law.

        Parameters
        ----------
        ids : integer array of any shape and framework, on the CPU or CUDA, or a number or sequence.

        Returns
        -------
        float64 array of the same shape and framework (float32 in JAX without x64).
        """
        return self._for_ids("log_prob", ids)

    def cdf(self, ids: Array) -> Array:
        """P(drawn id ≤ id), in float64: 0 below the law's range, 1 above it.

        Shapes and frameworks as for `log_prob`.
        """
        place, view = self._integers(ids)
        ranks = np.maximum(view, self.first_id - 1) - self.first_id
        inside = np.clip(ranks, 0, self.num_items - 1).astype(np.float64)
        return place.give(np.where(ranks < 0, 0.0, self._cdf(inside)))

    def ppf(self, u: Array) -> Array:
        """The smallest id whose `cdf` is at least `u`, to the rounding of `u`: the inverse.

        Parameters
        ----------
        u : array of probabilities in [0, 1], of any shape and framework, or a number or sequence.

        Returns
        -------
        int64 array of ids (int32 in JAX without x64).
        """
        place, view = view_of("u", u)
        if view.dtype.kind not in "iu":
            checks.floating("u", view)
        u = view.astype(np.float64)
        if not ((u >= 0) & (u <= 1)).all():
            raise ValueError("u: expected probabilities from 0 to 1, got values outside")
        ranks = self._rank(u.ravel()).reshape(u.shape)
        # The closed forms round; cdf decides.
        ranks = np.where((ranks > 0) & (self._cdf(np.maximum(ranks - 1, 0)) >= u), ranks - 1, ranks)
        ranks = np.where(
            (ranks < self.num_items - 1) & (self._cdf(ranks.astype(np.float64)) < u),
            ranks + 1,
            ranks,
        )
        return place.give(self.first_id + ranks.astype(np.int64))

    def draw(
        self,
        shape: int | tuple[int, ...],
        *,
        seed: int,
        step: int = 0,
        stream: int = 0,
        device: str = "cpu",
        out: Array | None = None,
    ) -> Array:
        """Draw ids independently, with replacement.

        A pure function of its arguments: draw i of (seed, step, stream) is the same whatever the
        shape, the number of threads or the device. Different (seed, step, stream) use disjoint
        counters of Philox4x32-10.

        Parameters
        ----------
        shape : number of draws, or the shape to fill in C order.
        seed : 0 to 2**64 − 1.
        step, stream : 0 to 2**32 − 1 each: the training step, and for instance the worker's rank.
        device : "cpu", "cuda" or, for instance, "cuda:1". On CUDA, `step` may be an integer array
            of one element there, which is read when the draw is made.
        out : C-contiguous int32 or int64 array of that shape on that device, to fill and return,
            of any framework that lends its memory for writing (NumPy, CuPy, PyTorch).

        Returns
        -------
        int64 array of ids, NumPy's or on CUDA CuPy's, or `out`.

        Examples
        --------
        >>> law = LogUniform(1_000_000, first_id=1)
        >>> law.draw(5, seed=7).tolist()
        [...]
        >>> bool((law.draw(5, seed=7) == law.draw(1000, seed=7)[:5]).all())
        True
        """
        sizes = (shape,) if np.ndim(shape) == 0 else tuple(shape)  # type: ignore[arg-type]
        sizes = tuple(checks.integer("shape", size, 0, 2**62) for size in sizes)
        place = on_device(device)
        if place.on_cuda:
            return self._draw_on_cuda(place, sizes, seed, step, stream, out)
        words = stream_words(seed, step, stream)
        if out is None:
            target = out = np.empty(sizes, np.int64)
        else:
            target = self._target(out, sizes)
        self._fill(target.reshape(-1), words)
        return out

    def _draw_on_cuda(
        self, place: Home, sizes: tuple[int, ...], seed: int, step: Any, stream: int, out: Array
    ) -> Array:
        from .cuda import sampling as cuda

        if out is not None:
            place = place.that_of("out", out)
        with place.current():
            words = words_on_cuda(place, seed, step, stream)
            if out is None:
                target = out = cuda.arrays().empty(sizes, np.int64)
            else:
                target = self._target(out, sizes)
            cuda.fill(self, target.reshape(-1), words)
        return out

    def _target(self, out: Array, sizes: tuple[int, ...]) -> NDArray:
        """A view of `out`, which the draws can be written to."""
        target = as_array(out, "out")
        checks.shape("out", target, sizes, "shape")
        if target.dtype not in (np.int32, np.int64):
            raise TypeError(f"out: expected int32 or int64, got {target.dtype}")
        if self.first_id + self.num_items - 1 > np.iinfo(target.dtype).max:
            raise ValueError(f"out: {target.dtype} does not hold this law's ids; use int64")
        # CuPy's arrays are always writable, and do not say so.
        if not (target.flags.c_contiguous and getattr(target.flags, "writeable", True)):
            raise ValueError("out: expected writable, C-contiguous memory")
        return target

    def _fill(self, out: NDArray, words: Words) -> None:
        """Draws 0 to out.size − 1 into the flat `out`."""
        draw, parameters = self._kernel.draw, self._rank_parameters()
        for_spans(
            lambda start, stop: draw(out, start, stop, *words, self.first_id, *parameters),
            out.size,
            THREAD_GRAIN,
        )

    def _for_ids(self, kernel_name: str, ids: Array, *arguments: float) -> Array:
        """What one of the law's kernels gives for each id, in float64."""
        place, view = view_of("ids", ids, cuda=True)
        if place.on_cuda:
            from .cuda import sampling as cuda

            checks.integral("ids", view)
            with place.current():
                return place.give(cuda.for_ids(self, kernel_name, view, *arguments))
        _, view = self._integers(view)
        kernel = getattr(self._kernel, kernel_name)
        law = (*arguments, self.first_id, self.num_items, *self._log_prob_parameters())
        out = np.empty(view.shape)
        flat, target = view.ravel(), out.reshape(-1)
        for_spans(
            lambda start, stop: kernel(target[start:stop], flat[start:stop], *law),
            out.size,
            THREAD_GRAIN,
        )
        return place.give(out)

    def log_inclusion(self, ids: Array, time: float) -> Array:
        """log π of each id, π = 1 − e^(−P(id)·t), in float64; −inf outside the law.

        Sampling S distinct ids is close to letting each arrive at its own Poisson rate until the
        time t > 0 at which S are expected (`zipfneg.logq.sampling_time`): exact for a Poissonised
        sample; for one of fixed size within 0.1 % from about S = 100 on, 0.4 % at S = 20, 2 % at
        S = 5, 4 % at S = 1 (log-uniform, N = 1000).
        """
        return self._for_ids("log_inclusion", ids, min(float(time), 1e300))

    def _integers(self, ids: Array) -> tuple[Any, NDArray]:
        """As int64, without wrapping: what of uint64 lies above it is no law's id."""
        place, view = view_of("ids", ids)
        if not view.size:
            view = view.astype(np.int64)  # of an empty list NumPy makes floats
        checks.integral("ids", view)
        if view.dtype == np.uint64:
            view = np.minimum(view, np.uint64(2**63 - 1))
        return place, view.astype(np.int64, copy=False)

    def _check_range(self) -> None:
        object.__setattr__(
            self, "num_items", checks.integer("num_items", self.num_items, 1, MAX_ITEMS)
        )
        object.__setattr__(self, "first_id", checks.integer("first_id", self.first_id, 0, 2**62))


def _counts(counts: Any) -> NDArray:
    """Checked counts as float64."""
    _, counts = view_of("counts", counts)
    if counts.ndim != 1 or counts.dtype.kind not in "iuf" or not counts.size:
        raise ValueError(
            f"counts: expected a one-dimensional array of at least one number, got "
            f"{counts.dtype} of shape {counts.shape}"
        )
    counts = counts.astype(np.float64)
    bad = ~((counts >= 0) & np.isfinite(counts))
    if bad.any():
        at = int(np.argmax(bad))
        raise ValueError(f"counts: expected numbers ≥ 0, got {counts[at]} at {at}")
    if not counts.any():
        raise ValueError("counts: expected at least one above zero, got none")
    return counts


def stream_words(seed: int, step: int, stream: int) -> Words:
    """The key and the upper half of the counter, as the kernels take them."""
    seed = checks.integer("seed", seed, 0, 2**64 - 1)
    step = checks.integer("step", step, 0, 2**32 - 1)
    stream = checks.integer("stream", stream, 0, 2**32 - 1)
    return u64(seed & 0xFFFFFFFF), u64(seed >> 32), u64(step), u64(stream)


def words_on_cuda(place: Home, seed: int, step: Any, stream: int) -> tuple[Any, ...]:
    """The same for CUDA's kernels, which read the step themselves where it is device data."""
    from .cuda import sampling as cuda

    if isinstance(step, int | float | np.generic):
        return cuda.device_words(stream_words(seed, step, stream))  # type: ignore[arg-type]
    view = as_array(step, "step")
    place.that_of("step", step)
    checks.integral("step", view)
    if view.size != 1:
        raise ValueError(f"step: expected one number, got shape {view.shape}")
    return cuda.device_words(stream_words(seed, 0, stream), view)


def uniforms(size: int, words: Words, *, row: int = 0) -> NDArray:
    """The uniforms in (0, 1) behind `Law.draw`: draw i is made of uniform i.

    Rows after 0 are those of draws for each query, on counters of their own.
    """
    out, first_tile = np.empty(size), row * kernels.TILES_PER_ROW
    for_spans(
        lambda start, stop: kernels.draw_uniforms(out, start, stop, first_tile, *words),
        size,
        THREAD_GRAIN,
    )
    return out


def poisson(mean: float, words: Words) -> int:
    """A Poisson number, of the stream's last counter, which no draw comes to."""
    from scipy.special import pdtr, pdtrik

    high, low, _, _ = philox(LOW, LOW, words[2], words[3], words[0], words[1])
    u = uniform_53(high, low)
    count = int(np.ceil(pdtrik(u, mean)))
    return count - 1 if count and pdtr(count - 1, mean) >= u else count


def _smooth_spectrum(prob: Any, num_items: int) -> tuple[NDArray, NDArray]:
    """`Law.spectrum` of a probability that is smooth in the logarithm of the rank.

    The head is taken term by term. The tail, ranks a to b, is the integral from a − 1/2 to b + 1/2
    by Gauss-Legendre in log rank, less the first correction of the midpoint rule,
    (g'(b + 1/2) − g'(a − 1/2))/24, its derivatives as differences.
    """
    head = num_items if num_items <= 4097 else 4096
    ranks = np.arange(head, dtype=np.float64)
    weights = np.ones(head)
    if num_items > head:
        low, high = np.log(head - 0.5), np.log(num_items - 0.5)
        edges = np.linspace(low, high, 2 + int((high - low) / 0.4))
        nodes, node_weights = np.polynomial.legendre.leggauss(8)
        half = np.diff(edges)[:, None] / 2
        x = np.exp(edges[:-1, None] + half * (1 + nodes)).ravel()  # (panels · 8,)
        ends = np.array([head - 1, head, num_items - 1, num_items], np.float64)
        ranks = np.concatenate([ranks, x, ends])
        weights = np.concatenate(
            [weights, (half * node_weights).ravel() * x, np.array([-1, 1, 1, -1]) / 24]
        )
    return prob(ranks), weights


@dataclass(frozen=True)
class LogUniform(Law):
    """The log-uniform (Zipfian) law of TensorFlow's candidate samplers, exactly.

    P(k) = log1p(1/(k + 1)) / log1p(N), with k = id − first_id.

    Parameters
    ----------
    num_items : N, the number of ids: first_id to first_id + N − 1, all of them drawn.
    first_id : ids below it are reserved (padding, unknown) and never drawn.

    Notes
    -----
    Nothing of size N is ever built. Draws are floor((N + 1)**u) − 1 with a 53-bit u.

    Examples
    --------
    >>> law = LogUniform(1000)
    >>> round(float(law.log_prob(0)), 6)
    -2.299302
    >>> int(law.ppf(0.5)), float(law.cdf(999))
    (30, 1.0)
    """

    num_items: int
    first_id: int = field(default=0, kw_only=True)
    _kernels: ClassVar[str] = "log_uniform"

    def __post_init__(self) -> None:
        self._check_range()

    def _cdf(self, ranks: NDArray) -> NDArray:
        return np.log1p(ranks + 1) / np.log1p(self.num_items)

    def _rank_parameters(self) -> tuple[Any, ...]:
        return float(np.log2(self.num_items + 1.0)), self.num_items

    def _log_prob_parameters(self) -> tuple[Any, ...]:
        return (float(np.log(np.log1p(self.num_items))),)

    def spectrum(self) -> tuple[NDArray, NDArray]:
        return _smooth_spectrum(lambda ranks: np.exp(self._log_prob(ranks)), self.num_items)


class Fitted(NamedTuple):
    """How far to trust a fitted law."""

    exponent_error: float  # standard errors; infinite where the counts do not tell
    shift_error: float
    kl: float  # nats by which the counts' own shares explain a draw better than the law
    ks: float  # largest distance of the two cumulative distributions (Kolmogorov-Smirnov)
    num_counted: float


@dataclass(frozen=True)
class ZipfMandelbrot(Law):
    """P(k) ∝ (k + 1 + shift)**−exponent, with k = id − first_id.

    Parameters
    ----------
    num_items : N, the number of ids.
    exponent : ≥ 0; 0 is the uniform law, 1 Zipf's.
    shift : > −1; flattens the head.
    first_id : ids below it are never drawn.

    Notes
    -----
    Sums over ids are exact to about 15 digits without a table of size N: the first 64 terms one by
    one, the rest by the Euler-Maclaurin formula. Its inverse gives a draw in constant time. A draw
    is as exact as its 53-bit uniform: an id of probability p has p·2**52 of them.

    References
    ----------
    Mandelbrot 1953, An informational theory of the statistical structure of language.

    Examples
    --------
    >>> law = ZipfMandelbrot(1_000_000, 1.2, shift=2.5)
    >>> law.log_prob([0, 999_999]).round(4)
    array([ -2.81  , -17.8853])
    >>> law.draw(3, seed=0).shape
    (3,)
    """

    num_items: int
    exponent: float
    shift: float = 0.0
    first_id: int = field(default=0, kw_only=True)
    fitted: Fitted | None = field(default=None, init=False, compare=False, repr=False)
    _kernels: ClassVar[str] = "zipf_mandelbrot"

    def __post_init__(self) -> None:
        self._check_range()
        for name, value, low, text in (
            ("exponent", self.exponent, 0.0, "≥ 0"),
            ("shift", self.shift, np.nextafter(-1.0, 0.0), "above −1"),
        ):
            # Beyond 1e12 the ranks would drown in the shift's rounding.
            if not (isinstance(value, Real) and low <= value <= 1e12):
                raise ValueError(f"{name}: expected a number {text}, to 1e12, got {value!r}")
            object.__setattr__(self, name, float(value))

    @classmethod
    def fit(cls, counts: Array, *, first_id: int = 0) -> "ZipfMandelbrot":
        """The law of maximum likelihood for the given counts, with its goodness of fit.

        Parameters
        ----------
        counts : (N,) how often each id was seen, one count an id, zeros included. They are ranked
            by size first, as ids are.
        first_id : of the law.

        Returns
        -------
        A law whose `fitted` says how far to trust it.

        Raises
        ------
        ValueError
            For bad counts, or fewer than three different ids seen.

        Notes
        -----
        Ranks that come from the same counts flatter the fit: among ids of equal popularity chance
        alone puts the larger counts first. The standard errors do not know that. Counts that fall
        faster than any power drive the exponent to 50, where the search ends.

        Examples
        --------
        >>> law = ZipfMandelbrot(2000, 1.1, shift=3.0)
        >>> counts = np.bincount(law.draw(1_000_000, seed=0), minlength=2000)
        >>> found = ZipfMandelbrot.fit(counts)
        >>> round(found.exponent, 1), round(found.shift), found.fitted.kl < 0.01
        (1.1, 3, True)
        """
        from scipy.optimize import minimize

        counts = np.sort(_counts(counts))[::-1]
        share = counts / counts[0]
        share /= share.sum()
        if np.count_nonzero(counts) < 3:
            raise ValueError("counts: expected three ids or more above zero, got fewer")
        ranks = np.arange(1, counts.size + 1, dtype=np.float64)

        def loss(parameters: NDArray) -> tuple[float, NDArray]:
            """Mean negative log likelihood and its gradient, for (exponent, log(1 + shift))."""
            exponent, log_offset = parameters
            x = ranks - 1 + np.exp(log_offset)
            log_x = np.log(x)
            weights = np.exp(-exponent * (log_x - log_x[0]))
            total = weights.sum()
            excess = share - weights / total
            value = exponent * share @ log_x + np.log(total) - exponent * log_x[0]
            return value, np.array(
                [excess @ log_x, exponent * np.exp(log_offset) * (excess @ (1 / x))]
            )

        # The likelihood is flat where the shift is large: several starts, the best end.
        best = min(
            (
                minimize(
                    loss,
                    [1.0, start],
                    jac=True,
                    method="L-BFGS-B",
                    bounds=[(0, 50), (-10, 27)],
                    options={"ftol": 1e-15, "gtol": 1e-10, "maxiter": 1000},
                )
                for start in (0.0, np.log(counts.size), np.log(counts.size) + 4)
            ),
            key=lambda found: float(found.fun),
        )
        exponent, log_offset = map(float, best.x)
        # Curvature by central differences of the gradient.
        step = 1e-4
        curvature = np.array(
            [
                (loss(best.x + move)[1] - loss(best.x - move)[1]) / (2 * step)
                for move in step * np.eye(2)
            ]
        )
        curvature = (curvature + curvature.T) / 2
        errors = np.full(2, np.inf)
        # A direction without curvature is one that the counts say nothing about.
        if np.linalg.eigvalsh(curvature)[0] > 1e-9 * np.linalg.norm(curvature):
            errors = np.sqrt(np.diag(np.linalg.inv(curvature)) / counts.sum())
        law = cls(counts.size, exponent, float(np.expm1(log_offset)), first_id=first_id)
        seen = share > 0
        entropy = -(share[seen] * np.log(share[seen])).sum()
        distance = np.abs(np.cumsum(share) - law._cdf(ranks - 1)).max()
        fitted = Fitted(
            exponent_error=float(errors[0]),
            shift_error=float(errors[1] * np.exp(log_offset)),
            kl=float(best.fun - entropy),
            ks=float(distance),
            num_counted=float(counts.sum()),
        )
        object.__setattr__(law, "fitted", fitted)
        return law

    # f(x) = (x/offset)**−exponent with x = k + offset: f = 1 at rank 0.

    def _f(self, x: Any) -> Any:
        return np.exp(-self.exponent * np.log(x / (1 + self.shift)))

    def _integral(self, low: float, high: Any) -> Any:
        """∫ f from low to high, exact for exponents near 1 too."""
        e = 1 - self.exponent
        log_ratio = np.log1p((high - low) / low)
        return low * self._f(low) * (np.expm1(e * log_ratio) / e if e else log_ratio)

    def _small_terms(self, x: Any) -> Any:
        """−f′/24 + 7·f‴/5760 − 31·f⁽⁵⁾/967680: what the integral lacks of the midpoint sum."""
        s = self.exponent
        first = s / x
        third = first * (s + 1) * (s + 2) / x**2
        fifth = third * (s + 3) * (s + 4) / x**2
        return self._f(x) * (first / 24 - 7 * third / 5760 + 31 * fifth / 967680)

    @cached_property
    def _head(self) -> NDArray:
        """Σ_{j ≤ k} f(j) of the first ranks."""
        ranks = np.arange(min(self.num_items, HEAD), dtype=np.float64)
        return np.cumsum(self._f(ranks + 1 + self.shift))

    def _sum(self, ranks: Any) -> Any:
        """Σ_{j ≤ k} f(j)."""
        head = self._head
        x = head.size - 0.5 + 1 + self.shift
        y = np.maximum(ranks, head.size) + 1.5 + self.shift
        tail = self._integral(x, y) + self._small_terms(y) - self._small_terms(x)
        inside = np.minimum(ranks, head.size - 1).astype(np.int64)
        return np.where(ranks < head.size, head[inside], head[-1] + tail)

    @cached_property
    def _total(self) -> float:
        return float(self._sum(self.num_items - 1.0))

    def _cdf(self, ranks: NDArray) -> NDArray:
        return np.minimum(self._sum(ranks) / self._total, 1.0)

    def _rank_parameters(self) -> tuple[Any, ...]:
        offset = 1.0 + self.shift
        x = HEAD - 0.5 + offset
        # A tail too thin for float64 is never reached: its scale does not matter.
        unit = x * float(self._f(x)) or np.inf
        head = np.ones(HEAD)
        head[: self._head.size] = self._head / self._total
        return (
            self.num_items,
            head,
            self.exponent,
            offset,
            self._total / unit,
            float(self._small_terms(x)) / unit,
        )

    def _log_prob_parameters(self) -> tuple[Any, ...]:
        return self.exponent, 1.0 + self.shift, float(np.log(self._total))

    def spectrum(self) -> tuple[NDArray, NDArray]:
        return _smooth_spectrum(lambda ranks: np.exp(self._log_prob(ranks)), self.num_items)


@dataclass(frozen=True)
class Uniform(Law):
    """Every one of N ids equally likely.

    Parameters
    ----------
    num_items : N, the number of ids.
    first_id : ids below it are never drawn.

    Examples
    --------
    >>> float(Uniform(4).cdf(1))
    0.5
    """

    num_items: int
    first_id: int = field(default=0, kw_only=True)
    _kernels: ClassVar[str] = "uniform"

    def __post_init__(self) -> None:
        self._check_range()

    def _cdf(self, ranks: NDArray) -> NDArray:
        return (ranks + 1) / self.num_items

    def _rank_parameters(self) -> tuple[Any, ...]:
        return (self.num_items,)

    def _log_prob_parameters(self) -> tuple[Any, ...]:
        return (float(np.log(self.num_items)),)

    def spectrum(self) -> tuple[NDArray, NDArray]:
        return np.array([1 / self.num_items]), np.array([float(self.num_items)])


@dataclass(frozen=True, eq=False)
class Empirical(Law):
    """Any popularity: P(k) ∝ counts[k]**power, with k = id − first_id.

    Parameters
    ----------
    counts : (N,) non-negative, finite, not all zero: how often each id was seen, or any weight.
        They need not be sorted. An id with count 0 is never drawn and has log_prob −inf.
    power : 1 keeps the counts' proportions, 0.75 is word2vec's flattening, 0 makes all ids with a
        positive count equally likely.
    first_id : the id of counts[0].

    Notes
    -----
    Draws use Walker's alias table (12 bytes an item): one uniform, one look-up. The order of the
    alias table is not the order of ids, so a draw is not `ppf` of its uniform here.

    Examples
    --------
    >>> law = Empirical([6, 3, 1])
    >>> law.cdf([0, 1, 2]).round(6).tolist()
    [0.6, 0.9, 1.0]
    """

    counts: Any
    power: float = field(default=1.0, kw_only=True)
    first_id: int = field(default=0, kw_only=True)
    num_items: int = field(init=False)
    _prob: NDArray = field(init=False, repr=False)
    _kernels: ClassVar[str] = "alias"

    def __post_init__(self) -> None:
        counts = _counts(self.counts)
        if not (isinstance(self.power, Real) and 0 <= self.power < np.inf):
            raise ValueError(f"power: expected a number ≥ 0, got {self.power!r}")
        counts.flags.writeable = False
        object.__setattr__(self, "counts", counts)
        seen = counts > 0
        # Relative to the largest: the powers of large counts must not overflow.
        weights = np.where(seen, (counts / counts.max()) ** self.power, 0.0)
        object.__setattr__(self, "num_items", counts.size)
        object.__setattr__(self, "_prob", weights / weights.sum())
        self._check_range()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Empirical):
            return NotImplemented
        return (self.power, self.first_id) == (other.power, other.first_id) and np.array_equal(
            self.counts, other.counts
        )

    def __hash__(self) -> int:
        return hash((self.num_items, self.power, self.first_id))

    def __reduce__(self) -> tuple[Any, ...]:  # without the tables, which can be made again
        return partial(Empirical, power=self.power, first_id=self.first_id), (self.counts,)

    @cached_property
    def _cumulative(self) -> NDArray:
        total = np.cumsum(self._prob)
        return total / total[-1]

    @cached_property
    def _alias_table(self) -> tuple[NDArray, NDArray]:
        threshold = np.empty(self.num_items)
        alias = np.empty(self.num_items, np.int32 if self.num_items < 2**31 else np.int64)
        kernels.build_alias(self._prob * self.num_items, threshold, alias)
        return threshold, alias

    def _cdf(self, ranks: NDArray) -> NDArray:
        return self._cumulative[ranks.astype(np.int64)]

    def _rank(self, u: NDArray) -> NDArray:
        return np.minimum(np.searchsorted(self._cumulative, u), self.num_items - 1)

    def _rank_parameters(self) -> tuple[Any, ...]:
        return self.num_items, *self._alias_table

    def _log_prob_parameters(self) -> tuple[Any, ...]:
        return (self._prob,)

    def spectrum(self) -> tuple[NDArray, NDArray]:
        prob, multiplicity = np.unique(self._prob, return_counts=True)
        return prob, multiplicity.astype(np.float64)
