"""Tar and Parquet files: captions and photos of each sample together, damage in one sentence, little memory."""

import gzip
import io
import json
import tarfile
import tracemalloc

import pyarrow as pa
import pytest
from pyarrow import parquet

from clipcap_rag.errors import InputError
from clipcap_rag.packed import read_parquet, read_tar
from clipcap_rag.sources import BadLines, CaptionRecord, SourceOptions, read_captions


def write_tar(path, members):
    with tarfile.open(path, "w:gz" if path.name.endswith("gz") else "w") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


SHARD = {
    "0001.jpg": b"first photo",
    "0001.json": json.dumps({"caption": "told twice", "url": "x"}).encode(),
    "0001.txt": b"A gate in a wall.\n\nAn open gate.\n",
    "0001.cls": b"7",
    "b/0002.json": json.dumps({"caption": "A round table"}).encode(),
    "b/0002.png": b"second photo",
    "0004.txt": b"\n",
    "0004.json": json.dumps({"caption": "beside an empty text"}).encode(),
    "0005.txt": b"before\n",
    "0005.json": json.dumps({"caption": "after"}).encode(),
    "0003.json": json.dumps({"captions": ["one", "two"]}).encode(),
}
RECORDS = [
    CaptionRecord("A gate in a wall.", "0001", "0001.jpg", "shard"),
    CaptionRecord("An open gate.", "0001", "0001.jpg", "shard"),
    CaptionRecord("A round table", "b/0002", "b/0002.png", "shard"),
    CaptionRecord("beside an empty text", "0004", None, "shard"),
    CaptionRecord("before", "0005", None, "shard"),
    CaptionRecord("one", "0003", None, "shard"),
    CaptionRecord("two", "0003", None, "shard"),
]


def read(path, skip=False, **options):
    bad = BadLines(skip)
    return list(read_captions([path], SourceOptions(**options), bad)), bad


@pytest.mark.parametrize("name", ["shard.tar", "shard.tar.gz", "shard.tgz"])
def test_captions_of_a_tar(tmp_path, name):
    assert read(write_tar(tmp_path / name, SHARD))[0] == RECORDS


def test_photos_of_a_tar(tmp_path):
    samples = list(read_tar(write_tar(tmp_path / "shard.tar", SHARD), "caption", BadLines(), photos=True))
    assert [values.get("content") for _, values in samples] == [b"first photo", b"second photo", None, None, None]
    assert samples[1][0] == f"{tmp_path / 'shard.tar'}:b/0002"


def test_bad_samples_of_a_tar_are_named(tmp_path):
    members = {
        "1.txt": b"caf\xe9",
        "2.json": b"{",
        "3.json": b'{"caption": 5}',
        "4.jpg": b"no caption",
        "5.txt": b"good",
    }
    path = write_tar(tmp_path / "shard.tar", members)
    with pytest.raises(InputError, match=r"shard\.tar:1\.txt: .*utf-8.* byte 0xe9 in position 3.*--skip-bad"):
        read(path)
    records, bad = read(path, skip=True)
    assert [record.caption for record in records] == ["good"]
    assert [line.split(": ")[0] for line in bad.listed] == [f"{path}:{name}" for name in ("1.txt", "2.json", "3", "4")]


@pytest.mark.parametrize("name", ["shard.tar", "shard.tgz"])
def test_a_tar_that_breaks_off_or_is_damaged(tmp_path, name):
    path = write_tar(tmp_path / name, {f"{number}.txt": b"word " * 300 for number in range(4)})
    whole = gzip.decompress(path.read_bytes()) if name.endswith("gz") else path.read_bytes()
    pack = gzip.compress if name.endswith("gz") else bytes
    for length in (100, 512, 1000, 2048, 3000, 4 * 2048):  # in headers, in texts, and after whole members of 2048
        path.write_bytes(pack(whole[:length]))
        with pytest.raises(InputError, match=rf"{name}.*copy it again"):
            read(path)
    path.write_bytes(pack(whole[:2050] + b"\xff" * 100 + whole[2150:]))
    with pytest.raises(InputError, match="damaged at byte 2048"):
        read(path)
    path.write_bytes(path.read_bytes()[:-20] if name.endswith("gz") else b"no tar at all" * 100)
    with pytest.raises(InputError, match=name):
        read(path)


def test_a_tar_streams(tmp_path):
    path = write_tar(
        tmp_path / "shard.tar", {f"{n:05d}.{kind}": b"x" * 3000 for n in range(4000) for kind in ("jpg", "txt")}
    )
    tracemalloc.start()
    assert sum(1 for _ in read_captions([path], SourceOptions(), BadLines())) == 4000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20


def write_parquet(path, **columns):
    parquet.write_table(pa.table(columns), path)
    return path


def test_parquet_with_names_of_photos(tmp_path):
    path = write_parquet(
        tmp_path / "t.parquet", caption=["a gate", "a lamp"], image=["g.jpg", None], image_id=[None, 7]
    )
    assert read(path)[0] == [CaptionRecord("a gate", "g", "g.jpg", "t"), CaptionRecord("a lamp", "7", None, "t")]
    assert read(write_parquet(tmp_path / "u.parquet", text=["a gate"]), caption_column="text")[0] == [
        CaptionRecord("a gate", source="u")
    ]


def test_parquet_with_photos(tmp_path):
    photos = [{"bytes": b"first", "path": "g.jpg"}, {"bytes": b"second", "path": None}]
    path = write_parquet(tmp_path / "t.parquet", captions=[["a gate", "a wall"], ["a lamp"]], image=photos)
    assert [(record.caption, record.image) for record in read(path)[0]] == [
        ("a gate", "g.jpg"),
        ("a wall", "g.jpg"),
        ("a lamp", None),
    ]
    samples = list(read_parquet(path, "caption", "image", "image_id", BadLines(), photos=True))
    assert [values["content"] for _, values in samples] == [b"first", b"second"]
    plain = write_parquet(tmp_path / "u.parquet", caption=["a gate"], jpg=[b"first"], key=["0001"])
    ((place, values),) = read_parquet(plain, "caption", "jpg", "key", BadLines(), photos=True)
    assert values["content"] == b"first" and values["image_id"] == "0001" and place.endswith("u.parquet:row 1")
    assert read(plain, image_column="jpg", image_id_column="key")[0] == [CaptionRecord("a gate", "0001", None, "u")]


def test_parquet_that_is_none_or_has_no_captions(tmp_path):
    (tmp_path / "t.parquet").write_bytes(b"PAR1 not quite")
    with pytest.raises(InputError, match=r"t\.parquet as Parquet"):
        read(tmp_path / "t.parquet")
    whole = write_parquet(tmp_path / "u.parquet", words=["a gate"] * 2000)
    with pytest.raises(InputError, match="columns words and no 'caption'.*--caption-column"):
        read(whole)
    whole.write_bytes(whole.read_bytes()[:-30])
    with pytest.raises(InputError, match=r"u\.parquet as Parquet"):
        read(whole)
    records, bad = read(write_parquet(tmp_path / "v.parquet", caption=["a gate", None, ""]), skip=True)
    assert len(records) == 1 and "v.parquet:row 2: no caption" in bad.listed[0]
