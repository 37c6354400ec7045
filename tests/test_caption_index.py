"""Search: exact against brute force with ties, tombstones and segments; IVF and HNSW with measured recall."""

from pathlib import Path

import numpy as np
import pytest
import torch

from clipcap_rag.caption_index import CaptionIndex
from clipcap_rag.config import IndexConfig
from clipcap_rag.errors import InputError
from clipcap_rag.index_store import SegmentWriter, caption_batch, write_index_manifest
from clipcap_rag.search_structure import build_search_structure, plan_search


def unit(vectors: np.ndarray) -> np.ndarray:
    return (vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)).astype(np.float32)


def clustered(rows: int, dim: int, seed: int = 0) -> np.ndarray:
    """Unit vectors around a few centres, as embeddings of captions are."""
    centres, generator = np.random.default_rng(99).normal(size=(20, dim)), np.random.default_rng(seed)
    return unit(centres[generator.integers(0, 20, rows)] + 0.6 * generator.normal(size=(rows, dim)))


def write_index(folder: Path, parts, captions=None, image_ids=None, tombstones=(), key="Flat", clip="tiny") -> Path:
    row, segments = 0, []
    for number, vectors in enumerate(parts, start=1):
        segment, rows = folder / "segments" / f"{number:06d}", range(row, row + len(vectors))
        with SegmentWriter(segment, vectors.shape[1]) as writer:
            columns = {
                "caption": [captions[i] if captions else f"A boat numbered {i}." for i in rows],
                "caption_id": [str(i) for i in rows],
                "image_id": [image_ids[i] if image_ids else None for i in rows],
                "source": [None for _ in rows],
                "meta": [{} for _ in rows],
            }
            writer.append(caption_batch(columns), vectors)
        search = build_search_structure(
            segment / "embeddings.npy", IndexConfig(index_key=key), segment / "search.faiss"
        )
        segments.append({"name": f"{number:06d}", "rows": len(vectors), "search": search})
        row += len(vectors)
    if len(tombstones):
        np.save(folder / "tombstones-000001.npy", np.array(tombstones, np.int64))
    write_index_manifest(
        folder,
        revision=3,
        encoder={"clip": clip, "dim": parts[0].shape[1], "probes": {}},
        segments=segments,
        tombstones="tombstones-000001.npy" if len(tombstones) else None,
        provenance={},
        licence=None,
    )
    return folder


def brute_force(vectors: np.ndarray, queries: np.ndarray, k: int, live=None) -> tuple[np.ndarray, np.ndarray]:
    """The k best by full sort over the float16 rows; equal scores in order of rows."""
    scores = (queries.astype(np.float64) @ vectors.astype(np.float16).astype(np.float64).T).astype(np.float32)
    if live is not None:
        scores[:, ~live] = -np.inf
    rows = np.broadcast_to(np.arange(len(vectors)), scores.shape)
    order = np.lexsort((rows, -scores))[:, :k]
    scores = np.take_along_axis(scores, order, 1)
    return scores, np.where(np.isfinite(scores), order, -1)


def assert_same_search(index: CaptionIndex, vectors, queries, k, live=None) -> None:
    scores, rows = index.search(queries, k)
    expected_scores, expected_rows = brute_force(vectors, queries, k, live)
    np.testing.assert_array_equal(rows, expected_rows)
    np.testing.assert_allclose(scores, expected_scores, atol=1e-6)
    assert scores.dtype == np.float32 and rows.dtype == np.int64


@pytest.mark.parametrize("dim", [7, 64])
@pytest.mark.parametrize("k", [1, 10, 100])
def test_exact_search_equals_brute_force(tmp_path, monkeypatch, dim, k):
    monkeypatch.setattr("clipcap_rag.exact_search.BLOCK", 300)  # several blocks, the last not full
    vectors = clustered(1000, dim)
    index = CaptionIndex.open(write_index(tmp_path / "boats", [vectors]), device="cpu")
    assert_same_search(index, vectors, unit(np.random.default_rng(1).normal(size=(30, dim))), k)


def test_ties_come_in_order_of_rows_even_where_they_cross_k_and_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr("clipcap_rag.exact_search.BLOCK", 64)
    generator = np.random.default_rng(2)
    vectors = clustered(25, 16)[generator.integers(0, 25, 1000)]  # each vector about forty times
    index = CaptionIndex.open(write_index(tmp_path / "boats", [vectors]), device="cpu")
    queries = np.concatenate([vectors[:5], unit(generator.normal(size=(5, 16))), np.zeros((1, 16), np.float32)])
    for k in (1, 3, 39, 40, 41, 300):
        assert_same_search(index, vectors, queries, k)


def test_one_vector_repeated_throughout(tmp_path):
    vectors = np.tile(clustered(1, 16), (500, 1))
    index = CaptionIndex.open(write_index(tmp_path / "boats", [vectors]), device="cpu")
    np.testing.assert_array_equal(index.search(vectors[:2], 7)[1], [np.arange(7)] * 2)


def test_segments_and_tombstones(tmp_path, monkeypatch):
    monkeypatch.setattr("clipcap_rag.exact_search.BLOCK", 50)
    vectors = clustered(400, 16)
    dead = np.unique(np.random.default_rng(3).integers(0, 400, 150))
    live = np.ones(400, bool)
    live[dead] = False
    live[100:150], dead = False, np.union1d(dead, np.arange(100, 150))  # a whole block
    parts = [vectors[:210], vectors[210:211], vectors[211:]]
    index = CaptionIndex.open(write_index(tmp_path / "boats", parts, tombstones=dead), device="cpu")
    assert len(index) == live.sum()
    for k in (1, 20, int(live.sum()), 400):
        assert_same_search(index, vectors, clustered(9, 16, seed=4), k, live)


def test_k_beyond_the_index_is_padded(tmp_path):
    vectors = clustered(5, 8)
    index = CaptionIndex.open(write_index(tmp_path / "boats", [vectors], tombstones=[2]), device="cpu")
    scores, rows = index.search(vectors[:2], 9)
    assert scores.shape == rows.shape == (2, 9)
    assert (rows[:, 4:] == -1).all() and np.isneginf(scores[:, 4:]).all()
    assert all(sorted(found) == [0, 1, 3, 4] for found in rows[:, :4].tolist())
    np.testing.assert_array_equal(index.embeddings(rows)[:, 4:], np.zeros((2, 5, 8)))


def test_no_neighbours_and_no_queries_are_legal(tmp_path):
    vectors = clustered(5, 8)
    index = CaptionIndex.open(write_index(tmp_path / "boats", [vectors]), device="cpu")
    assert [part.shape for part in index.search(vectors, 0)] == [(5, 0), (5, 0)]
    assert [part.shape for part in index.search(vectors[:0], 3)] == [(0, 3), (0, 3)]


def test_an_index_with_everything_removed_finds_nothing(tmp_path):
    vectors = clustered(3, 8)
    index = CaptionIndex.open(write_index(tmp_path / "boats", [vectors], tombstones=[0, 1, 2]), device="cpu")
    assert len(index) == 0 and (index.search(vectors, 2)[1] == -1).all()


@pytest.mark.parametrize(
    ("queries", "words"),
    [
        (np.zeros((2, 9), np.float32), "built with tiny of width 8"),
        (np.zeros(8, np.float32), "do not fit index boats"),
        (np.full((1, 8), np.nan, np.float32), "undefined"),
    ],
)
def test_queries_that_do_not_fit_are_refused(tmp_path, queries, words):
    index = CaptionIndex.open(write_index(tmp_path / "boats", [clustered(5, 8)]), device="cpu")
    with pytest.raises(InputError, match=words):
        index.search(queries, 1)


def test_what_an_open_index_says_of_itself_and_of_its_rows(tmp_path):
    vectors = clustered(3, 8)
    folder = write_index(tmp_path / "boats", [vectors], image_ids=["a", None, "b"])
    index = CaptionIndex.open(folder, device="cpu")
    assert (index.name, index.path, index.revision, index.dim, len(index)) == ("boats", folder, 3, 8, 3)
    assert index.encoder["clip"] == "tiny"
    assert index.captions([2, 0]) == ["A boat numbered 2.", "A boat numbered 0."]
    assert index.image_ids([2, 1]) == ["b", None]
    np.testing.assert_array_equal(index.embeddings([1]), vectors[[1]].astype(np.float16).astype(np.float32))


def test_rows_of_images_leaves_out_removed_ones(tmp_path):
    image_ids = ["p", "q", None, "p", "p"]
    folder = write_index(
        tmp_path / "boats",
        [clustered(3, 8), clustered(2, 8)],
        [f"boat {n}" for n in range(5)],
        image_ids,
        tombstones=[4],
    )
    index = CaptionIndex.open(folder, device="cpu")
    assert index.rows_of_images({"p"}).tolist() == [0, 3]
    assert index.rows_of_images({"p", "q", "r"}).tolist() == [0, 1, 3]
    assert index.rows_of_images({"r"}).tolist() == []


@pytest.mark.parametrize(
    ("key", "parameter"),
    [("IVF32,Flat", "nprobe"), ("HNSW16", "efSearch"), ("IVF32,SQfp16", "nprobe"), ("PCA16,IVF16,Flat", "nprobe")],
)
def test_search_structures_reach_their_recall_and_give_exact_scores(tmp_path, key, parameter):
    vectors = clustered(3000, 16)
    folder = write_index(tmp_path / "boats", [vectors[:2000], vectors[2000:]], key=key)
    index = CaptionIndex.open(folder, device="cpu")
    for segment in index.files.manifest["segments"]:
        search = segment["search"]
        assert search["key"] == key and search["queries"] == "text" and search["recall_at_10"] >= 0.95
        assert search["parameters"][parameter] >= 1
    queries = clustered(50, 16, seed=5)
    scores, rows = index.search(queries, 10)
    expected = brute_force(vectors, queries, 10)[1]
    assert np.mean([len(np.intersect1d(*pair)) / 10 for pair in zip(rows, expected, strict=True)]) >= 0.9
    exact = np.einsum("bkd,bd->bk", index.embeddings(rows), queries)
    np.testing.assert_allclose(scores, exact, atol=1e-6)
    assert (np.diff(scores, axis=1) <= 0).all()


def test_a_search_structure_respects_tombstones_and_still_fills_k(tmp_path):
    vectors = clustered(1500, 16)
    dead = np.arange(0, 1500, 2)
    folder = write_index(tmp_path / "boats", [vectors], tombstones=dead, key="IVF30,Flat")
    index = CaptionIndex.open(folder, device="cpu")
    rows = index.search(vectors[:20], 10)[1]
    assert (rows % 2 == 1).all()
    live = np.arange(1500) % 2 == 1
    assert_same_search(index, vectors, vectors[:3], 1500, live)  # beyond the probed lists: exact


@pytest.mark.parametrize("key", ["Flat", "IVF30,Flat", "HNSW16"])
def test_only_some_rows_may_be_found(tmp_path, key):
    vectors, queries = clustered(1500, 16), clustered(30, 16, seed=6)
    dead = np.arange(0, 1500, 3)
    folder = write_index(tmp_path / "boats", [vectors[:1000], vectors[1000:]], tombstones=dead, key=key)
    index = CaptionIndex.open(folder, device="cpu")
    for share in (0.5, 0.05, 0.0):  # the second and third are so few that structures are left aside
        among = np.random.default_rng(7).random(1500) < share
        allowed = among & (np.arange(1500) % 3 > 0)
        scores, rows = index.search(queries, 10, among=among)
        expected_scores, expected = brute_force(vectors, queries, 10, allowed)
        assert allowed[rows[rows >= 0]].all()
        if key == "Flat" or share < 1 / 8:
            np.testing.assert_array_equal(rows, expected)
            np.testing.assert_allclose(scores, expected_scores, atol=1e-6)
        else:
            assert np.mean([len(np.intersect1d(*pair)) for pair in zip(rows, expected, strict=True)]) >= 9


def test_ivf_is_memory_mapped(tmp_path):
    folder = write_index(tmp_path / "boats", [clustered(1500, 16)], key="IVF30,Flat")
    index = CaptionIndex.open(folder, device="cpu")
    file = str(folder / "segments" / "000001" / "search.faiss")
    assert file in Path("/proc/self/maps").read_text() and len(index) == 1500


def test_a_poor_or_slow_structure_is_reported(tmp_path, capsys):
    np.save(tmp_path / "embeddings.npy", clustered(20_000, 16).astype(np.float16))
    config = IndexConfig(index_key="PQ1x4", index_latency=1e-6)
    report = build_search_structure(tmp_path / "embeddings.npy", config, tmp_path / "search.faiss")
    assert report["recall_at_10"] < 0.95
    said = capsys.readouterr().err
    assert "of the ten nearest captions" in said and "more than --index-latency" in said


@pytest.mark.parametrize("rows", [1, 1_000_000])
def test_auto_is_exact_up_to_a_million_rows(rows):
    assert plan_search(IndexConfig(), rows, 64) is None


def test_auto_is_an_inverted_file_beyond():
    assert plan_search(IndexConfig(index_memory=100), 4_000_000, 64) == "IVF8000,Flat"


@pytest.mark.parametrize(
    ("config", "rows", "words"),
    [
        (IndexConfig(index_key="IVF"), 1000, "'IVF' does not suit"),
        (IndexConfig(index_key="sentences"), 1000, "'sentences' does not suit"),
        (IndexConfig(index_key="PQ7"), 1000, "'PQ7' does not suit"),
        (IndexConfig(index_key="IVF2000,Flat"), 1000, "asks for 2000 clusters of 1000 captions"),
        (IndexConfig(index_key="HNSW32", index_memory=0.001), 100_000, "raise --index-memory"),
    ],
)
def test_a_key_that_cannot_be_built_is_refused_in_a_sentence(config, rows, words):
    with pytest.raises(InputError, match=words) as caught:
        plan_search(config, rows, 64)
    assert "\n" not in str(caught.value)


def test_an_altered_search_structure_is_refused(tmp_path):
    folder = write_index(tmp_path / "boats", [clustered(300, 8)], key="SQfp16")
    (folder / "segments" / "000001" / "search.faiss").write_bytes(b"nothing")
    with pytest.raises(InputError, match="search.faiss"):
        CaptionIndex.open(folder, device="cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_gpu_that_is_not_there_is_an_error_when_demanded(tmp_path):
    folder = write_index(tmp_path / "boats", [clustered(5, 8)])
    with pytest.raises(InputError, match="no such GPU"):
        CaptionIndex.open(folder, device="gpu")
    CaptionIndex.open(folder, device="auto")


@pytest.mark.gpu
@pytest.mark.parametrize("key", ["Flat", "IVF32,Flat"])
def test_a_gpu_finds_what_the_cpu_finds(tmp_path, key):
    if not torch.cuda.is_available():
        pytest.skip("no GPU here")
    vectors = clustered(3000, 16)
    folder = write_index(tmp_path / "boats", [vectors], tombstones=[1, 5], key=key)
    queries = clustered(40, 16, seed=6)
    on_cpu, on_gpu = (CaptionIndex.open(folder, device).search(queries, 10) for device in ("cpu", "gpu"))
    np.testing.assert_array_equal(on_gpu[1], on_cpu[1])
    np.testing.assert_allclose(on_gpu[0], on_cpu[0], atol=1e-6)


@pytest.mark.parametrize(
    ("key", "effort"),
    [
        ("IVF64,Flat", "nprobe"),
        ("HNSW16", "ef_search"),
        ("PCA12,IVF64,Flat", "nprobe"),
        ("IVF64,PQ4x4,RFlat", "nprobe"),
    ],
)
def test_a_query_may_look_at_more_or_less_than_was_tuned(tmp_path, key, effort):
    vectors = clustered(3000, 16)
    folder = write_index(tmp_path / "boats", [vectors], key=key)
    queries = clustered(100, 16, seed=7)
    truth = brute_force(vectors, queries, 10)[1]

    def recall(index, **given):
        rows = index.search(queries, 10, **given)[1]
        return np.mean([len(np.intersect1d(*pair)) / 10 for pair in zip(rows, truth, strict=True)])

    index = CaptionIndex.open(folder, "cpu")
    little, tuned, all_ = recall(index, **{effort: 1}), recall(index), recall(index, **{effort: 3000})
    assert little < all_ and tuned <= all_ + 0.01 and (all_ == 1 or key != "IVF64,Flat")
    assert recall(CaptionIndex.open(folder, "cpu", **{effort: 1})) == little
    assert recall(index) == tuned, "what one search was given does not stay"
    other = {"nprobe": "ef_search", "ef_search": "nprobe"}[effort]
    for wrong, words in (({other: 4}, f"not searched with {other}"), ({effort: 0}, "at least 1")):
        with pytest.raises(InputError, match=words):
            index.search(queries, 1, **wrong)


@pytest.mark.parametrize("key", ["IVF30,Flat", "Flat"])
def test_what_does_not_fit_a_gpu_is_searched_on_the_cpu(tmp_path, monkeypatch, capsys, key):
    vectors = clustered(1500, 16)
    folder = write_index(tmp_path / "boats", [vectors], key=key)
    monkeypatch.setattr("clipcap_rag.caption_index.gpu_number", lambda device: 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 2000))
    index = CaptionIndex.open(folder, "gpu")
    assert index.search(vectors[:20], 1)[1][:, 0].tolist() == list(range(20))
    said = capsys.readouterr().err
    assert "GB of GPU" in said and said.count("using the CPU") == 1


def test_recall_is_tuned_with_the_queries_that_are_given(tmp_path):
    vectors = clustered(2000, 16)
    np.save(tmp_path / "embeddings.npy", vectors.astype(np.float16))
    easy, hard = vectors[:100], unit(np.random.default_rng(3).normal(size=(100, 16)))
    config = IndexConfig(index_key="IVF64,Flat")
    reports = [
        build_search_structure(tmp_path / "embeddings.npy", config, tmp_path / "search.faiss", queries)
        for queries in (easy, hard)
    ]
    assert [report["queries"] for report in reports] == ["images", "images"]
    assert reports[0]["parameters"]["nprobe"] < reports[1]["parameters"]["nprobe"]
    assert min(report["recall_at_10"] for report in reports) >= 0.95
