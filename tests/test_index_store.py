"""The files of an index: what is written is read back, and what is missing or altered is refused."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from clipcap_rag.errors import InputError
from clipcap_rag.index_names import resolve_index
from clipcap_rag.index_store import (
    SegmentWriter,
    caption_batch,
    index_lock,
    open_files,
    write_index_manifest,
)

DIM = 8


def write_index(folder: Path, sizes=(5, 3), tombstones=None, batch=2) -> np.ndarray:
    """An index with segments of the given sizes; returns its float16 embeddings."""
    vectors = np.random.default_rng(0).normal(size=(sum(sizes), DIM)).astype(np.float16)
    segments, row = [], 0
    for number, size in enumerate(sizes, start=1):
        with SegmentWriter(folder / "segments" / f"{number:06d}", DIM) as writer:
            for start in range(row, row + size, batch):
                rows = range(start, min(start + batch, row + size))
                columns = {
                    "caption": [f"A kite number {i} flies." for i in rows],
                    "caption_id": [str(i) for i in rows],
                    "image_id": [f"photo{i // 2}" if i % 3 else None for i in rows],
                    "source": ["kites" for _ in rows],
                    "meta": [{"row": str(i)} if i % 2 else {} for i in rows],
                }
                writer.append(caption_batch(columns), vectors[rows.start : rows.stop])
        segments.append({"name": f"{number:06d}", "rows": size, "search": None})
        row += size
    if tombstones is not None:
        np.save(folder / "tombstones-000002.npy", np.array(tombstones, np.int64))
    write_index_manifest(
        folder,
        revision=1,
        encoder={"clip": "tiny", "dim": DIM, "probes": {}},
        segments=segments,
        tombstones=None if tombstones is None else "tombstones-000002.npy",
        provenance={},
        licence=None,
    )
    return vectors


def test_rows_read_back_across_batches_and_segments(tmp_path):
    vectors = write_index(tmp_path / "kites")
    files = open_files(tmp_path / "kites")
    assert (files.rows, files.dim) == (8, DIM)
    assert files.captions([7, 0, 4, 4]) == [f"A kite number {i} flies." for i in (7, 0, 4, 4)]
    assert files.image_ids(np.array([[3, 5], [6, 7]])) == [None, "photo2", None, "photo3"]
    assert files.records([5, 6]) == [
        {"caption": "A kite number 5 flies.", "caption_id": "5", "image_id": "photo2", "source": "kites",
         "meta": {"row": "5"}},
        {"caption": "A kite number 6 flies.", "caption_id": "6", "image_id": None, "source": "kites", "meta": {}},
    ]  # fmt: skip
    np.testing.assert_array_equal(files.embeddings([[6, 1], [4, 5]]), vectors[[[6, 1], [4, 5]]].astype(np.float32))
    assert files.embeddings([[0]]).dtype == np.float32
    assert files.captions([]) == [] and files.embeddings([]).shape == (0, DIM)


def test_padding_rows_have_zero_embeddings_and_other_rows_out_of_range_are_refused(tmp_path):
    vectors = write_index(tmp_path / "kites")
    files = open_files(tmp_path / "kites")
    np.testing.assert_array_equal(files.embeddings([-1, 7]), [np.zeros(DIM), vectors[7]])
    for rows in ([-2], [8]):
        with pytest.raises(IndexError):
            files.embeddings(rows)
    for rows in ([-1], [8]):
        with pytest.raises(IndexError):
            files.captions(rows)


def test_blocks_cover_all_rows_in_order_without_copying(tmp_path):
    vectors = write_index(tmp_path / "kites")
    blocks = list(open_files(tmp_path / "kites").blocks(3))
    assert [start for start, _ in blocks] == [0, 3, 5]
    np.testing.assert_array_equal(np.concatenate([block for _, block in blocks]), vectors)
    assert all(isinstance(block, np.memmap) and block.dtype == np.float16 for _, block in blocks)


def test_tombstones_leave_the_row_numbers_alone(tmp_path):
    write_index(tmp_path / "kites", tombstones=[0, 6])
    files = open_files(tmp_path / "kites")
    assert files.live.tolist() == [False, True, True, True, True, True, False, True]
    assert files.captions([7]) == ["A kite number 7 flies."]


def test_bytes_depend_on_the_content_alone(tmp_path):
    for name in ("one", "two"):
        write_index(tmp_path / name)
    for file in ("segments/000001/captions.arrow", "segments/000001/embeddings.npy"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_an_empty_segment_has_a_readable_header(tmp_path):
    with SegmentWriter(tmp_path / "segment", DIM):
        pass
    assert np.load(tmp_path / "segment" / "embeddings.npy").shape == (0, DIM)


def test_embeddings_that_do_not_belong_to_the_captions_are_refused(tmp_path):
    columns = {"caption": ["A kite."], "caption_id": ["0"], "image_id": [None], "source": [None], "meta": [{}]}
    with SegmentWriter(tmp_path / "segment", DIM) as writer, pytest.raises(ValueError, match="shape"):
        writer.append(caption_batch(columns), np.zeros((2, DIM)))


@pytest.mark.parametrize("file", ["captions.arrow", "embeddings.npy"])
def test_a_missing_shortened_or_altered_file_is_refused(tmp_path, file):
    write_index(tmp_path / "kites")
    path = tmp_path / "kites" / "segments" / "000002" / file
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(InputError, match="was altered"):
        open_files(tmp_path / "kites")
    path.write_bytes(content[:-5])
    with pytest.raises(InputError, match="bytes where its manifest says"):
        open_files(tmp_path / "kites")
    path.unlink()
    with pytest.raises(InputError, match=f"lacks its file segments/000002/{file}"):
        open_files(tmp_path / "kites")


def change_manifest(folder: Path, change) -> None:
    manifest = json.loads((folder / "index.json").read_text())
    change(manifest)
    (folder / "index.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: m.pop("encoder"), "lacks encoder"),
        (lambda m: m["files"].pop("segments/000001/embeddings.npy"), "no record of segments/000001/embeddings.npy"),
        (lambda m: m["segments"][0].update(rows=4), "rows is 8, which cannot be"),
        (lambda m: m["encoder"].update(dim=9), "make the index again"),
        (lambda m: m.update(format_version=2), "format version 2"),
        (lambda m: m.update(kind="feature set"), "not a caption index but a feature set"),
    ],
)
def test_a_manifest_that_does_not_fit_its_files_is_refused(tmp_path, change, words):
    write_index(tmp_path / "kites")
    change_manifest(tmp_path / "kites", change)
    with pytest.raises(InputError, match=words):
        open_files(tmp_path / "kites")


def test_an_array_of_objects_is_never_unpickled(tmp_path):
    write_index(tmp_path / "kites", tombstones=[0])
    np.save(tmp_path / "kites" / "tombstones-000002.npy", np.array([{"a": 1}], object), allow_pickle=True)
    change_manifest(tmp_path / "kites", lambda m: m["files"].clear())
    with pytest.raises(InputError):
        open_files(tmp_path / "kites")


def test_names_are_looked_up_in_order_and_an_existing_index_path_wins(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CLIPCAP_RAG_INDEX_DIR", str(tmp_path / "store"))
    write_index(tmp_path / "index" / "kites")
    assert resolve_index("kites") == Path("index/kites")
    write_index(tmp_path / "store" / "kites")
    assert resolve_index("kites") == tmp_path / "store" / "kites"
    (tmp_path / "kites").mkdir()  # a folder of that name which is no index does not hide it
    assert resolve_index("kites") == tmp_path / "store" / "kites"
    write_index(tmp_path / "kites")
    assert resolve_index("kites") == Path("kites")
    assert resolve_index(tmp_path / "index" / "kites") == tmp_path / "index" / "kites"


def test_an_unknown_name_is_answered_with_the_known_ones(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_index(tmp_path / "index" / "kites")
    with pytest.raises(InputError, match="no caption index 'kits'.*kites"):
        resolve_index("kits")
    for nothing in ("", ".", "..", "/"):
        with pytest.raises(InputError, match="caption index"):
            resolve_index(nothing)
    (tmp_path / "other").mkdir()
    with pytest.raises(InputError, match="other is not a caption index"):
        resolve_index("other")


def test_two_commands_cannot_write_one_index(tmp_path):
    out = tmp_path / "kites"
    code = f"import pathlib, clipcap_rag.index_store as s\nwith s.index_lock(pathlib.Path({str(out)!r})): pass"
    with index_lock(out):
        second = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[1]
        )
        assert second.returncode != 0 and "another command is writing" in second.stderr
    with index_lock(out):
        pass
    assert list(tmp_path.iterdir()) == []


def test_this_module_imports_neither_torch_nor_faiss():
    code = "import sys, clipcap_rag.index_store; print({'torch', 'faiss'} & set(sys.modules))"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert answer.stdout.strip() == "set()", answer.stderr


def test_a_file_that_is_not_arrow_is_refused(tmp_path):
    write_index(tmp_path / "kites")
    path = tmp_path / "kites" / "segments" / "000001" / "captions.arrow"
    path.write_bytes(b"no arrow")
    change_manifest(tmp_path / "kites", lambda m: m["files"].pop("segments/000001/captions.arrow"))
    with pytest.raises(InputError, match="no record of"):
        open_files(tmp_path / "kites")
    table = pa.table({"caption": ["A kite."]})
    with pa.ipc.new_file(str(path), table.schema) as writer:
        writer.write_table(table)
    from clipcap_rag.artifact import file_record

    change_manifest(
        tmp_path / "kites", lambda m: m["files"].update({"segments/000001/captions.arrow": file_record(path)})
    )
    with pytest.raises(InputError, match="does not hold the 5 captions"):
        open_files(tmp_path / "kites")
