"""Variety, length and copies, by hand."""

import pytest

from clipcap_rag.bootstrap import estimates
from clipcap_rag.diversity import IndexCopies, copied_neighbors, variety


def values(measures):
    return {name: estimate.value for name, estimate in estimates(measures).items()}


def test_variety_by_hand():
    found = values(variety(["a dog runs", "a dog", "", "a"]))
    assert found == pytest.approx({"distinct-1": 3 / 6, "distinct-2": 2 / 3, "vocabulary": 3, "length": 6 / 4})


def test_copies_of_neighbours_look_at_words_only():
    captions = ["A dog runs.", "a cat", "", "a kite"]
    neighbors = [["two dogs", "a dog runs"], ["A cat sleeps"], ["", "..."], []]
    assert values(copied_neighbors(captions, neighbors)) == {"copied-neighbor": 0.25}


def test_copies_of_an_index(world, tiny_captions):
    captions = [tiny_captions[3].upper() + "!", "a lighthouse at night", "something else", ""]
    references = [[""]] * 4
    assert values(IndexCopies([str(world.index.path)])(references, captions)) == {"copied-index": 0.25}
    both = IndexCopies([str(world.index.path), str(world.other_index.path)])
    assert values(both(references, captions)) == {"copied-index": 0.5}
