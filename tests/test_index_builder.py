"""Builds: what comes out, what is refused, and that a kill at any moment changes nothing in the end."""

import errno
import hashlib
import json
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import faiss
import numpy as np
import pytest
import torch

from clipcap_rag import index_builder
from clipcap_rag.caption_index import CaptionIndex
from clipcap_rag.config import IndexConfig
from clipcap_rag.errors import InputError
from clipcap_rag.index_builder import build_caption_index

DIM = 16


class HashingEncoder:
    """Gives each text a vector that depends on nothing but the text, after a short sleep per batch."""

    clip, dim, dtype, device, pause = "hashing", DIM, "torch.float32", SimpleNamespace(type="cpu"), 0.0
    encoded = 0

    @classmethod
    def load(cls, clip: str, device: str = "auto", dtype: str = "auto", base: Path | None = None) -> "HashingEncoder":
        encoder = cls()
        encoder.clip = clip
        return encoder

    def encode_text(self, texts, batch_size=256, on_progress=None):
        time.sleep(self.pause)
        type(self).encoded += len(texts)
        bytes_ = [hashlib.shake_128(text.encode()).digest(DIM) for text in texts]
        vectors = np.array([np.frombuffer(text, np.uint8) for text in bytes_], np.float32) - 127.5
        norms = np.linalg.norm(vectors, axis=1)
        return SimpleNamespace(vectors=vectors / norms[:, None], norms=norms)

    def record(self):
        text = self.encode_text(["a kite"]).vectors.tolist()
        return {"clip": self.clip, "dim": DIM, "probes": {"sentences": ["a kite"], "text": text, "image": text[0]}}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(index_builder, "CHUNK", 8)


@pytest.fixture
def hashing(monkeypatch):
    monkeypatch.setattr(index_builder, "Encoder", HashingEncoder)
    monkeypatch.setattr(index_builder, "stored_clip", lambda clip, folder: clip)
    monkeypatch.setattr(HashingEncoder, "encoded", 0)


@pytest.fixture
def source(tmp_path) -> Path:
    """A JSONL file of 93 captions: eleven full chunks and five captions."""
    file = tmp_path / "kites.jsonl"
    lines = [{"caption": f"Kite {i} flies.", "image_id": f"photo{i // 5}" if i % 7 else None} for i in range(93)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def content(index: Path) -> list[bytes]:
    return [(index / "segments" / "000001" / name).read_bytes() for name in ("captions.arrow", "embeddings.npy")]


def test_real_encoder_end_to_end(tmp_path, tiny_clip, tiny_captions):
    source = tmp_path / "street.txt"
    source.write_text("\n".join(tiny_captions) + "\n")
    index = build_caption_index([source], f"local-dir:{tiny_clip}", tmp_path / "street", device="cpu", dtype="float32",
                                batch_size=5, licence="CC0")  # fmt: skip
    assert index.captions(range(len(index))) == tiny_captions
    from clipcap_rag.encoder import Encoder, check_encoder

    encoder = Encoder.load(f"local-dir:{tiny_clip}", "cpu", "float32")
    vectors = encoder.encode_text(tiny_captions).vectors
    np.testing.assert_allclose(index.embeddings(range(len(index))), vectors, atol=1e-3)
    assert index.search(vectors, 1)[1][:, 0].tolist() == list(range(len(tiny_captions)))
    check_encoder(index.encoder, encoder, "index street")
    assert index.files.manifest["licence"] == "CC0"
    assert index.files.manifest["provenance"]["sources"][0]["name"] == "street.txt"


def test_an_index_of_another_clip_is_refused_with_both_names(tmp_path, tiny_clip, hashing):
    source = tmp_path / "kites.txt"
    source.write_text("A kite.\n")
    index = build_caption_index([source], "hashing", tmp_path / "kites")
    from clipcap_rag.encoder import Encoder, check_encoder

    encoder = Encoder.load(f"local-dir:{tiny_clip}", "cpu", "float32")
    with pytest.raises(InputError) as caught:
        check_encoder(index.encoder, encoder, "index kites")
    assert "hashing" in str(caught.value) and "tiny_clip" in str(caught.value)


def test_captions_ids_and_embeddings_in_the_order_of_the_file(tmp_path, hashing, source):
    index = build_caption_index([source], "hashing", tmp_path / "index" / "kites")
    assert (len(index), index.dim, index.name, index.revision) == (93, DIM, "kites", 1)
    record = {"caption": "Kite 92 flies.", "caption_id": "92", "image_id": "photo18", "source": "kites", "meta": {}}
    assert index.files.records([92]) == [record]
    assert index.rows_of_images({"photo1"}).tolist() == [5, 6, 8, 9]  # the seventh has no image
    expected = HashingEncoder().encode_text([f"Kite {i} flies." for i in range(93)]).vectors
    np.testing.assert_array_equal(index.embeddings(range(93)), expected.astype(np.float16).astype(np.float32))
    assert sorted(file.name for file in (tmp_path / "index").iterdir()) == ["kites"]
    assert sorted(file.name for file in index.path.rglob("*") if file.is_file()) == [
        "captions.arrow", "embeddings.npy", "index.json"]  # fmt: skip


def test_several_files_and_bad_lines(tmp_path, hashing, source, capsys):
    second = tmp_path / "more.jsonl"
    second.write_text('{"caption": "A last kite."}\n{"title": "no caption"}\n')
    with pytest.raises(InputError, match=r"more\.jsonl:2"):
        build_caption_index([source, second], "hashing", tmp_path / "kites")
    assert HashingEncoder.encoded == 0  # the fault is found before the long work
    index = build_caption_index([source, second], "hashing", tmp_path / "kites", skip_bad=True)
    assert len(index) == 94 and index.captions([93]) == ["A last kite."]
    assert index.files.manifest["provenance"]["bad_lines_left_out"] == 1
    assert "1 bad line" in capsys.readouterr().err


def test_a_search_structure_is_built_on_demand(tmp_path, hashing, source):
    index = build_caption_index(
        [source], "hashing", tmp_path / "kites", index_config=IndexConfig(index_key="IVF4,Flat")
    )
    assert index.files.manifest["segments"][0]["search"]["key"] == "IVF4,Flat"
    assert index.search(index.embeddings([17]), 1)[1].tolist() == [[17]]


def killed_build(source: Path, out: Path, config: IndexConfig, die_in: str | None) -> None:
    faiss.omp_set_num_threads(1)  # OpenMP's threads do not survive the fork
    torch.set_num_threads(1)
    if die_in:
        setattr(index_builder, die_in, lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGKILL))
    build_caption_index([source], "hashing", out, index_config=config)


def run_killed(source: Path, out: Path, after: float | None = None, die_in: str | None = None, config=None) -> int:
    """Runs a build in a process that gets SIGKILL `after` seconds, or when it reaches a function; its exit code."""
    arguments = (source, out, config or IndexConfig(), die_in)
    process = multiprocessing.get_context("fork").Process(target=killed_build, args=arguments)
    process.start()
    if after is not None:
        time.sleep(after)
        process.kill()
    process.join()
    return process.exitcode


def test_a_build_killed_at_ten_random_moments_gives_the_same_bytes(tmp_path, hashing, source, monkeypatch):
    monkeypatch.setattr(HashingEncoder, "pause", 0.03)
    start = time.perf_counter()
    expected = content(build_caption_index([source], "hashing", tmp_path / "whole").path)
    duration, moments = time.perf_counter() - start, random.Random(5)
    kills, out = 0, tmp_path / "killed"
    for _ in range(10):
        if run_killed(source, out, after=moments.uniform(0.02, 0.6 * duration)) == -signal.SIGKILL:
            kills += 1
        if out.exists():  # it was faster than the kill: begin anew
            assert content(CaptionIndex.open(out, "cpu").path) == expected
            for file in (*out.rglob("*.*"),):
                file.unlink()
            for folder in (out / "segments" / "000001", out / "segments", out):
                folder.rmdir()
    assert kills >= 5
    index = build_caption_index([source], "hashing", out)
    assert content(index.path) == expected
    assert sorted(file.name for file in tmp_path.iterdir() if "killed" in file.name) == ["killed"]


@pytest.mark.parametrize(
    "die_in", ["_save_chunk", "_join", "build_search_structure", "write_index_manifest", "_provenance"]
)
def test_a_build_killed_between_its_steps_is_completed(tmp_path, hashing, source, die_in):
    expected = content(build_caption_index([source], "hashing", tmp_path / "whole").path)
    out = tmp_path / "killed"
    ivf = IndexConfig(index_key="IVF4,Flat")
    assert run_killed(source, out, die_in=die_in, config=ivf) == -signal.SIGKILL
    assert not out.exists()
    with pytest.raises(InputError, match="unfinished"):
        CaptionIndex.open(out, "cpu")
    for leftover in ("index.json.tmp", "segments/000001/search.faiss"):  # what a kill at a worse moment leaves
        if (out.with_name("killed.partial") / leftover).parent.is_dir():
            (out.with_name("killed.partial") / leftover).write_bytes(b"half")
    HashingEncoder.encoded = 0
    index = build_caption_index([source], "hashing", out)
    if die_in != "_save_chunk":
        assert HashingEncoder.encoded < 10  # only probes: nothing was encoded again
    assert content(index.path) == expected
    assert set(index.files.manifest["files"]) == {"segments/000001/captions.arrow", "segments/000001/embeddings.npy"}


def interrupt_after(monkeypatch, chunks: int, error: BaseException) -> None:
    """Lets the build fail with `error` when it saves the chunk after the first `chunks`."""
    save, saved = index_builder._save_chunk, []

    def failing(*args):
        if len(saved) == chunks:
            raise error
        saved.append(args)
        save(*args)

    monkeypatch.setattr(index_builder, "_save_chunk", failing)


def test_resume_encodes_only_what_is_missing(tmp_path, hashing, source, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        interrupt_after(patch, 7, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            build_caption_index([source], "hashing", tmp_path / "kites")
    HashingEncoder.encoded = 0
    assert len(build_caption_index([source], "hashing", tmp_path / "kites")) == 93
    assert 93 - 7 * 8 <= HashingEncoder.encoded < 93 - 7 * 8 + 10
    assert "56 of 93 captions are encoded already" in capsys.readouterr().err


@pytest.mark.parametrize("change", ["source", "clip"])
def test_unfinished_work_of_another_job_is_not_used(tmp_path, hashing, source, monkeypatch, capsys, change):
    with monkeypatch.context() as patch:
        interrupt_after(patch, 7, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            build_caption_index([source], "hashing", tmp_path / "kites")
    if change == "source":
        source.write_text(source.read_text().replace("Kite", "Bird"))
    index = build_caption_index([source], "hashing" if change == "source" else "other", tmp_path / "kites")
    assert "starting over" in capsys.readouterr().err
    assert index.captions([0]) == ["Bird 0 flies." if change == "source" else "Kite 0 flies."]


def test_a_full_disk_is_one_sentence_and_the_work_is_kept(tmp_path, hashing, source, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt_after(patch, 5, OSError(errno.ENOSPC, "No space left on device"))
        with pytest.raises(InputError, match="no space left for .*kites"):
            build_caption_index([source], "hashing", tmp_path / "kites")
    assert not (tmp_path / "kites").exists()
    HashingEncoder.encoded = 0
    assert len(build_caption_index([source], "hashing", tmp_path / "kites")) == 93
    assert HashingEncoder.encoded < 93


def test_an_existing_index_stays_unless_it_may_be_replaced(tmp_path, hashing, source):
    build_caption_index([source], "hashing", tmp_path / "kites")
    before = content(tmp_path / "kites")
    source.write_text('{"caption": "Another kite."}\n')
    with pytest.raises(InputError, match="--overwrite"):
        build_caption_index([source], "hashing", tmp_path / "kites")
    assert content(tmp_path / "kites") == before
    assert len(build_caption_index([source], "hashing", tmp_path / "kites", overwrite=True)) == 1


def test_a_failed_replacement_leaves_the_old_index(tmp_path, hashing, source, monkeypatch):
    build_caption_index([source], "hashing", tmp_path / "kites")
    interrupt_after(monkeypatch, 2, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        build_caption_index([source], "hashing", tmp_path / "kites", overwrite=True)
    assert len(CaptionIndex.open(tmp_path / "kites", "cpu")) == 93


def test_empty_missing_and_unusable_sources_are_refused(tmp_path, hashing, source):
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for paths in ([empty], [tmp_path / "missing.jsonl"], [pipe], []):
        with pytest.raises(InputError) as caught:
            build_caption_index(paths, "hashing", tmp_path / "kites")
        assert all(path.name in str(caught.value) for path in paths)
    assert not (tmp_path / "kites").exists() and not (tmp_path / "kites.partial").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"index_config": IndexConfig(index_key="sentences")}, "'sentences' does not suit"),
        ({"index_config": IndexConfig(index_key="IVF94,Flat")}, "94 clusters of 93"),
        ({"batch_size": 0}, "batch_size is 0"),
    ],
)
def test_what_cannot_be_built_is_refused_before_encoding(tmp_path, hashing, source, arguments, words):
    with pytest.raises(InputError, match=words):
        build_caption_index([source], "hashing", tmp_path / "kites", **arguments)
    assert HashingEncoder.encoded == 0


def test_captions_that_change_while_they_are_read_are_noticed(tmp_path, hashing, source, monkeypatch):
    plan = index_builder.plan_search

    def edit(*args):
        source.write_text(source.read_text() + '{"caption": "One more kite."}\n')
        return plan(*args)

    monkeypatch.setattr(index_builder, "plan_search", edit)
    with pytest.raises(InputError, match="93 captions, then 94"):
        build_caption_index([source], "hashing", tmp_path / "kites")


def test_any_script_and_any_length_of_caption(tmp_path, hashing):
    captions = ["Дракон над рекой", "凧が飛ぶ", "🪁" * 50, "long " * 2000 + "kite"]
    source = tmp_path / "words.jsonl"
    source.write_text("".join(json.dumps({"caption": caption}) + "\n" for caption in captions))
    index = build_caption_index([source], "hashing", tmp_path / "words")
    assert index.captions(range(4)) == captions


def test_a_search_structure_is_tuned_with_photos(tmp_path, tiny_clip, world):
    options = {"device": "cpu", "dtype": "float32", "query_features": world.features.path}
    config = IndexConfig(index_key="IVF4,Flat")
    index = build_caption_index([world.captions], world.clip, tmp_path / "kites", index_config=config, **options)
    assert index.files.manifest["segments"][0]["search"]["queries"] == "images"
    with pytest.raises(InputError, match="starter"):
        build_caption_index([world.captions], "starter", tmp_path / "other", index_config=config, **options)
    assert not (tmp_path / "other").exists()
