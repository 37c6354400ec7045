"""Caption metrics from strings and retrieval metrics from arrays."""

import html
import importlib.util
import re
from collections.abc import Sequence

import numpy as np

from clipcap_rag.errors import missing_extra

_PUNCTUATION = {"''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";", '"'}
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_TOKEN = re.compile(
    r"n't\b|'(?:s|re|ve|ll|d|m)\b|o'clock\b"  # contractions
    r"|(?:[a-z]\.){2,}|(?:ft|mr|mrs|ms|dr|st|jr|sr|co|corp|inc|vs|no|lt|sgt)\.(?=\s\w)"  # abbreviations
    r"|can(?=not\b)|\w+(?=n't\b)|\w+(?:[-.&]\w+)*|\.\.\.|--|[^\w\s]"
)


def tokenize(caption: str) -> str:
    """Lower-case words joined by spaces, without punctuation, as coco-caption's Penn Treebank tokenizer gives them.

    Brackets become -lrb- and -rrb- and stay, as they do there. A test on real captions asks that the two agree on
    99.9 % of them.
    """
    tokens = _TOKEN.findall(html.unescape(caption).lower())
    return " ".join(_BRACKETS.get(token, token) for token in tokens if token not in _PUNCTUATION)


def require_metrics() -> None:
    """Raises InputError with the remedy if the package that computes caption metrics is not installed."""
    if importlib.util.find_spec("pycocoevalcap") is None:
        raise missing_extra("pycocoevalcap", "eval")


def caption_metrics(references: Sequence[Sequence[str]], captions: Sequence[str]) -> dict[str, float]:
    """CIDEr-D (Vedantam et al. 2015) and BLEU-1..4 (Papineni et al. 2002) as raw fractions.

    Args:
        references: per image, its reference captions.
        captions: per image, the caption to judge.
    """
    require_metrics()
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider

    truth = {row: [tokenize(text) for text in texts] for row, texts in enumerate(references)}
    judged = {row: [tokenize(caption)] for row, caption in enumerate(captions)}
    cider, _ = Cider().compute_score(truth, judged)
    bleu, _ = Bleu(4).compute_score(truth, judged, verbose=0)
    return {"CIDEr": float(cider)} | {f"BLEU-{order + 1}": float(value) for order, value in enumerate(bleu)}


def cider_scores(references: Sequence[Sequence[str]], captions: Sequence[str]) -> np.ndarray:
    """CIDEr-D of each caption [N] as raw fractions, n-grams weighted by all the references; as `caption_metrics`."""
    require_metrics()
    from pycocoevalcap.cider.cider import Cider

    truth = {row: [tokenize(text) for text in texts] for row, texts in enumerate(references)}
    _, scores = Cider().compute_score(truth, {row: [tokenize(caption)] for row, caption in enumerate(captions)})
    return np.asarray(scores)


def recall_at(images: np.ndarray, texts: np.ndarray, owner: Sequence[int], ranks: Sequence[int]) -> dict[str, float]:
    """Share of images with at least one own caption among the k nearest of all captions, for each k.

    Args:
        images: [N, D] unit length.
        texts: [M, D] unit length.
        owner: per text, the row of its image.
        ranks: the k to report.
    """
    owner = np.asarray(owner)
    first = np.empty(len(images), np.int64)
    for row, similarities in enumerate(images @ texts.T):
        first[row] = np.count_nonzero(similarities > similarities[owner == row].max())
    return {f"R@{k}": float((first < k).mean()) for k in ranks}
