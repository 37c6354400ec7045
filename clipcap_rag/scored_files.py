"""Files of captions scored against a file of references, and two of them compared."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from clipcap_rag.diversity import IndexCopies
from clipcap_rag.errors import InputError
from clipcap_rag.hallucination import Hallucinations, ObjectNames, read_instances, read_synonyms
from clipcap_rag.judging import JudgingConfig
from clipcap_rag.lines import open_bytes, parse_json
from clipcap_rag.predictions import Joined, Photo, Prediction, join, listed, read_predictions, read_references
from clipcap_rag.scoring import Judge, paired_difference, score
from clipcap_rag.sources import SourceOptions

_RESULTS = 2**24  # bytes; the JSON that `evaluate` prints is far smaller


def score_files(
    predictions: str | Path,
    references: str | Path,
    *,
    options: SourceOptions | None = None,
    judging: JudgingConfig | None = None,
    indexes: Sequence[str] = (),
    captioner: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
) -> dict[str, Any]:
    """Scores the captions in a file.

    Args:
        predictions: a COCO result file, or JSON Lines as `caption` and `evaluate` write them.
        references: a caption file in any format of `sources`.
        indexes: captions that equal any of their entries are counted.
        captioner: what wrote the captions, to say whether the CLIP model of CLIPScore is its own.

    Returns:
        as `scoring.score`, with "predictions" and "references", their paths and SHA-256, "unpredicted" and
        "unreferenced", how many photos were left out, and "clip_score", whose model it was.

    Raises:
        InputError: a file cannot be used, or a photo lacks its caption or its references.
    """
    options, judging = options or SourceOptions(), judging or JudgingConfig()
    photos = read_references(Path(references), options)
    joined = join(read_predictions(Path(predictions)), photos, judging.allow_missing)
    judges, notes = _judges(joined.photos, judging, indexes, captioner, device, dtype)
    result = score(
        joined.references, joined.captions,
        neighbors=joined.neighbors, domains=joined.domains, judges=judges, java=judging.java,
    )  # fmt: skip
    files = {"predictions": _record(Path(predictions)), "references": _references(Path(references), photos, options)}
    return files | _left_out(joined) | notes | result


def compare_files(
    first: str | Path,
    second: str | Path,
    references: str | Path | None = None,
    *,
    options: SourceOptions | None = None,
    judging: JudgingConfig | None = None,
    indexes: Sequence[str] = (),
    captioner: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
) -> dict[str, Any]:
    """Scores the captions of two files on the same photos, and their difference, first minus second.

    Args:
        first, second: as `score_files` takes them, or what it returned, as JSON; that names its files.
        references: left out, those that a result names.

    Raises:
        InputError: as `score_files`, or a file that a result names has changed.
    """
    judging = judging or JudgingConfig()
    results = [_read_result(Path(path)) for path in (first, second)]
    paths = [Path(result["predictions"]["path"]) if result else Path(path)
             for result, path in zip(results, (first, second), strict=True)]  # fmt: skip
    if references is None:
        references, options = _references_of([result for result in results if result], options)
    options = options or SourceOptions()
    photos = read_references(Path(references), options)
    read = [read_predictions(path) for path in paths]
    joined = _join_both(read, photos, judging.allow_missing)
    judges, notes = _judges(joined[0].photos, judging, indexes, captioner, device, dtype)
    result = paired_difference(
        joined[0].references, joined[0].captions, joined[1].captions, domains=joined[0].domains,
        neighbors=[side.neighbors for side in joined], judges=judges, java=judging.java,
    )  # fmt: skip
    files = {
        "first": _record(paths[0]),
        "second": _record(paths[1]),
        "references": _references(Path(references), photos, options),
    }
    return files | _left_out(joined[0]) | notes | result


def _join_both(read: Sequence[list[Prediction]], photos: list[Photo], allow_missing: bool) -> tuple[Joined, Joined]:
    """Both on the photos that both caption."""
    joined = [join(predictions, photos, allow_missing) for predictions in read]
    both = set.intersection(*({photo.image_id for photo in side.photos} for side in joined))
    if not both:
        raise InputError("no photo has a caption in both files; give captions of the same photos")
    lost = [photo.image_id for photo in photos if photo.image_id not in both]
    extra = list(dict.fromkeys(name for side in joined for name in side.unreferenced))
    parts = []
    for side in joined:
        kept = [row for row, photo in enumerate(side.photos) if photo.image_id in both]
        parts.append(Joined([side.photos[row] for row in kept], [side.predictions[row] for row in kept], lost, extra))
    return parts[0], parts[1]


def _judges(
    photos: list[Photo],
    judging: JudgingConfig,
    indexes: Sequence[str],
    captioner: str | None,
    device: str,
    dtype: str,
) -> tuple[list[Judge], dict[str, Any]]:
    """The metrics that need more than words, and what the result says of them."""
    judges: list[Judge] = []
    notes: dict[str, Any] = {}
    if judging.clip:
        from clipcap_rag.clip_score import clip_scores

        images = [(photo.image or photo.image_id, photo.image_id) for photo in photos]
        judge, notes["clip_score"] = clip_scores(judging.clip, Path(judging.photos), images, captioner, device, dtype)
        judges.append(judge)
    if judging.instances:
        categories, present = read_instances(Path(judging.instances))
        synonyms = read_synonyms(Path(judging.synonyms), categories) if judging.synonyms else {}
        found = [next((present[key] for key in photo.keys if key in present), None) for photo in photos]
        lost = [photo.image_id for photo, objects in zip(photos, found, strict=True) if objects is None]
        if lost:
            raise InputError(f"{judging.instances} does not list {len(lost)} of the photos: {listed(lost)}")
        judges.append(Hallucinations(ObjectNames(categories, synonyms), found))
        notes["instances"] = _record(Path(judging.instances)) | {"synonyms": judging.synonyms}
    if indexes:
        judges.append(IndexCopies(indexes))
        notes["indexes"] = list(indexes)
    return judges, notes


def _left_out(joined: Joined) -> dict[str, int]:
    return {"unpredicted": len(joined.unpredicted), "unreferenced": len(joined.unreferenced)}


def _references(path: Path, photos: list[Photo], options: SourceOptions) -> dict[str, Any]:
    captions = sum(len(photo.captions) for photo in photos)
    return _record(path) | {"photos": len(photos), "captions": captions, **options.to_json()}


def _record(path: Path) -> dict[str, Any]:
    """Path and SHA-256 of a file; a folder has no hash."""
    if path.is_dir():
        return {"path": str(path), "sha256": None}
    with open(path, "rb") as file:
        return {"path": str(path), "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _read_result(path: Path) -> dict[str, Any] | None:
    """What `score_files` returned, from its JSON; None for any other file."""
    if not path.is_file():
        raise InputError(f"there is no file of predictions or results {path}; check the path")
    with open_bytes(path) as stream:
        content = stream.read(_RESULTS)
    try:
        result = parse_json(content)
    except ValueError:
        return None
    if not isinstance(result, dict) or not {"predictions", "references", "metrics"} <= set(result):
        return None
    for key in ("predictions", "references"):
        _check_unchanged(path, result[key])
    return result


def _check_unchanged(path: Path, record: Any) -> None:
    """Raises InputError unless the file that a result names is there as it was."""
    if not isinstance(record, dict) or not isinstance(record.get("path"), str):
        raise InputError(f"{path} does not name the files it was made from; give the predictions and the references")
    named = Path(record["path"])
    if not named.exists():
        raise InputError(f"{path} was made from {named}, which is not there; give the predictions and the references")
    if _record(named)["sha256"] != record.get("sha256"):
        raise InputError(f"{named} has changed since {path} was made from it; run evaluate on it again")


def _references_of(results: list[dict[str, Any]], options: SourceOptions | None) -> tuple[str, SourceOptions]:
    """The references that results name, and how they were read."""
    named = [result["references"] for result in results]
    if not named:
        raise InputError("two files of predictions need REFERENCES; give the caption file of their photos as third")
    if any((record["sha256"], record.get("split")) != (named[0]["sha256"], named[0].get("split")) for record in named):
        raise InputError("the two results have different references; give REFERENCES to score both against the same")
    stored = {field: named[0].get(field, value) for field, value in SourceOptions().to_json().items()}
    if not all(isinstance(value, str | None) for value in stored.values()):
        raise InputError("a result does not say how its references were read; give REFERENCES")
    return named[0]["path"], options or SourceOptions.from_json(stored)
