"""What an artefact stores of the CLIP model that made it, and the comparison of two such records."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from clipcap_rag.errors import InputError

PROBE_SENTENCES = (
    "a dog runs along the beach",
    "two children play football in a park",
    "an old red train waits at the station",
)
_SAME = 0.99  # smallest cosine of two embeddings of one probe by one model; bfloat16 against float32 gives above 0.999


def probe_image() -> Image.Image:
    """The synthetic picture, 224 x 224, whose embedding tells image towers apart: two ramps and a chessboard."""
    row, column = np.mgrid[:224, :224]
    board = (row // 28 + column // 28) % 2 * 255
    return Image.fromarray(np.stack([row, column, board], axis=-1).astype(np.uint8))


def encoder_record(clip: str, sentences: Sequence[str], text: np.ndarray, image: np.ndarray) -> dict[str, Any]:
    """The record of a CLIP model, ready for JSON.

    Args:
        clip: the string that loads the model.
        sentences: S probe sentences.
        text: [S, D] their embeddings.
        image: [D] the embedding of `probe_image`.
    """
    probes = {
        "sentences": list(sentences),
        "text": [[round(float(value), 6) for value in vector] for vector in text],
        "image": [round(float(value), 6) for value in image],
    }
    return {"clip": clip, "dim": len(image), "probes": probes}


def probe_sentences(record: dict[str, Any], owner: str) -> list[str]:
    """The sentences whose embeddings the record of `owner` holds."""
    return list(_read(record, owner)[0])


def check_same_encoder(record: dict[str, Any], owner: str, other: dict[str, Any], other_owner: str) -> None:
    """Makes sure that two artefacts live in one embedding space.

    Raises:
        InputError: the two models differ in width, or the embeddings of a probe have a cosine below 0.99. The message
            names both models. Also if a record is incomplete.
    """
    (text, image), (other_text, other_image) = _read(record, owner), _read(other, other_owner)
    ours = f"{owner} was made with the CLIP model {record['clip']} ({len(image)} wide)"
    theirs = f"{other_owner} is {other['clip']} ({len(other_image)} wide)"
    remedy = "use one CLIP model for both"
    if len(image) != len(other_image):
        raise InputError(f"{ours}, but {theirs}; {remedy}")
    cosine = _smallest_cosine(text, image, other_text, other_image)
    if not cosine >= _SAME:  # also refuses NaN
        raise InputError(f"{ours}, but {theirs}, whose embeddings differ (probe cosine {cosine:.2f}); {remedy}")


def same_encoder(record: dict[str, Any], owner: str, other: dict[str, Any], other_owner: str) -> bool:
    """Whether two artefacts live in one embedding space, True where that cannot be told.

    Raises:
        InputError: a record is incomplete.
    """
    (text, image), (other_text, other_image) = _read(record, owner), _read(other, other_owner)
    return len(image) == len(other_image) and not _smallest_cosine(text, image, other_text, other_image) < _SAME


def _read(record: dict[str, Any], owner: str) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Embeddings of the probe sentences by sentence, and of the probe image."""
    try:
        probes = record["probes"]
        image = np.asarray(probes["image"], np.float64)
        text = np.asarray(probes["text"], np.float64)
        complete = isinstance(record["clip"], str) and image.shape == (record["dim"],)
        if complete and text.shape == (len(probes["sentences"]), record["dim"]):
            return dict(zip(probes["sentences"], text, strict=True)), image
    except (KeyError, TypeError, ValueError):
        pass
    raise InputError(f"{owner} does not say completely which CLIP model made it; make it again")


def _smallest_cosine(
    text: dict[str, np.ndarray], image: np.ndarray, other_text: dict[str, np.ndarray], other_image: np.ndarray
) -> float:
    """Of the embeddings of the probe image and of the sentences that both records have."""
    cosines = [_cosine(text[sentence], other_text[sentence]) for sentence in text if sentence in other_text]
    return min([_cosine(image, other_image), *cosines])


def _cosine(first: np.ndarray, second: np.ndarray) -> float:
    return float(first @ second / (np.linalg.norm(first) * np.linalg.norm(second)))
