"""Rerank: the order follows the score, duplicates are merged."""

import numpy as np
import pytest

from clipcap_rag.generation import Written
from clipcap_rag.rerank import RerankWeights, by_likelihood, by_similarity, distinct, reweighted

WRITTEN = [
    Written("a red kite", (1, 2, 9), -3.0),
    Written("a blue kite", (1, 3, 4, 9), -6.0),
    Written("a red kite", (5, 9), -2.0),
    Written("", (9,), -0.1),
]


def test_equal_strings_are_one_candidate_and_the_likeliest_stays():
    kept = distinct(WRITTEN)
    assert [candidate.caption for candidate in kept] == ["a red kite", "a blue kite"]
    assert kept[0].log_probability == -2.0


def test_similarity_alone_and_with_likelihood():
    kept, embeddings, image = distinct(WRITTEN), np.array([[0.30, 1], [0.32, 2]]), np.array([1.0, 0.0])
    alone = by_similarity(kept, embeddings, image, 100.0, RerankWeights(0.0, 0.0))
    assert [candidate.caption for candidate in alone] == ["a blue kite", "a red kite"]
    assert alone[0].score == pytest.approx(0.32)
    weighed = by_similarity(kept, embeddings, image, 100.0, RerankWeights(5.0, 0.0))
    assert [candidate.caption for candidate in weighed] == ["a red kite", "a blue kite"]
    assert weighed[0].score == pytest.approx(0.30 - 5 * 1.0 / 100)
    assert weighed[1].score == pytest.approx(0.32 - 5 * 1.5 / 100)
    assert weighed[0].clip_similarity == pytest.approx(0.30)
    assert reweighted(alone, 100.0, RerankWeights(5.0, 0.0)) == weighed
    assert [candidate.embedding[1] for candidate in weighed] == [1, 2]  # it moves with its caption


def test_agreement_with_neighbours_counts():
    kept, embeddings, image = distinct(WRITTEN), np.array([[0.30, 1], [0.32, 2]]), np.array([1.0, 0.0])
    judged = by_similarity(kept, embeddings, image, 100.0, RerankWeights(0.0, 10.0), [0.5, 0.1])
    assert [(one.caption, one.agreement) for one in judged] == [("a red kite", 0.5), ("a blue kite", 0.1)]
    assert judged[0].score == pytest.approx(0.30 + 10 * 0.5 / 100)


def test_beams_that_agree_with_neighbours_go_first():
    ranked = by_likelihood(
        WRITTEN[:2], np.zeros((2, 2)), np.zeros(2), [0.1, 0.4], RerankWeights(2.0, 20.0).agreement_share
    )
    plain = by_likelihood(WRITTEN[:2], np.zeros((2, 2)), np.zeros(2))
    for one in ranked:
        (same,) = [other for other in plain if other.tokens == one.tokens]
        assert one.score == pytest.approx(same.score + 10 * one.agreement)
    assert ranked[0].agreement == 0.4 and RerankWeights(0.0, 20.0).agreement_share == 0


def test_likelihood_order_is_the_mean_per_token():
    ranked = by_likelihood(WRITTEN[:3], np.zeros((3, 2)), np.zeros(2))
    assert [candidate.score for candidate in ranked] == pytest.approx([-1.0, -1.0, -1.5])
