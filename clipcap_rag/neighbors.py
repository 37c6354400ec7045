"""What was retrieved for images: arrays for a mapper, and one by one for people and for JSON."""

import dataclasses
from dataclasses import dataclass
from itertools import compress

import numpy as np

from clipcap_rag.caption_index import CaptionIndex
from clipcap_rag.caption_votes import Votes, joint_votes

LISTED = 16  # neighbours of an image that results name, of however many were retrieved


@dataclass(frozen=True)
class Neighbor:
    """A retrieved caption.

    Attributes:
        row: where it stands in the index.
        caption: its words.
        score: the cosine by which it was found: of the image with the caption, or with the caption's own photo.
        index: the name of the index.
        route: `text` or `image`, what was compared.
    """

    row: int
    caption: str
    score: float
    index: str
    route: str = "text"


@dataclass(frozen=True)
class Neighbors:
    """Up to K neighbours for each of B images, best first; rows of -1 are absent.

    Attributes:
        rows: [B, K] int64, positions in the index that `sources` names.
        scores: [B, K] float32 cosines with the captions, which a mapper reads whatever found them.
        sources: [B, K] int64, position in `indexes`.
        embeddings: [B, K, D] float32 unit length, zero where absent.
        captions: per image, the captions of the neighbours that are present.
        indexes: those that were searched.
        image_scores: [B, K] float32 cosines with the captions' photos, by which they were found; NaN where a caption
            was found by its own words, None where all were.
        photo_votes: per image, what the captions of the photos most like it say; None where no photos were asked.
    """

    rows: np.ndarray
    scores: np.ndarray
    sources: np.ndarray
    embeddings: np.ndarray
    captions: list[list[str]]
    indexes: list[CaptionIndex]
    image_scores: np.ndarray | None = None
    photo_votes: list[Votes] | None = None

    @property
    def mask(self) -> np.ndarray:
        """[B, K] bool, True where a neighbour is present."""
        return self.rows >= 0

    def present_scores(self) -> list[np.ndarray]:
        """Per image, the cosines of the neighbours that are present, as `captions` has their captions."""
        return [own[mask] for own, mask in zip(self.scores, self.mask, strict=True)]

    def votes(self) -> list[Votes]:
        """What all captions that were found say about each image."""
        photos = self.photo_votes or [Votes()] * len(self.rows)
        return [joint_votes(*found) for found in zip(*self.matches(), photos, strict=True)]

    def matches(self) -> tuple[list[list[str]], list[np.ndarray]]:
        """Per image, the captions that count for how they match, with their cosines: all, but where photos vote.

        There, those found by their photo have a vote as it is.
        """
        scores = self.present_scores()
        if self.photo_votes is None or self.image_scores is None:
            return self.captions, scores
        by_words = [np.isnan(own[mask]) for own, mask in zip(self.image_scores, self.mask, strict=True)]
        captions = [list(compress(listed, own)) for listed, own in zip(self.captions, by_words, strict=True)]
        return captions, [own[kept] for own, kept in zip(scores, by_words, strict=True)]

    def part(self, images: slice) -> "Neighbors":
        """The neighbours of some of the images."""
        arrays = {name: array[images] for name, array in self._arrays().items()}
        votes = self.photo_votes and self.photo_votes[images]
        return dataclasses.replace(self, **arrays, captions=self.captions[images], photo_votes=votes)

    def first(self, count: int) -> "Neighbors":
        """The best `count` neighbours of each image; all of them for 0."""
        if not count or count >= self.rows.shape[1]:
            return self
        arrays = {name: array[:, :count] for name, array in self._arrays().items()}
        return dataclasses.replace(self, **arrays, captions=[listed[:count] for listed in self.captions])

    def versions(self, kept: np.ndarray) -> "Neighbors":
        """Those of one image in S versions, each with the ones that `kept` [S, K] says.

        A caption that is left out votes no more, and nothing does where all are.
        """
        arrays = {name: np.repeat(array, len(kept), axis=0) for name, array in self._arrays().items()}
        arrays["rows"] = np.where(kept, arrays["rows"], -1)
        captions = [list(compress(self.captions[0], version)) for version in kept]
        votes = self.photo_votes and [
            self.photo_votes[0].without(frozenset(self.captions[0]) - frozenset(left)) if left else Votes()
            for left in captions
        ]
        return dataclasses.replace(self, **arrays, captions=captions, photo_votes=votes)

    def _arrays(self) -> dict[str, np.ndarray]:
        """What holds a row for each image, by name, but for the captions."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, np.ndarray)}

    def listed(self) -> list[list[Neighbor]]:
        """The neighbours of each image one by one, best first, for people and for JSON."""
        image_scores = np.full_like(self.scores, np.nan) if self.image_scores is None else self.image_scores
        by_image = ~np.isnan(image_scores)
        scores = np.where(by_image, image_scores, self.scores)
        return [
            [
                Neighbor(int(row), caption, float(score), self.indexes[source].name, "image" if image else "text")
                for row, caption, score, source, image in zip(*columns, strict=False)
            ]
            for columns in zip(self.rows, self.captions, scores, self.sources, by_image, strict=True)
        ]
