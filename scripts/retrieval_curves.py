"""What retrieval brings: CIDEr against the number of neighbours, and against the size of the index.

The first index is used with more and more neighbours, then cut to a random part of its captions, whole, and with the
other indexes added one after another. Captions are kept in OUT: a stopped run continues. Neighbours that carry the id
of a captioned photo are never retrieved.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from clipcap_rag.artifact import write_json
from clipcap_rag.caption_index import CaptionIndex
from clipcap_rag.config import GenerationConfig
from clipcap_rag.evaluated import Photos, Subject
from clipcap_rag.features import FeatureSet
from clipcap_rag.index_builder import build_caption_index
from clipcap_rag.index_images import add_images
from clipcap_rag.neighbor_conditions import Condition, none
from clipcap_rag.neighbors import Neighbors
from clipcap_rag.prediction_files import PredictionFiles
from clipcap_rag.retrievable import Exclusion
from clipcap_rag.scoring import score

NEIGHBORS = (1, 2, 4, 8, 16, 32, 64, 100, 200)
PARTS = (100, 300, 1_000, 3_000, 10_000)  # captions of the first index


class Curves:
    """Captions of the photos under any choice of indexes and number of neighbours."""

    def __init__(self, subject: Subject, photos: Photos, decoding: str, out: Path):
        self._subject, self._photos, self._files = subject, photos, PredictionFiles(out)
        self._settings = GenerationConfig(decoding=decoding)
        self._exclusions = [Exclusion(image_id, frozenset()) for image_id in photos.image_ids]

    def search(self, indexes: list[CaptionIndex], k: int) -> Neighbors:
        """The k nearest captions of indexes for each photo."""
        retriever, _ = self._subject.captioner.retriever(indexes, k)
        images = self._photos.embeddings
        return retriever.search(images.vectors, k, self._exclusions, images.trunk)

    def point(self, name: str, indexes: list[CaptionIndex], shown: Neighbors) -> dict[str, Any]:
        """CIDEr with its interval when these neighbours out of indexes are shown."""
        condition, decoding = Condition(name, shown), self._settings.decoding
        written = self._files.captioned(self._subject, self._photos, condition, self._settings, decoding)
        cider = score(self._photos.references, written.captions)["metrics"]["CIDEr"]
        size, k = sum(len(index) for index in indexes), shown.rows.shape[1]
        print(f"{name}: {size} captions, {k} neighbours, CIDEr {100 * cider['value']:.1f}", flush=True)
        return {"name": name, "captions": size, "neighbors": k, "CIDEr": cider}


def part_of(index: CaptionIndex, size: int, out: Path, photos: Path | None) -> CaptionIndex:
    """`size` captions of an index, drawn at random, as an index of their own; smaller ones are parts of larger ones.

    Args:
        photos: feature set of the photos that they describe, which the part is to hold as well.
    """
    folder = out / f"part-{size}"
    if not folder.exists():
        rows = np.random.default_rng(0).permutation(np.flatnonzero(index.files.live))[:size]
        lines = (
            json.dumps({"caption": caption, "image_id": image_id})
            for caption, image_id in zip(index.captions(rows), index.image_ids(rows), strict=True)
        )
        file = out / f"part-{size}.jsonl"
        file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        build_caption_index([file], index.encoder["clip"], folder)
    if photos is not None and CaptionIndex.open(folder).files.images is None:
        add_images(folder, photos)
    return CaptionIndex.open(folder)


def draw(curves: dict[str, list[dict[str, Any]]], file: Path) -> None:
    """Both curves side by side, each with its interval and the captions without retrieval."""
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    off = curves["none"][0]["CIDEr"]
    for axis, key, label in zip(axes, ("neighbors", "captions"), ("neighbours", "captions in the index"), strict=True):
        points = curves[key]
        x, values = ([point[key] for point in points], [point["CIDEr"] for point in points])
        axis.plot(x, [100 * value["value"] for value in values], "o-", label="retrieval on")
        bounds = ([100 * value[end] for value in values] for end in ("low", "high"))
        axis.fill_between(x, *bounds, alpha=0.15)
        axis.axhline(100 * off["value"], color="grey", linestyle="--", label="off")
        axis.set(xscale="log", xlabel=label)
        axis.legend()
    axes[0].set_ylabel("CIDEr")
    figure.savefig(file, dpi=110)


def main() -> None:
    """Captions what is not captioned yet, and writes curves.json and curves.png."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--features", required=True, help="feature set of photos that were not trained on")
    parser.add_argument("--index", action="append", required=True, help="may be repeated; the first one is cut")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--photos", type=Path, help="feature set of the photos of the first index, where it holds them")
    parser.add_argument("--decoding", default="greedy", choices=("greedy", "beam", "sample"))
    parser.add_argument("--device", default="auto")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    subject = Subject.open(given.model, given.device, "auto")
    photos = Photos.of(FeatureSet.open(given.features), "photos")
    photos.check(subject, "the model")
    curves, indexes = Curves(subject, photos, given.decoding, given.out), [CaptionIndex.open(i) for i in given.index]
    first, k = indexes[0], subject.captioner.checkpoint.num_neighbors
    points = {"none": [curves.point("none", [], none(photos.embeddings.vectors).neighbors)]}
    points["neighbors"] = [
        curves.point(f"{count} neighbours", [first], curves.search([first], count)) for count in NEIGHBORS
    ]
    sizes = [[part_of(first, size, given.out, given.photos)] for size in PARTS if size < len(first)]
    sizes += [indexes[:count] for count in range(1, len(indexes) + 1)]
    points["captions"] = [
        curves.point(" + ".join(index.name for index in chosen), chosen, curves.search(chosen, k)) for chosen in sizes
    ]
    write_json(given.out / "curves.json", points)
    draw(points, given.out / "curves.png")


if __name__ == "__main__":
    main()
