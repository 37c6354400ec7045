"""The leak audit: planted ids, strings and nearly equal photos are found, and nothing else."""

import dataclasses
import json
import shutil

import numpy as np
import pytest

from clipcap_rag.caption_index import CaptionIndex
from clipcap_rag.evaluated import Photos
from clipcap_rag.index_builder import build_caption_index
from clipcap_rag.index_editor import remove_captions
from clipcap_rag.index_images import add_images
from clipcap_rag.leak_audit import audit
from clipcap_rag.sources import normalize_caption


@pytest.fixture(scope="module")
def planted(world, tmp_path_factory):
    """An index with a caption of photo 1 by id, the words of a caption of photo 2, two of a double of photo 3."""
    folder = tmp_path_factory.mktemp("planted")
    photos = world.features
    rows = [
        {"image_id": photos.image_ids[1], "caption": "a sentence of no photo"},
        {"image_id": "stranger", "caption": "a castle on a hill"},
        {"caption": photos.captions[2][1].upper() + " !"},
        {"image_id": "double", "caption": "an owl at night"},
        {"image_id": "double", "caption": "a bird with large eyes"},
    ]
    file = folder / "planted.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return build_caption_index([file], world.clip, folder / "planted", device="cpu", dtype="float32")


def others(world):
    """Photos of other ids: a stranger, a double of photo 3, and photo 4 itself."""
    vectors = np.asarray(world.features.embeddings, np.float32)
    near = vectors[3] + 0.02 * np.linalg.norm(vectors[3]) * np.eye(1, len(vectors[3]), dtype=np.float32)[0]
    ids = ["stranger", "double", world.features.image_ids[4]]
    return dataclasses.replace(world.features, image_ids=ids, embeddings=np.stack([-vectors[0], near, vectors[4]]))


def test_all_leaks_are_found(world, planted):
    photos = Photos.of(world.features, "dev")
    near = photos.embeddings.vectors @ photos.embeddings.vectors.T
    cosine = max(0.995, float(np.sort(near[~np.eye(len(near), dtype=bool)])[-1]))
    found = audit(planted, photos, others(world), cosine)
    assert (found.ids.photos, found.ids.rows) == ({1}, {0})
    assert (found.strings.photos, found.strings.rows) == ({2}, {2})
    assert [(one.photo, one.other) for one in found.doubles] == [(3, "double")] and found.compared == 3
    assert found.copies.rows == {3, 4} and found.photos == {1, 2, 3}
    assert found.texts(planted) == {normalize_caption(planted.captions([row])[0]) for row in (0, 2, 3, 4)}
    shown = found.to_json(photos)
    assert shown["doubles"]["pairs"] == [
        {"image": world.features.images[3], "other": "double", "cosine": pytest.approx(found.doubles[0].cosine)}
    ]
    assert shown["leaking"] == world.features.images[1:4]


def test_without_photos_nothing_is_said_of_doubles(world, planted):
    found = audit(planted, Photos.of(world.features, "dev", 2), None, 0.95)
    assert found.doubles is None and found.photos == {1} and found.to_json(Photos.of(world.features, "dev"))


def test_the_photos_of_an_index_are_compared(world, planted, tmp_path):
    own = shutil.copytree(world.index.path, tmp_path / "own")
    add_images(own, world.features.path)
    photos = Photos.of(world.features, "dev", 2)
    near = world.features.unit_embeddings() @ photos.embeddings.vectors.T
    found = audit(CaptionIndex.open(own), photos, None, 0.9999)
    assert found.compared == len(world.features) and found.doubles == []  # of other ids there is none so near
    some = audit(CaptionIndex.open(own), photos, None, float(np.sort(near.ravel())[-4] - 1e-3))
    first = some.doubles[0]
    assert first.cosine == pytest.approx(near[world.features.image_ids.index(first.other), first.photo], abs=1e-2)
    assert first.other in world.index.image_ids(sorted(some.copies.rows))


def test_removed_captions_do_not_leak(world, planted, tmp_path):
    shutil.copytree(planted.path, tmp_path / "copy")
    remove_captions(tmp_path / "copy", {"image_id": [world.features.image_ids[1]]})
    assert audit(CaptionIndex.open(tmp_path / "copy"), Photos.of(world.features, "dev"), None, 0.95).ids.rows == set()
