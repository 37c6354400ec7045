"""Metrics that compare words with words, photo by photo, and retrieval metrics from arrays."""

import importlib.util
from collections.abc import Sequence

import numpy as np

from clipcap_rag.bootstrap import Measure, mean
from clipcap_rag.errors import InputError, missing_extra
from clipcap_rag.ptb_tokens import tokenize

_BLEU_ORDERS = 4


def require_metrics() -> None:
    """Raises InputError with the remedy if the package that computes caption metrics is not installed."""
    if importlib.util.find_spec("pycocoevalcap") is None:
        raise missing_extra("pycocoevalcap", "eval")


def caption_metrics(references: Sequence[Sequence[str]], captions: Sequence[str]) -> dict[str, float]:
    """CIDEr-D and BLEU-1..4 as raw fractions, quickly and without intervals.

    Args:
        references: per image, its reference captions.
        captions: per image, the caption to judge.
    """
    tokens = [[tokenize(text) for text in texts] for texts in references]
    judged = [tokenize(caption) for caption in captions]
    measures = cider(tokens, judged) | bleu(tokens, judged)
    return {name: float(measure.combine(measure.statistics.sum(axis=0))) for name, measure in measures.items()}


def word_measures(references: Sequence[Sequence[str]], captions: Sequence[str]) -> dict[str, Measure]:
    """CIDEr-D, BLEU-1..4 and ROUGE-L of captions that are words joined by spaces."""
    return cider(references, captions) | bleu(references, captions) | rouge(references, captions)


def cider(references: Sequence[Sequence[str]], captions: Sequence[str]) -> dict[str, Measure]:
    """CIDEr-D (Vedantam et al. 2015): the mean over photos, whose references say how rare an n-gram is.

    Raises:
        InputError: no reference has a word, or the package that computes it is not installed.
    """
    require_metrics()
    from pycocoevalcap.cider.cider_scorer import CiderScorer

    if not any(text for texts in references for text in texts):
        raise InputError("no reference caption has a word; give captions of the photos")
    scorer = CiderScorer()
    for texts, caption in zip(references, captions, strict=True):
        scorer += (caption, list(texts))
    return {"CIDEr": mean(scorer.compute_score()[1])}


def bleu(references: Sequence[Sequence[str]], captions: Sequence[str]) -> dict[str, Measure]:
    """BLEU-1..4 of the corpus (Papineni et al. 2002), against the reference whose length is closest."""
    require_metrics()
    from pycocoevalcap.bleu.bleu_scorer import BleuScorer

    scorer = BleuScorer(n=_BLEU_ORDERS)
    for texts, caption in zip(references, captions, strict=True):
        scorer += (caption, list(texts))
    rows = []
    for counts in scorer.ctest:
        length = counts["testlen"]
        closest = min((abs(reference - length), reference) for reference in counts["reflen"])[1]
        rows.append([length, closest, *counts["guess"], *counts["correct"]])
    statistics = np.array(rows, float)
    return {
        f"BLEU-{order}": Measure(statistics, lambda sums, order=order: _bleu(sums, order))
        for order in range(1, _BLEU_ORDERS + 1)
    }


def _bleu(sums: np.ndarray, order: int) -> np.ndarray:
    """BLEU from [..., 10] sums: length, reference length, n-grams and matches of each order.

    The two small numbers are coco-caption's; they keep what has no n-gram of an order at 0.
    """
    length, reference = sums[..., 0], sums[..., 1]
    guessed, correct = sums[..., 2 : 2 + order], sums[..., 2 + _BLEU_ORDERS : 2 + _BLEU_ORDERS + order]
    precision = np.prod((correct + 1e-15) / (guessed + 1e-9), axis=-1) ** (1 / order)
    return precision * np.exp(np.minimum(0, 1 - (reference + 1e-9) / (length + 1e-15)))


def rouge(references: Sequence[Sequence[str]], captions: Sequence[str]) -> dict[str, Measure]:
    """ROUGE-L (Lin 2004): the mean over photos; a caption without words has 0."""
    require_metrics()
    from pycocoevalcap.rouge.rouge import Rouge

    scorer, values = Rouge(), []
    for texts, caption in zip(references, captions, strict=True):
        values.append(scorer.calc_score([caption], list(texts)) if caption else 0.0)
    return {"ROUGE-L": mean(values)}


def cider_scores(references: Sequence[Sequence[str]], captions: Sequence[str]) -> np.ndarray:
    """CIDEr-D of each caption [N] as raw fractions, n-grams weighted by all the references; as `caption_metrics`."""
    tokens = [[tokenize(text) for text in texts] for texts in references]
    return cider(tokens, [tokenize(caption) for caption in captions])["CIDEr"].statistics[:, 0]


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
