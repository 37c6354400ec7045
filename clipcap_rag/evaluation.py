"""A captioner on photos with reference captions: each decoding with each index, none, and random neighbours."""

import dataclasses
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from clipcap_rag.artifact import disk_errors, write_bytes, write_json
from clipcap_rag.caption_index import CaptionIndex
from clipcap_rag.captioner import Captioner
from clipcap_rag.config import EvaluationConfig, GenerationConfig, RetrievalConfig
from clipcap_rag.encoder import Embeddings, check_same_encoder
from clipcap_rag.errors import InputError
from clipcap_rag.features import FeatureSet
from clipcap_rag.metrics import caption_metrics, recall_at, require_metrics
from clipcap_rag.neighbors import Neighbors
from clipcap_rag.progress import bar, say
from clipcap_rag.ranker import Ranker
from clipcap_rag.rerank import Candidate, reweighted
from clipcap_rag.retriever import Exclusion, Retriever

_PHOTOS = 64  # captioned between two updates of the progress bar
SWEEP = (0.0, 1.0, 2.0, 3.0, 5.0, 7.0, 10.0, 15.0, 20.0, 30.0, 50.0)  # log-probability weights tried


@dataclass
class _Condition:
    """Where the neighbours come from: `neighbors` of all photos, and a name for the table."""

    name: str
    neighbors: Neighbors
    excluded: int = 0
    rows: list[dict[str, Any]] = field(default_factory=list)


def evaluate(
    model: str | Path,
    features: str | Path,
    out: str | Path,
    *,
    indexes: Sequence[str] = ("default",),
    num_neighbors: int | None = None,
    generation: GenerationConfig | None = None,
    config: EvaluationConfig | None = None,
    retrieval: RetrievalConfig | None = None,
    device: str = "auto",
    dtype: str = "auto",
) -> dict[str, Any]:
    """Captions the photos of a feature set in every condition and scores the captions against theirs.

    The conditions are each index, no retrieval, and random neighbours if asked for; each index also gives its nearest
    caption as a baseline. Rows of an index that carry the id of an evaluated photo are never retrieved, and counted.

    Args:
        out: a folder for results.json and, per condition and decoding, predictions as JSON Lines.

    Returns:
        {"rows": [{"neighbors", "decoding", "CIDEr", "BLEU-4", ..., "seconds_per_image"}], "recall": {...}, ...};
        metrics are raw fractions.
    """
    require_metrics()
    config, generation, out = config or EvaluationConfig(), generation or GenerationConfig(), Path(out)
    retrieval = retrieval or RetrievalConfig()
    captioner, photos = Captioner.from_pretrained(model, device, dtype), FeatureSet.open(features)
    check_same_encoder(captioner.checkpoint.encoder, "the model", photos.encoder, f"the feature set {photos.path}")
    chosen = np.arange(len(photos))[: config.images or None]
    raw = np.asarray(photos.embeddings[chosen], np.float32)
    norms = np.linalg.norm(raw, axis=1)
    images = Embeddings(raw / norms[:, None], norms)
    k = captioner.checkpoint.num_neighbors if num_neighbors is None else num_neighbors
    image_ids = [photos.image_ids[row] for row in chosen]
    conditions = _conditions(captioner, images, image_ids, indexes, k, config, retrieval)
    references = [photos.captions[row] for row in chosen]
    digests = [photos.digests[row] for row in chosen]
    with disk_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        rows = []
        for condition in conditions:
            if condition.neighbors.indexes and not condition.name.startswith("random"):
                nearest = [captions[0] if captions else "" for captions in condition.neighbors.captions]
                rows.append(
                    {"neighbors": condition.name, "decoding": "nearest caption"} | caption_metrics(references, nearest)
                )
            for decoding in config.names():
                settings = dataclasses.replace(generation, decoding=decoding)
                started = time.perf_counter()
                ranked = _write(captioner, images, condition, digests, settings)
                seconds = (time.perf_counter() - started) / len(ranked)
                captions = [_best(candidates) for candidates in ranked]
                rows.append(
                    {"neighbors": condition.name, "decoding": decoding}
                    | caption_metrics(references, captions)
                    | {"seconds_per_image": seconds}
                )
                _write_predictions(out, condition, decoding, [photos.images[row] for row in chosen], ranked)
                if config.rerank_sweep and decoding == "sample":
                    rows += _sweep(condition.name, ranked, references, captioner.encoder.logit_scale)
        result = {
            "model": str(model),
            "features": str(features),
            "photos": len(chosen),
            "num_neighbors": k,
            "generation": generation.to_json(),
            "retrieval": retrieval.to_json(),
            "excluded_rows": {condition.name: condition.excluded for condition in conditions},
            "recall": _recall(captioner, images, references),
            "rows": rows,
        }
        write_json(out / "results.json", result)
    return result


def _conditions(
    captioner: Captioner,
    images: Embeddings,
    image_ids: list[str],
    indexes: Sequence[str],
    k: int,
    config: EvaluationConfig,
    retrieval: RetrievalConfig,
) -> list[_Condition]:
    conditions, opened = [], []
    exclusions = [Exclusion(image_id, frozenset()) for image_id in image_ids]
    for name in indexes:
        retriever, _ = captioner.retriever(name, k or 1, retrieval)
        index = retriever.indexes[0]
        found = retriever.search(images.vectors, k or 1, exclusions)
        own = len(index.rows_of_images(set(image_ids)))
        if own:
            say(f"{index.name} holds {own} captions of the evaluated photos; they are not retrieved")
        conditions.append(_Condition(index.name, found, own))
        opened.append(index)
    conditions.append(_Condition("none", Retriever([]).search(images.vectors, 0)))
    if config.random_neighbors:
        if not opened:
            raise InputError("random neighbours need an index to come from; pass --index")
        conditions.append(_random(opened[0], images, k))
    return conditions


def _random(index: CaptionIndex, images: Embeddings, k: int) -> _Condition:
    """k random captions of the index for each photo, with their true cosines."""
    random = np.random.default_rng(0)
    rows = index.random_rows(len(images.vectors) * k, random).reshape(-1, k)
    embeddings = index.embeddings(rows)
    scores = np.einsum("bd,bkd->bk", images.vectors, embeddings)
    captions = [index.captions(row) for row in rows]
    neighbors = Neighbors(rows, scores, np.zeros_like(rows), embeddings, captions, [index])
    return _Condition(f"random of {index.name}", neighbors)


def _write(
    captioner: Captioner, images: Embeddings, condition: _Condition, digests: list[bytes], settings: GenerationConfig
) -> list[list[Candidate]]:
    ranked, ranker = [], Ranker(captioner.encoder)
    with bar(f"{condition.name}, {settings.decoding}", total=len(digests), unit="photo") as progress:
        for start in range(0, len(digests), _PHOTOS):
            part = slice(start, start + _PHOTOS)
            chosen = Embeddings(images.vectors[part], images.norms[part])
            ranked += captioner.write(chosen, condition.neighbors.part(part), digests[part], settings, ranker)
            progress.update(len(digests[part]))
    return ranked


def _best(candidates: list[Candidate]) -> str:
    return candidates[0].caption if candidates else ""


def _write_predictions(
    out: Path, condition: _Condition, decoding: str, names: list[str], ranked: list[list[Candidate]]
) -> None:
    lines = [
        json.dumps(
            {
                "image": name,
                "caption": candidates[0].caption if candidates else None,
                "candidates": [candidate.to_json() for candidate in candidates],
                "neighbors": [dataclasses.asdict(neighbor) for neighbor in neighbors],
            },
            ensure_ascii=False,
        )
        for name, candidates, neighbors in zip(names, ranked, condition.neighbors.listed(), strict=True)
    ]
    file = f"{condition.name}-{decoding}.jsonl".replace(" ", "-")
    write_bytes(out / file, ("\n".join(lines) + "\n").encode())


def _sweep(
    name: str, ranked: list[list[Candidate]], references: list[list[str]], logit_scale: float
) -> list[dict[str, Any]]:
    """The same candidates in the order of other log-probability weights."""
    rows = []
    for weight in SWEEP:
        captions = [_best(reweighted(candidates, logit_scale, weight)) for candidates in ranked]
        rows.append(
            {"neighbors": name, "decoding": f"sample, weight {weight:g}"} | caption_metrics(references, captions)
        )
    return rows


def _recall(captioner: Captioner, images: Embeddings, references: list[list[str]]) -> dict[str, float]:
    """Image-to-caption recall over the reference captions of the evaluated photos."""
    owner = [row for row, captions in enumerate(references) for _ in captions]
    texts = captioner.encoder.encode_text([caption for captions in references for caption in captions])
    return recall_at(images.vectors, texts.vectors, owner, (1, 5, 10))


def table(result: dict[str, Any]) -> str:
    """The result for people: metrics in points (times 100), one row per condition and decoding."""
    lines = [f"{'neighbours':<28}{'decoding':<20}{'CIDEr':>8}{'BLEU-4':>8}{'s/photo':>9}"]
    for row in result["rows"]:
        seconds = f"{row['seconds_per_image']:.3f}" if "seconds_per_image" in row else ""
        scores = f"{100 * row['CIDEr']:>8.1f}{100 * row['BLEU-4']:>8.1f}"
        lines.append(f"{row['neighbors']:<28}{row['decoding']:<20}{scores}{seconds:>9}")
    recall = ", ".join(f"{name} {100 * value:.1f}" for name, value in result["recall"].items())
    lines.append(f"image to caption on {result['photos']} photos: {recall}")
    return "\n".join(lines)
