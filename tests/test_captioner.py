"""The public API: retrieval on, off and swapped; every kind of input; bad images beside good ones."""

import dataclasses
import shutil

import numpy as np
import pytest
from PIL import Image

from clipcap_rag.caption_index import CaptionIndex
from clipcap_rag.captioner import Captioner
from clipcap_rag.config import GenerationConfig, RetrievalConfig
from clipcap_rag.errors import InputError
from clipcap_rag.index_builder import build_caption_index

FEW = GenerationConfig(candidates=4, max_new_tokens=10)


@pytest.fixture(scope="module")
def captioner(world):
    return Captioner.from_pretrained(world.run, device="cpu", dtype="float32")


def same(first, second):
    """Whether two lists of candidates are the same up to what another place in a batch does to the last digits."""
    assert [candidate.caption for candidate in first] == [candidate.caption for candidate in second]
    for name in ("clip_similarity", "log_probability", "score"):
        values = [getattr(candidate, name) for candidate in second]
        assert [getattr(candidate, name) for candidate in first] == pytest.approx(values, abs=1e-4)
    return True


@pytest.fixture
def photos(world):
    return [world.photos / name for name in world.features.images[:3]]


def test_results_are_complete_and_ordered(captioner, photos):
    results = captioner.caption(photos, generation=FEW)
    assert [result.image for result in results] == [str(photo) for photo in photos]
    for result in results:
        assert result.error is None and result.caption == result.candidates[0].caption
        scores = [candidate.score for candidate in result.candidates]
        assert scores == sorted(scores, reverse=True)
        assert len({candidate.caption for candidate in result.candidates}) == len(result.candidates)
        assert len(result.neighbors) == 3
        assert set(result.to_json()) == {"image", "caption", "candidates", "neighbors", "error"}
        assert set(result.to_json()["candidates"][0]) == {
            *("caption", "clip_similarity", "log_probability", "agreement", "score")
        }
        assert set(result.to_json()["neighbors"][0]) == {"row", "caption", "score", "index", "route"}


def test_similarity_is_the_cosine_of_image_and_caption(captioner, photos):
    (result,) = captioner.caption(photos[0], generation=FEW)
    image = captioner.encoder.encode_image([photos[0]]).embeddings.vectors[0]
    texts = captioner.encoder.encode_text([candidate.caption for candidate in result.candidates]).vectors
    assert [candidate.clip_similarity for candidate in result.candidates] == pytest.approx(texts @ image, abs=1e-5)


def test_three_ways_to_turn_retrieval_off_are_one(captioner, photos):
    without = captioner.caption(photos, index=None, generation=FEW)
    assert without == captioner.caption(photos, num_neighbors=0, generation=FEW)
    assert all(not result.neighbors for result in without)
    with_them = captioner.caption(photos, generation=FEW)
    assert [r.candidates for r in with_them] != [r.candidates for r in without]


def test_another_index_is_swapped_in_by_path_object_or_list(captioner, photos, world):
    by_path = captioner.caption(photos, index=world.other_index.path, generation=FEW)
    assert by_path == captioner.caption(photos, index=CaptionIndex.open(world.other_index.path), generation=FEW)
    assert by_path == captioner.caption(photos, index=[str(world.other_index.path)], generation=FEW)
    names = {neighbor.index for result in by_path for neighbor in result.neighbors}
    assert names == {world.other_index.name}
    both = captioner.caption(photos, index=[world.index, world.other_index], num_neighbors=50, generation=FEW)
    assert {neighbor.index for neighbor in both[0].neighbors} == {world.index.name, world.other_index.name}


def test_more_neighbors_than_captions_gives_what_there_is(captioner, photos, world, capsys):
    (result,) = captioner.caption(photos[0], index=world.other_index, num_neighbors=1000, generation=FEW)
    assert 0 < len(result.neighbors) <= len(world.other_index)
    assert capsys.readouterr().err.count("1000 neighbours were asked for") == 1


def test_conditions_on_what_is_retrieved(captioner, photos, world):
    chosen = RetrievalConfig(where=["caption_id=3", "caption_id=9"])
    (result,) = captioner.caption(photos[0], index=world.index, num_neighbors=8, generation=FEW, retrieval=chosen)
    assert {neighbor.row for neighbor in result.neighbors} == {3, 9}
    with pytest.raises(InputError, match="no retrieval here"):
        captioner.caption(photos[0], index=None, generation=FEW, retrieval=chosen)


def test_an_index_gives_at_most_so_many(captioner, photos, world):
    chosen = [f"{world.index.path}:1:2", f"{world.other_index.path}:0.5"]
    (result,) = captioner.caption(photos[0], index=chosen, num_neighbors=5, generation=FEW)
    names = [neighbor.index for neighbor in result.neighbors]
    assert names.count(world.index.name) == 2 and names.count(world.other_index.name) == 3


def test_every_kind_of_image_gives_the_same_caption(captioner, photos):
    photo = photos[0]
    picture = Image.open(photo).convert("RGB")
    kinds = [photo, str(photo), photo.read_bytes(), picture, np.asarray(picture)]
    results = captioner.caption(kinds, generation=FEW)
    assert len({result.caption for result in results}) == 1
    assert all(same(result.candidates, results[0].candidates) for result in results)


def test_one_array_is_one_image(captioner, photos):
    picture = np.asarray(Image.open(photos[0]).convert("RGB"))
    (one,) = captioner.caption(picture, generation=FEW)
    stacked = captioner.caption(np.stack([picture, picture]), generation=FEW)
    assert [result.caption for result in stacked] == [one.caption] * 2
    assert captioner.caption((photo for photo in photos), generation=FEW) == captioner.caption(photos, generation=FEW)


def test_a_caption_depends_on_its_image_alone(captioner, photos):
    together = captioner.caption(photos, generation=FEW)
    for photo, expected in zip(photos, together, strict=True):
        (alone,) = captioner.caption([photo], generation=FEW, batch_size=1)
        assert alone.caption == expected.caption and same(alone.candidates, expected.candidates)
    assert captioner.caption(photos, generation=FEW) == together


def test_bad_images_are_reported_and_the_rest_is_captioned(captioner, photos, tmp_path):
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(photos[0].read_bytes()[:200])
    missing = tmp_path / "missing.jpg"
    results = captioner.caption([photos[0], broken, photos[1], missing], generation=FEW, batch_size=2)
    assert [result.error is None for result in results] == [True, False, True, False]
    assert results[1].caption is None and results[1].candidates == [] and "broken.jpg" in results[1].error
    for found, expected in zip([results[0], results[2]], captioner.caption(photos[:2], generation=FEW), strict=True):
        assert found.caption == expected.caption and same(found.candidates, expected.candidates)


def test_embeddings_instead_of_images(captioner, world, photos):
    raw = captioner.encoder.encode_image(photos).embeddings.raw
    greedy = GenerationConfig(decoding="greedy", max_new_tokens=10)
    from_vectors = captioner.caption(embeddings=raw, generation=greedy)
    from_photos = captioner.caption(photos, generation=greedy)
    assert [result.caption for result in from_vectors] == [result.caption for result in from_photos]
    with pytest.raises(InputError, match="this model reads"):
        captioner.caption(embeddings=np.ones((2, 3)))
    with pytest.raises(InputError, match="zero or not finite"):
        captioner.caption(embeddings=np.zeros_like(raw))
    with pytest.raises(InputError, match="either images or embeddings"):
        captioner.caption()


def test_beams_are_ordered_by_mean_log_probability(captioner, photos):
    (result,) = captioner.caption(
        photos[0], generation=GenerationConfig(decoding="beam", num_beams=3, max_new_tokens=8)
    )
    assert len(result.candidates) in (1, 2, 3)
    scores = [candidate.score for candidate in result.candidates]
    assert scores == sorted(scores, reverse=True) and max(scores) < 0


def test_settings_by_name_go_before_those_of_generation(captioner, photos):
    beams = GenerationConfig(decoding="beam", num_beams=3, max_new_tokens=8)
    by_name = captioner.caption(photos, generation=FEW, decoding="beam", num_beams=3, max_new_tokens=8)
    assert by_name == captioner.caption(photos, generation=beams)
    with pytest.raises(InputError, match="beams is no setting"):
        captioner.caption(photos, beams=3)


def test_an_index_of_another_clip_is_refused_naming_both(captioner, photos, world, other_clip, tmp_path):
    foreign = build_caption_index([world.captions], str(other_clip), tmp_path / "foreign")
    with pytest.raises(InputError) as caught:
        captioner.caption(photos, index=foreign, generation=FEW)
    assert str(other_clip) in str(caught.value) and world.clip in str(caught.value)


def test_a_lost_default_index_names_the_flag(world, photos, tmp_path):
    captioner = Captioner.from_pretrained(world.run)
    captioner.checkpoint = dataclasses.replace(
        captioner.checkpoint, index={"path": str(tmp_path / "gone"), "name": "gone", "revision": 1}
    )
    with pytest.raises(InputError, match="--index"):
        captioner.caption(photos, generation=FEW)
    assert captioner.caption(photos, index=None, generation=FEW)[0].error is None


def test_models_that_are_not_there(tmp_path, world):
    with pytest.raises(InputError, match="no model at"):
        Captioner.from_pretrained(tmp_path / "nothing")
    half = tmp_path / "half"
    half.mkdir()
    shutil.copy(world.run / "run.json", half)
    with pytest.raises(InputError, match="first epoch"):
        Captioner.from_pretrained(half)
