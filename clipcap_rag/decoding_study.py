"""The study of decodings: greedy, beams, and samples put in order in three ways, each with its time, to choose from.

The largest number of samples is drawn once; a smaller set is the first of them, which is what asking for so many gives.
"""

import dataclasses
import time
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from clipcap_rag.config import GenerationConfig
from clipcap_rag.evaluated import Photos, Subject
from clipcap_rag.generation import Written
from clipcap_rag.neighbor_conditions import Condition
from clipcap_rag.prediction_files import PredictionFiles, Predictions, candidate_json, candidates_of
from clipcap_rag.progress import say
from clipcap_rag.ranker import Ranker
from clipcap_rag.rerank import Candidate, RerankWeights, by_likelihood, distinct, reweighted

BEAMS = (2, 3, 4, 5)
SCORERS = ("log-probability", "CLIP", "both")
_TIMED = 16  # photos on which the time of each number of samples is taken
_LISTED = 16  # candidates of a photo that the predictions of a set name


class DecodingStudy:
    """The decodings of one checkpoint on photos with the neighbours of one condition."""

    def __init__(
        self,
        subject: Subject,
        photos: Photos,
        condition: Condition,
        generation: GenerationConfig,
        files: PredictionFiles,
        sizes: Sequence[int],
    ):
        """sizes: numbers of samples, the greedy caption counted among them: `candidates` with one beam."""
        self._subject, self._photos, self._condition, self._files = subject, photos, condition, files
        self._generation, self._sizes = generation, sorted(set(sizes))
        self._sampling = self._sample_settings(self._sizes[-1])

    def predictions(self) -> Iterator[tuple[str, Predictions]]:
        """Yields each decoding by name."""
        settings = {"greedy": dataclasses.replace(self._generation, decoding="greedy")}
        for beams in BEAMS:
            settings[f"beam {beams}"] = dataclasses.replace(self._generation, decoding="beam", num_beams=beams)
        for name, chosen in settings.items():
            yield name, self._files.captioned(self._subject, self._photos, self._condition, chosen, name)
        for size in self._sizes:
            for scorer in SCORERS:
                yield f"{size} by {scorer}", self._cut(size, scorer)

    def _sample_settings(self, size: int) -> GenerationConfig:
        return dataclasses.replace(self._generation, decoding="sample", candidates=size, num_beams=1)

    def _cut(self, size: int, scorer: str) -> Predictions:
        def write(part: slice) -> list[dict[str, Any]]:
            seconds = self._seconds[size][scorer != "log-probability"]
            return [
                {"caption": best[0]["caption"] if best else None, "candidates": best, "seconds": seconds}
                for best in self._best[size, scorer][part]
            ]

        made_from = (self._subject.identity, self._sampling.to_json(), size, scorer)
        name = f"{self._condition.name}, {size} by {scorer}"
        return self._files.keep(name, made_from, self._photos, self._condition.neighbors, write)

    @cached_property
    def _samples(self) -> Predictions:
        """All samples; `drawn` says of each when it came first, and a text written in two ways stands there twice."""
        captioner, ranker = self._subject.captioner, Ranker(self._subject.captioner.encoder)

        def write(part: slice) -> list[dict[str, Any]]:
            images = self._condition.images(self._photos.embeddings, part)
            neighbors, digests = self._condition.neighbors.part(part), self._photos.digests[part]
            written = captioner.written(images, neighbors, digests, self._sampling)
            agreed = ranker.agreements(written, captioner.judges(neighbors))
            parts = zip(written, images.vectors, agreed, strict=True)
            return [_as_drawn(found, ranker, image, agreements) for found, image, agreements in parts]

        name = f"{self._condition.name}, {self._sizes[-1]} samples"
        made_from = (self._subject.identity, self._sampling.to_json(), "as drawn")
        return self._files.keep(name, made_from, self._photos, self._condition.neighbors, write)

    @cached_property
    def _best(self) -> dict[tuple[int, str], list[list[dict[str, Any]]]]:
        """For each number of samples and each scorer, the first candidates of every photo."""
        best = {(size, scorer): [] for size in self._sizes for scorer in SCORERS}
        for line in self._samples.lines():
            drawn = [candidate["drawn"] for candidate in line["candidates"]]
            candidates = sorted(zip(drawn, candidates_of(line), strict=True), key=lambda pair: pair[0])
            for size in self._sizes:
                among = distinct([candidate for number, candidate in candidates if number < size])
                for scorer in SCORERS:
                    best[size, scorer].append([candidate_json(one) for one in self._order(among, scorer)[:_LISTED]])
        return best

    def _order(self, candidates: Sequence[Candidate], scorer: str) -> list[Candidate]:
        likeliest = sorted(candidates, key=lambda found: -found.mean_log_probability)
        if scorer == "log-probability":
            return likeliest
        weights = RerankWeights(0.0, 0.0)
        if scorer == "both":
            weights = RerankWeights(self._generation.log_probability_weight, self._generation.agreement_weight)
        return reweighted(likeliest, self._subject.captioner.encoder.logit_scale, weights)

    @cached_property
    def _seconds(self) -> dict[int, tuple[float, float]]:
        """For each number of samples the seconds a photo takes, without and with CLIP, on some of the photos."""
        captioner, part = self._subject.captioner, slice(0, _TIMED)
        images = self._condition.images(self._photos.embeddings, part)
        neighbors, digests, seconds = self._condition.neighbors.part(part), self._photos.digests[part], {}
        say(f"timing {', '.join(map(str, self._sizes))} samples on {len(digests)} photos")
        for size in self._sizes:
            settings, began = self._sample_settings(size), time.perf_counter()
            written = captioner.written(images, neighbors, digests, settings)
            drawn = time.perf_counter()
            Ranker(captioner.encoder).rank(written, images.vectors, settings, captioner.judges(neighbors))
            ranked = time.perf_counter()
            seconds[size] = round((drawn - began) / len(digests), 6), round((ranked - began) / len(digests), 6)
        return seconds


def _as_drawn(
    written: Sequence[Written], ranker: Ranker, image: np.ndarray, agreements: Sequence[float]
) -> dict[str, Any]:
    """The line of one photo: each text once for each way in which it was written."""
    first: dict[tuple[str, float], int] = {}
    kept = [
        number
        for number, found in enumerate(written)
        if found.caption and first.setdefault((found.caption, found.log_probability), number) == number
    ]
    texts, agreed = [written[number] for number in kept], [agreements[number] for number in kept if agreements]
    candidates = [
        candidate_json(one) | {"drawn": first[one.caption, one.log_probability]}
        for one in by_likelihood(texts, ranker.embed([found.caption for found in texts]), image, agreed)
    ]
    return {"caption": candidates[0]["caption"] if candidates else None, "candidates": candidates}
