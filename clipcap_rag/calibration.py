"""A calibration: a captioner on photos with references tells when it may be sure, measured on photos not fitted on."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from clipcap_rag.abstention import Abstention, Logistic, circumstances, signals
from clipcap_rag.artifact import new_directory, refuse_existing
from clipcap_rag.captioner import Captioner
from clipcap_rag.config import GenerationConfig
from clipcap_rag.encoder import check_same_encoder
from clipcap_rag.errors import InputError
from clipcap_rag.features import FeatureSet
from clipcap_rag.metrics import cider_scores, require_metrics
from clipcap_rag.progress import bar, say
from clipcap_rag.ranker import Ranker
from clipcap_rag.rerank import Candidate
from clipcap_rag.retrievable import Exclusion
from clipcap_rag.risk_coverage import areas, draw, points, reliability

_PHOTOS = 64  # captioned between two updates of the progress bar
_BACKGROUND = 512  # captions of other images that a similarity is compared with


@dataclass(frozen=True)
class _Captioned:
    """N photos, what was written for them, the cosines of their neighbours, and the CIDEr of the best captions [N]."""

    images: np.ndarray
    candidates: list[list[Candidate]]
    scores: list[np.ndarray]
    cider: np.ndarray

    def background(self, rows: np.ndarray) -> np.ndarray:
        """[M, D] captions of some of them, rounded as they are stored."""
        chosen = np.stack([self.candidates[row][0].embedding for row in rows[:_BACKGROUND]])
        return chosen.astype(np.float16).astype(np.float32)

    def signals(self, rows: np.ndarray, background: np.ndarray) -> dict[str, np.ndarray]:
        """The signals of some of them, each [len(rows)]; a signal that some lack is left out."""
        found = [signals(self.images[row], self.candidates[row], self.scores[row], background) for row in rows]
        names = [name for name in found[0] if all(name in one for one in found)]
        return {name: np.array([one[name] for one in found]) for name in names}


def calibrate(
    model: str | Path,
    features: str | Path,
    out: str | Path,
    *,
    index: str | None = "default",
    num_neighbors: int | None = None,
    generation: GenerationConfig | None = None,
    good: float | None = None,
    keep: float = 0.8,
    device: str = "auto",
    dtype: str = "auto",
    overwrite: bool = False,
) -> dict[str, Any]:
    """Learns to tell good captions from bad ones and writes the calibration for `Captioner.caption`.

    A caption is good if its CIDEr against the references of its photo reaches `good`. What is measured comes from two
    fits, each to one half of the photos and judged on the other; what is kept is fitted to all. Rows of the index that
    carry the id of one of the photos are not retrieved for it.

    Args:
        features: feature set of photos that were not trained on.
        out: a folder for abstention.json, background.npy and risk_coverage.png.
        index: as `Captioner.caption` takes it.
        good: CIDEr of a good caption, a raw fraction; None takes the median of the captions.
        keep: share of the photos whose captions stay above the level.

    Returns:
        What was measured: {"photos", "good_CIDEr", "level", "curve": [{"coverage", "level", "risk", "CIDEr"}], "AURC":
        {signal: area}, "calibration_error", "reliability"}; CIDEr as raw fractions.

    Raises:
        InputError: unusable photos or settings, all or no captions are good, or `out` exists.
    """
    require_metrics()
    if not 0 < keep <= 1:
        raise InputError(f"keep is {keep}; it must be above 0 and at most 1")
    generation, out = generation or GenerationConfig(), Path(out)
    refuse_existing(out, overwrite)
    captioner, photos = Captioner.from_pretrained(model, device, dtype), FeatureSet.open(features)
    check_same_encoder(captioner.checkpoint.encoder, "the model", photos.encoder, f"the feature set {photos.path}")
    captioned, k = _caption(captioner, photos, index, num_neighbors, generation)
    if len(captioned.cider) < 4:
        raise InputError(f"{features} has {len(captioned.cider)} captioned photos; give at least some hundreds")
    threshold = float(np.median(captioned.cider)) if good is None else good
    is_good = captioned.cider >= threshold
    everyone = np.random.default_rng(0).permutation(len(is_good))
    halves = everyone[::2], everyone[1::2]
    orders: dict[str, np.ndarray] = {}
    for fitted, judged in (halves, halves[::-1]):
        logistic, background = _fit(captioned, fitted, is_good)
        found = captioned.signals(judged, background)
        sure = logistic(np.column_stack(list(found.values())))
        for name, values in {"calibrated": sure, **found}.items():
            orders.setdefault(name, np.empty(len(is_good)))[judged] = values
    sure = orders["calibrated"]
    level = float(np.sort(sure)[::-1][int(np.ceil(keep * len(sure))) - 1])
    error, bins = reliability(sure, is_good)
    measured = {
        "features": photos.name,
        "photos": len(is_good),
        "good_CIDEr": threshold,
        "level": level,
        "curve": points(sure, is_good, captioned.cider),
        "AURC": areas(orders, is_good),
        "calibration_error": error,
        "reliability": bins,
    }
    logistic, background = _fit(captioned, everyone, is_good)
    names = tuple(name for name in orders if name != "calibrated")
    made_for = circumstances(captioner.checkpoint, generation, k)
    with new_directory(out, overwrite) as folder:
        draw(orders, is_good, captioned.cider, folder / "risk_coverage.png")
        Abstention(names, logistic, background, level, made_for, measured).write(folder)
    return measured


def _fit(captioned: _Captioned, rows: np.ndarray, good: np.ndarray) -> tuple[Logistic, np.ndarray]:
    background = captioned.background(rows)
    found = captioned.signals(rows, background)
    return Logistic.fit(np.column_stack(list(found.values())), good[rows]), background


def _caption(
    captioner: Captioner, photos: FeatureSet, index: str | None, num_neighbors: int | None, generation: GenerationConfig
) -> tuple[_Captioned, int]:
    """Captions all photos; those for which no words were written are told and left out. Also gives K."""
    retriever, k = captioner.retriever(index, num_neighbors)
    encoded, ranker = photos.encoded(), Ranker(captioner.encoder)
    exclusions = [Exclusion(image_id, frozenset()) for image_id in photos.image_ids]
    candidates, scores = [], []
    with bar("captions", total=len(photos), unit="photo") as progress:
        for start in range(0, len(photos), _PHOTOS):
            part = slice(start, start + _PHOTOS)
            images = encoded.part(part)
            neighbors = retriever.search(images.vectors, k, exclusions[part], images.trunk)
            candidates += captioner.write(images, neighbors, photos.digests[part], generation, ranker)
            scores += neighbors.matches()[1]
            progress.update(len(images.vectors))
    rows = [row for row, found in enumerate(candidates) if found and found[0].caption]
    if len(rows) < len(photos):
        say(f"{len(photos) - len(rows)} photos got no words and are left out")
    captions = [candidates[row][0].caption for row in rows]
    cider = cider_scores([photos.captions[row] for row in rows], captions) if rows else np.empty(0)
    return _Captioned(encoded.vectors[rows], [candidates[row] for row in rows], [scores[row] for row in rows], cider), k
