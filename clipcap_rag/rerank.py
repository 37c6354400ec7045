"""Candidates in the order of how well they fit the image: CLIP similarity and the language model's own likelihood."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from clipcap_rag.generation import Written


@dataclass(frozen=True)
class Candidate:
    """One caption: its cosine with the image, its log-probability (nats, end token included) and its rank score."""

    caption: str
    clip_similarity: float
    log_probability: float
    score: float


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
    written: Sequence[Written], similarities: np.ndarray, logit_scale: float, log_probability_weight: float
) -> list[Candidate]:
    """Best first by clip_similarity + weight x log_probability / logit_scale; ties keep their order.

    CLIP's logit scale is the unit in which it was trained to compare cosines (Radford et al. 2021, arXiv 2103.00020),
    so dividing by it makes one weight serve encoders whose cosines spread differently.
    """
    candidates = [
        Candidate(
            candidate.caption,
            float(similarity),
            candidate.log_probability,
            float(similarity) + log_probability_weight * candidate.log_probability / logit_scale,
        )
        for candidate, similarity in zip(written, similarities, strict=True)
    ]
    return sorted(candidates, key=lambda candidate: -candidate.score)


def by_likelihood(written: Sequence[Written], similarities: np.ndarray) -> list[Candidate]:
    """Best first by mean log-probability per token, the order of greedy and beam search; that mean is the score."""
    candidates = [
        Candidate(
            candidate.caption,
            float(similarity),
            candidate.log_probability,
            candidate.log_probability / len(candidate.tokens),
        )
        for candidate, similarity in zip(written, similarities, strict=True)
    ]
    return sorted(candidates, key=lambda candidate: -candidate.score)
