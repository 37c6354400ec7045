"""Tags of photos: the nearest entries, one line or one file for each photo, whatever its name."""

import json

import numpy as np
import pytest
from PIL import Image

from clipcap_rag.cli import main
from clipcap_rag.errors import InputError
from clipcap_rag.tagging import Tagger, side_files


@pytest.fixture
def photos(tmp_path, photo_folder):
    """Two folders with photos of one stem, and a file that is no photo."""
    folder = tmp_path / "photos"
    for place, name in [("a", "kite.jpg"), ("a", "kite.png"), ("b", "kite.jpg")]:
        (folder / place).mkdir(parents=True, exist_ok=True)
        Image.open(photo_folder / f"photo-{len(list(folder.rglob('kite.*')))}.jpg").save(folder / place / name)
    (folder / "b" / "torn.jpg").write_bytes(b"no photo")
    return folder


def tag(*arguments) -> int:
    return main(["tag", *map(str, arguments), "--device", "cpu", "--dtype", "float32"])


def test_the_tags_are_the_nearest_entries(world, photo_folder):
    images = sorted(photo_folder.iterdir())
    tagger = Tagger.load(world.index.path, device="cpu", dtype="float32")
    tagged = list(tagger.tag_images(images, k=5, batch_size=3))
    scores, rows = world.index.search(tagger.encoder.encode_image(images).embeddings.vectors, 5)
    assert [[tag.row for tag in tags.tags] for tags in tagged] == rows.tolist()
    np.testing.assert_allclose([[tag.score for tag in tags.tags] for tags in tagged], scores, atol=1e-5)
    assert [tags.image for tags in tagged] == [str(image) for image in images]


def test_json_lines_name_errors_and_the_status_says_so(world, photos, capsys):
    assert tag(photos, "--index", world.index.path, "-k", 3, "--json") == 1
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["image"].removeprefix(str(photos)) for line in lines] == [
        "/a/kite.jpg", "/a/kite.png", "/b/kite.jpg", "/b/torn.jpg"
    ]  # fmt: skip
    assert [len(line["tags"]) for line in lines] == [3, 3, 3, 0]
    assert [line["error"] is None for line in lines] == [True, True, True, False]
    assert {"caption", "score", "row", "index", "route"} == set(lines[0]["tags"][0])


def test_every_photo_gets_its_own_side_file(world, photos, capsys):
    assert tag(photos, "--index", world.index.path, "-k", 2, "--sidecar") == 1
    found = sorted(path.relative_to(photos).as_posix() for path in photos.rglob("*.knn"))
    assert found == ["a/kite.jpg.knn", "a/kite.png.knn", "b/kite.jpg.knn"]
    written = (photos / "a/kite.jpg.knn").read_text().splitlines()
    assert len(written) == 2 and set(written) < set(world.index.captions(range(32)))
    (photos / "a/kite.jpg.knn").write_text("mine\n")
    (photos / "b/torn.jpg").unlink()
    assert tag(photos, "--index", world.index.path, "--sidecar") == 0
    assert "3 photos have their tags already" in capsys.readouterr().err
    assert (photos / "a/kite.jpg.knn").read_text() == "mine\n"
    assert tag(photos, "--index", world.index.path, "-k", 2, "--sidecar", "--overwrite") == 0
    assert (photos / "a/kite.jpg.knn").read_text().splitlines() == written


def test_side_files_elsewhere_mirror_the_folders(world, photos, tmp_path):
    assert tag(photos, "--index", world.index.path, "--sidecar", "--out", tmp_path / "tags") == 1
    assert sorted(path.relative_to(tmp_path / "tags").as_posix() for path in (tmp_path / "tags").rglob("*.*")) == [
        "a/kite.jpg.knn", "a/kite.png.knn", "b/kite.jpg.knn"
    ]  # fmt: skip
    assert not list(photos.rglob("*.knn"))
    apart = side_files([photos / "a", photos / "b/kite.jpg"], tmp_path / "tags")
    assert [path.relative_to(tmp_path / "tags").as_posix() for path in apart.values()] == [
        "a/kite.jpg.knn", "a/kite.png.knn", "b/kite.jpg.knn"
    ]  # fmt: skip
    assert list(side_files([photos / "a"], tmp_path).values())[0] == tmp_path / "kite.jpg.knn"


def test_another_clip_is_refused_and_files_need_sidecar(world, photos, other_clip, capsys):
    with pytest.raises(InputError, match="was made with the CLIP model"):
        Tagger.load(world.index.path, f"local-dir:{other_clip}", device="cpu", dtype="float32")
    assert tag(photos, "--index", world.index.path, "--out", photos) == 2
    assert "--sidecar" in capsys.readouterr().err
