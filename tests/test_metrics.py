"""Metrics: known values and orderings."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from clipcap_rag.metrics import caption_metrics, cider_scores, recall_at, tokenize


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
    captions = [references[0][0], references[2][0], references[2][1]]
    each = cider_scores(references, captions)
    assert each.mean() == pytest.approx(caption_metrics(references, captions)["CIDEr"]) and each[0] > each[1]


def test_recall_counts_the_best_own_caption():
    images = np.eye(3, dtype=np.float32)
    texts = np.array([[1, 0, 0], [0, 0.2, 0.9], [0.5, 0.6, 0.5], [0, 0.9, 0.1], [0.9, 0.1, 0]], np.float32)
    owner = [0, 2, 1, 0, 2]  # the second image's only caption is beaten by one other
    assert recall_at(images, texts, owner, (1, 2)) == {"R@1": pytest.approx(2 / 3), "R@2": 1.0}


@pytest.mark.photos
@pytest.mark.skipif("CLIPCAP_RAG_DATA" not in os.environ, reason="CLIPCAP_RAG_DATA does not name the captions")
@pytest.mark.skipif(shutil.which("java") is None, reason="coco-caption's tokenizer needs Java")
def test_tokenizer_agrees_with_the_one_in_java():
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    lines = (Path(os.environ["CLIPCAP_RAG_DATA"]) / "flickr8k/captions_dev.jsonl").read_text().splitlines()
    captions = [caption for line in lines for caption in json.loads(line)["captions"]]
    expected = PTBTokenizer().tokenize({row: [{"caption": caption}] for row, caption in enumerate(captions)})
    equal = [tokenize(caption) == expected[row][0] for row, caption in enumerate(captions)]
    assert np.mean(equal) >= 0.999
