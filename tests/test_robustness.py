"""Effects of neighbours: what counts as copied."""

import pytest

from clipcap_rag.bootstrap import estimates
from clipcap_rag.robustness import copied_words


def test_copied_words_are_in_the_majority_and_in_no_reference():
    majority = [["a red bus by the road", "the bus is red"], ["two cats"], []]
    captions = ["a dog by a red bus", "a dog sleeps", ""]
    references = [["a dog by the sea"], ["a dog sleeps"], ["a cat"]]
    found = copied_words(captions, majority, references)
    assert found.statistics.tolist() == [[2, 6], [0, 3], [0, 0]]
    assert estimates({"copied": found})["copied"].value == pytest.approx(2 / 9)
