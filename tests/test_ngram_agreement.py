"""Agreement of captions in their n-grams."""

import numpy as np
import pytest

from clipcap_rag.caption_votes import Votes
from clipcap_rag.ngram_agreement import NgramWeights, agreement, grams

DOCUMENTS = [["a red kite over the sea"], ["a dog in the snow"], ["a dog on a beach"], ["an old man in a hat"]]


@pytest.fixture(scope="module")
def weights():
    return NgramWeights(DOCUMENTS)


def test_equal_captions_agree_fully_and_strangers_not_at_all(weights):
    kite = weights.vector("A red kite over the sea.")
    assert agreement(kite, kite) == pytest.approx(1.0)
    assert agreement(kite, weights.vector("nothing like it")) == 0.0
    assert agreement(kite, weights.vector("")) == 0.0 and weights.vector("") == {}


def test_rare_words_count_more_than_usual_ones(weights):
    kite = weights.vector("a red kite over the sea")
    assert agreement(kite, weights.vector("my kite")) > agreement(kite, weights.vector("a cat the mat"))


def test_agreement_with_votes_is_the_weighted_mean_of_agreements(weights):
    one, captions = weights.vector("a dog on the snow"), ["a dog in the snow", "a red kite"]
    expected = sum(agreement(one, weights.vector(caption)) for caption in captions) / 2
    total = weights.total(Votes(captions, np.full(2, 0.5)))
    assert weights.agreement("a dog on the snow", total) == pytest.approx(expected)
    assert weights.agreement("words that nobody said", total) == 0.0
    against = weights.total(Votes(captions, np.array([1.0, -1.0])))
    assert weights.agreement("a red kite", against) < 0 < weights.agreement("a dog", against)
    assert weights.agreement("a dog", weights.total(Votes())) == 0.0


def test_the_end_and_marks_are_words_but_case_is_not():
    assert grams("A dog.")[:4] == [("a",), ("dog",), (".",), ("",)]
    assert ("dog", ".", "") in grams("A dog.") and grams(" ") == []
