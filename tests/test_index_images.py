"""Photos of an index: they come with add_images, stay through every change, and are found exactly."""

import json
import shutil

import numpy as np
import pyarrow as pa
import pytest

from clipcap_rag.artifact import file_record, read_json
from clipcap_rag.caption_index import CaptionIndex
from clipcap_rag.cli import main
from clipcap_rag.encoder import Encoder
from clipcap_rag.errors import InputError
from clipcap_rag.features import extract_features
from clipcap_rag.image_table import IndexPhotos, read_images, write_images
from clipcap_rag.index_check import verify_index
from clipcap_rag.index_commit import index_change
from clipcap_rag.index_editor import add_captions, compact_index, remove_captions, update_caption
from clipcap_rag.index_images import add_images
from clipcap_rag.index_store import open_files
from clipcap_rag.sources import CaptionRecord


@pytest.fixture(scope="module")
def encoder(world):
    return Encoder.load(world.clip, "cpu", "float32")


@pytest.fixture
def index(world, tmp_path):
    """The captions of eight photos, four each."""
    shutil.copytree(world.index.path, tmp_path / "own")
    return tmp_path / "own"


def photo_scores(world, index, queries):
    """[B, N] cosine of each query with the photo of each row, -inf where it has none or was removed; all by hand."""
    files = open_files(index)
    vectors = dict(zip(world.features.image_ids, world.features.unit_embeddings().astype(np.float16), strict=True))
    scores = np.full((len(queries), files.rows), -np.inf)
    for row in np.flatnonzero(files.live):
        (image_id,) = files.image_ids([row])
        if image_id in vectors:
            scores[:, row] = queries.astype(np.float64) @ vectors[image_id].astype(np.float64)
    return scores


def assert_exact(world, index, among=None):
    """Every k gives the best photos' captions; captions of one photo are ordered by their own cosine."""
    opened, queries = CaptionIndex.open(index, "cpu"), world.features.unit_embeddings()
    expected = photo_scores(world, index, queries)
    if among is not None:
        expected[:, ~among] = -np.inf
    for k in (1, 3, 6, 40):
        scores, rows = opened.search_images(queries, k, among)
        best = -np.sort(-expected, axis=1)[:, :k]
        best = np.pad(best, ((0, 0), (0, k - best.shape[1])), constant_values=-np.inf)
        np.testing.assert_allclose(scores, best, atol=1e-5)
        assert np.array_equal(rows >= 0, np.isfinite(best))
        for query, found in enumerate(rows):
            found = found[found >= 0]
            np.testing.assert_allclose(expected[query, found], best[query, : len(found)], atol=1e-5)
            own = opened.embeddings(found) @ queries[query]
            ids = opened.image_ids(found)
            same = [first == second for first, second in zip(ids, ids[1:], strict=False)]
            assert len(set(found.tolist())) == len(found) and (np.diff(own)[same] <= 1e-6).all()


def test_photos_are_stored_once_and_searched_exactly(world, index):
    edit = add_images(index, world.features.path)
    assert (edit.revision, edit.photos, edit.captions) == (2, 8, 32)
    assert len(open_files(index).images) == 8
    assert_exact(world, index)
    assert_exact(world, index, among=np.arange(32) % 3 == 1)
    assert verify_index(index, sample=0).rows == 32


def test_changes_keep_the_photos(world, index, encoder):
    add_images(index, world.features.path)
    opened = CaptionIndex.open(index, "cpu")
    opened.search_images(world.features.unit_embeddings(), 3)
    first, second = world.features.image_ids[:2]
    records = [CaptionRecord("one more of this photo", first), CaptionRecord("of a photo that nobody knows", "unknown")]
    add_captions(index, [*records, "of no photo"], encoder)
    assert_exact(world, index)
    remove_captions(index, {"image_id": [second]})
    update_caption(index, "0", "other words", encoder)
    assert_exact(world, index)
    assert len(open_files(index).images) == 8
    compact_index(index)
    assert_exact(world, index)
    files = open_files(index)
    assert len(files.images) == 7 and second not in files.images.ids.to_pylist()
    assert len(list(index.glob("images-*.arrow"))) == 1
    verify_index(index, sample=0)
    opened.refresh()
    found = opened.search_images(world.features.unit_embeddings([0]), 5)[1][0]
    assert opened.image_ids(found) == [first] * 5


def test_photos_are_added_to_those_that_are_there(world, index, encoder):
    add_captions(index, [CaptionRecord("a photo of another set", "elsewhere")], encoder)
    vectors = np.eye(3, open_files(index).dim, dtype=np.float16)
    with index_change(index, 0) as change:
        ids = pa.array(["elsewhere", world.features.image_ids[3], "of no caption"])
        change.set_images(IndexPhotos(ids, vectors))
        change.commit()
    assert add_images(index, world.features.path).photos == 9
    files = open_files(index)
    assert files.images.ids.to_pylist() == ["elsewhere", *world.features.image_ids]
    assert np.array_equal(files.images.vectors[0], vectors[0])
    assert np.array_equal(files.images.vectors[1:], world.features.unit_embeddings().astype(np.float16))
    remove_captions(index, {"image_id": ["elsewhere"]})
    assert_exact(world, index)


def test_altered_photos_are_noticed(world, index):
    add_images(index, world.features.path)
    (index / "images-000002.arrow").write_bytes(b"ARROW1 and no more")
    with pytest.raises(InputError, match="images-000002"):
        open_files(index)


def test_an_index_of_other_photos_or_of_another_model_is_refused(world, index, tmp_path, other_clip):
    with pytest.raises(InputError, match="has the image_id of a photo"):
        add_images(world.other_index.path, world.features.path)
    assert world.other_index.files.manifest["images"] is None
    manifest = read_json(index / "index.json", "manifest")
    add_images(index, world.features.path)
    assert manifest["images"] is None and open_files(index).manifest["images"] == "images-000002.arrow"
    with pytest.raises(InputError, match="holds no image embeddings; give it some with index add-images"):
        world.index.search_images(world.features.unit_embeddings(), 1)
    other = extract_features(
        [world.captions], world.photos, f"local-dir:{other_clip}", tmp_path / "other", device="cpu", workers=0
    )
    with pytest.raises(InputError, match="CLIP"):
        add_images(index, other.path)
    assert open_files(index).manifest["revision"] == 2


def test_the_last_photo_goes_with_its_captions(world, index):
    add_images(index, world.features.path)
    remove_captions(index, {"image_id": world.features.image_ids})
    compact_index(index)
    assert open_files(index).images is None and not list(index.glob("images-*.arrow"))


def test_the_commands_store_photos_and_search_by_them(world, index, tmp_path, capsys):
    def run(*arguments):
        assert main(list(map(str, arguments))) == 0
        return capsys.readouterr().out

    photo, deny = world.photos / world.features.images[2], tmp_path / "deny.txt"
    run("index", "update", index, "--caption-id", "8", "--caption", "a kite")
    assert "8 photos of 32 captions; revision 3" in run("index", "add-images", index, "--features", world.features.path)
    assert "photos      8, for --route image" in run("index", "info", index)
    search = ["index", "search", index, "--images", photo, "--num-neighbors", 4, "--json", "--device", "cpu"]
    found = json.loads(run(*search, "--route", "image"))["neighbors"]
    assert {hit["caption_id"] for hit in found} == {"8", "9", "10", "11"}
    assert all(hit["route"] == "image" and hit["score"] == pytest.approx(1, abs=0.01) for hit in found)
    deny.write_text("kite\n")
    denied = json.loads(run(*search, "--route", "image", "--deny", deny))["neighbors"]
    assert len(denied) == 4 and "a kite" not in {hit["caption"] for hit in denied}
    caption = ["caption", photo, "--model", world.run, "--index", index, "--route", "both", "--decoding", "greedy"]
    (line,) = run(*caption, "--num-neighbors", 4, "--where", "caption_id=8", "--where", "caption_id=0", "--json",
                  "--device", "cpu").splitlines()  # fmt: skip
    assert {hit["row"] for hit in json.loads(line)["neighbors"]} == {0, 32}  # what is updated becomes the last row


def test_an_index_of_before_photos_were_kept_opens(index):
    manifest = json.loads((index / "index.json").read_text())
    del manifest["images"]
    (index / "index.json").write_text(json.dumps(manifest))
    assert open_files(index).images is None
    remove_captions(index, {"caption_id": ["1"]})
    assert open_files(index).manifest["images"] is None


def test_verify_finds_photos_that_are_not_of_unit_length(world, index):
    add_images(index, world.features.path)
    file = index / "images-000002.arrow"
    write_images(file, IndexPhotos(pa.array(world.features.image_ids), 2 * world.features.unit_embeddings()))
    manifest = json.loads((index / "index.json").read_text())
    manifest["files"][file.name] = file_record(file)
    (index / "index.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="of length 2.000 instead of 1"):
        verify_index(index, sample=0)


@pytest.mark.parametrize("content", [b"", b"ARROW1 and no more", "another width", "a number is missing"])
def test_damaged_tables_are_one_sentence(tmp_path, content):
    file = tmp_path / "images-000002.arrow"
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif content == "another width":
        write_images(file, IndexPhotos(pa.array(["a"]), np.ones((1, 5))))
    else:
        write_images(file, IndexPhotos(pa.array(["a"]), np.ones((1, 4))))
        schema = pa.ipc.open_file(file).schema
        vectors = pa.array([[np.float16(1), np.float16(0), None, np.float16(0)]], schema.field("embedding").type)
        with pa.ipc.new_file(file, schema) as writer:
            writer.write_batch(pa.record_batch([pa.array(["a"]), vectors], schema=schema))
    with pytest.raises(InputError, match="run index add-images again"):
        read_images(file, 4)
