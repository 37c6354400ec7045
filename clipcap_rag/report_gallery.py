"""Photo by photo what a captioner wrote with retrieval and without, how good it is, and what it had to choose from."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from clipcap_rag.baselines import BASELINES
from clipcap_rag.bootstrap import Measure, estimates
from clipcap_rag.features import FeatureSet
from clipcap_rag.metrics import cider
from clipcap_rag.prediction_files import Predictions
from clipcap_rag.ptb_tokens import tokenize

Json = dict[str, Any]
_LISTED = 16  # candidates and neighbours of a photo
_DECIMALS = 4
_DECODING = "sample"  # shown where it was evaluated, as it is what captioning does by itself


def gallery(folder: Path, results: Mapping[str, Any], features: Mapping[str, Any], most: int) -> Json:
    """Photos of one feature set with their references and captions.

    Args:
        folder: of the evaluation whose `results` these are.
        features: its entry of `results` about this feature set.
        most: how many photos are listed: the best half and the worst half by CIDEr with retrieval, or without where
            there was none.

    Returns:
        features (its name), photos (how many were evaluated), decoding, conditions (names of neighbours that photos
        were captioned with), on and off (positions in them, or null), scores ({"on", "off", "gain"}: CIDEr of all
        photos with intervals, and of the difference), where there are both changed, better and worse (numbers of
        photos whose caption, and whose score, retrieval changed), and entries. An entry has image, references and
        captions, one for each condition with its CIDEr; those on and off also have candidates and neighbors.
    """
    rows = [row for row in results["rows"] if row["features"] == features["name"]]
    rows = _written(rows, [*features["excluded_rows"]], results["num_neighbors"])
    written = [Predictions.read(folder / row["predictions"]) for row in rows]
    references = FeatureSet.open(features["path"]).captions[: features["photos"]]
    tokens = [[tokenize(text) for text in texts] for texts in references]
    measures = [cider(tokens, [tokenize(text) for text in found.captions])["CIDEr"] for found in written]
    scores = [measure.statistics[:, 0] for measure in measures]
    sides = _sides(rows)
    order = np.argsort(-scores[next(iter(sides.values()))], kind="stable").tolist()
    half = most // 2
    listed = order if len(order) <= most else order[: most - half] + order[len(order) - half :]
    entries = {
        photo: {
            "references": references[photo],
            "captions": [
                {"caption": found.captions[photo], "cider": round(float(values[photo]), _DECIMALS)}
                for found, values in zip(written, scores, strict=True)
            ],
        }
        for photo in listed
    }
    for place in sides.values():
        for photo, line in enumerate(written[place].lines()):
            if photo in entries:
                entries[photo]["image"] = line["image"]
                entries[photo]["captions"][place] |= _choice(line)
    return {
        "features": features["name"],
        "photos": len(order),
        "decoding": rows[0]["decoding"],
        "conditions": [row["neighbors"] for row in rows],
        "on": sides.get("on"),
        "off": sides.get("off"),
        "scores": _compared({side: measures[place] for side, place in sides.items()}),
        **_changes([written[place].captions for place in sides.values()], [scores[place] for place in sides.values()]),
        "entries": list(entries.values()),
    }


def _written(rows: Sequence[Json], indexes: Sequence[str], k: int) -> list[Json]:
    """The conditions of one decoding, each file of captions once: good retrieval first, then none, then the others."""
    rows = [row for row in rows if row["decoding"] not in BASELINES and "weight" not in row["decoding"]]
    decodings = [row["decoding"] for row in rows]
    chosen = _DECODING if _DECODING in decodings else decodings[0]
    good = {name for index in indexes for name in (index, f"nearest {k} of {index}")}
    rows = [row for row in rows if row["decoding"] == chosen]
    files: dict[str, Json] = {}
    for row in sorted(rows, key=lambda row: (row["neighbors"] not in good, row["neighbors"] != "none")):
        files.setdefault(row["predictions"], row)
    return list(files.values())


def _sides(rows: Sequence[Json]) -> dict[str, int]:
    """The places of captions with retrieval and without; one may be missing."""
    shown = [place for place, row in enumerate(rows) if row["shown"]]
    without = [place for place, row in enumerate(rows) if row["neighbors"] == "none"]
    return {side: found[0] for side, found in (("on", shown), ("off", without)) if found}


def _compared(sides: Mapping[str, Measure]) -> dict[str, dict[str, float | None]]:
    found = estimates(sides)
    if len(found) == 2:
        found["gain"] = found["on"] - found["off"]
    return {side: estimate.to_json() for side, estimate in found.items()}


def _changes(captions: Sequence[Sequence[str]], scores: Sequence[np.ndarray]) -> dict[str, int]:
    """How many captions differ between two sides, and how many are better or worse on the first; none for one side."""
    if len(captions) < 2:
        return {}
    return {
        "changed": sum(first != second for first, second in zip(*captions, strict=True)),
        "better": int((scores[0] > scores[1]).sum()),
        "worse": int((scores[0] < scores[1]).sum()),
    }


def _choice(line: Mapping[str, Any]) -> Json:
    """What a line of predictions tells of the candidates and the neighbours."""
    candidates = [
        {name: _short(found[name]) for name in ("caption", "clip_similarity", "log_probability", "score")}
        for found in line["candidates"][:_LISTED]
    ]
    neighbors = [
        {name: _short(found[name]) for name in ("caption", "score", "index", "route")}
        for found in line["neighbors"][:_LISTED]
    ]
    return {"candidates": candidates, "neighbors": neighbors}


def _short(value: Any) -> Any:
    return round(value, _DECIMALS) if isinstance(value, float) else value
