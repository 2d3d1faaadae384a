"""Laws, samplers, estimators and heads as plain data, and back."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from .cached import CachedSampler
from .contrastive import ContrastiveOutput
from .logq import FrequencyEstimator
from .popularity import Empirical, LogUniform, Uniform, ZipfMandelbrot
from .sampling import InBatchSampler, MixtureSampler, PopularitySampler

TYPES: dict[str, Any] = {
    cls.__name__: cls
    for cls in (
        LogUniform, ZipfMandelbrot, Uniform, Empirical, FrequencyEstimator, PopularitySampler,
        InBatchSampler, MixtureSampler, CachedSampler, ContrastiveOutput,
    )
}  # fmt: skip


def to_state(x: Any) -> Any:
    """A law, sampler, estimator or head as a dictionary of plain data, every setting included.

    Returns
    -------
    Nested dictionaries and lists of numbers, strings, None and NumPy arrays, to be kept with a
    model's weights. Without arrays (counts, an estimator, a bank) it is JSON. How a law was
    fitted is left out.

    Raises
    ------
    TypeError
        For anything else, such as a sampler of your own.

    Examples
    --------
    >>> from zipfneg import LogUniform, PopularitySampler, from_state, to_state
    >>> sampler = PopularitySampler(LogUniform(1000), 64, seed=3)
    >>> state = to_state(sampler)
    >>> state["law"]
    {'type': 'LogUniform', 'num_items': 1000, 'first_id': 0}
    >>> from_state(state) == sampler
    True
    """
    if isinstance(x, list | tuple):
        return [to_state(item) for item in x]
    if type(x) in TYPES.values():
        if dataclasses.is_dataclass(x):
            settings = {f.name: getattr(x, f.name) for f in dataclasses.fields(x) if f.init}
        else:
            settings = x.state()
        return {"type": type(x).__name__, **{k: to_state(v) for k, v in settings.items()}}
    if x is None or isinstance(x, bool | int | float | str | np.ndarray):
        return x
    if isinstance(x, np.generic):
        return x.item()
    raise TypeError(f"x: expected {', '.join(TYPES)}, got {x!r}, whose settings are not known")


def from_state(state: Any) -> Any:
    """What `to_state` was given: it makes the same draws.

    Examples
    --------
    >>> from zipfneg import from_state
    >>> from_state({"type": "Uniform", "num_items": 10, "first_id": 1})
    Uniform(num_items=10, first_id=1)
    """
    if isinstance(state, list):
        return [from_state(item) for item in state]
    if not isinstance(state, Mapping):
        return state
    if state.get("type") not in TYPES:
        raise ValueError(f"state: expected a type of {', '.join(TYPES)}, got {state.get('type')!r}")
    cls = TYPES[state["type"]]
    settings = {name: from_state(value) for name, value in state.items() if name != "type"}
    return cls.from_state(settings) if hasattr(cls, "from_state") else cls(**settings)
