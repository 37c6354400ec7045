"""A captioner on photos with reference captions: every index and none, worse neighbours, decodings, leaks, baselines.

results.json and the files of predictions that it names (their lines are described in `prediction_files`) are all that a
page about an evaluation needs. results.json is an object of

- model, num_neighbors, generation, retrieval, config: what was evaluated, and how;
- features: per feature set name, path, photos (how many), recall (of its references by CLIP: R@1, R@5, R@10) and
  excluded_rows (per index, how many of its captions carry the id of an evaluated photo);
- rows: one per line of a table. study, features, neighbors (where they come from), decoding, photos, metrics
  ({name: {"value", "low", "high"}}, as `scoring.score` gives them), shown (neighbours per photo), seconds_per_image,
  predictions (file, relative);
- effects: of the robustness study, per feature set and decoding: effect (benefit, harm, copying), metric, of and minus
  (neighbors, value, low and high each), and value, low and high of their difference on the same photos;
- leaks: of the leak study, per feature set and index: ids, strings and doubles (null without photos to compare) with
  their numbers of photos and captions, pairs (image, other, cosine) of doubles, and leaking (the photos).
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from clipcap_rag.artifact import disk_errors, read_json, write_json
from clipcap_rag.config import EvaluationConfig, GenerationConfig, RetrievalConfig
from clipcap_rag.errors import InputError
from clipcap_rag.evaluated import Photos, Subject, short_names
from clipcap_rag.evaluation_studies import Studies
from clipcap_rag.features import FeatureSet
from clipcap_rag.metrics import recall_at, require_metrics
from clipcap_rag.prediction_files import PredictionFiles
from clipcap_rag.retriever import Retriever


def evaluate(
    model: str | Path,
    features: Sequence[str | Path],
    out: str | Path,
    *,
    indexes: Sequence[str] = ("default",),
    num_neighbors: int | None = None,
    baselines: Mapping[str, str | Path] | None = None,
    training_features: str | Path | None = None,
    generation: GenerationConfig | None = None,
    config: EvaluationConfig | None = None,
    retrieval: RetrievalConfig | None = None,
    device: str = "auto",
    dtype: str = "auto",
) -> dict[str, Any]:
    """Captions the photos of feature sets in every condition of some studies and scores the captions.

    What is in `out` already and was made of the same is not made again, so a killed evaluation continues, and another
    study or index can be added to a finished one. Rows of an index that carry the id of an evaluated photo are never
    retrieved (but for the leak study, which measures that), and counted.

    Args:
        out: a folder for results.json and, per condition and decoding, predictions as JSON Lines.
        baselines: other checkpoints by name, captioned without retrieval beside the table.
        training_features: photos whose captions the indexes may hold, for the leak study; left out, it takes those of
            an index that holds photos.

    Returns:
        what results.json holds.

    Raises:
        InputError: as `Captioner.from_pretrained` and `Captioner.retriever`; feature sets of another CLIP model; or a
            study that needs an index without one.
    """
    require_metrics()
    config, generation = config or EvaluationConfig(), generation or GenerationConfig()
    retrieval = retrieval or RetrievalConfig()
    subject = Subject.open(model, device, dtype)
    rivals = {name: Subject.open(path, device, dtype) for name, path in (baselines or {}).items()}
    k = subject.captioner.checkpoint.num_neighbors if num_neighbors is None else num_neighbors
    retrievers = _retrievers(subject, indexes, k, retrieval, config.together)
    training = FeatureSet.open(training_features) if training_features else None
    everything = _photos(features, config.images)
    for photos in everything:
        photos.check(subject, "the model")
        for name, rival in rivals.items():
            if name in ("none", *retrievers):
                raise InputError(f"the table has a row {name} already; give the baseline another name")
            photos.check(rival, f"the baseline {name}")
    result: dict[str, Any] = {
        "model": str(model),
        "num_neighbors": k,
        "generation": generation.to_json(),
        "retrieval": retrieval.to_json(),
        "config": config.to_json(),
        "features": [],
        "rows": [],
        "effects": [],
        "leaks": [],
    }
    files = PredictionFiles(Path(out))
    for photos in everything:
        studies = Studies(subject, photos, retrievers, k, generation, config, files, rivals, training)
        for name in config.chosen_studies():
            for kind, found in getattr(studies, name)():
                result[kind].append({"features": photos.name, **found})
        result["features"].append(
            {
                "name": photos.name,
                "path": str(photos.features.path),
                "photos": len(photos),
                "recall": _recall(subject, photos),
                "excluded_rows": studies.excluded_rows,
            }
        )
    with disk_errors(Path(out)):
        write_json(Path(out) / "results.json", result)
    return read_json(Path(out) / "results.json", "evaluation")


def _photos(paths: Sequence[str | Path], most: int) -> list[Photos]:
    sets = [FeatureSet.open(path) for path in paths]
    names = short_names([features.path for features in sets])
    return [Photos.of(features, name, most) for features, name in zip(sets, names, strict=True)]


def _retrievers(
    subject: Subject, indexes: Sequence[str], k: int, retrieval: RetrievalConfig, together: bool
) -> dict[str, Retriever]:
    """A retriever over each index by its name, and one over all; none for a model that looks at no neighbours."""
    opened = [subject.captioner.retriever(index, k, retrieval)[0] for index in indexes]
    opened = [retriever for retriever in opened if retriever.indexes]
    names = [retriever.indexes[0].name for retriever in opened]
    if len(set(names)) < len(names):
        names = short_names([retriever.indexes[0].path for retriever in opened])
    found = dict(zip(names, opened, strict=True))
    if together and len(found) > 1:
        found[" + ".join(found)] = subject.captioner.retriever(list(indexes), k, retrieval)[0]
    return found


def _recall(subject: Subject, photos: Photos) -> dict[str, float]:
    """Image-to-caption recall over the reference captions of the evaluated photos."""
    owner = [row for row, captions in enumerate(photos.references) for _ in captions]
    texts = subject.captioner.encoder.encode_text([caption for captions in photos.references for caption in captions])
    return recall_at(photos.embeddings.vectors, texts.vectors, owner, (1, 5, 10))
