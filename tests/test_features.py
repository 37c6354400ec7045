"""Feature sets: embeddings of the photos that can be read, with all their captions; killed extractions continue."""

import json

import numpy as np
import pytest

import clipcap_rag.features as features_module
from clipcap_rag.encoder import Encoder
from clipcap_rag.errors import InputError
from clipcap_rag.features import FeatureSet, extract_features


def write_captions(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_embeddings_ids_and_captions_belong_together(world):
    features = FeatureSet.open(world.features.path)
    rows = [json.loads(line) for line in world.captions.read_text().splitlines()]
    assert features.images == [row["image"] for row in rows]
    assert features.captions == [row["captions"] for row in rows]
    expected = Encoder.load(world.clip, "cpu", "float32").encode_image([world.photos / row["image"] for row in rows])
    np.testing.assert_allclose(features.embeddings, expected.embeddings.raw, rtol=2e-3, atol=2e-3)
    np.testing.assert_allclose(np.linalg.norm(features.unit_embeddings(), axis=1), 1, atol=1e-6)
    assert features.digests == expected.digests and features.folder == world.photos.resolve()


def test_unreadable_photos_are_left_out_and_listed(world, tmp_path):
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    (tmp_path / "good.jpg").write_bytes((world.photos / world.features.images[0]).read_bytes())
    captions = write_captions(
        tmp_path / "c.jsonl",
        [
            {"image": "broken.jpg", "caption": "a broken thing"},
            {"image": "good.jpg", "captions": ["a good thing", "one more word"]},
            {"image_id": "missing", "caption": "a missing thing"},
        ],
    )
    features = extract_features([captions], tmp_path, world.clip, tmp_path / "out", workers=0)
    assert features.images == ["good.jpg"] and features.captions == [["a good thing", "one more word"]]
    assert len(features.errors) == 2
    assert "broken.jpg" in features.errors[0] and "missing" in features.errors[1]
    assert FeatureSet.open(tmp_path / "out").errors == features.errors


@pytest.mark.parametrize("trunk", [False, True])
def test_a_killed_extraction_continues(world, tmp_path, monkeypatch, trunk):
    monkeypatch.setattr(features_module, "_CHUNK", 4)
    given, settings = ([world.captions], world.photos, world.clip), {"workers": 0, "trunk": trunk}
    whole = extract_features(*given, tmp_path / "whole", **settings)
    calls = []
    encode = Encoder.encode_image

    def dies_in_the_second_chunk(self, *arguments, **settings):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return encode(self, *arguments, **settings)

    monkeypatch.setattr(Encoder, "encode_image", dies_in_the_second_chunk)
    with pytest.raises(KeyboardInterrupt):
        extract_features(*given, tmp_path / "parts", **settings)
    assert not (tmp_path / "parts").exists()
    with pytest.raises(InputError, match="unfinished"):
        FeatureSet.open(tmp_path / "parts")
    chunks = -(-len(whole) // 4)
    extract_features(*given, tmp_path / "parts", **settings)
    assert len(calls) == 2 + chunks - 1
    for name in ("embeddings.npy", "images.arrow", "captions.arrow", *(["trunk.npy"] if trunk else [])):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not (tmp_path / "parts.partial").exists() and not list((tmp_path / "parts").glob("chunk-*"))


def test_two_photos_with_one_id_are_refused(world, tmp_path):
    rows = [{"image": "cats/1.jpg", "caption": "a cat"}, {"image": "dogs/1.jpg", "caption": "a dog"}]
    with pytest.raises(InputError, match="cats/1.jpg and dogs/1.jpg share"):
        extract_features([write_captions(tmp_path / "c.jsonl", rows)], tmp_path, world.clip, tmp_path / "out")


def test_photos_are_found_by_name_where_the_folders_differ(world, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "one.jpg").write_bytes((world.photos / world.features.images[0]).read_bytes())
    captions = write_captions(tmp_path / "c.jsonl", [{"image": "train2014/one.jpg", "caption": "a thing"}])
    features = extract_features([captions], tmp_path, world.clip, tmp_path / "out", workers=0)
    assert features.images == ["one.jpg"] and not features.errors


def test_no_photo_at_all(world, tmp_path):
    captions = write_captions(tmp_path / "c.jsonl", [{"image": "nothing.jpg", "caption": "nothing"}])
    with pytest.raises(InputError, match="none of the 1 photos"):
        extract_features([captions], tmp_path, world.clip, tmp_path / "out", workers=0)
    with pytest.raises(InputError, match="does not exist"):
        extract_features([captions], tmp_path / "nowhere", world.clip, tmp_path / "out")
    text = tmp_path / "t.txt"
    text.write_text("a caption without a photo\n")
    with pytest.raises(InputError, match="names an image"):
        extract_features([text], tmp_path, world.clip, tmp_path / "out")
