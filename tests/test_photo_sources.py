"""Sources of photos: every kind gives captions and content together, and what is no source is said."""

import json
import shutil

import huggingface_hub
import pyarrow as pa
import pytest
from pyarrow import parquet

from clipcap_rag.errors import InputError
from clipcap_rag.photo_sources import Photo, photo_files, read_photos
from clipcap_rag.sources import BadLines, SourceOptions


def photos(source, skip=False, **options):
    return list(read_photos(photo_files(source), SourceOptions(**options), BadLines(skip)))


def test_lists_of_urls_in_both_orders(tmp_path):
    path = tmp_path / "Train_list.tsv"
    path.write_text("a  gate\thttp://x.invalid/1.jpg\nhttps://x.invalid/2.jpg?a=b\ta lamp\n")
    assert photos(path) == [
        Photo(1, ["a gate"], "http://x.invalid/1.jpg", {"url": "http://x.invalid/1.jpg"}),
        Photo(2, ["a lamp"], "https://x.invalid/2.jpg?a=b", {"url": "https://x.invalid/2.jpg?a=b"}),
    ]


@pytest.mark.parametrize(
    "line",
    ["a gate", "a gate\tx.jpg", "a\tb\thttp://x.invalid/1", "http://x.invalid/1\thttp://x.invalid/2", "\thttp://x/1"],
)
def test_bad_lines_of_a_list_are_named_and_rows_stay_line_numbers(tmp_path, line):
    path = tmp_path / "list.tsv"
    path.write_text(f"a gate\thttp://x.invalid/1\n{line}\na lamp\thttp://x.invalid/3\n")
    with pytest.raises(InputError, match=r"list\.tsv:2: .*--skip-bad"):
        photos(path)
    assert [photo.row for photo in photos(path, skip=True)] == [1, 3]


def test_folders_that_img2dataset_makes(tmp_path, photo_folder):
    loose = tmp_path / "files"
    for shard in range(2):
        (loose / f"0000{shard}").mkdir(parents=True)
        for number in range(2):
            stem = loose / f"0000{shard}" / f"0000{shard}000{number}"
            shutil.copy(photo_folder / f"photo-{number}.jpg", f"{stem}.jpg")
            stem.with_suffix(".txt").write_text(f"picture {shard} {number}")
            stem.with_suffix(".json").write_text(json.dumps({"caption": "x", "key": stem.name}))
        parquet.write_table(pa.table({"caption": ["x"]}), loose / f"0000{shard}.parquet")
        (loose / f"0000{shard}_stats.json").write_text("{}")
    assert photo_files(loose) == [loose]
    found = photos(loose)
    assert [(photo.row, photo.captions) for photo in found] == [
        (1, ["picture 0 0"]), (2, ["picture 0 1"]), (3, ["picture 1 0"]), (4, ["picture 1 1"])
    ]  # fmt: skip
    assert found[3].content == loose / "00001/000010001.jpg" and found[3].meta == {"original": "00001/000010001.jpg"}
    tables = tmp_path / "tables"
    tables.mkdir()
    for shard in range(2):
        row = {"caption": [f"picture {shard}"], "jpg": [b"content"], "key": [f"0000{shard}0"]}
        parquet.write_table(pa.table(row), tables / f"0000{shard}.parquet")
    assert photos(tables, image_column="jpg", image_id_column="key") == [
        Photo(1, ["picture 0"], b"content", {"original": "000000"}),
        Photo(2, ["picture 1"], b"content", {"original": "000010"}),
    ]
    for shard in range(2):
        (tables / f"0000{shard}.tar").write_bytes(b"")
    assert photo_files(tables) == [tables / "00000.tar", tables / "00001.tar"], "the tables only tell of the tars"


def test_samples_without_photo_are_named(tmp_path):
    parquet.write_table(pa.table({"caption": ["a gate"], "image": ["gate.jpg"]}), tmp_path / "t.parquet")
    with pytest.raises(InputError, match=r"t\.parquet:row 1: no photo"):
        photos(tmp_path / "t.parquet")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A cache of the hub that holds a data set with one configuration, and one with two."""
    for name, configs in (("one", ["default"]), ("two", ["en", "fr"])):
        kept = tmp_path / f"datasets--someone--{name}"
        for config in configs:
            for split in ("train", "test"):
                folder = kept / "snapshots" / ("c" * 40) / config / split
                folder.mkdir(parents=True)
                content = {"caption": [f"{config} {split}"], "image": [{"bytes": b"content", "path": None}]}
                parquet.write_table(pa.table(content), folder / "0000.parquet")
        (kept / "refs/refs/convert").mkdir(parents=True)
        (kept / "refs/refs/convert/parquet").write_text("c" * 40)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))


def test_data_sets_of_the_hub(hub):
    assert photos("hf:someone/one") == [Photo(1, ["default train"], b"content", {})]
    assert photos("hf:someone/one:test")[0].captions == ["default test"]
    assert photos("hf:someone/two:fr/test")[0].captions == ["fr test"]


@pytest.mark.parametrize(
    "name, words",
    [
        ("someone/two", "configurations en, fr; give hf:someone/two:CONFIG/SPLIT"),
        ("someone/one:dev", "no such split"),
        ("someone/three", "cannot fetch hf:someone/three"),
        ("", "cannot fetch hf:"),
        ("a/b/c:train", "cannot fetch hf:a/b/c:train"),
    ],
)
def test_what_the_hub_does_not_have(hub, name, words):
    with pytest.raises(InputError, match=words) as error:
        photo_files(f"hf:{name}")
    assert "\n" not in str(error.value)


def test_no_such_source(tmp_path):
    with pytest.raises(InputError, match="there is no .*gone.tsv"):
        photo_files(tmp_path / "gone.tsv")
