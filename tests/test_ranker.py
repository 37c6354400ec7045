"""The ranker: texts seen before are not embedded again, and that changes no order."""

import numpy as np
import pytest

from clipcap_rag.config import GenerationConfig
from clipcap_rag.encoder import Encoder
from clipcap_rag.generation import Written
from clipcap_rag.ranker import Ranker


@pytest.fixture(scope="module")
def encoder(tiny_clip):
    return Encoder.load(f"local-dir:{tiny_clip}", device="cpu", dtype="float32")


@pytest.fixture
def asked(encoder, monkeypatch):
    """The texts that the encoder is asked to embed from now on."""
    texts, encode = [], encoder.encode_text
    monkeypatch.setattr(encoder, "encode_text", lambda part: texts.extend(part) or encode(part))
    return texts


def written(texts):
    return [Written(text, (1, 2, 3), -1.0 - place) for place, text in enumerate(texts)]


@pytest.mark.parametrize("decoding", ["sample", "beam"])
def test_a_text_is_embedded_once_and_the_order_is_that_of_a_fresh_ranker(encoder, asked, tiny_captions, decoding):
    random, ranker = np.random.default_rng(5), Ranker(encoder)
    settings = GenerationConfig(decoding=decoding)
    for _ in range(4):
        texts = [list(random.choice(tiny_captions, 6)) for _ in range(3)]
        images = random.standard_normal((3, encoder.dim)).astype(np.float32)
        images /= np.linalg.norm(images, axis=1, keepdims=True)
        kept = ranker.rank([written(part) for part in texts], images, settings)
        seen = len(asked)
        fresh = Ranker(encoder).rank([written(part) for part in texts], images, settings)
        del asked[seen:]
        for one, other, image in zip(kept, fresh, images, strict=True):
            assert [found.caption for found in one] == [found.caption for found in other]
            for found, expected in zip(one, other, strict=True):
                assert found.clip_similarity == pytest.approx(expected.clip_similarity, abs=1e-6)
                assert found.clip_similarity == pytest.approx(float(found.embedding @ image), abs=1e-6)
    assert len(asked) == len(set(asked)) > 6


def test_only_the_last_texts_are_remembered(encoder, asked, tiny_captions, monkeypatch):
    monkeypatch.setattr("clipcap_rag.ranker._MEMORY", 4 * encoder.dim * 4)  # four texts
    ranker = Ranker(encoder)
    first = ranker.embed(tiny_captions[:6])
    assert first.shape == (6, encoder.dim) and asked == tiny_captions[:6]
    ranker.embed(tiny_captions[2:6])
    assert asked == tiny_captions[:6]
    np.testing.assert_allclose(ranker.embed(tiny_captions[:1]), first[:1], atol=1e-6)
    assert asked[6:] == tiny_captions[:1]


def test_nothing_to_rank(encoder):
    images = np.zeros((2, encoder.dim), np.float32)
    assert Ranker(encoder).rank([[], written([""])], images, GenerationConfig()) == [[], []]
