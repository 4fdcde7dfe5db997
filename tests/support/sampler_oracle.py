"""The logits that sampling settings leave, by transformers."""

from torch import Tensor
from transformers.generation import logits_process as oracle

from tilewright.types import SamplingParams


def warped(logits: Tensor, params: SamplingParams) -> Tensor:
    """Logits [V] after temperature, top-k, top-p and min-p; -inf where a token is left out."""
    left: Tensor = oracle.TemperatureLogitsWarper(params.temperature)(None, logits[None])
    if params.top_k:
        left = oracle.TopKLogitsWarper(params.top_k)(None, left)
    if params.top_p < 1.0:
        left = oracle.TopPLogitsWarper(params.top_p)(None, left)
    if params.min_p:
        left = oracle.MinPLogitsWarper(params.min_p)(None, left)
    return left[0]
