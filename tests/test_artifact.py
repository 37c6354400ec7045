"""Directories that appear whole or not at all: kills, full disks, altered files."""

import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from clipcap_rag import artifact
from clipcap_rag.artifact import (
    disk_errors,
    file_record,
    join_arrays,
    new_directory,
    read_json,
    read_manifest,
    resumable_directory,
    save_array,
    staging_path,
    write_bytes,
    write_json,
    write_manifest,
)
from clipcap_rag.errors import InputError

JOB = {"captions": ["a.jsonl"], "size": 3}


def write_thing(folder: Path, size: int = 1000) -> None:
    (folder / "part").mkdir(exist_ok=True)
    (folder / "part" / "data.bin").write_bytes(bytes(range(250)) * (size // 250))
    write_manifest(folder, "thing.json", "thing", 1, {"rows": 3})


def read_thing(folder: Path) -> dict:
    return read_manifest(folder, "thing.json", "thing", 1)


@pytest.fixture
def thing(tmp_path):
    with new_directory(tmp_path / "thing") as folder:
        write_thing(folder)
    return tmp_path / "thing"


def test_a_finished_directory_reads_back(thing):
    manifest = read_thing(thing)
    assert manifest["rows"] == 3
    assert list(manifest["files"]) == ["part/data.bin"]
    assert not staging_path(thing).exists()


def test_nothing_stands_at_out_until_the_end(tmp_path):
    out = tmp_path / "thing"
    with new_directory(out) as folder:
        write_thing(folder)
        assert not out.exists()
    assert out.is_dir()


def test_an_error_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError), new_directory(tmp_path / "thing") as folder:
        write_thing(folder)
        raise RuntimeError("in the middle")
    assert list(tmp_path.iterdir()) == []


def test_an_error_leaves_the_old_one(thing):
    with pytest.raises(RuntimeError), new_directory(thing, overwrite=True) as folder:
        write_thing(folder, 500)
        raise RuntimeError("in the middle")
    assert read_thing(thing)["files"]["part/data.bin"]["bytes"] == 1000


def test_existing_out_needs_overwrite(thing):
    for directory in (new_directory(thing), resumable_directory(thing, JOB)):
        with pytest.raises(InputError, match="--overwrite"), directory:
            pytest.fail("must not begin")
    with new_directory(thing, overwrite=True) as folder:
        write_thing(folder, 500)
    assert read_thing(thing)["files"]["part/data.bin"]["bytes"] == 500
    assert [path.name for path in thing.parent.iterdir()] == ["thing"]


def test_out_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="not a writable folder"), new_directory(tmp_path / "file" / "thing"):
        pytest.fail("must not begin")


@pytest.mark.parametrize(
    "damage, named",
    [
        (lambda folder: (folder / "part/data.bin").unlink(), "lacks its file part/data.bin"),
        (lambda folder: (folder / "part/data.bin").write_bytes(b"short"), "5 bytes where its manifest says 1000"),
        (lambda folder: (folder / "part/data.bin").write_bytes(b"x" * 1000), "was altered"),
        (lambda folder: (folder / "thing.json").unlink(), "thing.json is missing"),
        (lambda folder: (folder / "thing.json").write_text('{"kind": '), "not valid JSON"),
        (lambda folder: (folder / "thing.json").write_bytes(b"\xff\xfe\x00"), "not valid JSON"),
        (lambda folder: (folder / "thing.json").write_text("[1]"), "not hold a JSON object"),
        (lambda folder: write_json(folder / "thing.json", {"kind": "other"}), "not a thing but a other"),
        (lambda folder: write_json(folder / "thing.json", {"kind": "thing", "format_version": 9}), "format version 9"),
    ],
)
def test_damage_is_named(thing, damage, named):
    damage(thing)
    with pytest.raises(InputError, match=named) as caught:
        read_thing(thing)
    assert str(thing) in str(caught.value)


def test_any_single_altered_byte_of_a_small_file_is_seen(thing):
    path = thing / "part/data.bin"
    whole = path.read_bytes()
    for position in (0, 499, 999):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        with pytest.raises(InputError, match="was altered"):
            read_thing(thing)


def test_large_files_are_sampled_up_to_both_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(artifact, "_WHOLE_HASH_LIMIT", 1000)
    monkeypatch.setattr(artifact, "_SAMPLE_BYTES", 100)
    path = tmp_path / "big"
    path.write_bytes(bytes(20_000))
    record = file_record(path)
    assert record["hash"].startswith("sampled-")
    for position in (0, 19_999):
        data = bytearray(20_000)
        data[position] = 1
        path.write_bytes(data)
        assert file_record(path)["hash"] != record["hash"]


def test_unfinished_work_is_named_when_it_is_opened(tmp_path):
    with pytest.raises(KeyboardInterrupt), resumable_directory(tmp_path / "thing", JOB):
        raise KeyboardInterrupt
    with pytest.raises(InputError, match="thing.partial is unfinished"):
        read_thing(tmp_path / "thing")


def test_the_same_job_continues_and_another_starts_over(tmp_path, capsys):
    out = tmp_path / "thing"
    for job, left in ((JOB, False), (JOB, True), (JOB | {"size": 4}, False)):
        with pytest.raises(KeyboardInterrupt), resumable_directory(out, job) as folder:
            assert (folder / "chunk").exists() == left
            (folder / "chunk").write_text("done")
            raise KeyboardInterrupt
    said = capsys.readouterr().err
    assert "continuing" in said and "starting over" in said
    with resumable_directory(out, JOB | {"size": 4}) as folder:
        assert (folder / "chunk").exists()
        write_thing(folder)
    assert set(read_thing(out)["files"]) == {"chunk", "part/data.bin"}, "the record of the job is gone"


@pytest.mark.parametrize("number, word", [(errno.ENOSPC, "no space left"), (errno.EDQUOT, "no space left"),
                                          (errno.EROFS, "cannot write"), (errno.EACCES, "cannot write")])  # fmt: skip
def test_disk_faults_are_one_sentence(tmp_path, number, word):
    with pytest.raises(InputError, match=word), disk_errors(tmp_path / "thing"):
        raise OSError(number, os.strerror(number))


def test_other_system_errors_keep_their_name(tmp_path):
    with pytest.raises(FileNotFoundError), disk_errors(tmp_path / "thing"):
        (tmp_path / "nothing" / "here").read_text()


def test_a_failing_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file.json"
    write_json(path, {"old": True})

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="full"):
        write_bytes(path, b"new and half-written")
    with pytest.raises(OSError, match="full"):
        save_array(path, np.zeros(3))
    assert read_json(path, "file") == {"old": True}


def test_arrays_round_trip_and_join(tmp_path):
    parts = [np.arange(6, dtype=np.float16).reshape(2, 3), np.empty((0, 3), np.float16), np.ones((1, 3), np.float16)]
    for number, part in enumerate(parts):
        save_array(tmp_path / f"{number}.npy", part)
    join_arrays([tmp_path / f"{number}.npy" for number in range(3)], tmp_path / "all.npy")
    joined = np.load(tmp_path / "all.npy")
    assert joined.dtype == np.float16
    np.testing.assert_array_equal(joined, np.concatenate(parts))


KILLED = """
import sys, time
from pathlib import Path
from clipcap_rag.artifact import new_directory, resumable_directory, write_manifest
out = Path(sys.argv[1])
for generation in range(100000):
    with new_directory(out, overwrite=True) as folder:
        for part in range(5):
            (folder / f"part{part}").write_text(str(generation) * 100)
        write_manifest(folder, "thing.json", "thing", 1, {"generation": generation})
    print(generation, flush=True)
"""


def test_killed_at_any_moment_a_directory_is_whole_or_absent(tmp_path):
    random = np.random.default_rng(0)
    for attempt in range(8):
        out = tmp_path / f"thing{attempt}"
        process = subprocess.Popen([sys.executable, "-c", KILLED, str(out)], stdout=subprocess.PIPE)
        process.stdout.readline()  # one whole generation is there
        time.sleep(random.uniform(0, 0.05))
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        homes = [path for path in (out, out.with_name(out.name + ".retired")) if path.exists()]
        assert homes, "between two renames the old directory is still there under another name"
        if out.exists():
            generation = read_thing(out)["generation"]
            texts = {(out / f"part{part}").read_text() for part in range(5)}
            assert texts == {str(generation) * 100}


def test_manifest_hashes_are_sha256(thing):
    record = json.loads((thing / "thing.json").read_text())["files"]["part/data.bin"]
    assert record["hash"] == "sha256:" + hashlib.sha256((thing / "part/data.bin").read_bytes()).hexdigest()
