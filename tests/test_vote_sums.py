"""Sums over votes: right whatever is remembered, and remembered within bounds."""

import numpy as np
import pytest

from clipcap_rag import vote_sums
from clipcap_rag.caption_votes import Votes
from clipcap_rag.vote_sums import VoteSums


def counted(caption):
    return {letter: float(caption.count(letter)) for letter in caption}


def expected(votes):
    letters = {letter for caption in votes.captions for letter in caption}
    return {letter: sum(weight * caption.count(letter) for caption, weight in votes) for letter in letters}


@pytest.mark.parametrize("most", [2, 500])
def test_sums_are_those_of_the_votes_however_much_is_forgotten(monkeypatch, most):
    monkeypatch.setattr(vote_sums, "_MOST", most)
    sums, random = VoteSums(counted), np.random.default_rng(0)
    for _ in range(30):
        captions = ["".join(random.choice(list("abcdefgh"), 5)) for _ in range(4)]
        votes = Votes(captions, random.standard_normal(4))
        total = sums.total(votes)
        found = {letter: total[number] for number, letter in enumerate(sums.terms) if letter in "".join(captions)}
        assert found == pytest.approx(expected(votes))
        assert len(sums.terms) <= most + 8
        own = sums.product(captions[0], total)
        assert own == pytest.approx(sum(captions[0].count(letter) * found[letter] for letter in set(captions[0])))
        assert sums.product("xyz", total) == 0.0


def test_no_votes_say_nothing():
    assert not VoteSums(counted).total(Votes()).any()
