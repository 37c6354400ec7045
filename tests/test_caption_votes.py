"""Votes: what captions that match, and captions of photos that look alike, say about a photo."""

import dataclasses
import shutil

import numpy as np
import pytest

from clipcap_rag.baselines import nearest_captions
from clipcap_rag.caption_index import CaptionIndex
from clipcap_rag.caption_votes import Votes, joint_votes, photo_weights
from clipcap_rag.cli import main
from clipcap_rag.config import RetrievalConfig
from clipcap_rag.embeddings import Embeddings
from clipcap_rag.encoder import Encoder
from clipcap_rag.evidence import versions
from clipcap_rag.generation import Written
from clipcap_rag.index_images import add_images
from clipcap_rag.index_ngrams import ngram_weights
from clipcap_rag.model import load_tokenizer
from clipcap_rag.ngram_agreement import NgramWeights
from clipcap_rag.ranker import Ranker
from clipcap_rag.retrievable import Exclusion
from clipcap_rag.retriever import Retriever
from clipcap_rag.word_bonus import neighbor_bonus, word_nats


def unit(*rows):
    vectors = np.array(rows, np.float32)
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def test_photos_estimate_as_a_gaussian_process_does():
    random = np.random.default_rng(0)
    photos, query, said = (
        unit(*random.standard_normal((9, 5))),
        unit(*random.standard_normal((1, 5)))[0],
        random.random(9),
    )
    trust = np.array([1.0] * 8 + [0.5])
    distances = ((photos[:, None] - photos[None]) ** 2).sum(-1)
    kernel = np.exp(-distances) + np.diag(1 / trust)
    expected = np.exp(-((photos - query) ** 2).sum(-1)) @ np.linalg.inv(kernel) @ said
    assert photo_weights(query, photos, trust) @ said == pytest.approx(expected, rel=1e-5)


def test_photos_alike_share_their_weight_and_far_ones_have_little():
    query, near, far = unit([1, 0, 0])[0], [1, 0.1, 0], [-1, 0.2, 0.3]
    alone = photo_weights(query, unit(near, far), np.ones(2))
    twice = photo_weights(query, unit(near, near, far), np.ones(3))
    assert alone[0] > 5 * abs(alone[1])
    assert twice[0] == pytest.approx(twice[1]) and twice[0] < alone[0] < 2 * twice[0]
    doubted = photo_weights(query, unit(near, far), np.array([0.1, 1.0]))
    assert 0 < doubted[0] < 0.5 * alone[0]


def test_captions_that_match_count_beside_photos_and_more_if_one_stands_out():
    captions, scores = [f"caption {number}" for number in range(100)], np.linspace(0.3, 0.4, 100)
    assert joint_votes(captions, scores, Votes()).weights == pytest.approx(np.full(100, 1 / 116))
    photos = Votes(["a", "b"], np.array([0.7, 0.3]))
    mixed = joint_votes(captions, scores, photos)
    assert list(mixed.captions) == [*captions, "a", "b"]
    assert mixed.weights[-2:] == pytest.approx([0.665, 0.285]) and mixed.weights[:100] == pytest.approx(0.05 / 116)
    standing_out = joint_votes(captions, np.append(scores[1:], 0.9), photos)
    assert standing_out.weights[99] > 10 * mixed.weights[99]
    assert standing_out.weights[-2] < 0.665
    assert joint_votes([], np.array([]), photos) is photos


@pytest.fixture(scope="module")
def index(world, tmp_path_factory):
    """The captions of the world's photos, with the photos."""
    folder = tmp_path_factory.mktemp("votes")
    shutil.copytree(world.index.path, folder / "index")
    add_images(folder / "index", world.features.path)
    return CaptionIndex.open(folder / "index", "cpu")


def votes_of(world, indexes, k=2, config=None, weights=None, most=None, vote=True):
    retriever = Retriever(indexes, weights, most, config, photos_vote=vote)
    own = [Exclusion.of(*photo) for photo in zip(world.features.image_ids, world.features.captions, strict=True)]
    return retriever.search(world.features.unit_embeddings(), k, own).photo_votes


def test_the_captions_of_the_nearest_photos_vote_but_never_a_photo_s_own(world, index):
    vectors, captions = world.features.unit_embeddings(), world.features.captions
    for photo, votes in enumerate(votes_of(world, [index], k=1)):
        others = [other for other in range(len(vectors)) if other != photo]
        near = sorted(others, key=lambda other: -(vectors[photo] @ vectors[other]))[:2]
        allowed = {text for text in (c for other in near for c in captions[other])} - set(captions[photo])
        assert set(votes.captions) == allowed
        weights = photo_weights(vectors[photo], vectors[near].astype(np.float16).astype(np.float32), np.ones(2))
        assert votes.weights.sum() == pytest.approx(weights.sum(), abs=1e-3)


def test_who_may_vote_is_a_matter_of_settings(world, index, tmp_path):
    assert votes_of(world, [index], vote=False) is None
    assert votes_of(world, [index], config=RetrievalConfig(route="text")) is None
    assert votes_of(world, [world.other_index]) is None
    assert votes_of(world, [index], k=0) is None
    (tmp_path / "deny.txt").write_text("\n".join(c for own in world.features.captions[:4] for c in own))
    denied = votes_of(world, [index], config=RetrievalConfig(deny=str(tmp_path / "deny.txt")))
    kept = {caption for own in world.features.captions[4:] for caption in own}
    assert all(set(votes.captions) <= kept for votes in denied) and any(votes.captions for votes in denied)
    only = votes_of(world, [index], config=RetrievalConfig(where=(f"image_id={world.features.image_ids[0]}",)))
    assert not only[0].captions and set(only[1].captions) <= set(world.features.captions[0])
    assert all(len(votes.captions) <= 3 for votes in votes_of(world, [index], most=[3]))
    full, half = (votes_of(world, [index], k=1, weights=[weight])[0].weights.sum() for weight in (1.0, 0.1))
    assert 0 < half < 0.5 * full
    assert votes_of(world, [index], weights=[0.0]) is None


def test_words_of_photos_that_look_alike_are_raised_and_agreed_with(world, index, tiny_lm):
    tokenizer = load_tokenizer(tiny_lm)
    captions, scores = ["a dog in the snow"] * 8, np.full(8, 0.5)
    photos = Votes(["a zeppelin in the snow", "a cat"], np.array([0.8, -0.1]))
    plain, seen = (word_nats(joint_votes(captions, scores, votes), Votes(), [index]) for votes in (Votes(), photos))
    assert "zeppelin" not in plain and seen["zeppelin"] > 1 and "cat" not in seen
    bonus = neighbor_bonus(tokenizer, [captions], [scores], [index], photos=[photos])
    first = tokenizer.encode(" zeppelin", add_special_tokens=False)[0]
    raised = dict(zip(bonus.tokens[0].tolist(), bonus.nats[0].tolist(), strict=True))
    assert raised[first] > 0.5
    weights = NgramWeights([caption] for caption in world.features.captions[0])
    common = weights.total(joint_votes(captions, scores, photos))
    assert weights.agreement("a zeppelin in the snow", common) > weights.agreement("a cat", common)


def test_captions_of_photos_that_agree_most_with_all_come_first(world, index):
    queries = world.features.unit_embeddings()
    own = [Exclusion(image_id, frozenset()) for image_id in world.features.image_ids]
    found = Retriever([index], photos_vote=True).search(queries, 6, own)
    plain = Retriever([index]).search(queries, 6, own)
    weights = ngram_weights([index])
    for listed, captions, votes, matches in zip(
        found.listed(), found.captions, found.photo_votes, found.matches()[0], strict=True
    ):
        total = weights.total(votes)
        agreed = {caption: weights.agreement(caption, total) for caption in votes.captions}
        assert [neighbor.route for neighbor in listed] == ["image"] * 3 + ["text"] * 3
        assert [agreed[caption] for caption in captions[:3]] == pytest.approx(sorted(agreed.values(), reverse=True)[:3])
        assert matches == captions[3:]
    for with_photos, without in zip(found.matches()[0], plain.captions, strict=True):
        assert [caption for caption in without if caption in with_photos] == with_photos
    assert nearest_captions(found) == [captions[0] for captions in plain.captions]
    assert plain.matches()[0] == plain.captions
    by_photo = Retriever([index], config=RetrievalConfig(route="image"), photos_vote=True).search(queries, 6, own)
    assert (
        by_photo.captions == Retriever([index], config=RetrievalConfig(route="image")).search(queries, 6, own).captions
    )


def test_agreement_counts_a_third_where_no_photos_vote(world, index):
    queries = world.features.unit_embeddings()[:1]
    found = Retriever([index], photos_vote=True).search(queries, 6)
    without = dataclasses.replace(found, photo_votes=None)
    written = [[Written("a brown dog", (1, 2), -1.0)]]
    weights, ranker = ngram_weights([index]), Ranker(Encoder.load(world.clip, "cpu"))
    for neighbors, share in ((found, 1.0), (without, 1 / 3)):
        (votes,) = neighbors.votes()
        expected = share * weights.agreement("a brown dog", weights.total(votes))
        assert list(ranker.agreements(written, neighbors)) == [[pytest.approx(expected)]]


def test_what_is_left_out_votes_no_more(world, index):
    retriever = Retriever([index], photos_vote=True)
    vectors = world.features.unit_embeddings()[:1]
    found = retriever.search(vectors, 4)
    _, shown = versions(Embeddings(vectors, np.ones(1, np.float32)), found, 4)
    for captions, votes in zip(shown.captions, shown.photo_votes, strict=True):
        gone = set(found.captions[0]) - set(captions)
        assert not gone & set(votes.captions)
        assert bool(captions) == bool(votes.captions)
    assert found.part(slice(0, 1)).photo_votes == found.photo_votes


def test_training_tells_how_an_index_gets_its_photos(world, index, tiny_lm, tmp_path, capsys):
    features = str(world.features.path)
    given = ["train", "--features", features, "--language-model", str(tiny_lm), "--device", "cpu", "--mapper-layers=1"]
    given += ["--mapper-heads=2", "--epochs=1", "--reward-epochs=0", "--num-neighbors=8", "--validation-fraction=0.3"]
    for own, told in ((world.index.path, True), (index.path, False), (world.other_index.path, False)):
        assert main([*given, "--index", str(own), "--out", str(tmp_path / own.parent.name / own.name)]) == 0
        assert (f"index add-images {own} --features {features}" in capsys.readouterr().err) == told
