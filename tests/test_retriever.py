"""Retriever: own captions and equal strings never come back, duplicates are dropped, several indexes merge."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clipcap_rag.errors import InputError
from clipcap_rag.retriever import Exclusion, Retriever, index_choice, stored_neighbors
from clipcap_rag.sources import normalize_caption

DIM = 6
WORDS = ["a red kite", "A red kite.", "two boats", "a dog", "a dog!", "the old mill", "snow"]


class FakeIndex:
    """An index in memory with the reading side of CaptionIndex, searched by brute force."""

    def __init__(self, captions, image_ids, vectors, name="fake"):
        self.texts, self.ids, self.vectors, self.name = captions, image_ids, vectors, name
        self.dim, self.encoder = vectors.shape[1], {"clip": "fake"}

    def __len__(self):
        return len(self.texts)

    def search(self, queries, k):
        scores = queries @ self.vectors.T
        rows = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        return np.take_along_axis(scores, rows, axis=1), rows

    def captions(self, rows):
        return [self.texts[row] for row in rows]

    def image_ids(self, rows):
        return [self.ids[row] for row in rows]

    def embeddings(self, rows):
        return self.vectors[rows]


def unit(rows, seed):
    vectors = np.random.default_rng(seed).standard_normal((rows, DIM)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


entries = st.lists(st.tuples(st.sampled_from(WORDS), st.sampled_from(["p", "q", "r", None])), min_size=1, max_size=60)


@settings(max_examples=150, deadline=None)
@given(
    entries, st.integers(0, 12), st.sampled_from(["p", "q", "z"]), st.sets(st.sampled_from(WORDS)), st.integers(0, 99)
)
def test_own_words_are_never_retrieved_and_all_allowed_ones_are(rows, k, image_id, own, seed):
    index = FakeIndex([text for text, _ in rows], [photo for _, photo in rows], unit(len(rows), seed))
    found = Retriever([index]).search(unit(1, seed + 1), k, [Exclusion.of(image_id, list(own))])
    forbidden = {normalize_caption(text) for text in own}
    allowed = {normalize_caption(text) for text, photo in rows if photo != image_id} - forbidden
    texts = [normalize_caption(text) for text in found.captions[0]]
    assert found.rows.shape == (1, k)
    assert len(texts) == min(k, len(allowed)) == found.mask.sum()
    assert set(texts) <= allowed and len(set(texts)) == len(texts)
    assert all(index.ids[row] != image_id for row in found.rows[0][found.mask[0]])
    assert np.all(np.diff(found.scores[0][found.mask[0]]) <= 0)
    assert np.array_equal(found.embeddings[0][found.mask[0]], index.vectors[found.rows[0][found.mask[0]]])
    assert not found.embeddings[0][~found.mask[0]].any()


def test_many_own_captions_do_not_crowd_out_the_others():
    query = unit(1, 0)
    near = np.repeat(query, 500, axis=0)
    index = FakeIndex(
        [f"own {n}" for n in range(500)] + ["another"], ["p"] * 500 + ["q"], np.concatenate([near, -query])
    )
    found = Retriever([index]).search(query, 3, [Exclusion.of("p", [])])
    assert found.captions == [["another"]]


def test_weights_order_the_merge_and_cosines_are_reported():
    query = unit(1, 0)
    first = FakeIndex(["a red kite"], [None], 0.9 * query, "first")
    second = FakeIndex(["two boats", "A red kite."], [None, None], np.concatenate([0.8 * query, 0.5 * query]), "second")
    plain = Retriever([first, second]).search(query, 3).listed()[0]
    assert [(found.caption, found.index) for found in plain] == [("a red kite", "first"), ("two boats", "second")]
    weighed = Retriever([first, second], [0.5, 1.0]).search(query, 3).listed()[0]
    assert [found.caption for found in weighed] == ["two boats", "A red kite."]
    assert weighed[0].score == pytest.approx(0.8)


def test_indexes_of_different_width_are_refused():
    other = FakeIndex(["x"], [None], np.ones((1, DIM + 1), np.float32), "other")
    with pytest.raises(InputError, match="different CLIP models"):
        Retriever([FakeIndex(["y"], [None], unit(1, 0)), other])


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("flickr:0.7", ("flickr", 0.7)),
        ("flickr", ("flickr", 1.0)),
        ("c:/data", ("c:/data", 1.0)),
        ("a:b:2", ("a:b", 2.0)),
    ],
)
def test_index_choice(argument, expected):
    assert index_choice(argument) == expected


def test_stored_neighbors_are_kept_and_follow_the_index(world):
    features, index = world.features, world.index
    rows = stored_neighbors(features, index, 4)
    assert rows.shape == (len(features), 4) and rows.dtype == np.int64
    for photo, found in enumerate(rows):
        own = {normalize_caption(text) for text in features.captions[photo]}
        present = found[found >= 0]
        assert own.isdisjoint(normalize_caption(text) for text in index.captions(present))
        assert features.image_ids[photo] not in index.image_ids(present)
    kept = features.path / f"neighbors-{index.name}.npy"
    kept.with_suffix(".json").write_text("{}")
    kept.write_bytes(b"rubbish")
    assert np.array_equal(stored_neighbors(features, index, 4), rows)
    assert np.array_equal(np.load(kept), rows)


def test_versions_of_one_image_keep_some_of_its_neighbors():
    index = FakeIndex(WORDS, ["p"] * 7, unit(7, 1))
    (whole,) = (Retriever([index]).search(unit(1, 2), 9),)  # two captions are repeated, so four are absent
    kept = np.array([[True] * 9, [False] * 9, [True, False, True, False, True] + [True] * 4])
    versions = whole.versions(kept)
    first, none, some = versions.captions
    assert first == whole.captions[0] and none == [] and some == whole.captions[0][::2]
    assert versions.mask.tolist() == (whole.mask & kept).tolist()
    assert [neighbor.caption for neighbor in versions.listed()[0]] == first
    for name in ("scores", "sources", "embeddings"):
        assert (getattr(versions, name) == getattr(whole, name)).all()
