"""Captions of an index in place of photos."""

import numpy as np

from clipcap_rag.caption_photos import caption_photos


def test_every_caption_is_a_photo_near_its_own_embedding(world):
    photos = caption_photos(world.index, world.features)
    assert len(photos) == len(world.index)
    assert photos.captions == [[caption] for caption in world.index.captions(np.arange(len(photos)))]
    assert photos.image_ids == list(world.index.image_ids(np.arange(len(photos))))
    np.testing.assert_allclose(np.linalg.norm(photos.unit_embeddings(), axis=1), 1, atol=1e-5)


def test_they_are_moved_to_where_photos_lie(world):
    captions, centre = world.index.embeddings(np.arange(len(world.index))), world.features.unit_embeddings().mean(0)
    moved = caption_photos(world.index, world.features).unit_embeddings()
    before, after = (np.linalg.norm(vectors.mean(0) - centre) for vectors in (captions, moved))
    assert after < before
