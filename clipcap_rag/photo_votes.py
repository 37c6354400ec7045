"""What the captions of photos that look like an image say: which photos are asked, what counts, what says it best."""

from collections import Counter
from collections.abc import Sequence
from itertools import islice
from typing import NamedTuple

import numpy as np

from clipcap_rag.caption_votes import Votes, photo_weights, trunk_weights
from clipcap_rag.index_ngrams import ngram_weights
from clipcap_rag.retrievable import Exclusion, Hit, Retrievable

_VOTING = 2  # photos whose captions vote, for each neighbour caption that is retrieved
_COMPARED = 6  # likewise, nearest photos that are compared by features of the trunk
_LEADING = 8  # captions that stand before those found by their own words
_CROWD = 100  # photos without which features of the trunk are not standardised


class _Photo(NamedTuple):
    """A photo that was found: weight x cosine, the number of its index and its place there."""

    score: float
    number: int
    place: int


class Said(NamedTuple):
    """What the photos that were asked say of an image: their votes, and the captions that agree most with these."""

    votes: Votes
    best: list[Hit]


class PhotoVotes:
    """The photos that indexes hold, asked what images like them show."""

    def __init__(self, allowed: Retrievable):
        """allowed: the indexes; those without photos or of weight 0 have no vote."""
        self._allowed = allowed

    @property
    def _asked(self) -> list[int]:
        """The numbers of the indexes that have a vote as they are now."""
        return [
            number
            for number, (index, weight) in enumerate(zip(self._allowed.indexes, self._allowed.weights, strict=True))
            if index.files.images is not None and weight > 0
        ]

    def __bool__(self) -> bool:
        """Whether there are photos to ask."""
        return bool(self._asked)

    @property
    def trunk_dim(self) -> int | None:
        """Width T of the features of the trunk that all photos have; None where some have none, or others."""
        features = [self._allowed.indexes[number].files.images.trunk for number in self._asked]
        widths = {None if part is None else part.shape[1] for part in features}
        return widths.pop() if len(widths) == 1 else None

    def votes(
        self, queries: np.ndarray, k: int, exclusions: Sequence[Exclusion], trunk: np.ndarray | None
    ) -> list[Said]:
        """For each query, what the captions of 2 k photos say.

        They are the nearest, or of the 6 k nearest those that weigh most by their features of the trunk.

        Args:
            queries: [B, D] float32 image embeddings of unit length.
            k: neighbour captions per image.
            exclusions: per query, what has no vote.
            trunk: [B, T] features of the images, T being `trunk_dim`; None compares embeddings.
        """
        count = k * (_VOTING if trunk is None else _COMPARED)
        nearest = self._nearest(queries, count, exclusions)
        features = [None] * len(queries) if trunk is None else trunk
        return [
            self._said(photos, self._weights(query, photos, own), exclusion, k * _VOTING)
            for query, photos, own, exclusion in zip(queries, nearest, features, exclusions, strict=True)
        ]

    def _nearest(self, queries: np.ndarray, count: int, exclusions: Sequence[Exclusion]) -> list[list[_Photo]]:
        """Per query the nearest photos of all indexes, its own left out."""
        found: list[list[_Photo]] = [[] for _ in queries]
        for number in self._asked:
            index, weight = self._allowed.indexes[number], self._allowed.weights[number]
            cosines, places = index.nearest_photos(queries, count + 1, self._allowed.among(number))
            for query, (near, own) in enumerate(zip(cosines.tolist(), places.tolist(), strict=True)):
                excluded = exclusions[query].image_id
                ids = index.files.images.ids.take(own).to_pylist() if excluded is not None else [""] * len(own)
                found[query] += [
                    _Photo(weight * cosine, number, place)
                    for cosine, place, image_id in zip(near, own, ids, strict=True)
                    if image_id != excluded
                ]
        return [sorted(photos, key=lambda photo: -photo.score)[:count] for photos in found]

    def _weights(self, query: np.ndarray, photos: Sequence[_Photo], features: np.ndarray | None) -> np.ndarray:
        """How much each photo [P] counts."""
        trust = np.array([self._allowed.weights[photo.number] for photo in photos])
        if features is not None and len(photos) >= _CROWD:
            return trunk_weights(features, self._gathered(photos, "trunk"), trust)
        return photo_weights(query, self._gathered(photos, "vectors"), trust) if photos else trust

    def _gathered(self, photos: Sequence[_Photo], name: str) -> np.ndarray:
        """The `vectors` [P, D] or features of the `trunk` [P, T] of photos, float32."""
        rows = [getattr(self._allowed.indexes[photo.number].files.images, name)[photo.place] for photo in photos]
        return np.stack(rows).astype(np.float32)

    def _said(self, photos: Sequence[_Photo], weights: np.ndarray, exclusion: Exclusion, count: int) -> Said:
        """What the captions of those `count` photos say that weigh most."""
        chosen = sorted(np.argsort(-np.abs(weights), kind="stable")[:count].tolist())
        found, said = [], []
        for number in self._asked:
            voters = [place for place in chosen if photos[place].number == number]
            places = [photos[place].place for place in voters]
            own = self._allowed.indexes[number].rows_of_photos(places, self._allowed.among(number))
            voter = {row: place for place, rows in zip(voters, own, strict=True) for row in rows.tolist()}
            cosines = [photos[place].score / self._allowed.weights[number] for place in voter.values()]
            hits = self._allowed.hits(number, "image", cosines, np.array(list(voter), np.int64), exclusion)
            kept = list(islice(hits, min(self._allowed.most[number], len(voter))))
            shared = Counter(voter[hit.row] for hit in kept)
            found += kept
            said += [weights[voter[hit.row]] / shared[voter[hit.row]] for hit in kept]
        votes = Votes([hit.caption for hit in found], np.array(said))
        return Said(votes, self._best(found, votes))

    def _best(self, hits: Sequence[Hit], votes: Votes) -> list[Hit]:
        """The captions of different words that agree most with the votes, best first."""
        ngrams = ngram_weights(self._allowed.indexes)
        total = ngrams.total(votes)
        agreements = np.array([ngrams.agreement(hit.caption, total) for hit in hits])
        best: dict[str, Hit] = {}
        for place in np.argsort(-agreements, kind="stable").tolist():
            best.setdefault(hits[place].text, hits[place])
            if len(best) == _LEADING:
                break
        return list(best.values())
