"""Metrics: known values and orderings."""

import math

import numpy as np
import pytest

from clipcap_rag.bootstrap import estimates
from clipcap_rag.errors import InputError
from clipcap_rag.metrics import caption_metrics, cider_scores, recall_at, word_measures


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


def values(references, captions):
    return {name: estimate.value for name, estimate in estimates(word_measures(references, captions)).items()}


def corpora():
    """Invented corpora with what may go wrong in one."""
    random = np.random.default_rng(5)
    words = ["a", "the", "red", "blue", "dog", "kite", "naïve", "日本", "café", "runs", "flies", "over", "-lrb-", "'s"]

    def sentence():
        return " ".join(random.choice(words, random.integers(1, 12)))

    yield "plain", [[sentence() for _ in range(5)] for _ in range(30)], [sentence() for _ in range(30)]
    yield "one reference", [[sentence()] for _ in range(20)], [sentence() for _ in range(20)]
    yield "fifty references", [[sentence() for _ in range(50)] for _ in range(6)], [sentence() for _ in range(6)]
    yield "unequal numbers", [[sentence() for _ in range(1 + row)] for row in range(8)], [sentence() for _ in range(8)]
    yield "duplicates", [[(text := sentence()), text, text] for _ in range(9)], ["a red dog runs"] * 9
    yield "empty captions", [[sentence()] * 2 for _ in range(9)], ["", "a", ""] * 3
    yield "one photo", [["a red dog", "the dog"]], ["a red dog"]


@pytest.mark.parametrize(
    "name, references, captions", list(corpora()), ids=lambda value: value if type(value) is str else ""
)
def test_values_are_those_of_coco_caption(name, references, captions):
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    truth, judged = dict(enumerate(references)), {row: [caption] for row, caption in enumerate(captions)}
    expected = {f"BLEU-{n + 1}": value for n, value in enumerate(Bleu(4).compute_score(truth, judged, verbose=0)[0])}
    expected["CIDEr"] = Cider().compute_score(truth, judged)[0]
    expected["ROUGE-L"] = Rouge().compute_score(truth, judged)[0]
    assert values(references, captions) == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_values_by_hand():
    references = [["the red dog runs home", "a dog runs"], ["two boats"]]
    found = values(references, ["a red dog runs", "three old boats"])
    # matches: a, red, dog, runs of 4 words; boats of 3. The closest references have 3 or 5 words (the shorter counts)
    # and 2: 7 words against 5, no penalty
    assert found["BLEU-1"] == pytest.approx(5 / 7)
    assert found["BLEU-2"] == pytest.approx(math.sqrt(5 / 7 * 2 / 5))  # "red dog", "dog runs" of 3 and 2
    # common in order: "red dog runs" of 4 and 5 words, "a dog runs" of 4 and 3: precision 3/4, recall 3/3; and 1/3, 1/2
    both = [((1 + 1.44) * p * r) / (r + 1.44 * p) for p, r in ((3 / 4, 1), (1 / 3, 1 / 2))]
    assert found["ROUGE-L"] == pytest.approx(sum(both) / 2)


def test_a_short_caption_is_penalised_in_bleu():
    found = values([["a red dog runs home"]], ["a red"])
    assert found["BLEU-1"] == pytest.approx(math.exp(1 - 5 / 2))


def test_an_empty_caption_has_nothing():
    found = values([["a red dog", "."], ["a kite", "the kite"]], ["", ""])
    assert found == pytest.approx(dict.fromkeys(found, 0), abs=1e-12)


def test_references_without_words_are_refused():
    with pytest.raises(InputError, match="no reference caption has a word"):
        word_measures([["", ""]], ["a dog"])
