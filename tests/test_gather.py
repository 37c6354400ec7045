"""Gathered photos: whole ones only, every row accounted for, nothing fetched twice, ready for features and indexes."""

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
import warnings
from collections import Counter

import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

from clipcap_rag import cli
from clipcap_rag.config import DownloadConfig
from clipcap_rag.errors import InputError
from clipcap_rag.features import extract_features
from clipcap_rag.gather import gather_photos
from clipcap_rag.sources import BadLines, SourceOptions, read_captions

QUICK = DownloadConfig(threads=4, connect_timeout=1, read_timeout=0.3, total_timeout=2, retries=1)
FATES = {
    "photo/1.jpg": "ok", "photo/2.png": "ok", "moved/3.jpg": "ok", "odd/4.jpg": "ok", "moody/5.jpg": "ok",
    "gone/1.jpg": "http 404", "gone/2.jpg": "http 404", "mute/1.jpg": "timeout", "cut/1.jpg": "truncated",
    "half/1.jpg": "damaged image", "page/1.jpg": "not an image", "tiny/1.jpg": "too small",
    "plain/1.jpg": "one colour", "circle/1.jpg": "redirects",
}  # fmt: skip


def write_list(path, web, names):
    path.write_text("".join(f"a picture, number {n}\t{web.url}/{name}\n" for n, name in enumerate(names, 1)))
    return path


def rows(folder):
    return [json.loads(line) for line in (folder / "captions.jsonl").read_text().splitlines()]


def journal(folder):
    return [json.loads(line) for line in (folder / "journal.jsonl").read_text().splitlines()]


def files(folder):
    return sorted(path.relative_to(folder / "images").as_posix() for path in (folder / "images").rglob("*.*"))


def test_every_url_has_its_outcome(web, tmp_path):
    source, out = write_list(tmp_path / "list.tsv", web, FATES), tmp_path / "out"
    made = gather_photos(source, out, "val", config=QUICK)
    assert made.outcomes == Counter(FATES.values()) and made.photos == made.captions == 5 and made.failed == 9
    told = {entry["row"]: entry["outcome"] for entry in journal(out)}
    assert [told[row] for row in range(1, len(FATES) + 1)] == list(FATES.values())
    assert [(row["image"], row["image_id"]) for row in rows(out)] == [
        (f"00000/val-00000000{n}.{'png' if n == 2 else 'jpg'}", f"val-00000000{n}") for n in range(1, 6)
    ]
    assert rows(out)[2]["captions"] == ["a picture, number 3"]
    assert rows(out)[2]["meta"] == {"url": f"{web.url}/moved/3.jpg"}
    assert files(out) == [row["image"] for row in rows(out)]
    for row in rows(out):
        Image.open(out / "images" / row["image"]).load()
    manifest = json.loads((out / "photos.json").read_text())
    assert manifest["outcomes"] == made.outcomes and manifest["files"]["captions.jsonl"]["hash"].startswith("sha256:")


def test_failures_are_tried_again_only_when_asked(web, tmp_path):
    names = ["photo/1.jpg", "moody/2.jpg", "gone/3.jpg"]
    source, out = write_list(tmp_path / "list.tsv", web, names), tmp_path / "out"
    once = DownloadConfig(**QUICK.to_json() | {"retries": 0})
    assert gather_photos(source, out, config=once).outcomes == {"ok": 1, "http 500": 1, "http 404": 1}
    with pytest.raises(InputError, match="is finished; pass --retry-failed"):
        gather_photos(source, out, config=once)
    assert sum(web.hits.values()) == 3
    assert gather_photos(source, out, config=once, retry_failed=True).outcomes == {"ok": 2, "http 404": 1}
    assert web.hits == {"/photo/1.jpg": 1, "/moody/2.jpg": 2, "/gone/3.jpg": 2}
    assert [row["image_id"] for row in rows(out)] == ["train-000000001", "train-000000002"]
    assert not (tmp_path / "out.partial").exists()
    gather_photos(source, out, config=once, overwrite=True)
    assert web.hits["/photo/1.jpg"] == 2


def test_a_killed_run_fetches_nothing_twice(web, tmp_path):
    names = [f"calm/{n}.jpg" for n in range(1, 81)] + ["gone/1.jpg"]
    source, out = write_list(tmp_path / "list.tsv", web, names), tmp_path / "out"
    kept = tmp_path / "out.partial" / "journal.jsonl"
    words = ["prepare", "conceptual", str(source), "--out", str(out), "--threads", "2"]
    running = subprocess.Popen([sys.executable, "-m", "clipcap_rag", *words], stderr=subprocess.DEVNULL)
    ends = time.monotonic() + 60
    while not kept.is_file() or kept.read_bytes().count(b"\n") < 12:
        assert time.monotonic() < ends and running.poll() is None
        time.sleep(0.01)
    os.kill(running.pid, signal.SIGKILL)
    running.wait()
    time.sleep(0.1)  # for requests that are under way to arrive
    kept.write_bytes(kept.read_bytes() + b'{"row": 80, "outc')
    done, before = len(kept.read_bytes().splitlines()) - 1, web.hits.copy()
    assert 12 <= done < 80
    (tmp_path / "out.partial" / "images" / "00000" / "train-000000080.jpg.tmp").write_bytes(b"torn")
    made = gather_photos(source, out, config=QUICK)
    assert made.outcomes == {"ok": 80, "http 404": 1}
    twice = [path for path, count in web.hits.items() if count > 1]
    assert len(twice) <= 4, "at most what the two threads of the killed run had not written down"
    assert sum(web.hits.values()) - sum(before.values()) == 81 - done
    assert files(out) == [row["image"] for row in rows(out)] and len(rows(out)) == 80


def test_hours_of_work_are_not_lost_by_a_slip(web, tmp_path):
    source, out = write_list(tmp_path / "list.tsv", web, ["gone/1.jpg", "gone/2.jpg"]), tmp_path / "out"
    with pytest.raises(InputError, match=r"no photo of .*list.tsv could be had \(2 http 404\).*--retry-failed"):
        gather_photos(source, out, config=QUICK)
    assert not out.exists()
    other = write_list(tmp_path / "other.tsv", web, ["photo/1.jpg"])
    for changed in ({"source": other}, {"split": "val"}):
        with pytest.raises(InputError, match=r"out\.partial holds photos of another source"):
            gather_photos(**{"source": source, "split": "train"} | changed, out=out, config=QUICK)
    assert len(journal(tmp_path / "out.partial")) == 2
    gather_photos(other, out, config=QUICK, overwrite=True)
    with pytest.raises(InputError, match="out holds photos of another source"):
        gather_photos(source, out, config=QUICK, retry_failed=True)


def test_bad_lines_are_found_before_anything_is_fetched(web, tmp_path):
    source = write_list(tmp_path / "list.tsv", web, ["photo/1.jpg", "photo/2.jpg"])
    source.write_text(source.read_text() + "no address\n")
    with pytest.raises(InputError, match=r"list\.tsv:3: "):
        gather_photos(source, tmp_path / "out", config=QUICK)
    assert not web.hits
    made = gather_photos(source, tmp_path / "out", config=QUICK, skip_bad=True)
    assert (made.photos, made.bad_line_count, made.failed) == (2, 1, 1) and "list.tsv:3" in made.bad_lines[0]
    with pytest.raises(InputError, match="split is 'a/b'"):
        gather_photos(source, tmp_path / "new", "a/b")


def test_warning_filters_are_left_as_they_were(web, tmp_path):
    before = list(warnings.filters)
    source = write_list(tmp_path / "list.tsv", web, [f"photo/{n}.jpg" for n in range(40)])
    gather_photos(source, tmp_path / "out", config=DownloadConfig(threads=16))
    assert warnings.filters == before


@pytest.fixture
def shards(photo_folder, tmp_path):
    """Two tars as img2dataset writes them: three photos, two of them whole and large enough, and two captions."""
    pictures = [Image.open(photo_folder / f"photo-{n}.jpg").resize((100, 80)) for n in range(2)]
    contents = []
    for picture in pictures:
        stream = io.BytesIO()
        picture.save(stream, "JPEG")
        contents.append(stream.getvalue())
    contents.append(contents[0][:300])
    folder = tmp_path / "shards"
    folder.mkdir()
    for number, content in enumerate(contents):
        with tarfile.open(folder / f"0000{number // 2}.tar", "a") as archive:
            for suffix, data in (("jpg", content), ("txt", f"picture {number}".encode()), ("json", b"{}")):
                member = tarfile.TarInfo(f"0000{number // 2}000{number}.{suffix}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    return folder


def test_tars_are_unpacked_and_checked_like_the_web(shards, tmp_path, world):
    out = tmp_path / "out"
    made = gather_photos(shards, out)
    assert made.outcomes == {"ok": 2, "damaged image": 1}
    assert [row["captions"] for row in rows(out)] == [["picture 0"], ["picture 1"]]
    assert rows(out)[1]["meta"] == {"original": "000000001.jpg"}
    features = extract_features([out / "captions.jsonl"], out / "images", world.clip, tmp_path / "features", workers=0)
    assert features.image_ids == ["train-000000001", "train-000000002"] and not features.errors
    assert features.captions == [["picture 0"], ["picture 1"]]
    assert len(list(read_captions(sorted(shards.iterdir()), SourceOptions(), BadLines()))) == 3


def test_a_damaged_tar_makes_no_folder(shards, tmp_path):
    second, out = shards / "00001.tar", tmp_path / "out"
    whole = second.read_bytes()
    second.write_bytes(whole[:700])
    with pytest.raises(InputError, match=r"00001\.tar is not a whole tar file"):
        gather_photos(shards, out)
    assert not out.exists()
    second.write_bytes(whole)
    with pytest.raises(InputError, match=r"out\.partial holds photos of another source.*--overwrite"):
        gather_photos(shards, out)
    assert gather_photos(shards, out, overwrite=True).photos == 2


def test_parquet_of_a_data_set(photo_folder, tmp_path, world):
    photos = [{"bytes": (photo_folder / f"photo-{n}.png").read_bytes(), "path": None} for n in (6, 7)]
    table = pa.table({"text": [["one", "two"], ["three"]], "image": photos})
    parquet.write_table(table, tmp_path / "train-00000.parquet")
    options = SourceOptions(caption_column="text")
    small = DownloadConfig(min_side=40)
    out = tmp_path / "out"
    assert gather_photos(tmp_path / "train-00000.parquet", out, source_options=options, config=small).captions == 3
    assert files(out) == ["00000/train-000000001.png", "00000/train-000000002.png"]
    features = extract_features([out / "captions.jsonl"], out / "images", world.clip, tmp_path / "features", workers=0)
    assert features.captions == [["one", "two"], ["three"]]


def test_the_command_prints_a_table_or_json(web, tmp_path, capsys):
    source = write_list(tmp_path / "list.tsv", web, ["photo/1.jpg", "gone/2.jpg", "gone/3.jpg"])
    words = ["prepare", "conceptual", str(source), "--retries", "0"]
    assert cli.main([*words, "--out", str(tmp_path / "a")]) == 1
    table = capsys.readouterr().out.splitlines()
    assert [line.split() for line in table[:2]] == [["2", "http", "404"], ["1", "ok"]]
    assert table[2] == f"{tmp_path / 'a'}: 1 photos, 1 captions"
    assert cli.main([*words, "--out", str(tmp_path / "b"), "--split", "val", "--json"]) == 1
    shown = json.loads(capsys.readouterr().out)
    assert shown["outcomes"] == {"ok": 1, "http 404": 2} and shown["split"] == "val"
    source.write_text(source.read_text().splitlines()[0] + "\n")
    assert cli.main([*words, "--out", str(tmp_path / "c")]) == 0
    source.write_text("a caption\tgopher://x.invalid/1\n")
    assert cli.main([*words, "--out", str(tmp_path / "d")]) == 2
    assert "list.tsv:1" in capsys.readouterr().err
