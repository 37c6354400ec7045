"""Indexes of other projects in and out: what is taken over, what is refused, and that a round trip loses nothing."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clipcap_rag import index_export, segment_encoding
from clipcap_rag.caption_index import CaptionIndex
from clipcap_rag.config import EXPORT_FORMATS, ImportConfig
from clipcap_rag.encoder import Encoder
from clipcap_rag.errors import InputError
from clipcap_rag.index_builder import build_caption_index
from clipcap_rag.index_check import verify_index
from clipcap_rag.index_editor import add_captions, update_caption
from clipcap_rag.index_export import export_index
from clipcap_rag.index_import import import_index

EXACT = {"device": "cpu", "dtype": "float32"}


@pytest.fixture(scope="module")
def clip(tiny_clip) -> str:
    return f"local-dir:{tiny_clip}"


@pytest.fixture(scope="module")
def vectors(clip, tiny_captions) -> np.ndarray:
    return Encoder.load(clip, **EXACT).encode_text(tiny_captions).vectors


@pytest.fixture
def cache(tmp_path, vectors, tiny_captions) -> Path:
    """The stem of an antarctic cache."""
    (tmp_path / "cache.txt").write_text("".join(f"{caption}\n" for caption in tiny_captions))
    np.save(tmp_path / "cache.npy", vectors)
    return tmp_path / "cache"


def embeddings(index: CaptionIndex) -> np.ndarray:
    return index.embeddings(np.arange(len(index)))


def origin(index: CaptionIndex) -> dict:
    return index.files.manifest["provenance"]["import"]


@pytest.mark.parametrize("form", ["stem", "text", "both"])
def test_an_antarctic_cache_is_taken_over(tmp_path, cache, clip, vectors, tiny_captions, form):
    text, array = cache.with_suffix(".txt"), cache.with_suffix(".npy")
    paths = {"stem": [cache], "text": [text], "both": [array, text]}[form]
    index = import_index(paths, clip, tmp_path / "own", licence="CC0", **EXACT)
    assert index.captions(range(len(index))) == tiny_captions
    assert (embeddings(index) == vectors.astype(np.float16)).all()
    assert origin(index)["embeddings"] == "taken over" and origin(index)["format"] == "antarctic"
    assert [source["name"] for source in index.files.manifest["provenance"]["sources"]] == ["cache.txt", "cache.npy"]
    assert verify_index(index.path, **EXACT).smallest_cosine > 0.999


def test_rows_that_are_not_of_unit_length_are_normalised_and_that_is_said(tmp_path, cache, clip, vectors, capsys):
    np.save(cache.with_suffix(".npy"), np.asfortranarray(3 * vectors.astype(np.float64)))
    index = import_index([cache], clip, tmp_path / "own", **EXACT)
    assert "normalised" in capsys.readouterr().err and origin(index)["embeddings"] == "taken over and normalised"
    np.testing.assert_allclose(embeddings(index), vectors, atol=1e-3)


def test_lines_and_rows_that_do_not_agree_are_refused(tmp_path, cache, clip, vectors):
    np.save(cache.with_suffix(".npy"), vectors[:-1])
    with pytest.raises(InputError, match="has 32 lines and cache.npy 31 rows"):
        import_index([cache], clip, tmp_path / "own", **EXACT)
    assert not (tmp_path / "own").exists()


def test_embeddings_of_another_clip_are_refused_with_cosine_and_remedy(tmp_path, cache, other_clip, tiny_captions):
    other = f"local-dir:{other_clip}"
    with pytest.raises(InputError, match=r"median cosine -?0\.\d\d over 32 of them\); name .*--clip.*--reencode"):
        import_index([cache], other, tmp_path / "own", **EXACT)
    encoded = ImportConfig(reencode=True)
    index = import_index([cache], other, tmp_path / "own", import_config=encoded, **EXACT)
    assert origin(index)["embeddings"] == "encoded again"
    cache.with_suffix(".npy").unlink()
    import_index([cache.with_suffix(".txt")], other, tmp_path / "text", import_config=encoded, **EXACT)
    expected = Encoder.load(other, **EXACT).encode_text(tiny_captions).vectors
    np.testing.assert_allclose(embeddings(index), expected, atol=1e-3)


def test_embeddings_of_another_width_are_refused(tmp_path, cache, clip, vectors):
    np.save(cache.with_suffix(".npy"), np.concatenate([vectors, vectors], axis=1))
    with pytest.raises(InputError, match=r"\(48 wide\) are not those of .* \(24 wide\)"):
        import_index([cache], clip, tmp_path / "own", **EXACT)


def test_bad_lines_and_rows_stop_or_are_left_out_together(tmp_path, cache, clip, vectors, tiny_captions):
    lines = [*tiny_captions]
    lines[3], lines[20], lines[31] = "", "\x1b[31m", ""
    cache.with_suffix(".txt").write_text("".join(f"{line}\n" for line in lines))
    faulty = vectors.copy()
    faulty[7], faulty[9] = 0, np.nan
    np.save(cache.with_suffix(".npy"), faulty)
    with pytest.raises(InputError, match="cache.txt:4: empty caption"):
        import_index([cache], clip, tmp_path / "own", **EXACT)
    index = import_index([cache], clip, tmp_path / "own", skip_bad=True, **EXACT)
    kept = [row for row in range(32) if row not in (3, 7, 9, 20, 31)]
    assert index.captions(range(len(index))) == [tiny_captions[row] for row in kept]
    assert (embeddings(index) == vectors[kept].astype(np.float16)).all()
    assert origin(index)["bad_lines_left_out"] == 5


class Trap:
    def __reduce__(self):
        return Path.touch, (Path("trap"),)


@pytest.mark.parametrize("content", ["objects", "text", "empty", "cut", "vector"])
def test_what_is_no_matrix_is_refused_and_nothing_is_executed(tmp_path, cache, clip, vectors, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    array = cache.with_suffix(".npy")
    whole = array.read_bytes()
    match content:
        case "objects":
            np.save(array, np.array([[Trap()]], object), allow_pickle=True)
        case "text" | "empty" | "cut":
            array.write_bytes({"text": b"no array", "empty": b"", "cut": whole[:-400]}[content])
        case "vector":
            np.save(array, vectors[0])
    with pytest.raises(InputError, match="cache.npy"):
        import_index([cache], clip, tmp_path / "own", **EXACT)
    assert not (tmp_path / "trap").exists()


def grams(folder: Path, captions: list[str], vectors: np.ndarray, prefix: str) -> Path:
    folder.mkdir()
    for number, part in enumerate(np.array_split(vectors, 12)):
        np.save(folder / f"emb{number}.npy", part)  # emb10 comes after emb9
    (folder / "entries.txt").write_text("".join(f"{caption}\n" for caption in captions))
    (folder / "args.txt").write_text(json.dumps({"prefix": prefix, "lower": True}))
    (folder / "x.index").write_bytes(b"not even FAISS")
    return folder


def test_a_clip_grams_folder_with_a_prefix(tmp_path, clip, tiny_captions, capsys):
    prefixed = Encoder.load(clip, **EXACT).encode_text([f"a painting: {caption}" for caption in tiny_captions]).vectors
    folder = grams(tmp_path / "grams", tiny_captions, prefixed, "a painting: ")
    index = import_index([folder], clip, tmp_path / "own", **EXACT)
    assert "not used: x.index" in capsys.readouterr().err
    assert index.captions([31]) == tiny_captions[31:]
    assert (embeddings(index) == prefixed.astype(np.float16)).all()
    assert index.files.manifest["provenance"]["template"] == "a painting: {}"
    verify_index(index.path, **EXACT)
    (folder / "args.txt").unlink()
    with pytest.raises(InputError, match="--template"):
        import_index([folder], clip, tmp_path / "plain", **EXACT)
    import_index([folder], clip, tmp_path / "plain", import_config=ImportConfig(template="a painting: {}"), **EXACT)


def test_a_clip_grams_folder_without_entries_is_refused(tmp_path, clip, vectors, tiny_captions):
    folder = grams(tmp_path / "grams", tiny_captions, vectors, "")
    (folder / "entries.txt").unlink()
    with pytest.raises(InputError, match="--save_entries"):
        import_index([folder], clip, tmp_path / "own", **EXACT)


def retrieval(folder: Path, captions: list[str], vectors: np.ndarray) -> Path:
    for name in ("metadata", "text_emb", "img_emb"):
        (folder / name).mkdir(parents=True)
    for number, rows in enumerate(np.array_split(np.arange(len(captions)), 11)):
        table = {"caption": [captions[row] for row in rows], "image_path": [f"photos/{row}.jpg" for row in rows]}
        pq.write_table(pa.table(table), folder / "metadata" / f"metadata_{number}.parquet")
        np.save(folder / "text_emb" / f"text_emb_{number}.npy", vectors[rows].astype(np.float16))
    return folder


def test_a_clip_retrieval_folder(tmp_path, clip, vectors, tiny_captions, capsys):
    folder = retrieval(tmp_path / "out", tiny_captions, vectors)
    index = import_index([folder], clip, tmp_path / "own", **EXACT)
    assert "not used: img_emb" in capsys.readouterr().err
    assert index.captions(range(len(index))) == tiny_captions and index.image_ids([30]) == ["30"]
    assert (embeddings(index) == vectors.astype(np.float16)).all() or np.allclose(embeddings(index), vectors, atol=1e-3)
    np.save(folder / "text_emb" / "text_emb_4.npy", vectors[:1])
    with pytest.raises(InputError, match=r"metadata_4.parquet has 3 rows and its text_emb 1"):
        import_index([folder], clip, tmp_path / "again", **EXACT)


@pytest.mark.parametrize("kind", [pa.list_(pa.float32()), pa.list_(pa.float64(), 24), pa.large_list(pa.float16())])
def test_parquet_with_embeddings(tmp_path, clip, vectors, tiny_captions, kind):
    for number, rows in enumerate(np.array_split(np.arange(32), 2)):
        columns = {
            "phrase": [tiny_captions[row] for row in rows],
            "clip_vector": pa.array([vectors[row].astype(kind.value_type.to_pandas_dtype()) for row in rows], kind),
        }
        pq.write_table(pa.table(columns), tmp_path / f"part-{number}.parquet", row_group_size=5)
    with pytest.raises(InputError, match="phrase, clip_vector .*--caption-column"):
        import_index([tmp_path], clip, tmp_path / "own", **EXACT)
    index = import_index(
        [tmp_path], clip, tmp_path / "own", import_config=ImportConfig("parquet", "phrase", "clip_vector"), **EXACT
    )
    assert index.captions(range(len(index))) == tiny_captions
    np.testing.assert_allclose(embeddings(index), vectors, atol=1e-3)


def test_parquet_without_embeddings_is_encoded(tmp_path, clip, vectors, tiny_captions):
    lists = [tiny_captions[row : row + 4] for row in range(0, 32, 4)]
    images = [{"bytes": b"no photo", "path": f"photos/{number}.jpg"} for number in range(8)]  # as Hugging Face has them
    pq.write_table(pa.table({"image": images, "captions": lists}), tmp_path / "set.parquet")
    index = import_index([tmp_path / "set.parquet"], clip, tmp_path / "own", **EXACT)
    assert index.captions(range(len(index))) == tiny_captions and index.image_ids([31]) == ["7"]
    assert origin(index)["embeddings"] == "encoded"
    np.testing.assert_allclose(embeddings(index), vectors, atol=1e-3)


def test_parquet_rows_with_one_embedding_for_several_captions_or_none_are_refused(tmp_path, clip, vectors):
    several = {"captions": [["a kite", "a hill"]], "embedding": [vectors[0]]}
    pq.write_table(pa.table(several), tmp_path / "several.parquet")
    with pytest.raises(InputError, match="several captions and one embedding"):
        import_index([tmp_path / "several.parquet"], clip, tmp_path / "own", **EXACT)
    assert (
        len(
            import_index(
                [tmp_path / "several.parquet"],
                clip,
                tmp_path / "own",
                import_config=ImportConfig(reencode=True),
                **EXACT,
            )
        )
        == 2
    )
    for stored, sentence in [([vectors[0], None], "missing or not 24 wide"), ([None, vectors[0]], "row 0 has no emb")]:
        pq.write_table(pa.table({"caption": ["a kite", "a hill"], "embedding": stored}), tmp_path / "missing.parquet")
        with pytest.raises(InputError, match=sentence):
            import_index([tmp_path / "missing.parquet"], clip, tmp_path / "none", **EXACT)


def test_what_cannot_be_told_is_refused(tmp_path, clip):
    for path, sentence in [(tmp_path / "none", "there is no"), (tmp_path, "cannot tell what")]:
        with pytest.raises(InputError, match=sentence):
            import_index([path], clip, tmp_path / "own", **EXACT)


def test_a_killed_import_continues(tmp_path, cache, clip, monkeypatch, capsys):
    monkeypatch.setattr(segment_encoding, "CHUNK", 8)
    whole = import_index([cache], clip, tmp_path / "whole", **EXACT).path
    save, saved = segment_encoding._save_chunk, []

    def dies(*arguments):
        if len(saved) == 2:
            raise KeyboardInterrupt
        saved.append(arguments)
        save(*arguments)

    monkeypatch.setattr(segment_encoding, "_save_chunk", dies)
    with pytest.raises(KeyboardInterrupt):
        import_index([cache], clip, tmp_path / "own", **EXACT)
    monkeypatch.setattr(segment_encoding, "_save_chunk", save)
    own = import_index([cache], clip, tmp_path / "own", **EXACT).path
    assert "16 of 32 captions" in capsys.readouterr().err
    for name in ("captions.arrow", "embeddings.npy"):
        assert (own / "segments/000001" / name).read_bytes() == (whole / "segments/000001" / name).read_bytes()


@pytest.mark.parametrize("layout", EXPORT_FORMATS)
def test_out_and_in_again_loses_nothing(tmp_path, world, layout, monkeypatch):
    monkeypatch.setattr(index_export, "PART", 10)
    monkeypatch.setattr(index_export, "_BLOCK", 4)
    folder = export_index(world.index.path, layout, tmp_path / "out")
    again = import_index([folder / "own" if layout == "antarctic" else folder], world.clip, tmp_path / "again", **EXACT)
    rows = range(len(world.index))
    assert again.captions(rows) == world.index.captions(rows)
    np.testing.assert_allclose(again.embeddings(rows), world.index.embeddings(rows), atol=1e-3)
    if layout == "clip-retrieval":
        assert again.files.records(rows) == world.index.files.records(rows)
        assert len(list(folder.glob("text_emb/*.npy"))) == 4
    told = json.loads((folder / "export.json").read_text())
    assert told["encoder"]["clip"] == world.index.encoder["clip"] and told["rows"] == 32
    with pytest.raises(InputError, match="exists already"):
        export_index(world.index.path, layout, folder)
    export_index(world.index.path, layout, folder, overwrite=True)


def test_removed_captions_are_not_exported(tmp_path, world, monkeypatch):
    from clipcap_rag.index_store import IndexFiles

    opened = IndexFiles.__init__

    def with_removed(self, *arguments):
        opened(self, *arguments)
        self.live[[0, 5]] = False

    monkeypatch.setattr(IndexFiles, "__init__", with_removed)
    folder = export_index(world.index.path, "antarctic", tmp_path / "out")
    lines = (folder / "own.txt").read_text().splitlines()
    assert len(lines) == 30 == len(np.load(folder / "own.npy")) and lines == world.index.captions(
        [row for row in range(32) if row not in (0, 5)]
    )


def test_export_needs_neither_torch_nor_open_clip(tmp_path, world):
    program = (
        "import sys; from clipcap_rag.cli import main; "
        f"assert main(['index', 'export', {str(world.index.path)!r}, '--format', 'antarctic', "
        f"'--out', {str(tmp_path / 'out')!r}]) == 0; assert not {{'torch', 'open_clip', 'faiss'}} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_phrases_in_a_template_are_stored_without_it_and_verified_with_it(tmp_path, clip):
    from clipcap_rag.ngrams import PhraseOptions

    source = tmp_path / "hills.txt"
    source.write_text("a red kite over green hills\n\nred kite, green hills. Red kite and green hills!\n" * 3)
    index = build_caption_index(
        [source], clip, tmp_path / "own",
        phrase_options=PhraseOptions(ngrams="2", fold_case=True), template="a photo of {}", **EXACT,
    )  # fmt: skip
    captions = index.captions(range(len(index)))
    assert {"red kite", "green hills"} < set(captions) and "kite green" not in captions
    expected = Encoder.load(clip, **EXACT).encode_text([f"a photo of {caption}" for caption in captions]).vectors
    np.testing.assert_allclose(embeddings(index), expected, atol=1e-3)
    assert index.files.manifest["provenance"]["phrases"]["ngrams"] == "2"
    add_captions(index.path, ["a blue boat"], Encoder.load(clip, **EXACT))
    update_caption(index.path, "0", "a white boat", Encoder.load(clip, **EXACT))
    check = verify_index(index.path, **EXACT)
    assert check.smallest_cosine > 0.999 and check.encoded == len(captions) + 1
    with pytest.raises(InputError, match="no phrase that occurs 99 times"):
        build_caption_index(
            [source], clip, tmp_path / "none", phrase_options=PhraseOptions(ngrams="2", min_count=99), **EXACT
        )
    with pytest.raises(InputError, match="template"):
        build_caption_index([source], clip, tmp_path / "none", template="a photo", **EXACT)
