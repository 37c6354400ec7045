"""Retriever: own captions and equal strings never come back, duplicates are dropped, several indexes merge."""

import math

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clipcap_rag.caption_index import CaptionIndex
from clipcap_rag.config import IndexConfig, RetrievalConfig
from clipcap_rag.errors import InputError
from clipcap_rag.image_table import IndexPhotos, write_images
from clipcap_rag.index_store import SegmentWriter, caption_batch, write_index_manifest
from clipcap_rag.photo_neighbors import stored_neighbors
from clipcap_rag.retrievable import Exclusion
from clipcap_rag.retriever import Retriever
from clipcap_rag.search_structure import build_search_structure
from clipcap_rag.sources import normalize_caption

DIM = 6
WORDS = ["a red kite", "A red kite.", "two boats", "a dog", "a dog!", "the old mill", "snow"]


class FakeIndex:
    """An index in memory with the reading side of CaptionIndex, searched by brute force."""

    def __init__(self, captions, image_ids, vectors, name="fake"):
        self.texts, self.ids, self.vectors, self.name = captions, image_ids, vectors, name
        self.dim, self.encoder = vectors.shape[1], {"clip": "fake"}

    def __len__(self):
        return len(self.texts)

    def search(self, queries, k, among=None):
        scores = queries @ self.vectors.T
        rows = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        return np.take_along_axis(scores, rows, axis=1), rows

    def captions(self, rows):
        return [self.texts[row] for row in rows]

    def image_ids(self, rows):
        return [self.ids[row] for row in rows]

    def embeddings(self, rows):
        return self.vectors[rows]


def unit(rows, seed):
    vectors = np.random.default_rng(seed).standard_normal((rows, DIM)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


entries = st.lists(st.tuples(st.sampled_from(WORDS), st.sampled_from(["p", "q", "r", None])), min_size=1, max_size=60)


@settings(max_examples=150, deadline=None)
@given(
    entries, st.integers(0, 12), st.sampled_from(["p", "q", "z"]), st.sets(st.sampled_from(WORDS)), st.integers(0, 99)
)
def test_own_words_are_never_retrieved_and_all_allowed_ones_are(rows, k, image_id, own, seed):
    index = FakeIndex([text for text, _ in rows], [photo for _, photo in rows], unit(len(rows), seed))
    found = Retriever([index]).search(unit(1, seed + 1), k, [Exclusion.of(image_id, list(own))])
    forbidden = {normalize_caption(text) for text in own}
    allowed = {normalize_caption(text) for text, photo in rows if photo != image_id} - forbidden
    texts = [normalize_caption(text) for text in found.captions[0]]
    assert found.rows.shape == (1, k)
    assert len(texts) == min(k, len(allowed)) == found.mask.sum()
    assert set(texts) <= allowed and len(set(texts)) == len(texts)
    assert all(index.ids[row] != image_id for row in found.rows[0][found.mask[0]])
    assert np.all(np.diff(found.scores[0][found.mask[0]]) <= 0)
    assert np.array_equal(found.embeddings[0][found.mask[0]], index.vectors[found.rows[0][found.mask[0]]])
    assert not found.embeddings[0][~found.mask[0]].any()


def test_many_own_captions_do_not_crowd_out_the_others():
    query = unit(1, 0)
    near = np.repeat(query, 500, axis=0)
    index = FakeIndex(
        [f"own {n}" for n in range(500)] + ["another"], ["p"] * 500 + ["q"], np.concatenate([near, -query])
    )
    found = Retriever([index]).search(query, 3, [Exclusion.of("p", [])])
    assert found.captions == [["another"]]


def test_weights_order_the_merge_and_cosines_are_reported():
    query = unit(1, 0)
    first = FakeIndex(["a red kite"], [None], 0.9 * query, "first")
    second = FakeIndex(["two boats", "A red kite."], [None, None], np.concatenate([0.8 * query, 0.5 * query]), "second")
    plain = Retriever([first, second]).search(query, 3).listed()[0]
    assert [(found.caption, found.index) for found in plain] == [("a red kite", "first"), ("two boats", "second")]
    weighed = Retriever([first, second], [0.5, 1.0]).search(query, 3).listed()[0]
    assert [found.caption for found in weighed] == ["two boats", "A red kite."]
    assert weighed[0].score == pytest.approx(0.8)


def test_indexes_of_different_width_are_refused():
    other = FakeIndex(["x"], [None], np.ones((1, DIM + 1), np.float32), "other")
    with pytest.raises(InputError, match="different CLIP models"):
        Retriever([FakeIndex(["y"], [None], unit(1, 0)), other])


def made_index(folder, rows, seed, key="Flat", photos=True):
    """An index on the disk: captions of few words, so that many are equal, by photos of three captions each."""
    random = np.random.default_rng(seed)
    name = lambda: random.choice(["dog", "Cat", "boat", "kite", "hill"])  # noqa: E731
    columns = {
        "caption": [f"a {name()} and a {name()}{random.choice(['', '.'])} {row % 7}" for row in range(rows)],
        "caption_id": [str(row) for row in range(rows)],
        "image_id": [None if row % 9 == 8 else f"photo{row // 3}" for row in range(rows)],
        "source": [str(source) for source in random.choice(["wiki", "news", "mine"], rows, p=[0.48, 0.48, 0.04])],
        "meta": [{"language": "de" if row % 5 else "en"} for row in range(rows)],
    }
    segment = folder / "segments" / "000001"
    with SegmentWriter(segment, DIM) as writer:
        writer.append(caption_batch(columns), unit(rows, seed))
    search = build_search_structure(segment / "embeddings.npy", IndexConfig(index_key=key), segment / "search.faiss")
    np.save(folder / "tombstones-000001.npy", np.arange(0, rows, 11))
    if photos:
        ids = [f"photo{number}" for number in range(0, rows // 3)]
        write_images(folder / "images-000001.arrow", IndexPhotos(pa.array(ids), unit(len(ids), seed + 50)))
    write_index_manifest(
        folder, revision=1, encoder={"clip": "tiny", "dim": DIM, "probes": {}}, licence=None, provenance={},
        segments=[{"name": "000001", "rows": rows, "search": search}],
        tombstones="tombstones-000001.npy", images="images-000001.arrow" if photos else None,
    )  # fmt: skip
    return CaptionIndex.open(folder, "cpu")


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """Two indexes of different captions with photos, and one without."""
    folder = tmp_path_factory.mktemp("real")
    return [made_index(folder / "first", 300, 1), made_index(folder / "second", 150, 2),
            made_index(folder / "third", 60, 3, photos=False)]  # fmt: skip


def allowed_by_hand(index, where, denied=()):
    """Rows that are there, meet all conditions (of one field any) and hold none of the denied words."""
    rows = []
    for row, record in enumerate(index.files.records(np.arange(index.files.rows))):
        values = {**record, **{f"meta.{key}": value for key, value in record["meta"].items()}}
        fields = {condition.partition("=")[0] for condition in where}
        fits = all(any(f"{field}={values[field]}" == condition for condition in where) for field in fields)
        words = f" {normalize_caption(record['caption'])} "
        if index.files.live[row] and fits and not any(f" {word} " in words for word in denied):
            rows.append(row)
    return rows


def ranked_by_hand(indexes, weights, query, route, where, denied):
    """All allowed (index number, row, score) by weight x cosine; captions of one photo by their own cosine."""
    ranked = []
    for number, (index, weight) in enumerate(zip(indexes, weights, strict=True)):
        images = index.files.images
        places = {} if images is None else {name: place for place, name in enumerate(images.ids.to_pylist())}
        for row in allowed_by_hand(index, where, denied):
            own = float(index.embeddings([row])[0].astype(np.float64) @ query)
            score = own
            if route == "image":
                place = places.get(index.image_ids([row])[0])
                if place is None:
                    continue
                score = float(images.vectors[place].astype(np.float64) @ query)
            ranked.append((-weight * score, number, -own, row, score))
    return [(number, row, score) for _, number, _, row, score in sorted(ranked)]


def expected_neighbors(indexes, k, query, weights, most, route="text", where=(), denied=()):
    """What `Retriever` promises, the slow way."""
    routes = ["text", "image"] if route == "both" else [route]
    lists = [ranked_by_hand(indexes, weights, query, one, where, denied) for one in routes]
    kept, seen = [], set()
    for place in range(max(map(len, lists))):
        for one, ranked in zip(routes, lists, strict=True):
            if place >= len(ranked) or len(kept) == k:
                continue
            number, row, score = ranked[place]
            text = normalize_caption(indexes[number].captions([row])[0])
            if text not in seen and sum(hit[0] == indexes[number].name for hit in kept) < most[number]:
                seen.add(text)
                kept.append((indexes[number].name, row, one, pytest.approx(score, abs=1e-5)))
    return kept


@pytest.mark.parametrize("route", ["text", "image"])
@pytest.mark.parametrize(
    "where", [(), ("source=wiki",), ("source=mine", "meta.language=en"), ("source=mine", "source=news")]
)
@pytest.mark.parametrize("denied", [(), ("kite", "a dog and")])
@pytest.mark.parametrize("most", [(math.inf, math.inf), (2, math.inf), (3, 0), (1, 4)])
def test_filters_denials_limits_and_routes_are_exact(real, tmp_path, route, where, denied, most):
    deny = tmp_path / "deny.txt"
    deny.write_text("\n".join(denied))
    indexes, queries, weights = real[:2], unit(4, 77), [0.8, 1.0]
    config = RetrievalConfig(route=route, where=where, deny=str(deny) if denied else "")
    limits = [None if limit == math.inf else limit for limit in most]
    for k in (1, 6, 200):
        found = Retriever(indexes, weights, limits, config).search(queries, k)
        for query, hits in zip(queries, found.listed(), strict=True):
            expected = expected_neighbors(indexes, k, query, weights, most, route, where, denied)
            assert [(hit.index, hit.row, hit.route, hit.score) for hit in hits] == expected
        present = found.mask
        own = np.einsum("bkd,bd->bk", found.embeddings, queries)
        np.testing.assert_allclose(found.scores[present], own[present], atol=1e-5)  # what a mapper reads
        assert found.rows.shape == (4, k)


def test_both_routes_take_turns(real):
    queries, config = unit(4, 78), RetrievalConfig(route="both")
    found = Retriever(real, config=config).search(queries, 7)
    for query, hits in zip(queries, found.listed(), strict=True):
        lists = {
            route: [(number, row) for number, row, _ in ranked_by_hand(real, [1, 1, 1], query, route, (), ())]
            for route in ("text", "image")
        }
        names = [index.name for index in real]
        assert [hit.route for hit in hits[:2]] == ["text", "image"]
        assert (names.index(hits[0].index), hits[0].row) == lists["text"][0]
        assert (names.index(hits[1].index), hits[1].row) == lists["image"][0]
        assert len({normalize_caption(hit.caption) for hit in hits}) == 7
    hits = found.listed()[0]
    assert [(hit.index, hit.row) for hit in hits] == [
        (name, row) for name, row, _, _ in expected_neighbors(real, 7, queries[0], [1, 1, 1], [math.inf] * 3, "both")
    ]


@pytest.mark.parametrize("key", ["IVF8,Flat", "HNSW16"])
def test_rare_captions_are_found_behind_a_search_structure(tmp_path, key):
    index, query = made_index(tmp_path / "large", 600, 5, key), unit(3, 79)
    where = ("source=mine", "meta.language=en")
    expected = len({normalize_caption(text) for text in index.captions(allowed_by_hand(index, where))})
    found = Retriever([index], config=RetrievalConfig(where=where)).search(query, 50)
    assert 0 < expected < 50 and (found.mask.sum(axis=1) == expected).all()


def test_an_image_retrieves_its_own_words_by_no_route(real):
    query, config = np.asarray(real[0].files.images.vectors[:1], np.float32), RetrievalConfig(route="both")
    exclusions = [Exclusion.of("photo0", ["a dog and a dog 1"])]
    (own,) = Retriever(real[:1], config=config).search(query, 4).listed()
    assert "photo0" in real[0].image_ids([hit.row for hit in own])
    (hits,) = Retriever(real[:1], config=config).search(query, 400, exclusions).listed()
    assert "photo0" not in real[0].image_ids([hit.row for hit in hits])
    assert "a dog and a dog 1" not in {normalize_caption(hit.caption) for hit in hits}


def test_what_cannot_be_retrieved_is_refused(real):
    with pytest.raises(InputError, match="no caption of first and third meets source=wkii"):
        Retriever([real[0], real[2]], config=RetrievalConfig(where=["source=wkii"]))
    with pytest.raises(InputError, match="third holds no image embeddings for route image"):
        Retriever(real, config=RetrievalConfig(route="image"))
    with pytest.raises(InputError, match="third holds no image embeddings for route both"):
        Retriever(real[2:], config=RetrievalConfig(route="both"))
    with pytest.raises(InputError, match="FIELD=VALUE"):
        Retriever(real, config=RetrievalConfig(where=["wiki"]))
    with pytest.raises(InputError, match="give a list of conditions"):
        RetrievalConfig(where="source=wiki")


def test_stored_neighbors_are_kept_and_follow_the_index(world):
    features, index = world.features, world.index
    rows = stored_neighbors(features, index, 4)
    assert rows.shape == (len(features), 4) and rows.dtype == np.int64
    for photo, found in enumerate(rows):
        own = {normalize_caption(text) for text in features.captions[photo]}
        present = found[found >= 0]
        assert own.isdisjoint(normalize_caption(text) for text in index.captions(present))
        assert features.image_ids[photo] not in index.image_ids(present)
    kept = features.path / f"neighbors-{index.name}.npy"
    kept.with_suffix(".json").write_text("{}")
    kept.write_bytes(b"rubbish")
    assert np.array_equal(stored_neighbors(features, index, 4), rows)
    assert np.array_equal(np.load(kept), rows)


def test_versions_of_one_image_keep_some_of_its_neighbors():
    index = FakeIndex(WORDS, ["p"] * 7, unit(7, 1))
    (whole,) = (Retriever([index]).search(unit(1, 2), 9),)  # two captions are repeated, so four are absent
    kept = np.array([[True] * 9, [False] * 9, [True, False, True, False, True] + [True] * 4])
    versions = whole.versions(kept)
    first, none, some = versions.captions
    assert first == whole.captions[0] and none == [] and some == whole.captions[0][::2]
    assert versions.mask.tolist() == (whole.mask & kept).tolist()
    assert [neighbor.caption for neighbor in versions.listed()[0]] == first
    for name in ("scores", "sources", "embeddings"):
        assert (getattr(versions, name) == getattr(whole, name)).all()
