"""Stored embeddings and texts in place of photos."""

import numpy as np
import pytest

from clipcap_rag.caption_inputs import StoredEmbeddings, checked_texts
from clipcap_rag.captioner import Captioner
from clipcap_rag.config import GenerationConfig
from clipcap_rag.errors import InputError
from clipcap_rag.features import extract_features

FEW = GenerationConfig(candidates=4, max_new_tokens=8)


@pytest.fixture(scope="module")
def captioner(world):
    return Captioner.from_pretrained(world.run, device="cpu", dtype="float32")


def test_a_feature_set_gives_the_captions_of_its_photos(captioner, world):
    stored = StoredEmbeddings.open(world.features.path)
    assert stored.names == world.features.image_ids and stored.digests == world.features.digests
    results = captioner.caption(embeddings=stored, generation=FEW, batch_size=3)
    photos = captioner.caption([world.photos / name for name in world.features.images], generation=FEW)
    assert [result.image for result in results] == world.features.image_ids
    assert [result.caption for result in results] == [result.caption for result in photos]  # samples too: same digest
    part = captioner.caption(embeddings=stored.part([5, 1]), generation=FEW)
    assert [(result.image, result.caption) for result in part] == [
        (results[row].image, results[row].caption) for row in (5, 1)
    ]


def test_a_npy_file_is_an_array(captioner, world, tmp_path):
    np.save(tmp_path / "rows.npy", world.features.embeddings)
    stored = StoredEmbeddings.open(tmp_path / "rows.npy")
    assert isinstance(stored.vectors, np.memmap) and stored.names[:2] == ["embedding-0", "embedding-1"]
    from_file = captioner.caption(embeddings=stored, generation=FEW)
    assert from_file == captioner.caption(embeddings=np.asarray(world.features.embeddings), generation=FEW)
    (alone,) = captioner.caption(embeddings=np.asarray(world.features.embeddings[0]), generation=FEW)
    assert alone.caption == from_file[0].caption


def test_what_cannot_be_used_is_named(captioner, world, other_clip, tmp_path):
    (tmp_path / "words.npy").write_text("no array")
    np.save(tmp_path / "objects.npy", np.array([{}]), allow_pickle=True)
    np.save(tmp_path / "strings.npy", np.array(["a"]))
    for name, reason in (("none", "cannot read"), ("words", "no array"), ("objects", "no array"), ("strings", "<U1")):
        with pytest.raises(InputError, match=reason):
            StoredEmbeddings.open(tmp_path / f"{name}.npy")
    bad = np.array(world.features.embeddings)
    bad[3] = 0
    with pytest.raises(InputError, match="embedding-3 is zero or not finite"):
        captioner.caption(embeddings=bad)
    foreign = extract_features([world.captions], world.photos, str(other_clip), tmp_path / "foreign", workers=0)
    with pytest.raises(InputError, match="one CLIP model for both"):
        captioner.caption(embeddings=StoredEmbeddings.open(foreign.path))


def test_a_text_takes_the_place_of_an_image(captioner, tiny_captions):
    results = captioner.caption(texts=tiny_captions[:3], generation=FEW)
    assert [result.image for result in results] == tiny_captions[:3]
    vectors = captioner.encoder.encode_text(tiny_captions[:3])
    for row, result in enumerate(results):
        assert result.error is None and len(result.neighbors) == 3
        assert result.neighbors[0].caption == tiny_captions[row]  # the index holds this very text
        assert result.candidates[0].clip_similarity == pytest.approx(
            float(result.caption_embedding @ vectors.vectors[row]), abs=1e-5
        )
    greedy = GenerationConfig(decoding="greedy", max_new_tokens=8)
    by_hand = captioner.caption(embeddings=vectors.raw, generation=greedy)
    by_text = captioner.caption(texts=tiny_captions[:3], generation=greedy)
    assert [result.caption for result in by_text] == [result.caption for result in by_hand]
    (alone,) = captioner.caption(texts=tiny_captions[0], generation=FEW)
    assert alone.caption == results[0].caption


def test_texts_that_are_none():
    for texts in ("", [" "], ["a dog", 5]):
        with pytest.raises(InputError, match="give a sentence"):
            checked_texts(texts)
