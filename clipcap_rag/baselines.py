"""What a captioner has to beat: the nearest caption, the neighbours' consensus, and other checkpoints."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from clipcap_rag.errors import InputError
from clipcap_rag.evaluated import Photos
from clipcap_rag.index_ngrams import ngram_weights
from clipcap_rag.neighbor_conditions import Condition
from clipcap_rag.neighbors import Neighbors
from clipcap_rag.prediction_files import PredictionFiles, Predictions


def nearest_captions(neighbors: Neighbors) -> list[str]:
    """The caption with the largest cosine with each photo, "" where there is none."""
    found = zip(neighbors.captions, neighbors.present_scores(), strict=True)
    return [captions[int(np.argmax(scores))] if captions else "" for captions, scores in found]


def consensus_captions(neighbors: Neighbors) -> list[str]:
    """Of the captions that vote on each photo the one that agrees most with all votes.

    With equal votes this is the consensus of Devlin et al. 2015 (arXiv 1505.04467).
    """
    weights = ngram_weights(neighbors.indexes)
    chosen = []
    for votes in neighbors.votes():
        common = weights.total(votes)
        agreements = [weights.agreement(caption, common) for caption in votes.captions]
        chosen.append(votes.captions[int(np.argmax(agreements))] if agreements else "")
    return chosen


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
