"""Zipf-distributed negatives, their exact log q, and losses with hand-derived gradients."""

from .cached import CachedSampler
from .candidates import Candidates
from .checking import SamplerReport, check_sampler
from .contrastive import Contrastive, ContrastiveGrads, ContrastiveOutput, RowGrads
from .interop import as_array
from .logq import FrequencyEstimator
from .loss import (
    Diagnostics,
    Grads,
    sampled_softmax_backward,
    sampled_softmax_diagnostics,
    sampled_softmax_forward,
    sampled_softmax_loss,
    sampled_softmax_value_and_grad,
)
from .popularity import Empirical, LogUniform, Uniform, ZipfMandelbrot
from .retrieval import (
    CatalogGrads,
    Ranks,
    TopK,
    full_softmax_loss,
    full_softmax_value_and_grad,
    log_normalizer,
    rank,
    scores,
    top_k,
)
from .sampling import Draw, InBatchSampler, MixtureSampler, PopularitySampler, merge_repeats
from .state import from_state, to_state
from .symmetric import SymmetricGrads, symmetric_softmax_value_and_grad

__version__ = "0.1.0.dev0"

__all__ = [
    "CachedSampler",
    "Candidates",
    "CatalogGrads",
    "Contrastive",
    "ContrastiveGrads",
    "ContrastiveOutput",
    "Diagnostics",
    "Draw",
    "Empirical",
    "FrequencyEstimator",
    "Grads",
    "InBatchSampler",
    "LogUniform",
    "MixtureSampler",
    "PopularitySampler",
    "Ranks",
    "RowGrads",
    "SamplerReport",
    "SymmetricGrads",
    "TopK",
    "Uniform",
    "ZipfMandelbrot",
    "as_array",
    "check_sampler",
    "from_state",
    "full_softmax_loss",
    "full_softmax_value_and_grad",
    "log_normalizer",
    "merge_repeats",
    "rank",
    "sampled_softmax_backward",
    "sampled_softmax_diagnostics",
    "sampled_softmax_forward",
    "sampled_softmax_loss",
    "sampled_softmax_value_and_grad",
    "scores",
    "symmetric_softmax_value_and_grad",
    "to_state",
    "top_k",
]
