"""Damaged and hostile indexes: each is refused with one sentence, and none crashes or reads what lies elsewhere."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from clipcap_rag import artifact
from clipcap_rag.artifact import file_record
from clipcap_rag.caption_index import CaptionIndex
from clipcap_rag.config import IndexConfig
from clipcap_rag.errors import InputError
from clipcap_rag.index_check import verify_index
from clipcap_rag.index_editor import compact_index, remove_captions
from clipcap_rag.index_lock import index_lock
from clipcap_rag.index_store import SegmentWriter, caption_batch, open_files, write_index_manifest
from clipcap_rag.search_structure import build_search_structure

DIM, ROWS = 8, 40
PROBES = {"sentences": ["a kite"], "text": [[1.0] + [0.0] * 7], "image": [1.0] + [0.0] * 7}


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    """Two segments, one of them with a search structure, and two removed rows."""
    folder = tmp_path_factory.mktemp("sound") / "kites"
    vectors = np.random.default_rng(0).normal(size=(ROWS, DIM))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    entries = []
    for name, rows in (("000001", range(30)), ("000002", range(30, ROWS))):
        segment = folder / "segments" / name
        with SegmentWriter(segment, DIM) as writer:
            columns = {
                "caption": [f"kite {row} flies" for row in rows],
                "caption_id": [str(row) for row in rows],
                "image_id": [None for _ in rows],
                "source": ["kites" for _ in rows],
                "meta": [{"row": str(row)} for row in rows],
            }
            writer.append(caption_batch(columns), vectors[rows.start : rows.stop])
        key = IndexConfig(index_key="IVF2,Flat" if name == "000001" else "Flat")
        search = build_search_structure(segment / "embeddings.npy", key, segment / "search.faiss")
        entries.append({"name": name, "rows": len(rows), "search": search})
    np.save(folder / "tombstones-000002.npy", np.array([3, 35]))
    encoder = {"clip": "tiny", "dim": DIM, "probes": PROBES}
    write_index_manifest(folder, revision=2, encoder=encoder, segments=entries, provenance={}, licence=None,
                         tombstones="tombstones-000002.npy")  # fmt: skip
    return folder


@pytest.fixture
def kites(sound, tmp_path) -> Path:
    return shutil.copytree(sound, tmp_path / "kites")


def use(folder: Path) -> None:
    """Everything that reads an index, over all of it."""
    index = CaptionIndex.open(folder, "cpu")
    rows = np.arange(index.files.rows)
    index.files.records(rows)
    index.search(index.embeddings(rows), 50)
    verify_index(folder, sample=0)


def refusal(folder: Path) -> str:
    with pytest.raises(InputError) as caught:
        use(folder)
    sentence = str(caught.value)
    assert sentence.isprintable() and len(sentence) < 700
    return sentence


def rewrite(folder: Path, change) -> None:
    manifest = json.loads((folder / "index.json").read_text())
    change(manifest)
    (folder / "index.json").write_text(json.dumps(manifest))


def seal(folder: Path) -> None:
    """Makes the manifest fit the files, as one who means harm would."""
    rewrite(folder, lambda m: m["files"].update({name: file_record(folder / name) for name in m["files"]}))


FILES = [
    "segments/000001/captions.arrow", "segments/000001/embeddings.npy", "segments/000001/search.faiss",
    "segments/000002/captions.arrow", "segments/000002/embeddings.npy", "tombstones-000002.npy",
]  # fmt: skip


def test_a_sound_index_is_used_without_complaint(sound):
    use(sound)


@pytest.mark.parametrize("file", FILES)
def test_every_kind_of_damage_to_every_file_is_one_sentence(kites, file):
    path, random = kites / file, np.random.default_rng(1)
    whole = path.read_bytes()
    for place in random.integers(0, len(whole), 20).tolist():
        path.write_bytes(whole[:place] + bytes([whole[place] ^ (1 << random.integers(8))]) + whole[place + 1 :])
        assert path.name in refusal(kites)
    for size in (0, 1, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        assert path.name in refusal(kites)
    path.unlink()
    assert path.name in refusal(kites)
    path.mkdir()
    assert path.name in refusal(kites)


@pytest.mark.parametrize("file", [name for name in FILES if "faiss" not in name])
def test_damage_that_the_hashes_do_not_show_does_not_crash(kites, file):
    path, random = kites / file, np.random.default_rng(2)
    whole = path.read_bytes()
    for place in random.integers(0, len(whole), 150).tolist():
        path.write_bytes(whole[:place] + bytes([whole[place] ^ (1 << random.integers(8))]) + whole[place + 1 :])
        seal(kites)
        try:
            use(kites)
        except InputError as error:
            assert str(error).isprintable()


def test_a_flipped_bit_in_a_large_file_is_found_by_verify(kites, monkeypatch):
    monkeypatch.setattr(artifact, "_WHOLE_HASH_LIMIT", 100)
    monkeypatch.setattr(artifact, "_SAMPLES", 2)
    monkeypatch.setattr(artifact, "_SAMPLE_BYTES", 16)
    seal(kites)
    use(kites)
    path = kites / "segments/000002/embeddings.npy"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1  # the last bit of a component: nothing but the hash of all bytes shows it
    path.write_bytes(data)
    assert len(CaptionIndex.open(kites, "cpu")) == 38
    with pytest.raises(InputError, match="embeddings.npy was altered"):
        verify_index(kites, sample=0)


@pytest.mark.parametrize(
    ("value", "words"), [(np.nan, "length nan"), (np.inf, "length inf|finite"), (-3.0, "instead of 1")]
)
def test_vectors_that_are_none_are_found(kites, value, words):
    path = kites / "segments/000002/embeddings.npy"
    vectors = np.load(path)
    vectors[4] = value
    np.save(path, vectors)
    seal(kites)
    with pytest.raises(InputError, match=words):
        verify_index(kites, sample=0)
    index = CaptionIndex.open(kites, "cpu")
    queries = np.full((3, DIM), DIM**-0.5, np.float32)
    if np.isinf(value):
        with pytest.raises(InputError, match="no finite vector"):
            index.search(queries, 38)
    else:
        scores, rows = index.search(queries, 38)
        assert np.isfinite(scores[rows >= 0]).all()


def test_arrays_of_another_kind_are_refused(kites):
    vectors = np.load(kites / "segments/000002/embeddings.npy")
    for wrong in (vectors.astype(np.float32), vectors.astype(np.int16), vectors[:5], vectors.ravel(), vectors[:, :4]):
        np.save(kites / "segments/000002/embeddings.npy", wrong)
        seal(kites)
        assert "embeddings.npy holds" in refusal(kites)


@pytest.mark.parametrize("rows", [[-1], [40], [2**62], [0.5], [[1]], ["a"]])
def test_tombstones_that_are_no_rows_are_refused(kites, rows):
    np.save(kites / "tombstones-000002.npy", np.array(rows))
    seal(kites)
    assert "does not hold rows" in refusal(kites)


def test_ids_that_stand_twice_or_would_be_given_again_are_found(kites):
    rewrite(kites, lambda m: m.update(next_caption_id=20))
    assert "would give it again" in refusal(kites)
    rewrite(kites, lambda m: m.update(next_caption_id=40))
    use(kites)
    shutil.copytree(kites / "segments/000002", kites / "segments/000003")
    entry = {"name": "000003", "rows": 10, "search": None}
    records = {f"segments/000003/{file}": None for file in ("captions.arrow", "embeddings.npy")}
    rewrite(kites, lambda m: (m["segments"].append(entry), m.update(rows=50), m["files"].update(records)))
    seal(kites)
    assert "2 captions of" in refusal(kites)


DEEP = "[" * 100_000 + "]" * 100_000


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m["segments"][0].update(name="../../secret"),
        lambda m: m["segments"][0].update(name="/etc"),
        lambda m: m["segments"][0].update(name="a\x00b"),
        lambda m: m["segments"][0].update(name="."),
        lambda m: m["segments"][0].update(name=m["segments"][1]["name"]),
        lambda m: m["segments"][0].update(rows=2**80),
        lambda m: m["segments"][0].update(rows=-1),
        lambda m: m["segments"][0].update(rows=True),
        lambda m: m["segments"][0].update(rows=30.0),
        lambda m: m["segments"][0].update(rows=float("nan")),
        lambda m: m["segments"][0].pop("search"),
        lambda m: m.update(segments=[[]]),
        lambda m: m.update(segments={"a": 1}),
        lambda m: m.update(segments=None),
        lambda m: m.update(rows=10**30),
        lambda m: m.update(revision=-2),
        lambda m: m.update(revision="2"),
        lambda m: m.update(tombstones="../tombstones-000002.npy"),
        lambda m: m.update(tombstones="/etc/passwd"),
        lambda m: m.update(tombstones=7),
        lambda m: m.update(next_caption_id="x"),
        lambda m: m.update(files=[]),
        lambda m: m["files"].update({"/etc/passwd": {"bytes": 1, "hash": "sha256:0"}}),
        lambda m: m["files"].update({"../x": {"bytes": 1, "hash": "sha256:0"}}),
        lambda m: m["files"].update({"a\x00b": {"bytes": 1, "hash": "sha256:0"}}),
        lambda m: m["files"].update({"segments/000001/captions.arrow": None}),
        lambda m: m["files"]["segments/000001/captions.arrow"].update(bytes=float("inf")),
        lambda m: m["files"]["segments/000001/captions.arrow"].pop("hash"),
        lambda m: m.update(encoder=None),
        lambda m: m["encoder"].update(dim=0),
        lambda m: m["encoder"].update(dim=2**60),
        lambda m: m["encoder"].update(clip=["a"]),
        lambda m: m.update(licence=3),
        lambda m: m.update(kind="a\nb"),
        lambda m: m.update(format_version={"a": ["b"] * 1000}),
    ],
)
def test_a_hostile_manifest_is_one_sentence(kites, change):
    rewrite(kites, change)
    refusal(kites)
    with pytest.raises(InputError):
        remove_captions(kites, {"caption_id": ["1"]})
    with pytest.raises(InputError):
        compact_index(kites)


@pytest.mark.parametrize("text", [DEEP, '{"a":' * 50_000, '{"kind": ' + "9" * 10_000 + "}", "", "null", "\x00"])
def test_a_manifest_that_is_no_object_is_one_sentence(kites, text):
    (kites / "index.json").write_text(text)
    refusal(kites)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=10), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_value_anywhere_in_the_manifest_is_taken_or_refused_in_a_sentence(sound, tmp_path, data):
    folder = tmp_path / "kites"
    if not folder.exists():
        shutil.copytree(sound, folder)
    manifest = json.loads((sound / "index.json").read_text())
    part, key = manifest, None
    while True:
        keys = list(part) if isinstance(part, dict) else list(range(len(part)))
        if not keys:
            break
        key = data.draw(st.sampled_from(keys))
        if not isinstance(part[key], dict | list) or not part[key] or data.draw(st.booleans()):
            break
        part = part[key]
    part[key] = data.draw(VALUES)
    (folder / "index.json").write_text(json.dumps(manifest))
    try:
        use(folder)
    except InputError as error:
        assert str(error).isprintable()


@pytest.mark.parametrize("place", ["segments", "index.json"])
def test_a_file_or_folder_in_place_of_the_other_is_one_sentence(kites, place):
    path = kites / place
    if path.is_dir():
        shutil.rmtree(path)
        path.write_text("no folder")
    else:
        path.unlink()
        path.mkdir()
    refusal(kites)
    with pytest.raises(InputError):
        remove_captions(kites, {"caption_id": ["1"]})


def test_an_index_whose_folder_cannot_be_written_is_one_sentence(kites):
    (kites.parent / f".{kites.name}.lock").mkdir()  # root may write anywhere, but not a file where a folder is
    before = (kites / "index.json").read_bytes()
    with pytest.raises(InputError, match="cannot write"):
        remove_captions(kites, {"caption_id": ["1"]})
    assert (kites / "index.json").read_bytes() == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write into a folder that is read-only")
def test_a_read_only_folder_is_one_sentence(kites):
    kites.chmod(0o555)
    try:
        with pytest.raises(InputError, match="cannot write"):
            remove_captions(kites, {"caption_id": ["1"]})
    finally:
        kites.chmod(0o755)


def test_a_reader_that_meets_a_commit_opens_the_new_state(kites, monkeypatch):
    from clipcap_rag import index_store

    check, met = index_store.check_files, []

    def commit_first(*arguments):
        if not met:
            met.append(True)
            compact_index(kites, "Flat")
        return check(*arguments)

    monkeypatch.setattr(index_store, "check_files", commit_first)
    files = open_files(kites)
    assert files.manifest["revision"] == 3 and files.live.all() and files.rows == 38


def test_the_lock_survives_what_is_no_lock(tmp_path):
    (tmp_path / ".kites.lock").write_text("{no json")
    with index_lock(tmp_path / "kites"), pytest.raises(InputError, match="process"), index_lock(tmp_path / "kites"):
        pass
    assert list(tmp_path.iterdir()) == []
