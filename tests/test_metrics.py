"""Metrics: known values and orderings."""

import numpy as np
import pytest

from clipcap_rag.metrics import caption_metrics, recall_at, tokenize


@pytest.mark.parametrize(
    ("caption", "tokens"),
    [
        ("A dog's ball, on the grass .", "a dog 's ball on the grass"),
        ("The man isn't here; he can't wait!", "the man is n't here he ca n't wait"),
        ('A sign says "stop" (in red)...', "a sign says stop -lrb- in red -rrb-"),
        ("Bread &amp; tea at 5 o'clock in the U.S.", "bread & tea at 5 o'clock in the u.s."),
        ("A t-shirt and a 3.5 m kite", "a t-shirt and a 3.5 m kite"),
    ],
)
def test_tokenizer_follows_the_treebank_style(caption, tokens):
    assert tokenize(caption) == tokens


def test_perfect_and_unrelated_captions():
    references = [
        ["a red kite flies over the beach", "a kite in the sky"],
        ["two boats lie in the harbour", "boats at the pier"],
        ["a cook cuts an onion in the kitchen", "someone cooks"],
    ]
    perfect = caption_metrics(references, [texts[0] for texts in references])
    assert perfect["BLEU-4"] == pytest.approx(1.0, abs=1e-6)
    wrong = caption_metrics(references, [references[(row + 1) % 3][0] for row in range(3)])
    assert perfect["CIDEr"] > 1.0 > wrong["CIDEr"]
    assert perfect["CIDEr"] > 10 * wrong["CIDEr"]


def test_recall_counts_the_best_own_caption():
    images = np.eye(3, dtype=np.float32)
    texts = np.array([[1, 0, 0], [0, 0.2, 0.9], [0.5, 0.6, 0.5], [0, 0.9, 0.1], [0.9, 0.1, 0]], np.float32)
    owner = [0, 2, 1, 0, 2]  # the second image's only caption is beaten by one other
    assert recall_at(images, texts, owner, (1, 2)) == {"R@1": pytest.approx(2 / 3), "R@2": 1.0}
