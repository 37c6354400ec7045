"""What a captioner has to beat: the nearest caption, the neighbours' consensus, and other checkpoints."""

from collections.abc import Sequence
from typing import Any

from clipcap_rag.errors import InputError
from clipcap_rag.evaluated import Photos
from clipcap_rag.metrics import cider
from clipcap_rag.neighbor_conditions import Condition
from clipcap_rag.neighbors import Neighbors
from clipcap_rag.prediction_files import PredictionFiles, Predictions
from clipcap_rag.ptb_tokens import tokenize


def nearest_captions(neighbors: Neighbors) -> list[str]:
    """The nearest caption of each photo, "" where there is none."""
    return [captions[0] if captions else "" for captions in neighbors.captions]


def consensus_captions(neighbors: Neighbors) -> list[str]:
    """Of each photo's neighbours the one with the highest CIDEr against the others (Devlin et al. 2015, 1505.04467)."""
    words = [[tokenize(caption) for caption in captions] for captions in neighbors.captions]
    places = [(photo, place) for photo, captions in enumerate(words) for place in range(len(captions))]
    others = [[*words[photo][:place], *words[photo][place + 1 :]] for photo, place in places]
    best = [(-1.0, caption) for caption in nearest_captions(neighbors)]
    if any(text for rest in others for text in rest):
        found = cider([rest or [""] for rest in others], [words[photo][place] for photo, place in places])
        agreement = found["CIDEr"].statistics[:, 0]  # the CIDEr of each caption
        for (photo, place), value in zip(places, agreement.tolist(), strict=True):
            if value > best[photo][0]:
                best[photo] = value, neighbors.captions[photo][place]
    return [caption for _, caption in best]


BASELINES = {"nearest caption": nearest_captions, "consensus caption": consensus_captions}


def baseline_predictions(files: PredictionFiles, name: str, photos: Photos, condition: Condition) -> Predictions:
    """The predictions of one of BASELINES."""
    made: list[str] = []

    def write(part: slice) -> list[dict[str, Any]]:
        if not made:
            made.extend(BASELINES[name](condition.neighbors))
        return [{"caption": caption or None, "candidates": []} for caption in made[part]]

    return files.keep(f"{condition.name}, {name}", name, photos, condition.neighbors, write)


def named_checkpoints(given: Sequence[str]) -> dict[str, str]:
    """`NAME=CHECKPOINT` arguments by name.

    Raises:
        InputError: one has no name or no checkpoint, or a name stands twice.
    """
    named: dict[str, str] = {}
    for text in given:
        name, _, checkpoint = text.partition("=")
        if not name or not checkpoint or name in named or "/" in name:
            raise InputError(f"a baseline is {text!r}; give NAME=CHECKPOINT with a name of its own")
        named[name] = checkpoint
    return named
