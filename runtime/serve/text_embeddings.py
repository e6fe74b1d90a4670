"""How Text Embeddings Inference answers: scores as its clients expect them, and what it says of a model."""

from __future__ import annotations

import math

import bonnx
from bonnx.errors import InputError

from .rows import label_name
from .service import Service

__all__ = ["model_info", "tei_score"]


def tei_score(service: Service, score: float, *, raw: bool) -> float:
    """A score as that server gives it: between 0 and 1, unless the client asks for raw scores.

    Raises:
        InputError: raw scores of a model whose scores are probabilities.
    """
    if service.engine.manifest.scoring.activation != "none":
        if raw:
            raise InputError("raw_scores: this model's scores are probabilities from the start; leave it out")
        return score
    if raw or math.isnan(score):
        return score
    # Written so that neither large nor small scores overflow.
    return 1 / (1 + math.exp(-score)) if score >= 0 else math.exp(score) / (1 + math.exp(score))


def model_info(service: Service) -> dict[str, object]:
    """What that server's `/info` says."""
    engine, settings = service.engine, service.settings
    manifest, label = engine.manifest, label_name(service)
    return {
        "model_id": service.name,
        "model_sha": None,
        "model_dtype": manifest.precision,
        "model_type": {"reranker": {"id2label": {"0": label}, "label2id": {label: 0}}},
        "max_concurrent_requests": settings.max_queue,
        "max_input_length": manifest.limits.max_tokens,
        "max_batch_tokens": settings.batch_tokens,
        "max_batch_requests": None,
        "max_client_batch_size": min(manifest.limits.max_candidates, settings.max_queue),
        "auto_truncate": False,
        "tokenization_workers": 2,
        "version": bonnx.__version__,
        "sha": None,
        "docker_label": None,
    }
