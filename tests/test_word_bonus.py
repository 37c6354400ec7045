"""The bonus of neighbours' words: who gets one, where it is given, and when it is spent."""

import dataclasses
import shutil

import numpy as np
import pytest
import torch

from clipcap_rag.caption_index import CaptionIndex
from clipcap_rag.caption_votes import Votes, joint_votes, match_weights, near_weights
from clipcap_rag.captioner import Captioner
from clipcap_rag.config import GenerationConfig
from clipcap_rag.errors import InputError
from clipcap_rag.index_builder import build_caption_index
from clipcap_rag.index_editor import add_captions
from clipcap_rag.model import load_tokenizer
from clipcap_rag.token_bonus import TokenBonus
from clipcap_rag.word_bonus import caption_tokens, gram_nats, neighbor_bonus, word_nats, words_of


@pytest.fixture(scope="module")
def index(world, tiny_captions, tmp_path_factory):
    folder = tmp_path_factory.mktemp("words")
    file = folder / "captions.txt"
    file.write_text("\n".join([*tiny_captions, "a zeppelin by the sea"]))
    return build_caption_index([file], world.clip, folder / "index", device="cpu", dtype="float32")


def nats_of(captions, scores, *rest, **settings):
    """The nats of the words of neighbours where no photos vote."""
    near = Votes(captions, near_weights(scores))
    return word_nats(joint_votes(captions, scores, Votes()), near, *rest, **settings)


def test_words_keep_their_writing_but_not_the_capital_of_a_sentence():
    assert words_of("A dog chases Anna's ball, the dog-like one.") == {
        word.casefold(): word for word in ("a", "dog", "chases", "Anna's", "ball", "the", "dog-like", "one")
    }
    assert words_of("Anna meets Anna") == {"anna": "Anna", "meets": "meets"}


def test_rare_words_gain_and_usual_ones_do_not(index):
    captions = 20 * ["a zeppelin by the sea", "a zeppelin in the snow", "a brown dog in the snow"]
    nats = nats_of(captions, np.full(60, 0.5), [index])
    assert nats["zeppelin"] == max(nats.values()) > 0.9
    assert max(nats.get("a", 0.0), nats.get("by", 0.0)) < 0.15 * nats["zeppelin"]
    assert nats_of([], np.array([]), [index]) == {}


def test_few_neighbors_raise_less_than_many_that_say_the_same(index):
    captions = ["a zeppelin by the sea", "a zeppelin in the snow"]
    one, some, many = (nats_of(captions * n, np.full(2 * n, 0.5), [index])["zeppelin"] for n in (1, 4, 50))
    assert 3 * one < some < many / 2


def test_words_that_were_never_trained_on_gain_most(index):
    captions = ["a zeppelin by the sea", *["a brown dog in the snow"] * 3]
    known, new = (
        nats_of(captions, np.full(4, 0.5), [index], frozenset(trained))
        for trained in ({"a", "zeppelin", "brown", "dog", "sea", "snow", "the", "in", "by"}, {"dog"})
    )
    assert known == nats_of(captions, np.full(4, 0.5), [index])  # when nobody knows
    assert new["dog"] == known["dog"] and new["zeppelin"] > 3 * known["zeppelin"]


@pytest.mark.parametrize("trained", [frozenset(), frozenset({"dog"})])
def test_one_strong_match_counts_for_several(index, trained):
    captions = ["a zeppelin by the sea", "a brown dog in the snow", "a cat in the snow"]
    weak, strong = (
        nats_of(captions, np.array([score, 0.3, 0.3]), [index], trained, new_word_share=1.0)["zeppelin"]
        for score in (0.3, 0.6)
    )
    assert strong > 2 * weak > 0


def test_neighbors_count_the_same_but_for_one_that_stands_out():
    scores = np.linspace(0.3, 0.4, 100)
    assert match_weights(scores) == pytest.approx(np.full(100, 0.01))
    weights = match_weights(np.append(scores, 0.9))
    assert weights.sum() == pytest.approx(1.0)
    assert weights[-1] > 20 * weights[0] and weights[:-1] == pytest.approx(weights[0])
    assert match_weights(np.array([0.2])).tolist() == [1.0] and match_weights(np.array([])).tolist() == []


def test_runs_of_tokens_gain_where_the_neighbors_share_them(index, tiny_lm):
    tokenizer = load_tokenizer(tiny_lm)
    shared, single = "a zeppelin at sea", "an old man in a hat"
    captions = [shared, shared, shared, single]
    tokens = caption_tokens(tokenizer, captions)
    nats = gram_nats(Votes(captions, np.full(4, 0.2)), [index], tokenizer)
    for n in (2, 3):
        common, rare = ({*zip(*(ids[start:] for start in range(n)), strict=False)} for ids in (tokens[0], tokens[3]))
        assert max(nats.get(gram, 0.0) for gram in common - rare) > 2 * max(
            nats.get(gram, 0.0) for gram in rare - common
        )
    assert gram_nats(Votes(), [index], tokenizer) == {}


def test_the_bonus_along_a_caption_is_that_of_writing_it():
    ids = torch.tensor([[3, 4, 5, 3, 4, 5]])
    bonus = TokenBonus.of([{(3,): 2.0, (3, 4): 1.0, (3, 4, 5): 0.5, (5,): 0.25}])
    along, left = bonus.along(ids, 8), bonus
    for step in range(ids.shape[1]):
        assert torch.equal(along[:, step], left.add(torch.zeros(1, 8)))
        left = left.without(ids[:, step])
    given = along[0].gather(1, ids[0][:, None])[:, 0]
    assert given.tolist() == [2.0, 1.0, 0.75, 0.0, 0.0, 0.0]


def test_each_bonus_is_spent_once_it_was_written_where_it_applies():
    bonus = TokenBonus.of([{(3, 4): 1.0}, {(2, 3, 4): 1.0}, {}])

    def given(left):
        return left.add(torch.zeros(3, 8))[:, 4].tolist()

    for written, expected in ((4, [0, 0, 0]), (3, [1, 0, 0]), (2, [0, 0, 0]), (3, [1, 1, 0]), (4, [0, 0, 0])):
        bonus = bonus.without(torch.tensor([written] * 3))
        assert given(bonus) == expected, written
    for written in (2, 3):
        bonus = bonus.without(torch.tensor([written] * 3))
    assert given(bonus) == [0, 0, 0]
    assert given(bonus.rows(torch.tensor([2, 0, 1]))) == [0, 0, 0]


def test_only_the_words_are_raised_and_a_part_only_behind_the_part_before(index, tiny_lm):
    tokenizer = load_tokenizer(tiny_lm)
    ids = tokenizer.encode(" zeppelin")
    assert len(ids) > 2
    captions, scores = [["zeppelin"], []], [np.array([0.5]), np.array([])]
    bonus, double = (neighbor_bonus(tokenizer, captions, scores, [index], strength=strength) for strength in (1.0, 2.0))
    logits = torch.zeros(2, len(tokenizer))
    start = bonus.add(logits)
    assert start[0].nonzero()[:, 0].tolist() == [ids[0]]
    assert torch.equal(double.add(logits), 2 * start)
    assert not start[1].any() and not logits.any()
    inside = bonus.without(torch.tensor([ids[0]] * 2)).add(logits)
    assert inside[0].nonzero()[:, 0].tolist() == [ids[1]]  # and no second zeppelin
    elsewhere = bonus.without(torch.tensor([7, 7])).add(logits)
    assert elsewhere[0].nonzero()[:, 0].tolist() == [ids[0]]


@pytest.mark.parametrize("decoding", ["greedy", "sample", "beam"])
def test_a_captioner_takes_up_words_of_its_neighbors(world, index, decoding):
    captioner = Captioner.from_pretrained(world.run, device="cpu", dtype="float32")
    photos = [world.photos / name for name in world.features.images[:2]]
    settings = {"index": index, "num_neighbors": 8, "decoding": decoding, "max_new_tokens": 12, "candidates": 4}
    off = captioner.caption(photos, retrieved_text="off", **settings)
    assert off == captioner.caption(photos, **settings)
    assert off == captioner.caption(photos, retrieved_text="bias", bias_strength=0.0, **settings)
    strong = captioner.caption(photos, retrieved_text="bias", bias_strength=50.0, **settings)

    for result in strong:
        near = {word for neighbor in result.neighbors for word in words_of(neighbor.caption)}
        said = words_of(result.caption)
        assert len(near & said.keys()) >= 2
    without = captioner.caption(photos, retrieved_text="bias", bias_strength=50.0, **(settings | {"index": None}))
    assert without == captioner.caption(photos, **(settings | {"index": None}))


def test_words_as_a_prompt_need_a_model_that_reads_them(world):
    captioner = Captioner.from_pretrained(world.run, device="cpu", dtype="float32")
    photo = world.photos / world.features.images[0]
    greedy = GenerationConfig(decoding="greedy", retrieved_text="prompt")
    with pytest.raises(InputError, match="--text-neighbors"):
        captioner.caption(photo, generation=greedy)
    captioner.checkpoint = dataclasses.replace(captioner.checkpoint, text_neighbors=2)
    (with_words,) = captioner.caption(photo, generation=greedy)
    assert with_words == captioner.caption(photo, decoding="greedy")[0]  # auto
    (off,) = captioner.caption(photo, decoding="greedy", retrieved_text="off")
    assert with_words.candidates[0].log_probability != off.candidates[0].log_probability
    alone = [captioner.caption(photo, index=None, decoding="greedy", retrieved_text=mode) for mode in ("prompt", "off")]
    assert alone[0] == alone[1]


def test_words_added_to_an_index_are_counted(index, tmp_path):
    shutil.copytree(index.path, tmp_path / "index")
    live = CaptionIndex.open(tmp_path / "index")

    def nats():
        return nats_of(["a zeppelin"] * 100, np.full(100, 0.4), [live])["zeppelin"]

    before = nats()
    add_captions(live.path, [f"a zeppelin over town number {number}" for number in range(20)])
    assert nats() == before  # a snapshot until it is refreshed
    assert live.refresh() and nats() < before - 1
