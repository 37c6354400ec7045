"""What comes of one photo: its caption, the candidates, the neighbours, or an error."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from clipcap_rag.abstention import Confidence
from clipcap_rag.evidence import Evidence
from clipcap_rag.neighbors import Neighbor
from clipcap_rag.prefix_words import PrefixWord
from clipcap_rag.rerank import Candidate


@dataclass(frozen=True)
class CaptionResult:
    """What came of one image.

    Attributes:
        image: its name.
        caption: the best of `candidates`, or None.
        candidates: what was written, without repetitions, best first.
        neighbors: what was retrieved for it, best first.
        error: a sentence when it could not be captioned, and then `caption` is None.
        prefix_words: for each prefix vector the nearest words, where they were asked for.
        evidence: what the caption rests on, where it was asked for.
        confidence: how sure the caption is, where a calibration was given.
    """

    image: str
    caption: str | None
    candidates: list[Candidate] = field(default_factory=list)
    neighbors: list[Neighbor] = field(default_factory=list)
    error: str | None = None
    prefix_words: list[list[PrefixWord]] | None = None
    evidence: Evidence | None = None
    confidence: Confidence | None = None

    @property
    def caption_embedding(self) -> np.ndarray | None:
        """[D] float32, the CLIP text embedding of the caption, of unit length; None where there is no caption."""
        return self.candidates[0].embedding if self.candidates else None

    def to_json(self) -> dict[str, Any]:
        """The object that `clipcap-rag caption --json` prints for this image."""
        shown = {
            "image": self.image,
            "caption": self.caption,
            "candidates": [candidate.to_json() for candidate in self.candidates],
            "neighbors": [dataclasses.asdict(neighbor) for neighbor in self.neighbors],
            "error": self.error,
        }
        if self.prefix_words is not None:
            shown["prefix_words"] = [[dataclasses.asdict(word) for word in words] for words in self.prefix_words]
        if self.evidence is not None:
            shown["evidence"] = self.evidence.to_json()
        if self.confidence is not None:
            shown |= dataclasses.asdict(self.confidence)
        return shown
