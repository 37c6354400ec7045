"""What neighbours a photo is shown: those of retrieval, and worse ones, to see what a captioner makes of them.

The ways of being worse follow studies of how captioners bear retrieval that errs (Li et al. 2024, arXiv 2406.02265).
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from clipcap_rag.caption_index import CaptionIndex
from clipcap_rag.embeddings import Embeddings
from clipcap_rag.neighbors import Neighbors
from clipcap_rag.retrievable import Exclusion
from clipcap_rag.retriever import Retriever
from clipcap_rag.sources import normalize_caption

SWEEP = (1, 2, 4, 8, 16, 32)  # numbers of nearest captions that are tried
LOW_RANK = 40  # the first of the low ranks, counted from 1
_TRIES = 20  # draws of random captions until none is a photo's own


@dataclass(frozen=True)
class Condition:
    """Neighbours of N photos and what tables call them; `blank` shows zeros in place of the image embedding."""

    name: str
    neighbors: Neighbors
    blank: bool = False

    def images(self, embeddings: Embeddings, part: slice) -> Embeddings:
        """What is shown of some of the images."""
        shown = embeddings.part(part)
        return Embeddings(np.zeros_like(shown.vectors), shown.norms) if self.blank else shown

    @property
    def shown(self) -> float:
        """Neighbours per photo."""
        return float(self.neighbors.mask.sum() / max(1, len(self.neighbors.rows)))


def none(images: np.ndarray) -> Condition:
    """No retrieval."""
    return Condition("none", Retriever([]).search(images, 0))


def placed(neighbors: Neighbors, places: np.ndarray) -> Neighbors:
    """The neighbours that stand at `places` [B, K], counted from 0; places behind the last one stay empty.

    Photos have no vote among them.
    """
    arrays = {
        name: np.take_along_axis(getattr(neighbors, name), places, 1)
        for name in ("rows", "scores", "sources", "image_scores")
        if getattr(neighbors, name) is not None
    }
    embeddings = np.take_along_axis(neighbors.embeddings, places[..., None], 1)
    captions = [
        [listed[place] for place in row if place < len(listed)]
        for listed, row in zip(neighbors.captions, places.tolist(), strict=True)
    ]
    return dataclasses.replace(neighbors, embeddings=embeddings, captions=captions, photo_votes=None, **arrays)


def nearest(neighbors: Neighbors, first: int, count: int) -> Neighbors:
    """`count` neighbours from rank `first`, counted from 0."""
    last = neighbors.rows.shape[1]
    return placed(neighbors, np.tile(np.arange(last)[first : first + count], (len(neighbors.rows), 1)))


def shuffled(neighbors: Neighbors, random: np.random.Generator) -> Neighbors:
    """The same neighbours in another order for each photo."""
    keys = np.where(neighbors.mask, random.random(neighbors.rows.shape), np.inf)  # the absent stay behind
    mixed = placed(neighbors, np.argsort(keys, axis=1, kind="stable"))
    return dataclasses.replace(mixed, photo_votes=neighbors.photo_votes)


def repeated(neighbors: Neighbors) -> Neighbors:
    """The nearest one in all places."""
    return placed(neighbors, np.zeros_like(neighbors.rows))


def of_rows(index: CaptionIndex, rows: np.ndarray, images: np.ndarray) -> Neighbors:
    """Rows [B, K] of an index as neighbours of image embeddings [B, D], with their true cosines; -1 is none."""
    rows = np.take_along_axis(rows, np.argsort(rows < 0, axis=1, kind="stable"), 1)
    embeddings = index.embeddings(rows)
    scores = np.einsum("bd,bkd->bk", images, embeddings)
    captions = [index.captions(row[row >= 0]) for row in rows]
    return Neighbors(rows, scores, np.zeros_like(rows), embeddings, captions, [index])


def random_rows(index: CaptionIndex, image_ids: Sequence[str], k: int, random: np.random.Generator) -> np.ndarray:
    """k random rows [B, k] of an index for each photo, none of its own image; -1 where no other was found."""
    rows = index.random_rows(len(image_ids) * k, random)
    owners = np.repeat(np.array(image_ids, object), k)
    for _ in range(_TRIES):
        own = np.flatnonzero(np.array(index.image_ids(rows), object) == owners)
        if not len(own):
            return rows.reshape(-1, k)
        rows[own] = index.random_rows(len(own), random)
    rows[np.array(index.image_ids(rows), object) == owners] = -1
    return rows.reshape(-1, k)


def random_neighbors(
    index: CaptionIndex, images: np.ndarray, image_ids: Sequence[str], k: int, random: np.random.Generator
) -> Neighbors:
    """k random captions of the index for each photo."""
    return of_rows(index, random_rows(index, image_ids, k, random), images)


def wrong_majority(
    index: CaptionIndex,
    found: Neighbors,
    images: np.ndarray,
    image_ids: Sequence[str],
    k: int,
    random: np.random.Generator,
) -> Neighbors:
    """The nearest caption and k - 1 of one other random image: its own, then those nearest to them in meaning."""
    groups = _families(index, random_rows(index, image_ids, 1, random)[:, 0])
    centres = np.stack([index.embeddings(group).sum(axis=0) for group in groups])
    centres /= np.maximum(np.linalg.norm(centres, axis=1, keepdims=True), 1e-9)
    exclusions = [Exclusion(image_id, frozenset()) for image_id in image_ids]
    similar = Retriever([index]).search(centres, k - 1, exclusions)
    rows = np.full((len(images), k), -1, np.int64)
    rows[:, :1] = found.rows[:, :1]
    for place, (group, close) in enumerate(zip(groups, similar.rows, strict=True)):
        both = np.concatenate([group, close[close >= 0]])
        distinct: dict[str, int] = {}
        for row, caption in zip(both.tolist(), index.captions(both), strict=True):
            distinct.setdefault(normalize_caption(caption), row)
        majority = list(distinct.values())[: k - 1]
        rows[place, 1 : 1 + len(majority)] = majority
    return of_rows(index, rows, images)


def _families(index: CaptionIndex, drawn: np.ndarray) -> list[np.ndarray]:
    """For each row all rows of its image, itself first; none for -1."""
    ids = index.image_ids(drawn[drawn >= 0])
    rows = index.rows_of_images({image_id for image_id in ids if image_id is not None})
    siblings: dict[str | None, list[int]] = {None: []}
    for row, image_id in zip(rows.tolist(), index.image_ids(rows), strict=True):
        siblings.setdefault(image_id, []).append(row)
    owners, families = iter(ids), []
    for row in drawn.tolist():
        family = [] if row < 0 else [row, *(other for other in siblings[next(owners)] if other != row)]
        families.append(np.array(family, np.int64))
    return families


def robustness(
    name: str,
    index: CaptionIndex,
    search: Callable[[int], Neighbors],
    images: np.ndarray,
    image_ids: Sequence[str],
    k: int,
    seed: int,
) -> dict[str, Condition]:
    """All conditions of one index by short names; `nearest K` is what retrieval gives, for several K.

    Args:
        name: of the index in tables.
        search: gives so many nearest neighbours of each photo, as far as the index has them.
        images: [B, D] of unit length.
        k: neighbours of each photo, at least 1.
    """
    found, counts = search(LOW_RANK - 1 + k), {count: search(count) for count in sorted({*SWEEP, k})}
    top = counts[k]
    fixed = np.tile(random_rows(index, [""], k, _random(seed, 1)), (len(images), 1))
    neighbors = {f"nearest {count}": shown for count, shown in counts.items()} | {
        f"ranks {LOW_RANK}-{LOW_RANK - 1 + k}": nearest(found, LOW_RANK - 1, k),
        "random": random_neighbors(index, images, image_ids, k, _random(seed, 0)),
        "random but fixed": of_rows(index, fixed, images),
        "shuffled": shuffled(top, _random(seed, 2)),
        "nearest repeated": repeated(top),
        "wrong majority": wrong_majority(index, found, images, image_ids, k, _random(seed, 3)),
    }
    conditions = {short: Condition(f"{short} of {name}", shown) for short, shown in neighbors.items()}
    conditions["blank image"] = Condition(f"blank image, nearest {k} of {name}", top, blank=True)
    return conditions | {"none": none(images)}


def _random(seed: int, number: int) -> np.random.Generator:
    """Random numbers of one condition, whatever the others draw."""
    return np.random.default_rng([seed, number])
