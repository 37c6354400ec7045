"""Candidates in the order of how well they fit the image: CLIP similarity and the language model's own likelihood."""

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from clipcap_rag.generation import Written


@dataclass(frozen=True)
class Candidate:
    """One caption.

    Attributes:
        clip_similarity: its cosine with the image.
        log_probability: in nats, over `tokens`.
        score: what it is ranked by, larger is better.
        tokens: what was written, with the end token; those of a prompt are not among them.
        embedding: [D] float32, its CLIP text embedding of unit length.
    """

    caption: str
    clip_similarity: float
    log_probability: float
    score: float
    tokens: tuple[int, ...]
    embedding: np.ndarray = field(compare=False, repr=False)

    @property
    def mean_log_probability(self) -> float:
        """Nats per token, the end token included."""
        return self.log_probability / len(self.tokens)

    def to_json(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("caption", "clip_similarity", "log_probability", "score")}


def distinct(written: Sequence[Written]) -> list[Written]:
    """Drops empty captions and repeated strings; of equal strings the likeliest stays, in the place of the first."""
    best: dict[str, Written] = {}
    for candidate in written:
        if candidate.caption:
            known = best.setdefault(candidate.caption, candidate)
            if candidate.log_probability > known.log_probability:
                best[candidate.caption] = candidate
    return list(best.values())


def by_similarity(
    written: Sequence[Written],
    embeddings: np.ndarray,
    image: np.ndarray,
    logit_scale: float,
    log_probability_weight: float,
) -> list[Candidate]:
    """Best first by clip_similarity + weight x mean log-probability / logit_scale; ties keep their order.

    CLIP's logit scale is the unit in which it was trained to compare cosines (Radford et al. 2021, arXiv 2103.00020),
    so dividing by it makes one weight serve encoders whose cosines spread differently. `clipcap-rag evaluate
    --rerank-sweep` finds the weight for a model. The sum of log-probabilities would favour
    short captions.

    Args:
        embeddings: [N, D] of the N captions, unit length.
        image: [D], unit length.
    """
    return reweighted(by_likelihood(written, embeddings, image), logit_scale, log_probability_weight)


def reweighted(candidates: Sequence[Candidate], logit_scale: float, log_probability_weight: float) -> list[Candidate]:
    """Candidates as `by_similarity` orders them under this weight."""
    unit = log_probability_weight / logit_scale
    return _best_first(
        dataclasses.replace(found, score=found.clip_similarity + unit * found.mean_log_probability)
        for found in candidates
    )


def by_likelihood(written: Sequence[Written], embeddings: np.ndarray, image: np.ndarray) -> list[Candidate]:
    """Best first by mean log-probability per token, the order of greedy and beam search; that mean is the score."""
    return _best_first(
        Candidate(
            found.caption,
            float(similarity),
            found.log_probability,
            found.log_probability / len(found.tokens),
            found.tokens,
            embedding,
        )
        for found, similarity, embedding in zip(written, embeddings @ image, embeddings, strict=True)
    )


def _best_first(candidates: Iterable[Candidate]) -> list[Candidate]:
    return sorted(candidates, key=lambda found: -found.score)
