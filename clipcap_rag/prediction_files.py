"""Captions of photos under one condition, written once and kept as JSON Lines, which survive a kill.

A line per photo, in the order of the feature set: row (its place there), image, image_id, seconds (that it took),
caption (null if nothing was written), candidates (best first: caption, clip_similarity, log_probability, agreement,
score, tokens by their ids), and neighbors (the first 16: row, caption, score, index, route). `clipcap-rag evaluate
compare` reads such files, too.
"""

import dataclasses
import hashlib
import itertools
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from clipcap_rag.artifact import disk_errors, read_json, sync, write_json
from clipcap_rag.config import GenerationConfig
from clipcap_rag.evaluated import Photos, Subject
from clipcap_rag.journal import Journal
from clipcap_rag.neighbor_conditions import Condition
from clipcap_rag.neighbors import LISTED, Neighbors
from clipcap_rag.progress import bar
from clipcap_rag.ranker import Ranker
from clipcap_rag.rerank import Candidate

_PHOTOS = 64  # captioned between two entries of the journal
_MADE_FROM = "made_from.json"  # for each file the hash of all that determines it


@dataclass(frozen=True)
class Predictions:
    """A finished file of predictions."""

    path: Path
    captions: list[str]
    seconds_per_image: float

    @classmethod
    def read(cls, path: Path) -> "Predictions":
        captions, seconds = [], 0.0
        for line in _lines(path):
            captions.append(line["caption"] or "")
            seconds += line["seconds"]
        return cls(path, captions, seconds / max(1, len(captions)))

    def lines(self) -> Iterator[dict[str, Any]]:
        """What the file says of each photo."""
        return _lines(self.path)


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    with open(path, encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)


def candidates_of(line: dict[str, Any]) -> list[Candidate]:
    """The candidates of a line, without their embeddings."""
    nothing = np.empty(0, np.float32)
    return [
        Candidate(**{name: found[name] for name in _SCORES} | {"tokens": tuple(found["tokens"])}, embedding=nothing)
        for found in line["candidates"]
    ]


_SCORES = ("caption", "clip_similarity", "log_probability", "score", "agreement", "tokens")


def candidate_json(candidate: Candidate) -> dict[str, Any]:
    """What a line keeps of a candidate."""
    return {name: getattr(candidate, name) for name in _SCORES}


class PredictionFiles:
    """The predictions in the folder of an evaluation; what is there and was made of the same is not written again."""

    def __init__(self, folder: Path):
        self.folder = folder
        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        file = folder / _MADE_FROM
        self._made_from: dict[str, str] = read_json(file, "evaluation") if file.is_file() else {}
        self._given: set[str] = set()  # files that this evaluation refers to

    def captioned(
        self, subject: Subject, photos: Photos, condition: Condition, settings: GenerationConfig, decoding: str
    ) -> Predictions:
        """The photos captioned with the neighbours of a condition; `decoding` names the settings."""
        captioner, ranker = subject.captioner, Ranker(subject.captioner.encoder)

        def write(part: slice) -> list[dict[str, Any]]:
            images = condition.images(photos.embeddings, part)
            ranked = captioner.write(images, condition.neighbors.part(part), photos.digests[part], settings, ranker)
            return [
                {"caption": found[0].caption if found else None, "candidates": [candidate_json(one) for one in found]}
                for found in ranked
            ]

        made_from = (subject.identity, settings.to_json(), condition.blank)
        return self.keep(f"{condition.name}, {decoding}", made_from, photos, condition.neighbors, write)

    def keep(
        self,
        name: str,
        made_from: Any,
        photos: Photos,
        neighbors: Neighbors,
        write: Callable[[slice], list[dict[str, Any]]],
    ) -> Predictions:
        """A file of predictions, written where it is not there yet.

        Args:
            name: of the file, and of the progress bar.
            made_from: what determines the captions beside the photos and their neighbours.
            write: makes the lines of some of the photos, but for what all lines have; `seconds` may be given.
        """
        stamp = _stamp(made_from, photos, neighbors)
        for file, known in self._made_from.items():
            if known == stamp and (self.folder / file).is_file():
                break
        else:
            file = self._file(f"{photos.name}/{name}".replace(", ", "-").replace(" ", "-"))
            path = self.folder / file
            unfinished = path.with_name(path.name + ".partial")
            with disk_errors(path):
                path.parent.mkdir(exist_ok=True)
                if self._made_from.get(file) != stamp:
                    unfinished.unlink(missing_ok=True)
                    path.unlink(missing_ok=True)
                    self._made_from[file] = stamp
                    write_json(self.folder / _MADE_FROM, self._made_from)
                self._complete(unfinished, name, photos, neighbors, write)
                sync(unfinished)
                os.replace(unfinished, path)
        self._given.add(file)
        return Predictions.read(self.folder / file)

    def _file(self, stem: str) -> str:
        """The file of that name, with a number if this evaluation has another of that name."""
        numbered = (f"{stem}-{number}.jsonl" for number in itertools.count(2))
        return next(file for file in itertools.chain([f"{stem}.jsonl"], numbered) if file not in self._given)

    def _complete(
        self,
        unfinished: Path,
        name: str,
        photos: Photos,
        neighbors: Neighbors,
        write: Callable[[slice], list[dict[str, Any]]],
    ) -> None:
        with open(unfinished, "a+b") as file:
            journal = Journal(file)
            with bar(name, len(photos), len(journal), "photo") as progress:
                # whole parts, so that a continued run captions in the batches of one that was not killed
                for start in range(len(journal) // _PHOTOS * _PHOTOS, len(photos), _PHOTOS):
                    part = slice(start, min(start + _PHOTOS, len(photos)))
                    began = time.perf_counter()
                    lines = write(part)
                    seconds = round((time.perf_counter() - began) / len(lines), 6)
                    listed = neighbors.part(part).first(LISTED).listed()
                    for row, line, around in zip(range(start, part.stop), lines, listed, strict=True):
                        if row not in journal:
                            photo = {"row": row, "image": photos.images[row], "image_id": photos.image_ids[row]}
                            shown = {"neighbors": [dataclasses.asdict(neighbor) for neighbor in around]}
                            journal.add(photo | {"seconds": seconds} | line | shown)
                            progress.update(1)


def _stamp(made_from: Any, photos: Photos, neighbors: Neighbors) -> str:
    digest = hashlib.sha256(json.dumps(made_from, sort_keys=True).encode())
    digest.update(repr((photos.images, photos.digests, neighbors.captions)).encode())
    digest.update(repr([(str(index.path.resolve()), index.revision) for index in neighbors.indexes]).encode())
    embeddings = photos.embeddings
    for array in (embeddings.vectors, embeddings.norms, neighbors.rows, neighbors.scores, neighbors.embeddings):
        digest.update(repr(array.shape).encode() + np.ascontiguousarray(array).tobytes())
    for votes in neighbors.photo_votes or ():
        digest.update(repr(votes.captions).encode() + votes.weights.tobytes())
    return digest.hexdigest()
