"""Trunk features: what lies before the projection, in several views, from extraction to the votes of photos."""

import json
import shutil

import numpy as np
import open_clip
import pyarrow as pa
import pytest
import torch
from PIL import Image

import clipcap_rag.photo_votes as photo_votes
from clipcap_rag.caption_index import CaptionIndex
from clipcap_rag.caption_votes import trunk_weights
from clipcap_rag.captioner import Captioner
from clipcap_rag.cli import main
from clipcap_rag.encoder import Encoder
from clipcap_rag.errors import InputError
from clipcap_rag.features import extract_features
from clipcap_rag.image_table import IndexPhotos, read_images, write_images
from clipcap_rag.image_tower import ImageTower, Views
from clipcap_rag.index_check import verify_index
from clipcap_rag.index_editor import compact_index, remove_captions
from clipcap_rag.index_images import add_images
from clipcap_rag.index_store import open_files
from clipcap_rag.retrievable import Exclusion
from clipcap_rag.retriever import Retriever

_TOWERS = {
    "transformer": {"image_size": 32, "patch_size": 8, "width": 32, "layers": 1, "head_width": 16},
    "resnet": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 16},
    "timm": {"image_size": 64, "timm_model_name": "mobilenetv2_050", "timm_pool": "", "timm_proj": "linear"},
}
_WIDTHS = {"transformer": 32, "resnet": 256, "timm": 1280}


@pytest.fixture(scope="module")
def features(world, tmp_path_factory):
    """The world's photos with trunk features."""
    out = tmp_path_factory.mktemp("trunk") / "features"
    given = ([world.captions], world.photos, world.clip, out)
    return extract_features(*given, workers=0, trunk=True, dtype="float32")


@pytest.fixture(scope="module")
def index(world, features, tmp_path_factory):
    """The captions of the world's photos, with these."""
    folder = tmp_path_factory.mktemp("trunk") / "index"
    shutil.copytree(world.index.path, folder)
    add_images(folder, features.path)
    return CaptionIndex.open(folder, "cpu")


@pytest.mark.parametrize("kind", _TOWERS)
def test_features_lie_before_the_projection_of_every_kind_of_tower(kind):
    text = {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1}
    torch.manual_seed(3)
    model = open_clip.CLIP(embed_dim=24, vision_cfg=_TOWERS[kind], text_cfg=text).eval()
    pixels = torch.randn(2, 3, _TOWERS[kind]["image_size"], _TOWERS[kind]["image_size"])
    with torch.inference_mode():
        embeddings, features = ImageTower(model.visual)(pixels)
        torch.testing.assert_close(embeddings, model.encode_image(pixels))
        assert features.shape == (2, _WIDTHS[kind])
        if kind == "transformer":
            torch.testing.assert_close(features @ model.visual.proj, embeddings)
        torch.testing.assert_close(model.encode_image(pixels), embeddings)


def test_a_photo_is_seen_whole_mirrored_and_in_five_crops():
    shown = []
    preprocess = lambda picture: shown.append(picture) or torch.zeros(3, 2, 2)  # noqa: E731
    ramp = np.arange(30 * 60, dtype=np.uint16).reshape(30, 60) // 8
    picture = Image.fromarray(np.stack([ramp.astype(np.uint8)] * 3, -1))
    assert Views(preprocess)(picture).shape == (7, 3, 2, 2)
    arrays = [np.asarray(view) for view in shown]
    whole = arrays[0]
    assert np.array_equal(whole, np.asarray(picture)) and np.array_equal(arrays[1], whole[:, ::-1])
    assert {array.shape for array in arrays[2:]} == {(20, 40, 3)}
    assert np.array_equal(arrays[2], whole[:20, :40]) and np.array_equal(arrays[5], whole[10:, 20:])
    assert np.array_equal(arrays[6], whole[5:25, 10:50])
    assert Views(preprocess)(picture.resize((1, 1))).shape[0] == 7


def test_trunk_features_are_the_mean_over_the_views_and_change_no_embedding(world, features):
    plain = world.features
    assert features.embeddings == pytest.approx(plain.embeddings, abs=0.02) and plain.trunk is None
    encoder = Encoder.load(world.clip, "cpu", "float32")
    views = Views(encoder.preprocess)(Image.open(world.photos / features.images[2]).convert("RGB"))
    with torch.inference_mode():
        seen = ImageTower(encoder.model.visual)(views)[1]
    mean = (seen[:2].mean(0) + seen[2:].mean(0)) / 2
    np.testing.assert_allclose(features.trunk[2], mean, rtol=2e-3, atol=2e-3)
    assert features.encoded(slice(2, 3)).trunk.dtype == np.float32


def test_photos_that_cannot_be_read_have_no_trunk_features(world, tmp_path):
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    (tmp_path / "good.jpg").write_bytes((world.photos / world.features.images[1]).read_bytes())
    lines = [{"image": name, "caption": f"what {name} shows"} for name in ("broken.jpg", "good.jpg")]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    made = extract_features([tmp_path / "c.jsonl"], tmp_path, world.clip, tmp_path / "out", workers=0, trunk=True)
    assert made.images == ["good.jpg"] and made.trunk.shape == (1, 32)
    encoded = Encoder.load(world.clip, "cpu").encode_image([tmp_path / "broken.jpg"], trunk=True)
    assert encoded.errors[0] and encoded.embeddings.trunk.shape == (1, 32)


def test_an_index_keeps_the_features_of_its_photos(world, features, index, tmp_path):
    assert np.array_equal(index.files.images.trunk, features.trunk)
    verify_index(index.path, sample=0)
    folder = shutil.copytree(index.path, tmp_path / "index")
    remove_captions(folder, {"image_id": [features.image_ids[0]]})
    compact_index(folder)
    assert np.array_equal(open_files(folder).images.trunk, features.trunk[1:])


def test_photos_with_and_without_features_do_not_mix(world, features, tmp_path):
    captions = tmp_path / "some.jsonl"
    captions.write_text("".join(world.captions.read_text().splitlines(keepends=True)[:3]))
    some = extract_features([captions], world.photos, world.clip, tmp_path / "some", workers=0)
    folder = shutil.copytree(world.index.path, tmp_path / "index")
    add_images(folder, features.path)
    with pytest.raises(InputError, match="extract the photos of both with --trunk"):
        add_images(folder, some.path)
    assert len(open_files(folder).images) == len(features)
    add_images(folder, world.features.path)  # in place of all of them
    assert open_files(folder).images.trunk is None


def test_damaged_features_of_an_index_are_noticed(tmp_path):
    file, ids = tmp_path / "images-000002.arrow", pa.array(["a", "b"])
    write_images(file, IndexPhotos(ids, np.eye(2), np.ones((2, 3))))
    assert read_images(file, 2).trunk.shape == (2, 3)
    schema = pa.ipc.open_file(file).schema
    table = pa.ipc.open_file(file).read_all()
    holed = pa.array([[np.float16(1), None, np.float16(1)]] * 2, schema.field("trunk").type)
    with pa.ipc.new_file(file, schema) as writer:
        writer.write_batch(pa.record_batch([ids, table["embedding"].chunk(0), holed], schema=schema))
    with pytest.raises(InputError, match="run index add-images again"):
        read_images(file, 2)


def test_features_tell_photos_apart_whatever_all_of_them_share():
    random = np.random.default_rng(1)
    photos, trust = random.standard_normal((150, 12)).astype(np.float32), np.ones(150)
    query = photos[40] + 0.1 * random.standard_normal(12).astype(np.float32)
    weights = trunk_weights(query, photos, trust)
    assert weights.argmax() == 40
    moved = 50.0 + photos * np.linspace(0.1, 9, 12, dtype=np.float32)
    assert trunk_weights(50.0 + query * np.linspace(0.1, 9, 12), moved, trust) == pytest.approx(weights, abs=2e-3)
    trust[40] = 0.05
    assert trunk_weights(query, photos, trust)[40] < 0.5 * weights[40]
    constant = np.hstack([photos, np.full((150, 1), 7, np.float32)])
    assert np.isfinite(trunk_weights(np.append(query, 7), constant, trust)).all()


def test_embeddings_without_features_are_told_once(features, index, capsys):
    retriever, encoded = Retriever([index], photos_vote=True), features.encoded()
    retriever.search(encoded.vectors, 4, trunk=encoded.trunk)
    assert not capsys.readouterr().err
    for times in (1, 0):
        retriever.search(encoded.vectors, 4)
        assert capsys.readouterr().err.count("give photos, or features of extract --trunk") == times


def test_features_of_another_width_are_refused(features, index):
    retriever, encoded = Retriever([index], photos_vote=True), features.encoded()
    with pytest.raises(InputError, match="31 trunk features and the photos of the index 32; extract both"):
        retriever.search(encoded.vectors, 4, trunk=encoded.trunk[:, 1:])


def test_photos_vote_by_their_features_where_there_are_enough(world, features, index, monkeypatch):
    own = [Exclusion(image_id, frozenset()) for image_id in features.image_ids]
    retriever, encoded = Retriever([index], photos_vote=True), features.encoded()
    assert retriever.wants_trunk and not Retriever([index]).wants_trunk
    assert not Retriever([world.index], photos_vote=True).wants_trunk
    few = retriever.search(encoded.vectors, 4, own, encoded.trunk).photo_votes
    plain = retriever.search(encoded.vectors, 4, own).photo_votes
    assert [list(votes.weights) for votes in few] == [list(votes.weights) for votes in plain]
    monkeypatch.setattr(photo_votes, "_CROWD", 2)
    many = retriever.search(encoded.vectors, 4, own, encoded.trunk).photo_votes
    for votes, row in zip(many, range(len(features)), strict=True):
        others = np.array([other for other in range(len(features)) if other != row])
        order = others[np.argsort(-(encoded.vectors[others] @ encoded.vectors[row]), kind="stable")]
        expected = dict(zip(order, trunk_weights(encoded.trunk[row], encoded.trunk[order], np.ones(7)), strict=True))
        said = {caption: other for other in order for caption in features.captions[other]}
        total = {other: 0.0 for other in order}
        for caption, weight in votes:
            total[said[caption]] += weight
        assert not set(votes.captions) & set(features.captions[row])
        assert total == pytest.approx(expected, abs=2e-3)


def test_a_captioner_looks_at_the_trunk_only_where_the_index_has_it(world, index, tmp_path, monkeypatch):
    captioner, asked = Captioner.from_pretrained(world.run, device="cpu"), []
    encode = Encoder.iter_images

    def noted(self, *arguments, **settings):
        asked.append(arguments[3])
        return encode(self, *arguments, **settings)

    monkeypatch.setattr(Encoder, "iter_images", noted)
    monkeypatch.setattr(type(captioner.checkpoint), "raises_words", True)
    photo = world.photos / world.features.images[0]
    for chosen in (index, world.index, None):
        assert captioner.caption(photo, index=chosen, decoding="greedy")[0].error is None
    assert asked == [True, False, False]


def test_extract_stores_trunk_features_when_asked(world, tmp_path, capsys):
    given = ["extract", "--captions", str(world.captions), "--images", str(world.photos), "--clip", world.clip]
    assert main([*given, "--trunk", "--device=cpu", "--workers=0", "--out", str(tmp_path / "f")]) == 0
    assert np.load(tmp_path / "f" / "trunk.npy").shape == (8, 32)
    folder = shutil.copytree(world.index.path, tmp_path / "index")
    assert main(["index", "add-images", str(folder), "--features", str(tmp_path / "f")]) == 0
    assert main(["index", "info", str(folder)]) == 0
    assert "photos      8, for --route image and auto; 32 trunk features of each" in capsys.readouterr().out
