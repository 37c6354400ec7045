"""Training batches: every caption once, labels that end and pad rightly, bad retrieval without own words."""

import numpy as np
import pytest
import torch

from clipcap_rag.batches import CaptionBatches
from clipcap_rag.config import ModelConfig, TrainConfig
from clipcap_rag.model import IGNORED, load_tokenizer
from clipcap_rag.photo_neighbors import stored_neighbors
from clipcap_rag.sources import normalize_caption


@pytest.fixture
def make(world, tiny_lm):
    tokenizer = load_tokenizer(tiny_lm)
    neighbors = stored_neighbors(world.features, world.index, 6)

    def batches(**settings):
        config = TrainConfig(**({"batch_size": 4, "neighbor_pool": 6, "max_neighbors": 4} | settings))
        rows = range(len(world.features))
        return CaptionBatches(world.features, rows, tokenizer, ModelConfig(), config, world.index, neighbors, room=50)

    return batches


def test_every_caption_once_with_end_token_and_ignored_padding(make, world, tiny_lm):
    batches, tokenizer = make(), load_tokenizer(tiny_lm)
    seen = []
    for batch in batches.epoch(0):
        for row in batch.tokens.tolist():
            words = [token for token in row if token != IGNORED]
            assert row == words + [IGNORED] * (len(row) - len(words))
            assert words[-1] == tokenizer.eos_token_id
            seen.append(tokenizer.decode(words[:-1]))
    assert sorted(seen) == sorted(text for texts in world.features.captions for text in texts)
    assert len(list(batches.epoch(0))) == len(batches)


def test_long_captions_are_cut_before_the_end_token(make):
    for batch in make(max_caption_tokens=3).epoch(0):
        assert batch.tokens.shape[1] <= 4
        assert (batch.tokens[:, -1] != IGNORED).any()


def test_an_epoch_can_be_entered_in_the_middle(make):
    batches = make(image_noise=0.1, neighbor_noise=0.1)
    whole, rest = list(batches.epoch(3)), list(batches.epoch(3, skip=2))
    assert len(rest) == len(whole) - 2
    for expected, found in zip(whole[2:], rest, strict=True):
        assert torch.equal(expected.tokens, found.tokens)
        assert all(torch.equal(*pair) for pair in zip(expected.inputs, found.inputs, strict=True))


def test_epochs_differ(make):
    batches = make()
    assert [list(part) for part in batches.order(0)] != [list(part) for part in batches.order(1)]


def test_no_photo_is_shown_its_own_words(make, world):
    batches = make(random_neighbors=0.7, retrieval_dropout=0.0)
    random = np.random.default_rng(0)
    photos = np.repeat(np.arange(len(world.features)), 20)
    rows = batches._noisy_rows(photos, random)
    assert (rows >= 0).any()
    for photo, found in zip(photos, rows, strict=True):
        present = found[found >= 0]
        own = {normalize_caption(text) for text in world.features.captions[photo]}
        assert own.isdisjoint(normalize_caption(text) for text in world.index.captions(present))
        assert world.features.image_ids[photo] not in world.index.image_ids(present)


def test_retrieval_noise_does_what_its_settings_say(make):
    photos = np.zeros(2000, np.int64)
    nearest = make().neighbor_rows[0]

    def draw(**settings):
        quiet = {"retrieval_dropout": 0.0, "vary_neighbors": 0.0, "pool_sampling": 0.0, "random_neighbors": 0.0}
        return make(**(quiet | settings))._noisy_rows(photos, np.random.default_rng(1))

    assert (draw() == nearest[:4]).all()
    assert ((draw(retrieval_dropout=0.25) < 0).all(1)).mean() == pytest.approx(0.25, abs=0.04)
    counts = (draw(vary_neighbors=1.0) >= 0).sum(1)
    assert set(counts) == {1, 2, 3, 4}
    sampled = draw(pool_sampling=1.0)
    assert (sampled[:, 0] == nearest[0]).all()
    assert set(sampled.ravel()) == set(nearest)


def read(tokenizer, context):
    """The captions that a row of a context holds."""
    text = tokenizer.decode([token for token in context.tolist() if token != IGNORED])
    return text.split(tokenizer.eos_token)[:-1]


def test_words_are_those_of_the_neighbors_that_are_shown(make, world, tiny_lm):
    tokenizer, batches = load_tokenizer(tiny_lm), make(text_neighbors=2, text_dropout=0.0)
    stored = {text: row for row, text in enumerate(world.index.captions(np.arange(len(world.index))))}
    lengths = set()
    for batch in batches.epoch(0):
        _, embeddings, _, mask = batch.inputs
        for context, vectors, present in zip(batch.context, embeddings, mask, strict=True):
            rows = [stored[text] for text in read(tokenizer, context)]
            lengths.add(len(rows))
            np.testing.assert_allclose(world.index.embeddings(rows), vectors[present][:2], atol=1e-3)
    assert lengths == {0, 1, 2}


def test_words_are_dropped_as_often_as_asked(make):
    def wordless(**settings):
        return np.mean([batch.context.shape[1] == 0 for epoch in range(40) for batch in make(**settings).epoch(epoch)])

    always = {"retrieval_dropout": 0.0, "text_neighbors": 2}
    assert wordless(**always, text_dropout=0.25) == pytest.approx(0.25, abs=0.08)
    assert wordless(**always, text_dropout=0.0) == 0.0
    assert wordless() == 1.0


def test_words_leave_everything_else_as_it_was(make):
    for with_words, without in zip(make(text_neighbors=2).epoch(1), make().epoch(1), strict=True):
        assert (with_words.tokens == without.tokens).all()
        for one, other in zip(with_words.inputs, without.inputs, strict=True):
            assert (one == other).all()


def test_noise_has_the_asked_length(make):
    random = np.random.default_rng(0)
    vectors = np.full((4, 4096), 0.5, np.float32)
    noise = CaptionBatches._noise(random, vectors, 0.3)
    lengths = np.linalg.norm(noise, axis=1) / np.linalg.norm(vectors, axis=1)
    assert lengths == pytest.approx(np.full(4, 0.3), rel=0.05)
