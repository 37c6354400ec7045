"""Candidates in the order of how well they fit the image: CLIP, the language model, and the captions of neighbours."""

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from clipcap_rag.generation import Written


class RerankWeights(NamedTuple):
    """What counts beside CLIP similarity, in units of CLIP's logit: nats per token, and agreement with neighbours."""

    log_probability: float
    agreement: float

    @property
    def agreement_share(self) -> float:
        """What agreement counts beside a mean log-probability that counts 1."""
        return self.agreement / self.log_probability if self.log_probability else 0.0


@dataclass(frozen=True)
class Candidate:
    """One caption.

    Attributes:
        clip_similarity: its cosine with the image.
        log_probability: in nats, over `tokens`.
        score: what it is ranked by, larger is better.
        tokens: what was written, with the end token; those of a prompt are not among them.
        embedding: [D] float32, its CLIP text embedding of unit length.
        agreement: 0 to about 1, with the captions of the neighbours (`Ranker.agreements`); 0 where there are none.
    """

    caption: str
    clip_similarity: float
    log_probability: float
    score: float
    tokens: tuple[int, ...]
    embedding: np.ndarray = field(compare=False, repr=False)
    agreement: float = 0.0

    @property
    def mean_log_probability(self) -> float:
        """Nats per token, the end token included."""
        return self.log_probability / len(self.tokens)

    def to_json(self) -> dict[str, Any]:
        return {
            name: getattr(self, name)
            for name in ("caption", "clip_similarity", "log_probability", "agreement", "score")
        }


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
    weights: RerankWeights,
    agreements: Sequence[float] = (),
) -> list[Candidate]:
    """Best first as `reweighted` orders them.

    Args:
        embeddings: [N, D] of the N captions, unit length.
        image: [D], unit length.
        agreements: of the N captions with those of the neighbours; empty where there are none.
    """
    return reweighted(by_likelihood(written, embeddings, image, agreements), logit_scale, weights)


def reweighted(candidates: Sequence[Candidate], logit_scale: float, weights: RerankWeights) -> list[Candidate]:
    """Best first by clip_similarity + (w1 x mean log-probability + w2 x agreement) / logit_scale.

    Ties keep their order. CLIP's logit scale is the unit in which it was trained to compare cosines (Radford et al.
    2021, arXiv 2103.00020), so dividing by it makes one weight serve encoders whose cosines spread differently.
    `clipcap-rag evaluate --rerank-sweep` finds the weights for a model. The sum of log-probabilities would favour short
    captions. Agreement with the captions of similar photos follows Devlin et al. 2015 (arXiv 1505.04467), who copied
    the caption that agrees most.
    """
    return _best_first(
        dataclasses.replace(
            found,
            score=found.clip_similarity
            + (weights.log_probability * found.mean_log_probability + weights.agreement * found.agreement)
            / logit_scale,
        )
        for found in candidates
    )


def by_likelihood(
    written: Sequence[Written],
    embeddings: np.ndarray,
    image: np.ndarray,
    agreements: Sequence[float] = (),
    agreement_share: float = 0.0,
) -> list[Candidate]:
    """Best first by mean log-probability per token + agreement_share x agreement, the order of beam search."""
    return _best_first(
        Candidate(
            found.caption,
            float(similarity),
            found.log_probability,
            found.log_probability / len(found.tokens) + agreement_share * agreement,
            found.tokens,
            embedding,
            agreement,
        )
        for found, similarity, embedding, agreement in zip(
            written, embeddings @ image, embeddings, agreements or [0.0] * len(written), strict=True
        )
    )


def _best_first(candidates: Iterable[Candidate]) -> list[Candidate]:
    return sorted(candidates, key=lambda found: -found.score)
