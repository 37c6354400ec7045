"""Caption sources: every format gives the same records, bad lines are named, and files stream in little memory."""

import bz2
import csv
import gc
import gzip
import io
import json
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clipcap_rag.errors import InputError
from clipcap_rag.sources import BadLines, CaptionRecord, SourceOptions, normalize_caption, read_captions

DOGS, BOAT, KITE = "Two dogs share a stick .", "A blue boat waits\tat the pier", "a kite above the dunes"


def read(*paths, skip=False, bad=None, **options):
    return list(read_captions(paths, SourceOptions(**options), bad or BadLines(skip)))


def captions(*paths, **options):
    return [record.caption for record in read(*paths, **options)]


@pytest.fixture
def write(tmp_path):
    """Writes a file, gzipped if its name says so, and returns its path."""

    def write_file(name, content) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not isinstance(content, str | bytes):
            content = json.dumps(content)
        content = content.encode() if isinstance(content, str) else content
        path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
        return path

    return write_file


def json_lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


COCO = {
    "info": {"year": 2031},
    "images": [{"id": 7, "file_name": "000000000007.jpg"}, {"id": 9, "file_name": "val/000000000009.jpg"}],
    "annotations": [
        {"id": 1, "image_id": 9, "caption": DOGS},
        {"id": 2, "image_id": 7, "caption": BOAT + "\n"},
        {"id": 3, "image_id": 9, "caption": KITE},
    ],
}
KARPATHY = {
    "dataset": "invented",
    "images": [
        {"filepath": "val", "filename": "a.jpg", "split": "train", "sentences": [{"raw": DOGS}, {"raw": KITE}]},
        {"filename": "b.jpg", "split": "restval", "sentences": [{"tokens": ["a", "blue", "boat"]}]},
        {"filename": "c.jpg", "split": "val", "sentences": [{"raw": "A lamp ."}]},
        {"filename": "d.jpg", "split": "test", "sentences": [{"raw": "A chair ."}]},
    ],
}

# -- formats ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["birds.jsonl", "birds.jsonl.gz", "birds.ndjson", "birds.json", "birds.json.gz"])
def test_json_lines(write, name):
    rows = [
        {"caption": DOGS, "image_id": "p1", "image": "x/p1.jpg", "source": "mine", "meta": {"licence": "CC0"}},
        {"captions": [BOAT, KITE], "image": "x/p.2.jpg"},
        {"caption": KITE, "image_id": None, "other": [1]},
        {"caption": DOGS, "image_id": 12, "meta": {"width": 640, "tags": ["a"], "shown": True}},
    ]
    assert read(write(name, json_lines(*rows))) == [
        CaptionRecord(DOGS, "p1", "x/p1.jpg", "mine", {"licence": "CC0"}),
        CaptionRecord("A blue boat waits at the pier", "p.2", "x/p.2.jpg", "birds"),
        CaptionRecord(KITE, "p.2", "x/p.2.jpg", "birds"),
        CaptionRecord(KITE, None, None, "birds"),
        CaptionRecord(DOGS, "12", None, "birds", {"width": "640", "tags": '["a"]', "shown": "true"}),
    ]


@pytest.mark.parametrize("name", ["birds.txt", "birds.txt.gz", "birds", "birds.gz"])
def test_text(write, name):
    path = write(name, f"{DOGS}\n  {BOAT}  \r\n{KITE}")
    expected = [CaptionRecord(text, source="birds") for text in (DOGS, "A blue boat waits at the pier", KITE)]
    assert read(path) == expected


@pytest.mark.parametrize("name, delimiter", [("t.csv", ","), ("t.csv.gz", ","), ("t.tsv", "\t"), ("t.tab.gz", "\t")])
def test_tables(write, name, delimiter):
    stream = io.StringIO()
    writer = csv.writer(stream, delimiter=delimiter)
    writer.writerows([["image", "caption", "extra"], ["a.jpg", 'a "red", round door', "1"], ["", DOGS, ""]])
    assert read(write(name, stream.getvalue())) == [
        CaptionRecord('a "red", round door', "a", "a.jpg", "t"),
        CaptionRecord(DOGS, None, None, "t"),
    ]


def test_named_columns(write):
    options = {"caption_column": "text", "image_id_column": "key", "image_column": "file"}
    expected = [CaptionRecord(DOGS, "k1", "a.jpg", "t")]
    assert read(write("t.csv", f" key ,text,file,caption\nk1,{DOGS},a.jpg,no\n"), **options) == expected
    row = {"key": "k1", "text": DOGS, "file": "a.jpg", "caption": "no"}
    assert read(write("t.jsonl", json_lines(row)), **options) == expected
    assert read(write("t.json", json_lines(row)), **options) == expected


def test_csv_with_captions_of_several_lines(write):
    path = write("t.csv", 'caption,image\r\n"one\r\n\r\ntwo ""three""",a.jpg\r\nfour,b.jpg\r\n')
    assert captions(path) == ['one two "three"', "four"]
    bad = BadLines(skip=True)
    assert captions(write("u.csv", 'caption\n"one\ntwo"\na,b\nthree\n'), bad=bad) == ["one two", "three"]
    assert bad.count == 1 and "u.csv:4: 2 fields" in bad.listed[0]


@pytest.mark.parametrize("name", ["c.json", "c.json.gz", "c"])
@pytest.mark.parametrize("indent", [None, 1])
def test_coco(write, name, indent):
    path = write(name, json.dumps(COCO, indent=indent))
    expected = [
        CaptionRecord(DOGS, "000000000009", "val/000000000009.jpg", "c", {"coco_id": "9"}),
        CaptionRecord("A blue boat waits at the pier", "000000000007", "000000000007.jpg", "c", {"coco_id": "7"}),
        CaptionRecord(KITE, "000000000009", "val/000000000009.jpg", "c", {"coco_id": "9"}),
    ]
    assert read(path) == read(path, format="coco") == expected


def test_coco_without_images_and_as_a_list(write):
    annotations = [{"image_id": 7, "caption": DOGS}]
    for content in ({"annotations": annotations}, {"annotations": annotations, "images": []}, annotations):
        assert read(write("c.json", content)) == [CaptionRecord(DOGS, "7", None, "c")]


@pytest.mark.parametrize("name", ["dataset_invented.json", "dataset_invented.json.gz"])
def test_karpathy(write, name):
    path = write(name, KARPATHY)
    trained, rest = {"split": "train"}, {"split": "restval"}
    first = [CaptionRecord(text, "a", "val/a.jpg", "dataset_invented", trained) for text in (DOGS, KITE)]
    second = [CaptionRecord("a blue boat", "b", "b.jpg", "dataset_invented", rest)]
    assert len(read(path)) == len(read(path, format="karpathy")) == 5
    assert read(path, split="train") == first
    assert read(path, split="restval") == second
    assert read(path, split="train, restval") == first + second
    assert captions(path, split="val") == ["A lamp ."]


def test_folder(write, tmp_path):
    for name in ("a.jpg", "b.c.PNG", "sub/a.webp", ".d.jpg"):
        write(f"album/{name}", b"any")
    write("album/a.txt", f"{DOGS}\n{KITE}\n\n")
    write("album/b.c.txt", BOAT)
    write("album/sub/a.txt.gz", KITE)
    write("album/ids.csv", "no caption file")
    expected = [
        CaptionRecord(DOGS, "a", "a.jpg", "album"),
        CaptionRecord(KITE, "a", "a.jpg", "album"),
        CaptionRecord("A blue boat waits at the pier", "b.c", "b.c.PNG", "album"),
        CaptionRecord(KITE, "sub/a", "sub/a.webp", "album"),
    ]
    assert read(tmp_path / "album") == read(tmp_path / "album", format="folder") == expected


def test_several_sources_follow_each_other(write):
    paths = [write("b.txt", KITE), write("a.jsonl", json_lines({"caption": DOGS})), write("c.json", COCO)]
    assert [(record.source, record.caption) for record in read(*paths)][:3] == [("b", KITE), ("a", DOGS), ("c", DOGS)]
    assert captions(str(paths[0])) == list(
        record.caption for record in read_captions(str(paths[0]), SourceOptions(), BadLines())
    )


def test_a_given_format_beats_the_name(write):
    path = write("captions.txt", json_lines({"caption": DOGS}))
    assert captions(path, format="jsonl") == [DOGS]
    assert captions(write("x.dat", f"caption\n{DOGS}\n"), format="csv") == [DOGS]
    assert captions(write("Flickr.token", DOGS), format="text") == [DOGS]


def test_gzip_is_known_by_its_content(write, tmp_path):
    plain = tmp_path / "a.jsonl"
    plain.write_bytes(gzip.compress(json_lines({"caption": DOGS}).encode()))
    assert captions(plain) == [DOGS]
    named = tmp_path / "b.txt.gz"
    named.write_text(KITE)
    assert captions(named) == [KITE]
    two = tmp_path / "c.txt.gz"
    two.write_bytes(gzip.compress(b"one\ntw") + gzip.compress(b"o\nthree"))
    assert captions(two) == ["one", "two", "three"]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_line_ends_and_byte_order_mark(write, end):
    assert captions(write("a.txt", "\ufeff" + end.join(["één", "two", "三", ""]))) == ["één", "two", "三"]
    assert captions(write("a.csv", "\ufeff" + end.join(["caption,image", "één,a.jpg", ""]))) == ["één"]
    assert captions(write("a.jsonl", "\ufeff" + json_lines({"caption": "één"}))) == ["één"]
    assert captions(write("a.json", "\ufeff" + json_lines({"caption": "één"}))) == ["één"]
    assert len(captions(write("c.json", "\ufeff" + json.dumps(COCO)))) == 3


@settings(max_examples=40, deadline=None)
@given(st.lists(st.text(st.characters(exclude_categories=("Cs", "Cc", "Cf"), include_characters="\n\r\t")), min_size=1))
def test_csv_and_json_lines_hold_any_text(tmp_path_factory, texts):
    folder = tmp_path_factory.mktemp("any")
    wanted = [" ".join(text.split()) for text in texts if text.split()] + ["end"]
    (folder / "a.jsonl").write_text(json_lines(*({"caption": text} for text in [*texts, "end"])))
    with open(folder / "a.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["caption", "image"], *([text, "x.jpg"] for text in [*texts, "end"])])
    assert captions(folder / "a.jsonl", skip=True) == captions(folder / "a.csv", skip=True) == wanted


# -- bad lines --------------------------------------------------------------------------------------------------------

GOOD = {"caption": DOGS}
BAD_ROWS = [
    ({}, "no caption"),
    ({"caption": None}, "no caption"),
    ({"caption": ""}, "empty caption"),
    ({"caption": " \t\u00a0"}, "empty caption"),
    ({"caption": "\u200b \ufeff"}, "empty caption"),
    ({"caption": "\x1b[31ma red flag"}, "control character"),
    ({"caption": 5}, "not a string"),
    ({"caption": True}, "not a string"),
    ({"caption": {"raw": "a"}}, "not a string"),
    ({"captions": []}, "no caption"),
    ({"captions": [None]}, "no caption"),
    ({"captions": [["a"]]}, "not a string"),
    ({"caption": "a", "captions": ["b"]}, "more than one"),
    ({"caption": "half \ud83d of a pair"}, "no text"),
    ({"caption": "a\0b"}, "no text"),
    ({"caption": "a", "image": ["a.jpg"]}, "image is"),
    ({"caption": "a", "image": "\udcff.jpg"}, "image "),
    ({"caption": "a", "image_id": 1.5}, "image_id is 1.5"),
    ({"caption": "a", "image_id": True}, "image_id is True"),
    ({"caption": "a", "source": {}}, "source is"),
    ({"caption": "a", "meta": "b"}, "meta is"),
    ({"caption": "a", "meta": {"k": "\ud800"}}, "no text"),
    ({"caption": "a", "meta": {"\ud800": "v"}}, "no text"),
    (["a"], "no caption"),
    ("a", "no caption"),
    (None, "no caption"),
]


@pytest.mark.parametrize("row, words", BAD_ROWS)
def test_bad_json_rows(write, row, words):
    path = write("a.jsonl", json_lines(GOOD, row, GOOD))
    with pytest.raises(InputError) as error:
        read(path)
    assert str(error.value).startswith(f"{path}:2: ") and words in str(error.value)
    assert "--skip-bad" in str(error.value)
    bad = BadLines(skip=True)
    assert captions(path, bad=bad) == [DOGS, DOGS]
    assert bad.count == 1 and bad.listed[0].startswith(f"{path}:2: ") and words in bad.listed[0]
    json.dumps(bad.listed, ensure_ascii=False).encode()


BAD_BYTES = [
    (b"", "not JSON"),
    (b"{", "not JSON"),
    (b"{'caption': 'a'}", "not JSON"),
    (b'{"caption": "a"} x', "not JSON"),
    (b'{"caption": "a\xff"}', "not UTF-8 (byte 0xff at position 15)"),
    (b"[" * 100_000, "not JSON"),
    (b'{"caption": "a", "image_id": ' + b"9" * 5000 + b"}", "not JSON"),
]


@pytest.mark.parametrize("line, words", BAD_BYTES, ids=range(len(BAD_BYTES)))
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_bad_bytes_in_json_lines(write, line, words, suffix):
    good = json_lines(GOOD).encode()
    path = write("a.jsonl" + suffix, good + line + b"\n" + good)
    with pytest.raises(InputError) as error:
        read(path)
    assert str(error.value).startswith(f"{path}:2: ") and words in str(error.value)
    assert captions(path, skip=True) == [DOGS, DOGS]


def test_some_of_several_captions_are_bad(write):
    bad = BadLines(skip=True)
    path = write("a.jsonl", json_lines({"captions": [DOGS, " ", 3, KITE]}))
    assert captions(path, bad=bad) == [DOGS, KITE] and bad.count == 2


def test_blank_lines_are_bad_inside_and_nothing_at_the_end(write):
    for name, start in (("a.txt", ""), ("a.csv", "caption\n"), ("a.tsv", "caption\n")):
        number = 2 + start.count("\n")
        assert captions(write(name, f"{start}one\ntwo\n\n \n")) == ["one", "two"]
        path = write(name, f"{start}one\n\n \ntwo\n\n")
        with pytest.raises(InputError, match=f"{name}:{number}: "):
            read(path)
        bad = BadLines(skip=True)
        assert captions(path, bad=bad) == ["one", "two"]
        assert [line.split(": ")[0] for line in bad.listed] == [f"{path}:{number}", f"{path}:{number + 1}"]


def test_text_that_is_not_utf8(write):
    path = write("a.txt", "café\n".encode("latin-1") + b"two\n\xf0\x9f\nthree")
    with pytest.raises(InputError, match=r"a\.txt:1: not UTF-8 \(byte 0xe9 at position 4\)"):
        read(path)
    bad = BadLines(skip=True)
    assert captions(path, bad=bad) == ["two", "three"] and bad.count == 2 and f"{path}:3: " in bad.listed[1]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32"])
@pytest.mark.parametrize("name", ["a.txt", "a.csv", "a.jsonl", "a.json"])
def test_utf16_and_utf32_are_refused(write, name, encoding):
    content = f"caption\n{DOGS}\n" if name.endswith(("txt", "csv")) else json_lines(GOOD, GOOD)
    with pytest.raises(InputError, match=str(name)):
        read(write(name, content.encode(encoding)))


def test_only_twenty_bad_lines_are_listed(write):
    bad = BadLines(skip=True)
    path = write("a.jsonl", "{}\n" * 500 + json_lines(GOOD))
    assert captions(path, bad=bad) == [DOGS]
    assert bad.count == 500 and len(bad.listed) == 20


def test_long_lines_are_bad_and_the_next_is_read(write):
    bad = BadLines(skip=True)
    path = write("a.txt.gz", b"one\n" + b"x" * (40 * 2**20) + b"\ntwo\n" + b"y" * (16 * 2**20))
    assert captions(path, bad=bad) == ["one", "two"]
    assert [line.split(": ")[0] for line in bad.listed] == [f"{path}:2", f"{path}:4"]


@pytest.mark.parametrize(
    "name, content, place",
    [
        ("a.csv", "caption,image\na,b,c\nz,y\n", ":2: 3 fields"),
        ("a.csv", "caption,image\na\nz,y\n", ":2: 1 fields"),
        ("a.csv", 'caption,image\n"a" b,c\nz,y\n', ":2: "),
        ("a.csv", 'caption,image\nz,y\n"a,b\nc,d\n', ":3-4: unexpected end"),
        ("a.tsv", 'caption\timage\n"a\tb\nz\ty\n', ":2: unexpected end"),
        ("a.csv", "caption,image\n,b\nz,y\n", ":2: empty caption"),
        ("a.csv", "caption,image\na\0,b\nz,y\n", ":2: "),
        ("a.csv", "caption,image\n" + "a" * 200_000 + ",b\nz,y\n", ":2: field larger"),
    ],
)
def test_bad_rows_of_tables(write, name, content, place):
    path = write(name, content)
    with pytest.raises(InputError) as error:
        read(path)
    assert f"{path}{place}" in str(error.value)
    bad = BadLines(skip=True)
    assert captions(path, bad=bad) == ["z"] and bad.count == 1


@pytest.mark.parametrize(
    "header, options, words",
    [
        ("text,image", {}, "text, image"),
        ("caption;image", {}, "caption;image"),
        ("caption,image", {"caption_column": "text"}, "'text'"),
        ("caption,image", {"image_column": "file"}, "'file'"),
        ("caption,image", {"image_id_column": "key"}, "--image-id-column"),
        ("caption,caption", {}, "exactly one 'caption'"),
        ("caption,image,image", {}, "exactly one 'image'"),
    ],
)
def test_missing_and_doubled_columns(write, header, options, words):
    with pytest.raises(InputError, match=words):
        read(write("a.csv", f"{header}\na,b\n"), skip=True, **options)


@pytest.mark.parametrize(
    "change, place",
    [
        ({"annotations": [COCO["annotations"][0], {"image_id": 7}]}, "annotations[1]: no caption"),
        ({"annotations": [COCO["annotations"][0], {"image_id": 8, "caption": "a"}]}, "annotations[1]: image_id 8"),
        ({"annotations": [COCO["annotations"][0], {"caption": "a"}]}, "annotations[1]: image_id None"),
        ({"annotations": [COCO["annotations"][0], "a"]}, "annotations[1]: not an object"),
        ({"annotations": [COCO["annotations"][0], {"image_id": [], "caption": "a"}]}, "annotations[1]: image_id []"),
    ],
)
def test_bad_coco_annotations(write, change, place):
    path = write("c.json", COCO | change)
    with pytest.raises(InputError) as error:
        read(path)
    assert str(error.value).startswith(f"{path}:{place}")
    assert captions(path, skip=True) == [DOGS]


@pytest.mark.parametrize(
    "image, place",
    [
        ("a", "images[4]: "),
        ({"filename": "x.jpg", "split": "val"}, "images[4]: "),
        ({"filename": "x.jpg", "split": "val", "sentences": []}, "images[4]: no caption"),
        ({"filename": "x.jpg", "split": "val", "sentences": [{}]}, "images[4]: no caption"),
        ({"filename": "x.jpg", "split": "val", "sentences": [{"tokens": 3}]}, "images[4]: no caption"),
        ({"filename": "x.jpg", "split": ["val"], "sentences": [{"raw": "A lamp ."}]}, "images[4]: split is"),
        ({"filename": {}, "split": "val", "sentences": [{"raw": "a"}]}, "images[4]: image is {}"),
    ],
)
def test_bad_karpathy_images(write, image, place):
    path = write("k.json", {"images": [*KARPATHY["images"], image]})
    with pytest.raises(InputError) as error:
        read(path, split="train,restval,val,test")
    assert str(error.value).startswith(f"{path}:{place}")
    assert len(captions(path, split="train,restval,val,test", skip=True)) == 5


def test_karpathy_splits_that_are_not_there(write):
    path = write("k.json", KARPATHY)
    for split in ("dev", "train,dev", "", "train,"):
        with pytest.raises(InputError, match="restval, test, train, val"):
            read(path, split=split)


def test_a_split_of_something_else(write, tmp_path):
    write("album/a.jpg", b"")
    for path in (write("a.txt", DOGS), write("c.json", COCO), tmp_path / "album"):
        with pytest.raises(InputError, match="--split"):
            read(path, split="train")


@pytest.mark.parametrize(
    "files, place",
    [
        (["a.jpg"], "a: 1 images and 0 caption files"),
        (["a.txt"], "a: 0 images and 1 caption files"),
        (["a.jpg", "a.png", "a.txt"], "a: 2 images and 1 caption files"),
        (["a.jpg", "a.txt", "a.txt.gz"], "a: 1 images and 2 caption files"),
        (["a.jpg", "a.txt="], "a.txt: no caption"),
        (["a.jpg", "a.txt=\n \n"], "a.txt: no caption"),
        (["a.jpg", "a.txt=x\n\ny"], "a.txt:2: "),
    ],
)
def test_folders_with_faults(write, tmp_path, files, place):
    write("album/z.jpg", b"")
    write("album/z.txt", KITE)
    for file in files:
        name, _, content = file.partition("=")
        write(f"album/{name}", content if "=" in file else DOGS)
    with pytest.raises(InputError) as error:
        read(tmp_path / "album")
    assert str(error.value).startswith(f"{tmp_path / 'album' / place}")
    bad = BadLines(skip=True)
    assert captions(tmp_path / "album", bad=bad)[-1] == KITE and bad.count == 1


def test_a_file_name_that_is_not_utf8(tmp_path):
    folder = tmp_path / "album"
    folder.mkdir()
    for name in (b"caf\xe9.jpg", b"caf\xe9.txt"):
        (folder / os.fsdecode(name)).write_text(DOGS)
    bad = BadLines(skip=True)
    with pytest.raises(InputError, match="caf"):
        read(folder, bad=bad)
    assert bad.count == 1 and bad.listed[0].encode()


# -- sources that cannot be read --------------------------------------------------------------------------------------


def test_faults_are_told_before_anything_is_read(write, tmp_path):
    good, empty, pipe = write("a.txt", DOGS), write("empty.jsonl", b""), tmp_path / "pipe"
    os.mkfifo(pipe)
    for path, words in (
        (tmp_path / "gone.txt", "there is no caption file"),
        (tmp_path / ("x" * 5000), "there is no caption file"),
        (empty, "is empty"),
        (pipe, "is not a file"),
        (write("photo.jpg", b"\xff\xd8\xff\xe0"), "--format"),
        (write("captions.xml", b"<a>"), "--format"),
        (write("captions.bz2", bz2.compress(b"a")), "--format"),
    ):
        with pytest.raises(InputError, match=words) as error:
            read_captions([good, path], SourceOptions(), BadLines(skip=True))
        assert str(path) in str(error.value)
    with pytest.raises(InputError, match="no caption file is given"):
        read_captions([], SourceOptions(), BadLines())


def test_formats_that_do_not_fit(write, tmp_path):
    (tmp_path / "album").mkdir()
    for path, name in (
        (tmp_path / "album", "jsonl"),
        (write("a.txt", DOGS), "folder"),
        (write("c.json", COCO), "karpathy"),
        (write("k.json", KARPATHY), "coco"),
        (write("a.jsonl", json_lines(GOOD, GOOD)), "coco"),
    ):
        with pytest.raises(InputError) as error:
            read(path, format=name)
        assert str(path) in str(error.value) and "format" in str(error.value)
    with pytest.raises(InputError, match="choose one of"):
        SourceOptions(format="xml")


@pytest.mark.parametrize(
    "content", ["{}", "[]", "{", '{"images": [{"id": 1}]}', '{"images": 3}', "[1, 2]", "{]", "[" * 99_999]
)
def test_json_that_is_no_caption_file(write, content):
    for skip in (True, False):
        with pytest.raises(InputError, match=r"a\.json"):
            read(write("a.json", content), skip=skip)


@pytest.mark.parametrize("name", ["a.txt", "a.csv", "a.jsonl", "a.txt.gz"])
def test_files_without_a_caption(write, name):
    for content in ("\n\n", "caption\n" if "csv" in name else "\n", b"\xff\n\xfe\xff\n"):
        with pytest.raises(InputError, match=name):
            read(write(name, content), skip=True)


def test_a_file_of_bad_lines_says_so(write):
    with pytest.raises(InputError, match=r"all of its 2 entries are bad, the last: .*a\.jsonl:2: no caption"):
        read(write("a.jsonl", "{}\n{}\n"), skip=True)


def test_an_empty_folder(tmp_path):
    with pytest.raises(InputError, match="holds no caption"):
        read(tmp_path)


@pytest.mark.parametrize("skip", [True, False])
def test_damaged_gzip(tmp_path, skip):
    content = gzip.compress("".join(f"{number} kites\n" for number in range(50_000)).encode())
    path = tmp_path / "a.txt.gz"
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 0xFF
    for damaged in (content[: len(content) // 2], content[:-4], bytes(flipped), content + b"tail", content[:12]):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match="damaged gzip"):
            read(path, skip=skip)


def test_a_file_that_vanishes(write):
    path = write("a.txt", DOGS)
    stream = read_captions([path], SourceOptions(), BadLines())
    path.unlink()
    with pytest.raises(InputError, match="cannot read"):
        next(stream)


# -- streaming --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.txt", "a.csv", "a.tsv"])
def test_large_files_take_little_memory(write, name):
    rows = 8_000
    line = json_lines({"caption": DOGS * 20}) if "jsonl" in name else DOGS * 20 + "\n"
    path = write(name, ("caption\n" if name[2:] in ("csv", "tsv") else "") + line * rows)
    next(read_captions([path], SourceOptions(), BadLines()))  # what is imported or cached once is not counted
    gc.collect()
    tracemalloc.start()
    try:
        assert sum(1 for _ in read_captions([path], SourceOptions(), BadLines())) == rows
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < path.stat().st_size / 2 or (name.endswith(".gz") and peak < 2**20)


def test_an_open_quote_does_not_fill_the_memory(write):
    bad = BadLines(skip=True)
    path = write("a.csv", 'caption\n"' + (DOGS * 20 + "\n") * 6_000)
    tracemalloc.start()
    try:
        count = sum(1 for _ in read_captions([path], SourceOptions(), bad))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert bad.count == 1 and count > 5_000 and peak < path.stat().st_size / 2


def test_records_come_one_by_one(write):
    path = write("a.jsonl", json_lines(GOOD, {}))
    stream = read_captions([path], SourceOptions(), BadLines())
    assert next(stream).caption == DOGS
    with pytest.raises(InputError):
        next(stream)


# -- the rest ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "one, other",
    [
        ("A dog runs .", "a DOG runs"),
        ("two  cats,\tasleep!", "Two cats asleep"),
        ("“Stop” — said the sign…", "stop said the sign"),
        ("Cafe\u0301 at night", "café at night"),
        ("ﬁve boats", "five boats"),
        ("¿Dónde está?", "dónde está"),
    ],
)
def test_equal_captions(one, other):
    assert normalize_caption(one) == normalize_caption(other) != ""


def test_different_captions_stay_different():
    assert normalize_caption("a dog") != normalize_caption("a cat")
    assert normalize_caption("कि") != normalize_caption("की")
    assert normalize_caption("two dogs") != normalize_caption("twodogs")


@settings(max_examples=200, deadline=None)
@given(st.text())
def test_normalizing_twice_changes_nothing(text):
    once = normalize_caption(text)
    assert normalize_caption(once) == once


def test_import_is_light():
    code = "import sys, clipcap_rag.sources; sys.exit(bool({'torch', 'faiss', 'pyarrow', 'pandas'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.photos
@pytest.mark.skipif("CLIPCAP_RAG_DATA" not in os.environ, reason="CLIPCAP_RAG_DATA names no folder")
def test_the_real_caption_files():
    folder = Path(os.environ["CLIPCAP_RAG_DATA"])
    records = read(folder / "flickr8k" / "captions_dev.jsonl")
    assert len(records) == 5000 and len({record.image_id for record in records}) == 1000
    assert all((folder / "flickr8k" / "images" / record.image).is_file() for record in records)
    stores = sorted((folder / "captions").glob("*.jsonl.gz"))
    assert sum(1 for _ in read_captions(stores, SourceOptions(), BadLines())) == 231_734
