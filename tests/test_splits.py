"""Prepared data sets: splits that do not mix, photos that are there, the rest named, features that continue."""

import json
import shutil

import pytest

import clipcap_rag.splits as splits_module
from clipcap_rag import cli
from clipcap_rag.errors import InputError
from clipcap_rag.features import FeatureSet, extract_features
from clipcap_rag.sources import BadLines, SourceOptions, read_captions
from clipcap_rag.splits import prepare_splits


def photo(number: int, split: str, folder: str | None = None) -> dict:
    sentences = [{"raw": f"picture {number}"}, {"tokens": ["number", str(number)]}]
    name = {"filename": f"photo-{number}.jpg", "filepath": folder} if folder else {"filename": f"photo-{number}.jpg"}
    return name | {"split": split, "sentences": sentences, "cocoid": number}


@pytest.fixture
def karpathy(tmp_path):
    """A Karpathy file of six photos, the last of which is in no folder."""
    places = [("train", "train2014"), ("restval", "val2014"), ("val", "val2014"), ("test", "val2014"), ("test", "gone")]
    path = tmp_path / "dataset_invented.json"
    images = [photo(n, *place) for n, place in enumerate(places)] + [photo(9, "train", "train2014")]
    path.write_text(json.dumps({"dataset": "invented", "images": images}))
    return path


@pytest.fixture
def images(photo_folder, tmp_path):
    """Folders as COCO has them; photo-4 lies elsewhere than the file says."""
    for number, folder in enumerate(("train2014", "val2014", "val2014", "val2014", "other")):
        (tmp_path / "images" / folder).mkdir(parents=True, exist_ok=True)
        shutil.copy(photo_folder / f"photo-{number}.jpg", tmp_path / "images" / folder)
    return tmp_path / "images"


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_karpathy_splits_with_restval_in_train(karpathy, images, tmp_path):
    made = prepare_splits(karpathy, tmp_path / "out", images=images)
    assert {name: (split.photos, split.captions) for name, split in made.splits.items()} == {
        "train": (2, 4), "val": (1, 2), "test": (2, 4)
    }  # fmt: skip
    assert made.splits["train"].missing == ["train2014/photo-9.jpg"] and not made.splits["test"].missing
    assert rows(tmp_path / "out" / "train.jsonl") == [
        {
            "image": f"{folder}/photo-{n}.jpg",
            "image_id": f"photo-{n}",
            "captions": [f"picture {n}", f"number {n}"],
            "meta": {"coco_id": str(n)},
        }
        for n, folder in enumerate(("train2014", "val2014"))
    ]
    manifest = json.loads((tmp_path / "out" / "splits.json").read_text())
    assert manifest["splits"]["val"]["hash"] == manifest["files"]["val.jsonl"]["hash"] == made.splits["val"].hash
    again = prepare_splits(karpathy, tmp_path / "again", images=images)
    assert again.splits == made.splits, "the hash depends on nothing else"
    assert prepare_splits(karpathy, tmp_path / "no-photos").splits["train"].photos == 3


def test_features_of_each_split(karpathy, images, tmp_path, world, monkeypatch):
    (images / "val2014" / "photo-3.jpg").write_bytes(b"no photo")
    extracted = []

    def stops_at_test(captions, *arguments, **options):
        extracted.append(captions[0].stem)
        if len(extracted) == 3:
            raise KeyboardInterrupt
        return extract_features(captions, *arguments, **options)

    monkeypatch.setattr(splits_module, "extract_features", stops_at_test)
    job = {"images": images, "clip": world.clip, "workers": 0, "device": "cpu", "dtype": "float32"}
    with pytest.raises(KeyboardInterrupt):
        prepare_splits(karpathy, tmp_path / "out", **job)
    assert not (tmp_path / "out").exists()
    made = prepare_splits(karpathy, tmp_path / "out", **job)
    assert extracted == ["train", "val", "test", "test"]
    assert FeatureSet.open(tmp_path / "out/features-train").images == ["photo-0.jpg", "photo-1.jpg"]
    assert FeatureSet.open(tmp_path / "out/features-test").captions == [["picture 4", "number 4"]]
    assert len(made.splits["test"].unreadable) == 1 and "photo-3.jpg" in made.splits["test"].unreadable[0]
    assert not list(tmp_path.rglob("job.json"))


TOKENS = "".join(f"photo-{n}.jpg#{k}\ta picture , {n} of {k} .\n" for n in range(4) for k in range(2))


@pytest.fixture
def flickr(tmp_path):
    """A token file of four photos and lists that hold three of them."""
    (tmp_path / "Flickr.token.txt").write_text(TOKENS)
    lists = {"train": "photo-0.jpg\nphoto-2.jpg\n", "val": "photo-1\n"}
    for name, content in lists.items():
        (tmp_path / f"{name}Images.txt").write_text(content)
    return tmp_path / "Flickr.token.txt", {name: tmp_path / f"{name}Images.txt" for name in lists}


def test_token_files_with_lists(flickr, photo_folder, tmp_path):
    tokens, lists = flickr
    made = prepare_splits(tokens, tmp_path / "out", lists=lists, images=photo_folder)
    assert [(name, split.photos, split.captions) for name, split in made.splits.items()] == [
        ("train", 2, 4),
        ("val", 1, 2),
    ]
    assert made.unlisted == 1
    assert rows(tmp_path / "out" / "val.jsonl") == [
        {"image": "photo-1.jpg", "image_id": "photo-1", "captions": ["a picture , 1 of 0 .", "a picture , 1 of 1 ."]}
    ]


@pytest.mark.parametrize(
    "line, words", [("photo-9.jpg a picture", ":9: not of the form"), ("photo-9.jpg\ta picture", ":9: not of the form")]
)
def test_bad_lines_of_token_files(flickr, tmp_path, line, words):
    tokens, lists = flickr
    tokens.write_text(TOKENS + line + "\n")
    with pytest.raises(InputError, match=words):
        prepare_splits(tokens, tmp_path / "out", lists=lists)
    assert prepare_splits(tokens, tmp_path / "out", lists=lists, skip_bad=True).bad_line_count == 1
    assert len(list(read_captions([tokens], SourceOptions(), BadLines(skip=True)))) == 8


NOCAPS = {
    "images": [
        {"id": 0, "file_name": "photo-0.jpg", "open_images_id": "photo-0", "domain": "near-domain"},
        {"id": 1, "file_name": "photo-1.jpg", "open_images_id": "photo-1", "domain": "out-domain"},
    ],
    "annotations": [{"id": n, "image_id": n % 2, "caption": f"picture {n}"} for n in range(5)],
}


def test_nocaps_keeps_its_domains(photo_folder, tmp_path, capsys):
    (tmp_path / "nocaps.json").write_text(json.dumps(NOCAPS))
    words = ["prepare", "nocaps", "--captions", str(tmp_path / "nocaps.json"), "--images", str(photo_folder)]
    assert cli.main([*words, "--out", str(tmp_path / "out"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["splits"]["val"]["captions"] == 5
    assert rows(tmp_path / "out" / "val.jsonl") == [
        {
            "image": f"photo-{n}.jpg",
            "image_id": f"photo-{n}",
            "captions": [f"picture {k}" for k in range(n, 5, 2)],
            "meta": {"coco_id": str(n), "domain": domain},
        }
        for n, domain in enumerate(("near-domain", "out-domain"))
    ]


def test_the_command_names_what_is_missing(karpathy, images, tmp_path, capsys):
    words = ["prepare", "coco", "--karpathy", str(karpathy), "--images", str(images), "--out", str(tmp_path / "out")]
    assert cli.main(words) == 1
    shown = capsys.readouterr()
    assert f"{tmp_path / 'out' / 'train'}.jsonl: 2 photos, 4 captions, sha256:" in shown.out
    assert "missing: train2014/photo-9.jpg" in shown.err and "1 photos of train are missing" in shown.err
    assert cli.main(words) == 2 and "exists already" in capsys.readouterr().err


def test_what_does_not_go_together(karpathy, flickr, images, tmp_path):
    tokens, lists = flickr
    out = tmp_path / "out"
    (tmp_path / "plain.txt").write_text("a gate\n")
    same = [{"image": f"{folder}/x.jpg", "caption": "a gate"} for folder in "ab"]
    (tmp_path / "same.jsonl").write_text("".join(json.dumps(row) + "\n" for row in same))
    (tmp_path / "both.txt").write_text("photo-1.jpg\n")
    (tmp_path / "none.txt").write_text("photo-77.jpg\n")
    for arguments, words in (
        ({"captions": tokens}, "does not say the splits"),
        ({"captions": karpathy, "lists": lists}, "says the splits of its photos itself"),
        ({"captions": tmp_path / "plain.txt", "lists": lists}, "captions without photos"),
        (
            {"captions": tokens, "lists": lists | {"test": tmp_path / "both.txt"}},
            r"both\.txt:1: .* is in val",
        ),
        ({"captions": tokens, "lists": lists | {"test": tmp_path / "none.txt"}}, "no photo of the split test"),
        ({"captions": tokens, "lists": {"train": tmp_path / "gone.txt"}}, "cannot read .*gone.txt"),
        ({"captions": karpathy, "clip": "starter"}, "--images"),
        ({"captions": images, "whole": "val"}, "is a folder"),
        ({"captions": tmp_path / "same.jsonl", "whole": "val"}, "a/x.jpg and b/x.jpg .* have one name"),
        ({"captions": karpathy, "images": tmp_path / "gone"}, "does not exist"),
        ({"captions": karpathy, "images": images / "train2014"}, "no photo of the split val is below"),
    ):
        with pytest.raises(InputError, match=words):
            prepare_splits(**arguments, out=out)
        assert not out.exists()


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "folder", "parquet"])
def test_any_captions_become_features(kind, photo_folder, tmp_path, world):
    import pyarrow as pa
    from pyarrow import parquet

    names = ["photo-2.jpg", "photo-6.png"]
    captions, images = tmp_path / f"captions.{kind}", photo_folder
    if kind == "folder":
        captions = images = tmp_path
        for name in names:
            shutil.copy(photo_folder / name, tmp_path)
            (tmp_path / name).with_suffix(".txt").write_text(f"words about {name}\n")
    elif kind == "parquet":
        parquet.write_table(pa.table({"image": names, "caption": [f"words about {name}" for name in names]}), captions)
    elif kind == "jsonl":
        captions.write_text("".join(json.dumps({"image": n, "caption": f"words about {n}"}) + "\n" for n in names))
    else:
        mark = "," if kind == "csv" else "\t"
        captions.write_text(f"image{mark}caption\n" + "".join(f"{name}{mark}words about {name}\n" for name in names))
    features = extract_features([captions], images, world.clip, tmp_path / "features", workers=0)
    assert features.images == names and features.captions == [[f"words about {name}"] for name in names]
