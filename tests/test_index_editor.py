"""Live indexes: what is added is found, what is removed is not, ids stay, and no interruption loses anything."""

import hashlib
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from clipcap_rag import index_builder, index_commit
from clipcap_rag.caption_index import CaptionIndex
from clipcap_rag.config import IndexConfig
from clipcap_rag.encoder_record import encoder_record
from clipcap_rag.errors import InputError
from clipcap_rag.index_check import verify_index
from clipcap_rag.index_editor import add_caption_files, add_captions, compact_index, remove_captions, update_caption
from clipcap_rag.index_store import SegmentWriter, caption_batch, index_lock, open_files, write_index_manifest
from clipcap_rag.search_structure import build_search_structure
from clipcap_rag.sources import CaptionRecord

DIM = 16
ROOT = Path(__file__).parents[1]


class HashingEncoder:
    """Gives each text a vector that depends on nothing but the text; what an index asks of its CLIP model."""

    clip, dim, dtype, device = "hashing", DIM, "torch.float32", SimpleNamespace(type="cpu")

    def encode_text(self, texts, batch_size=256, on_progress=None):
        digests = [hashlib.shake_128(text.encode()).digest(DIM) for text in texts]
        raw = np.array([np.frombuffer(digest, np.uint8) for digest in digests], np.float32).reshape(-1, DIM) - 127.5
        norms = np.linalg.norm(raw, axis=1)
        return SimpleNamespace(vectors=raw / norms[:, None], norms=norms)

    def _record(self, sentences):
        vectors = self.encode_text(sentences).vectors
        return encoder_record(self.clip, sentences, vectors, vectors[0])

    def record(self):
        return self._record(["a kite", "a boat"])


ENCODER = HashingEncoder()


def write(folder: Path, captions: list[str], key: str = "Flat", next_caption_id: int | None = None) -> Path:
    """An index of one segment; every second caption has an image, every third is from a wiki."""
    segment, count = folder / "segments" / "000001", len(captions)
    with SegmentWriter(segment, DIM) as writer:
        columns = {
            "caption": captions,
            "caption_id": [str(number) for number in range(count)],
            "image_id": [f"photo{number // 4}" if number % 2 else None for number in range(count)],
            "source": ["wiki" if number % 3 == 0 else "news" for number in range(count)],
            "meta": [{"language": "de" if number % 5 == 0 else "en"} for number in range(count)],
        }
        writer.append(caption_batch(columns), ENCODER.encode_text(captions).vectors)
    search = build_search_structure(segment / "embeddings.npy", IndexConfig(index_key=key), segment / "search.faiss")
    segments = [{"name": "000001", "rows": count, "search": search}]
    write_index_manifest(
        folder, revision=1, encoder=ENCODER.record(), segments=segments, provenance={}, licence=None,
        next_caption_id=next_caption_id,
    )  # fmt: skip
    return folder


@pytest.fixture
def kites(tmp_path) -> Path:
    return write(tmp_path / "kites", [f"kite {number} flies" for number in range(20)])


def content(folder: Path) -> dict[str, str]:
    """Captions by id, of the rows that are left."""
    files = open_files(folder)
    rows = np.flatnonzero(files.live)
    return dict(zip(files.caption_ids(rows), files.captions(rows), strict=True))


def nearest(index: CaptionIndex, text: str) -> tuple[str, float]:
    scores, rows = index.search(ENCODER.encode_text([text]).vectors, 1)
    return index.captions(rows[0])[0], float(scores[0, 0])


def test_what_is_added_is_found_after_a_refresh_and_not_before(kites):
    index = CaptionIndex.open(kites, "cpu")
    record = CaptionRecord("a  red boat", "photo99", None, "harbour", {"language": "fr"})
    edit = add_captions(kites, [record, "a green boat"], ENCODER)
    assert (edit.path, edit.revision, edit.caption_ids) == (kites, 2, ["20", "21"])
    assert len(index) == 20 and nearest(index, "a red boat")[1] < 0.99
    assert index.refresh() and not index.refresh()
    assert (index.revision, len(index)) == (2, 22)
    assert nearest(index, "a red boat") == ("a red boat", pytest.approx(1, abs=1e-3))
    expected = {"caption": "a red boat", "caption_id": "20", "image_id": "photo99", "source": "harbour",
                "meta": {"language": "fr"}}  # fmt: skip
    assert index.files.records([20]) == [expected]
    verify_index(kites, sample=0)


def test_adding_reads_none_of_what_is_there(kites, monkeypatch):
    add_captions(kites, ["a boat"], ENCODER)
    before = {path: path.stat().st_atime_ns for path in kites.rglob("*.*") if path.name != "index.json"}
    opened = []
    monkeypatch.setattr(index_commit, "open_files", lambda path: opened.append(path))
    from clipcap_rag import index_manifest

    hashed, record = [], index_manifest.file_record
    monkeypatch.setattr(index_manifest, "file_record", lambda path: hashed.append(path) or record(path))
    add_captions(kites, ["another boat"], ENCODER)
    assert not opened and not set(hashed) & set(before) and len(hashed) == 2


def test_removed_captions_are_gone_and_their_ids_are_never_given_again(kites):
    index = CaptionIndex.open(kites, "cpu")
    assert remove_captions(kites, {"caption_id": ["19", "4"]}).caption_ids == ["4", "19"]
    assert nearest(index, "kite 19 flies")[0] == "kite 19 flies", "an open index keeps its snapshot"
    index.refresh()
    assert nearest(index, "kite 19 flies")[0] != "kite 19 flies" and len(index) == 18
    compact_index(kites)
    assert add_captions(kites, ["kite 19 flies"], ENCODER).caption_ids == ["20"]
    assert index.refresh() and nearest(index, "kite 19 flies")[0] == "kite 19 flies"
    assert set(content(kites)) == {str(number) for number in range(21)} - {"4", "19"}
    verify_index(kites, sample=0)


@pytest.mark.parametrize(
    ("where", "gone"),
    [
        ({"source": ["wiki"]}, {0, 3, 6, 9, 12, 15, 18}),
        ({"source": ["wiki"], "meta.language": ["de"]}, {0, 15}),
        ({"image_id": ["photo0", "photo1"]}, {1, 3, 5, 7}),
        ({"image_id": [""], "source": ["wiki"]}, {0, 6, 12, 18}),
        ({"caption": ["kite 7 flies"]}, {7}),
    ],
)
def test_captions_are_removed_by_what_is_said_of_them(kites, where, gone):
    assert set(map(int, remove_captions(kites, where).caption_ids)) == gone
    assert set(map(int, content(kites))) == set(range(20)) - gone


@pytest.mark.parametrize(
    ("where", "words"),
    [
        ({"caption_id": ["3", "77"]}, "caption_id=77"),
        ({"source": ["Wiki"]}, "source=Wiki"),
        ({"meta.colour": ["red"]}, "meta.colour=red"),
        ({"caption_id": ["1"], "source": ["wiki"]}, "meets all conditions"),
        ({"colour": ["red"]}, "no field 'colour'"),
        ({}, "at least one condition"),
    ],
)
def test_a_condition_that_nothing_meets_changes_nothing(kites, where, words):
    before = (kites / "index.json").read_bytes()
    with pytest.raises(InputError, match=words):
        remove_captions(kites, where)
    assert (kites / "index.json").read_bytes() == before


def test_an_updated_caption_keeps_its_id_and_what_is_said_of_it(kites):
    edit = update_caption(kites, "3", "a boat sails", ENCODER)
    assert (edit.revision, edit.caption_ids) == (2, ["3"])
    index = CaptionIndex.open(kites, "cpu")
    assert len(index) == 20 and content(kites)["3"] == "a boat sails"
    row = int(index.search(ENCODER.encode_text(["a boat sails"]).vectors, 1)[1][0, 0])
    expected = {"caption": "a boat sails", "caption_id": "3", "image_id": "photo0", "source": "wiki",
                "meta": {"language": "en"}}  # fmt: skip
    assert index.files.records([row]) == [expected]
    update_caption(kites, "3", "a boat sinks", ENCODER)
    assert content(kites)["3"] == "a boat sinks" and len(content(kites)) == 20
    with pytest.raises(InputError, match="caption_id=88"):
        update_caption(kites, "88", "a boat", ENCODER)


def test_small_segments_are_merged_once_there_are_more_than_sixteen(kites):
    remove_captions(kites, {"caption_id": ["2"]})
    for number in range(17):
        add_captions(kites, [f"boat {number} sails"], ENCODER)
        if number == 9:
            remove_captions(kites, {"caption": ["boat 3 sails"]})
    files = open_files(kites)
    assert [entry["rows"] for entry in files.manifest["segments"]] == [19 + 16 - 1 + 1]
    assert files.live.all() and len(files.segments[0].batch_sizes) == 2, "merged rows share a batch"
    expected = [f"kite {n} flies" for n in range(20) if n != 2] + [f"boat {n} sails" for n in range(17) if n != 3]
    assert list(content(kites).values()) == expected
    verify_index(kites, sample=0)


def test_a_big_segment_stays_where_it_is_while_small_ones_are_merged(kites, monkeypatch):
    monkeypatch.setattr(index_commit, "SMALL", 10)
    remove_captions(kites, {"caption_id": ["2", "5"]})
    for number in range(18):
        add_captions(kites, [f"boat {number} sails"], ENCODER)
    files = open_files(kites)
    assert [entry["rows"] for entry in files.manifest["segments"]] == [20, 18]
    assert np.flatnonzero(~files.live).tolist() == [2, 5]


def test_compacting_makes_one_segment_and_frees_the_space(kites):
    remove_captions(kites, {"source": ["wiki"]})
    add_captions(kites, ["a boat"], ENCODER)
    before = content(kites)
    index = CaptionIndex.open(kites, "cpu")
    compact_index(kites)
    assert content(kites) == before and open_files(kites).live.all()
    assert sorted(path.name for path in kites.rglob("*") if path.is_file()) == [
        "captions.arrow", "embeddings.npy", "index.json"]  # fmt: skip
    assert nearest(index, "a boat")[0] == "a boat", "an open index reads files that are removed"
    assert sorted(path.name for path in kites.parent.iterdir()) == ["kites"]


def test_everything_may_be_removed_and_something_added_again(kites):
    remove_captions(kites, {"source": ["wiki", "news"]})
    compact_index(kites)
    assert len(CaptionIndex.open(kites, "cpu")) == 0
    verify_index(kites, sample=0)
    assert add_captions(kites, ["a boat"], ENCODER).caption_ids == ["20"]
    assert content(kites) == {"20": "a boat"}


def test_an_index_of_before_ids_were_counted_opens_and_gets_new_ones(kites):
    manifest = json.loads((kites / "index.json").read_text())
    del manifest["next_caption_id"]
    (kites / "index.json").write_text(json.dumps(manifest))
    assert len(CaptionIndex.open(kites, "cpu")) == 20
    assert add_captions(kites, ["a boat"], ENCODER).caption_ids == ["20"]


@pytest.mark.parametrize("key", ["IVF8,Flat", "HNSW16", "IVF8,PQ4x4", "PCA8,IVF8,Flat", "PQ8x4"])
def test_exact_and_inexact_segments_are_searched_together(tmp_path, key):
    folder = write(tmp_path / "kites", [f"kite {number} flies" for number in range(1000)], key)
    add_captions(folder, [f"boat {number} sails" for number in range(50)], ENCODER)
    remove_captions(folder, {"caption": ["kite 5 flies", "boat 5 sails"]})
    index = CaptionIndex.open(folder, "cpu")
    texts = [f"kite {number} flies" for number in range(0, 1000, 50)] + [f"boat {number} sails" for number in range(50)]
    scores, rows = index.search(ENCODER.encode_text(texts).vectors, 10)
    found = [index.captions(row[:1])[0] == text for row, text in zip(rows, texts, strict=True)]
    exact = sum(found[20:]) - found[25]
    assert exact == 49, "rows of the exact segment are all found"
    assert sum(found[:20]) >= 18 or "PQ" in key
    assert index.files.live[rows].all() and (np.diff(scores, axis=1) <= 0).all()
    compact_index(folder)
    (segment,) = open_files(folder).manifest["segments"]
    assert segment["search"]["key"] == key and segment["rows"] == 1048
    assert index.refresh() and len(index) == 1048
    verify_index(folder, sample=0)
    compact_index(folder, "Flat")
    assert open_files(folder).manifest["segments"][0]["search"] is None


def test_long_files_continue_where_a_kill_stopped_them(kites, tmp_path, monkeypatch):
    monkeypatch.setattr(index_builder, "CHUNK", 8)
    monkeypatch.setattr(index_builder, "check_same_encoder", None)
    source = tmp_path / "boats.txt"
    source.write_text("".join(f"boat {number} sails\n" for number in range(50)))
    encode, encoded = HashingEncoder.encode_text, []

    def failing(self, texts, **rest):
        encoded.extend(text for text in texts if text.startswith("boat"))
        if len(encoded) > 30:
            raise KeyboardInterrupt
        return encode(self, texts, **rest)

    with monkeypatch.context() as patch:
        patch.setattr(HashingEncoder, "encode_text", failing)
        with pytest.raises(KeyboardInterrupt):
            add_caption_files(kites, [source], ENCODER)
    assert len(content(kites)) == 20 and (kites / "added.partial").is_dir()
    encoded.clear()
    monkeypatch.setattr(
        HashingEncoder, "encode_text", lambda self, texts, **rest: encoded.extend(texts) or encode(self, texts)
    )
    edit = add_caption_files(kites, [source], ENCODER)
    assert "boat 23 sails" not in encoded and "boat 24 sails" in encoded
    assert edit.caption_ids == [str(number) for number in range(20, 70)]
    assert list(content(kites).values())[20:] == [f"boat {number} sails" for number in range(50)]
    assert not (kites / "added.partial").exists() and not (kites / "added").exists()
    assert open_files(kites).manifest["provenance"]["sources"] == [
        {"name": "boats.txt", "bytes": source.stat().st_size, "revision": 2}]  # fmt: skip


def test_what_else_lies_in_an_index_stays_recorded(tmp_path):
    (tmp_path / "kites" / "clip").mkdir(parents=True)
    (tmp_path / "kites" / "clip" / "config.json").write_text("{}")
    folder = write(tmp_path / "kites", ["a kite", "a boat"])
    add_captions(folder, ["a train"], ENCODER)
    compact_index(folder)
    assert "clip/config.json" in open_files(folder).manifest["files"]
    (folder / "clip" / "config.json").write_text("[]")
    with pytest.raises(InputError, match="config.json was altered"):
        open_files(folder)


@pytest.mark.parametrize("caption", ["", "  ", "a \x1b[2J kite", "\ud800"])
def test_a_caption_that_is_no_text_is_refused(kites, caption):
    with pytest.raises(InputError, match="caption"):
        add_captions(kites, ["a boat", caption], ENCODER)
    assert len(content(kites)) == 20


def test_another_encoder_is_refused_and_so_is_the_index_of_the_package(kites):
    class Other(HashingEncoder):
        clip = "other"

        def encode_text(self, texts, **rest):
            return super().encode_text([text[::-1] for text in texts])

    with pytest.raises(InputError, match="hashing.*other"):
        add_captions(kites, ["a boat"], Other())
    with pytest.raises(InputError, match="lies on the hub"):
        compact_index("hf-hub:someone/kites")
    for change in (lambda: add_captions("starter", ["a boat"]), lambda: compact_index("starter")):
        with pytest.raises(InputError, match="comes with the package"):
            change()


PRELUDE = f"""
import sys, importlib.util
specification = importlib.util.spec_from_file_location("editor_test", {str(Path(__file__))!r})
module = importlib.util.module_from_spec(specification)
specification.loader.exec_module(module)
from clipcap_rag.index_editor import *
from clipcap_rag.index_store import index_lock
from pathlib import Path
E = module.ENCODER
folder = Path(sys.argv[1])
"""


def python(code: str, *arguments, **options) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", PRELUDE + code, *map(str, arguments)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, **options
    )


def test_a_second_writer_waits_or_learns_who_writes(kites):
    first = python(
        "with index_lock(folder):\n print('held', flush=True)\n sys.stdin.read()", kites, stdin=subprocess.PIPE
    )
    assert first.stdout.readline() == "held\n"
    with pytest.raises(InputError, match=rf"process {first.pid} \(-c .*kites\) since \d"):
        add_captions(kites, ["a boat"], ENCODER, wait=0)
    with pytest.raises(InputError, match="wait until it ends"), index_lock(kites, 0.2):
        pass
    second = python("add_captions(folder, ['a boat'], E)", kites)
    assert f"process {first.pid}" in second.stderr.readline()
    assert second.poll() is None
    first.kill()  # what a dead process held is free
    assert second.wait(60) == 0
    assert len(content(kites)) == 21
    first.communicate()
    second.communicate()


def test_two_writers_lose_nothing(kites):
    code = "for number in range(20): add_captions(folder, [f'{sys.argv[2]} {number}'], E)"
    writers = [python(code, kites, name) for name in ("boat", "train")]
    assert [writer.wait(120) for writer in writers] == [0, 0]
    captions = list(content(kites).values())
    assert sorted(captions[20:]) == sorted(f"{name} {n}" for name in ("boat", "train") for n in range(20))
    verify_index(kites, sample=0)
    for writer in writers:
        writer.communicate()


def change_forever(folder: Path, seed: int, reports: Path) -> None:
    """Changes an index at random and reports each change once it is made: revision and captions."""
    choice = random.Random(seed)
    with open(reports, "w", buffering=1) as said:
        while True:
            kind, ids = choice.choice(["add", "add", "add", "remove", "update", "compact"]), sorted(content(folder))
            if kind == "add":
                edit = add_captions(folder, [f"boat {choice.random()}"], ENCODER)
            elif kind == "remove" and len(ids) > 5:
                edit = remove_captions(folder, {"caption_id": [choice.choice(ids)]})
            elif kind == "update":
                edit = update_caption(folder, choice.choice(ids), f"train {choice.random()}", ENCODER)
            else:
                edit = compact_index(folder)
            said.write(json.dumps([edit.revision, content(folder)]) + "\n")


def kill_at_random_moments(folder: Path, moments: int, seed: int) -> int:
    """Kills a process that changes an index, again and again; returns the revision that was reported last."""
    generator, reached, reports = random.Random(seed), 1, folder.with_name("reports")
    for moment in range(moments):
        reports.write_text("")
        change = multiprocessing.get_context("fork").Process(target=change_forever, args=(folder, moment, reports))
        change.start()
        time.sleep(generator.uniform(0.02, 0.3))
        change.kill()
        change.join()
        assert change.exitcode == -signal.SIGKILL
        lines = [line for line in reports.read_text().splitlines(keepends=True) if line.endswith("\n")]
        revision, captions = open_files(folder).manifest["revision"], content(folder)
        if lines:
            last, expected = json.loads(lines[-1])
            assert revision in (last, last + 1), "what was reported as written is there, and at most one change more"
            assert revision != last or captions == expected
            reached = last
        assert revision >= reached
        verify_index(folder, sample=0)
    return reached


def test_killed_at_any_moment_an_index_is_as_before_or_as_after(kites):
    assert kill_at_random_moments(kites, 10, seed=3) > 5


@pytest.mark.slow
def test_killed_two_hundred_times_an_index_is_as_before_or_as_after(kites):
    assert kill_at_random_moments(kites, 200, seed=100) > 100


@pytest.mark.parametrize("limit", [100, 700, 1500])
@pytest.mark.parametrize("change", ["add_captions(folder, ['a boat'] * 40, E)", "compact_index(folder)"])
def test_a_full_disk_leaves_the_index_as_it_was(kites, limit, change):
    before, manifest = content(kites), (kites / "index.json").read_bytes()
    files = {path for path in kites.rglob("*") if path.is_file()}
    full = python(
        change, kites, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    )  # a file that grows beyond the limit fails as on a full disk
    output = full.communicate()[1]
    assert full.returncode == 1 and "InputError: no space left" in output.splitlines()[-1]
    assert content(kites) == before and (kites / "index.json").read_bytes() == manifest
    assert {path for path in kites.rglob("*") if path.is_file()} == files, "nothing half-written stays"
    verify_index(kites, sample=0)


@pytest.mark.parametrize("command", ["info", "remove", "compact", "verify", "lint"])
def test_what_encodes_nothing_loads_no_torch(kites, command):
    extra = {"remove": ["--caption-id", "3"], "verify": ["--quick"], "lint": ["--quick"]}.get(command, [])
    code = (
        "import sys; from clipcap_rag.cli import main; status = main(sys.argv[1:]);"
        "print(status, {'torch', 'open_clip', 'transformers'} & set(sys.modules))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    arguments = [sys.executable, "-c", code, "index", command, str(kites), *extra]
    answer = subprocess.run(arguments, capture_output=True, text=True, env=environment)
    assert answer.stdout.splitlines()[-1] == "0 set()", answer.stderr


def test_the_commands_change_an_index(world, tmp_path, capsys):
    from clipcap_rag.cli import main

    index, source = str(tmp_path / "own"), tmp_path / "more.jsonl"
    shutil.copytree(world.index.path, index)
    source.write_text('{"caption": "a tram in the snow", "source": "mine"}\n{"caption": "a tram in the rain"}\n')
    exact = ["--device", "cpu", "--dtype", "float32", "--clip", world.clip]

    def run(*arguments: str) -> str:
        assert main(["index", *arguments]) == 0
        return capsys.readouterr().out

    assert "1 caption added, id 32; revision 2" in run("add", index, "--caption", "a kite", "--meta", "a=b", *exact)
    assert "2 captions added, ids 33 to 34; revision 3" in run("add", index, "--captions", str(source), *exact)
    assert "caption 33 updated; revision 4" in run("update", index, "--caption-id", "33", "--caption", "a bus", *exact)
    found = json.loads(run("search", index, "a bus", "--num-neighbors", "1", "--json", *exact))["neighbors"][0]
    assert (found["caption_id"], found["caption"]) == ("33", "a bus")
    assert "1 caption removed; revision 5" in run("remove", index, "--where", "meta.a=b")
    assert "1 caption removed; revision 6" in run("remove", index, "--caption-id", "33")
    assert "(3 removed)" in run("info", index)
    assert "33 captions, one segment; revision 7" in run("compact", index)
    assert "sound; 33 rows, 33 captions encoded again" in run("verify", index, *exact)
    for wrong, words in (
        (["add", index], "either --caption or --captions"),
        (["add", index, "--captions", str(source), "--source", "x"], "go with --caption"),
        (["add", index, "--caption", "a kite", "--meta", "ab"], "KEY=VALUE"),
        (["remove", index], "at least one condition"),
        (["remove", index, "--text", "no such words"], "caption=no such words"),
        (["search", index, "a bus", "--nprobe", "4", *exact], "not searched with nprobe"),
    ):
        assert main(["index", *wrong]) == 2
        assert words in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("key", ["Flat", "IVF1024,Flat", "HNSW16", "IVF1024,PQ32x8"])
def test_a_million_captions_take_one_more_and_are_searched(tmp_path, key):
    from clipcap_rag.bench_searching import perturbed, widened, write_index

    encoder = SimpleNamespace(record=ENCODER.record, _record=ENCODER._record, dim=512)
    seeds = widened(CaptionIndex.open("starter", "cpu").embeddings(range(0, 21_000, 5)), 512)
    record = ENCODER.record()
    record = encoder_record("hashing", record["probes"]["sentences"], seeds[:2], seeds[0])
    encoder._record = lambda sentences: record
    encoder.encode_text = lambda texts: SimpleNamespace(vectors=perturbed(seeds, len(texts), 5_000_000))
    folder = tmp_path / "million"
    write_index(folder, seeds, 1_000_000, record, key)
    index = CaptionIndex.open(folder, "cpu")
    times = []
    for number in range(10):
        began = time.perf_counter()
        add_captions(folder, [f"caption {number}"], encoder)
        index.refresh()
        times.append(time.perf_counter() - began)
    assert np.median(times) < 0.1, times
    assert len(index) == 1_000_010
    queries = perturbed(seeds, 50, 2_000_000)
    found = index.search(queries, 10)[1]
    flat = CaptionIndex(index.files, "cpu")
    flat._structures = {}
    recall = np.mean([len(np.intersect1d(*pair)) / 10 for pair in zip(found, flat.search(queries, 10)[1], strict=True)])
    assert recall >= (0.9 if "PQ" not in key else 0.5)
