"""Neighbour conditions: each shows the model what its name says, with true cosines and nothing of the photo's own."""

import dataclasses

import numpy as np
import pytest

from clipcap_rag.neighbor_conditions import LOW_RANK, of_rows, placed, robustness
from clipcap_rag.retrievable import Exclusion
from clipcap_rag.retriever import Retriever
from clipcap_rag.sources import normalize_caption

K = 4


@pytest.fixture(scope="module")
def parts(world):
    vectors, ids = world.features.unit_embeddings(), world.features.image_ids
    exclusions = [Exclusion(image_id, frozenset()) for image_id in ids]
    retriever = Retriever([world.index])

    def search(k):
        return retriever.search(vectors, k, exclusions)

    conditions = robustness("own", world.index, search, vectors, ids, K, seed=3)
    return world.index, search(LOW_RANK - 1 + K), vectors, ids, conditions


def test_every_neighbour_is_what_it_says_and_none_is_the_photo_s_own(parts):
    index, _, vectors, ids, conditions = parts
    for name, condition in conditions.items():
        neighbors = condition.neighbors
        listed = neighbors.listed()
        assert [len(one) for one in listed] == neighbors.mask.sum(axis=1).tolist(), name
        for image, own, vector in zip(listed, ids, vectors, strict=True):
            rows = [neighbor.row for neighbor in image]
            assert index.captions(rows) == [neighbor.caption for neighbor in image]
            np.testing.assert_allclose([one.score for one in image], index.embeddings(rows) @ vector, atol=1e-5)
            assert name == "random but fixed" or own not in index.image_ids(rows)
        shown = neighbors.rows[neighbors.mask]
        np.testing.assert_array_equal(neighbors.embeddings[neighbors.mask], index.embeddings(shown))
        assert not neighbors.embeddings[~neighbors.mask].any()


def test_ranks_and_numbers(parts):
    _, found, _, _, conditions = parts
    for count in (1, 2, K, 8):
        np.testing.assert_array_equal(conditions[f"nearest {count}"].neighbors.rows, found.rows[:, :count])
    assert conditions["none"].neighbors.rows.shape[1] == 0 and conditions["none"].shown == 0
    low = conditions[f"ranks {LOW_RANK}-{LOW_RANK + K - 1}"]
    np.testing.assert_array_equal(low.neighbors.rows, found.rows[:, LOW_RANK - 1 : LOW_RANK - 1 + K])
    assert low.shown == 0  # the index has fewer captions than that


def test_low_ranks_of_an_index_that_has_them(world):
    vectors, count = world.features.unit_embeddings(), len(world.index)
    found = Retriever([world.index]).search(vectors, count)
    places = np.tile([count - 2, count - 1, count - 1], (len(vectors), 1))
    assert placed(found, places).captions == [[*captions[-2:], captions[-1]] for captions in found.captions]


def test_places_keep_by_which_photo_a_neighbour_was_found(parts):
    _, found, _, _, _ = parts
    scores = np.where(np.arange(found.rows.size).reshape(found.rows.shape) % 2, 0.5, np.nan).astype(np.float32)
    by_photo = dataclasses.replace(found, image_scores=scores)
    for route, neighbor in zip(["image", "text"], placed(by_photo, np.array([[1, 0]] * 8)).listed()[0], strict=True):
        assert neighbor.route == route


def test_shuffled_and_repeated(parts):
    _, found, _, _, conditions = parts
    shuffled = conditions["shuffled"].neighbors.rows
    np.testing.assert_array_equal(np.sort(shuffled, axis=1), np.sort(found.rows[:, :K], axis=1))
    assert (shuffled != found.rows[:, :K]).any()
    repeated = conditions["nearest repeated"].neighbors
    np.testing.assert_array_equal(repeated.rows, np.repeat(found.rows[:, :1], K, axis=1))
    assert repeated.captions == [[captions[0]] * K for captions in found.captions]


def test_shuffling_keeps_absent_neighbours_behind(world):
    from clipcap_rag.neighbor_conditions import shuffled

    rows = np.array([[5, -1, 2, -1], [1, 2, 3, 4]])
    mixed = shuffled(of_rows(world.index, rows, world.features.unit_embeddings()[:2]), np.random.default_rng(0))
    assert mixed.mask.tolist() == [[True, True, False, False], [True] * 4]
    assert sorted(mixed.captions[0]) == sorted(world.index.captions([2, 5]))


def test_random_neighbours_differ_between_photos_and_the_fixed_ones_do_not(parts):
    _, _, _, _, conditions = parts
    assert len({tuple(rows) for rows in conditions["random"].neighbors.rows.tolist()}) > 1
    assert len({tuple(rows) for rows in conditions["random but fixed"].neighbors.rows.tolist()}) == 1
    assert conditions["random"].shown == conditions["random but fixed"].shown == K


def test_the_majority_is_one_wrong_image(parts):
    index, found, _, ids, conditions = parts
    wrong = conditions["wrong majority"].neighbors
    np.testing.assert_array_equal(wrong.rows[:, 0], found.rows[:, 0])
    owners = [index.image_ids(rows) for rows in wrong.rows[:, 1:]]
    assert all(len(set(images)) == 1 for images in owners)  # each photo has four captions, three are shown
    assert all(images[0] != own for images, own in zip(owners, ids, strict=True))
    assert all(len({normalize_caption(text) for text in texts[1:]}) == K - 1 for texts in wrong.captions)


def test_a_majority_larger_than_an_image_s_captions_is_filled_with_what_is_close(world):
    from clipcap_rag.neighbor_conditions import wrong_majority

    vectors, ids = world.features.unit_embeddings(), world.features.image_ids
    found = Retriever([world.index]).search(vectors, 7)
    wrong = wrong_majority(world.index, found, vectors, ids, 7, np.random.default_rng(0))
    for rows, own in zip(wrong.rows, ids, strict=True):
        images = world.index.image_ids(rows[1:])
        assert own not in images and len(set(images[:4])) == 1 and len(set(images)) > 1


def test_a_majority_without_image_ids(world):
    from clipcap_rag.neighbor_conditions import wrong_majority

    vectors, ids = world.features.unit_embeddings(), world.features.image_ids
    found = Retriever([world.other_index]).search(vectors, 3)
    wrong = wrong_majority(world.other_index, found, vectors, ids, 3, np.random.default_rng(0))
    assert all(len(set(texts[1:])) == 2 for texts in wrong.captions)


def test_a_blank_image_leaves_the_neighbours(parts):
    _, found, vectors, _, conditions = parts
    from clipcap_rag.embeddings import Embeddings

    blank, norms = conditions["blank image"], np.full(len(vectors), 2.0, np.float32)
    assert not blank.images(Embeddings(vectors, norms), slice(2, 5)).raw.any()
    assert conditions["shuffled"].images(Embeddings(vectors, norms), slice(2, 5)).raw.all()
    np.testing.assert_array_equal(blank.neighbors.rows, found.rows[:, :K])


def test_random_rows_of_an_index_with_nothing_but_the_photo_s_own_are_absent(world, tmp_path):
    from clipcap_rag.index_builder import build_caption_index
    from clipcap_rag.neighbor_conditions import random_rows

    file = tmp_path / "one.jsonl"
    file.write_text('{"image_id": "x", "caption": "a cat"}\n{"image_id": "x", "caption": "a black cat"}\n')
    index = build_caption_index([file], world.clip, tmp_path / "one", device="cpu", dtype="float32")
    rows = random_rows(index, ["x", "y"], 3, np.random.default_rng(0))
    assert rows[0].tolist() == [-1, -1, -1] and set(rows[1].tolist()) <= {0, 1}
