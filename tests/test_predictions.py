"""Predictions and references: read, joined by any name of a photo, and every fault named."""

import gzip
import json

import pytest

from clipcap_rag.errors import InputError
from clipcap_rag.predictions import Photo, Prediction, join, read_predictions, read_references
from clipcap_rag.sources import SourceOptions


def write(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def test_coco_results_and_json_lines_say_the_same(tmp_path):
    rows = [{"image_id": 12, "caption": "a  dog\n runs"}, {"image_id": "p2.jpg", "caption": ""}]
    as_list = read_predictions(write(tmp_path / "a.json", json.dumps(rows, indent=1)))
    as_lines = read_predictions(write(tmp_path / "a.jsonl", lines(*rows)))
    (tmp_path / "a.json.gz").write_bytes(gzip.compress(json.dumps(rows).encode()))
    packed = read_predictions(tmp_path / "a.json.gz")
    for found in (as_list, as_lines, packed):
        assert [prediction.keys for prediction in found] == [("12",), ("p2.jpg", "p2")]
        assert [prediction.caption for prediction in found] == ["a dog runs", ""]
        assert all(prediction.neighbors is None for prediction in found)


def test_our_own_objects_bring_their_neighbours(tmp_path):
    row = {
        "image": "photos/p1.jpg",
        "caption": "naïve 日本",
        "neighbors": [{"caption": "a dog", "row": 3}],
        "error": None,
    }
    silent = {"image": "p2.jpg", "caption": None, "candidates": [], "neighbors": [], "error": None}
    found = read_predictions(write(tmp_path / "p.jsonl", lines(row, silent)))
    assert found[0] == Prediction(f"{tmp_path}/p.jsonl:1", ("p1",), "naïve 日本", ["a dog"])
    assert found[1].caption == "" and found[1].neighbors == []


@pytest.mark.parametrize(
    "content, named",
    [
        ("", "holds no caption"),
        ("[]", "holds no caption"),
        ('[{"image_id": 1, "caption": "a"', "not JSON"),
        ('{"image_id": 1, "caption": "a"\n', "p.json:1: not JSON"),
        ("[" * 100_000, "nested too deeply"),
        ("[NaN]", "nan is no object"),
        ('["a dog"]', "is no object"),
        ('[{"caption": "a"}]', "names the photo"),
        ('[{"image_id": NaN, "caption": "a"}]', "image_id nan"),
        ('[{"image_id": true, "caption": "a"}]', "image_id True"),
        ('[{"image_id": [1], "caption": "a"}]', r"image_id \[1\]"),
        ('[{"image": 3, "caption": "a"}]', "image 3"),
        ('[{"image_id": 1}]', "caption is None"),
        ('[{"image_id": 1, "caption": NaN}]', "caption is nan"),
        ('[{"image_id": 1, "caption": ["a"]}]', "caption is"),
        ('[{"image_id": 1, "caption": "\\ud800"}]', "no text"),
        ('[{"image_id": 1, "caption": null, "error": "broken"}]', "has the error 'broken'"),
        ('[{"image_id": 1, "caption": "a", "neighbors": 3}]', "neighbors is no list"),
        ('[{"image_id": 1, "caption": "a", "neighbors": [{"row": 1}]}]', "neighbors is no list"),
        ('{"images": [], "annotations": []}', "names the photo"),
    ],
)
def test_hostile_files_are_one_sentence(tmp_path, content, named):
    with pytest.raises(InputError, match=named) as caught:
        read_predictions(write(tmp_path / "p.json", content))
    assert "p.json" in str(caught.value) and "\n" not in str(caught.value)


def test_no_file_and_a_folder(tmp_path):
    for path in (tmp_path / "none.json", tmp_path):
        with pytest.raises(InputError, match="no file of predictions"):
            read_predictions(path)


NOCAPS = {
    "images": [
        {"id": 0, "file_name": "00f0.jpg", "domain": "in-domain"},
        {"id": 1, "file_name": "0007.jpg", "domain": "out-domain"},
    ],
    "annotations": [{"image_id": n % 2, "caption": f"caption {n}"} for n in range(20)],
}


def test_references_of_a_coco_file_know_number_stem_and_domain(tmp_path):
    first, second = read_references(write(tmp_path / "nocaps.json", NOCAPS), SourceOptions())
    assert first.keys == ("00f0", "0") and second.keys == ("0007", "1")
    assert (first.domain, second.domain) == ("in-domain", "out-domain")
    assert first.captions == [f"caption {n}" for n in range(0, 20, 2)]


def test_karpathy_splits_are_chosen_by_name(tmp_path):
    images = [
        {"filename": f"COCO_val2014_00000000000{n}.jpg", "filepath": "val2014", "split": split, "cocoid": n,
         "sentences": [{"raw": f"caption {n}"}]}
        for n, split in enumerate(["train", "test", "test"])
    ]  # fmt: skip
    path = write(tmp_path / "dataset_coco.json", {"images": images})
    found = read_references(path, SourceOptions(split="test"))
    assert [photo.keys for photo in found] == [("COCO_val2014_000000000001", "1"), ("COCO_val2014_000000000002", "2")]


def test_prepared_splits_keep_the_number(tmp_path):
    from clipcap_rag.splits import prepare_splits

    prepare_splits(write(tmp_path / "nocaps.json", NOCAPS), tmp_path / "out", whole="val")
    found = read_references(tmp_path / "out" / "val.jsonl", SourceOptions())
    assert [(photo.keys, photo.domain) for photo in found] == [
        (("00f0", "0"), "in-domain"),
        (("0007", "1"), "out-domain"),
    ]


def test_references_without_photos_or_with_one_name_are_refused(tmp_path):
    with pytest.raises(InputError, match="captions without photos"):
        read_references(write(tmp_path / "a.txt", "a dog\n"), SourceOptions())
    rows = [{"image": "a/1.jpg", "caption": "a"}, {"image": "b/1.jpg", "caption": "b"}]
    with pytest.raises(InputError, match=r"a/1\.jpg and b/1\.jpg in .* have one name"):
        read_references(write(tmp_path / "a.jsonl", lines(*rows)), SourceOptions())


PHOTOS = [
    Photo("p1", "x/p1.jpg", captions=["a"]),
    Photo("p2", "x/p2.jpg", "7", captions=["b"]),
    Photo("8", captions=["c"]),
]


def said(*keys):
    return [Prediction(f"p.json[{n}]", (key,), f"caption of {key}") for n, key in enumerate(keys)]


def test_photos_are_joined_in_their_own_order():
    joined = join(said("8", "7", "p1"), PHOTOS)
    assert joined.captions == ["caption of p1", "caption of 7", "caption of 8"]
    assert joined.references == [["a"], ["b"], ["c"]]
    assert joined.unpredicted == joined.unreferenced == []


def test_missing_ones_are_named_and_counted():
    with pytest.raises(InputError, match=r"2 photos have no caption: p2, 8; .*--allow-missing"):
        join(said("p1"), PHOTOS)
    with pytest.raises(InputError, match=r"4 photos have no references: q1, q2, q3 and 1 more"):
        join(said("p1", "p2", "8", "q1", "q2", "q3", "q4"), PHOTOS)
    joined = join(said("p2", "q1"), PHOTOS, allow_missing=True)
    assert joined.captions == ["caption of p2"]
    assert (joined.unpredicted, joined.unreferenced) == (["p1", "8"], ["q1"])
    with pytest.raises(InputError, match="no photo has both"):
        join(said("q1"), PHOTOS, allow_missing=True)


def test_two_captions_of_one_photo_are_refused():
    with pytest.raises(InputError, match=r"p\.json\[1\] and p\.json\[3\] both caption the photo p2"):
        join(said("p1", "p2", "8", "7"), PHOTOS)


def test_a_name_of_two_photos_is_refused():
    photos = [Photo("one", "a/1.jpg", captions=["a"]), Photo("two", "b/1.jpg", captions=["b"])]
    with pytest.raises(InputError, match=r"p\.json\[0\]: 1 is the name of 2 photos; give their image_id"):
        join(said("1", "two"), photos)
