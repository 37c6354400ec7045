"""Evidence: leaving neighbours out by hand gives the same numbers, and words are supported by what the model reads."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch

from clipcap_rag.captioner import Captioner
from clipcap_rag.checkpoint import Checkpoint, load_tokenizer
from clipcap_rag.config import GenerationConfig, ModelConfig
from clipcap_rag.embeddings import Embeddings
from clipcap_rag.evidence import SUPPORT, WordEvidence, _words, forced_log_probabilities, versions, weigh
from clipcap_rag.mapper import RetrievalMapper
from clipcap_rag.model import CaptionModel, build_mapper, load_language_model, tune
from clipcap_rag.neighbors import Neighbor, Neighbors
from clipcap_rag.retrieved_text import context_tokens

FEW = GenerationConfig(candidates=4, max_new_tokens=10)
D, K, P = 24, 3, 3


@pytest.fixture(scope="module")
def captioner(world):
    return Captioner.from_pretrained(world.run, device="cpu", dtype="float32")


@pytest.fixture
def photo(world):
    return world.photos / world.features.images[0]


def by_hand(captioner, image, neighbors, kept, tokens, context=None):
    """Log-probability of the tokens behind the prefix of the neighbours at `kept`, which alone are given."""
    inputs = [torch.from_numpy(image)[None]]
    if kept:
        arrays = neighbors.embeddings[:, kept], neighbors.scores[:, kept], neighbors.mask[:, kept]
        inputs += [torch.from_numpy(array) for array in arrays]
    with torch.no_grad():
        logits = captioner.model(torch.tensor([tokens]), *inputs, context=context)
    return float(logits.log_softmax(-1)[0].gather(1, torch.tensor(tokens)[:, None]).sum())


def without(neighbors, kept):
    arrays = (neighbors.rows, neighbors.scores, neighbors.sources, neighbors.embeddings)
    captions = [[neighbors.captions[0][place] for place in kept]]
    return dataclasses.replace(
        neighbors,
        **dict(
            zip(("rows", "scores", "sources", "embeddings"), [array[:, kept] for array in arrays], strict=True),
        ),
        captions=captions,
    )


@pytest.mark.parametrize("text_neighbors", [0, 2])
def test_a_neighbor_left_out_is_a_neighbor_not_given(captioner, world, photo, text_neighbors):
    captioner = Captioner(
        dataclasses.replace(captioner.checkpoint, text_neighbors=text_neighbors), device="cpu", dtype="float32"
    )
    (result,) = captioner.caption(photo, generation=FEW, explain=True)
    encoded = captioner.encoder.encode_image([photo])
    image = encoded.embeddings.vectors[0]
    neighbors = captioner.retriever("default")[0].search(image[None], K)
    evidence, tokens = result.evidence, list(result.candidates[0].tokens)
    assert evidence.neighbors == result.neighbors and len(evidence.left_out) == K

    def score(kept):
        captions = [neighbors.captions[0][place] for place in kept]
        context = context_tokens(captioner.checkpoint.tokenizer, [captions], text_neighbors, 64 - P - 10)
        return by_hand(captioner, image, neighbors, kept, tokens, context if text_neighbors else None)

    whole = score([0, 1, 2])
    remaining = [[1, 2], [0, 2], [0, 1], []]
    for kept, found in zip(remaining, [*evidence.left_out, evidence.all_left_out], strict=True):
        assert found.change == pytest.approx(score(kept) - whole, abs=1e-4)
        one = Embeddings(encoded.embeddings.vectors, encoded.embeddings.norms)
        (written,) = captioner.write(one, without(neighbors, kept), encoded.digests, FEW)
        assert found.caption == written[0].caption
    assert any(abs(found.change) > 1e-3 for found in evidence.left_out)


def test_changes_are_not_rounded_to_bfloat16(captioner, world, photo):
    settings = dataclasses.replace(FEW, decoding="greedy")
    images = captioner.encoder.encode_image([photo]).embeddings
    neighbors = captioner.retriever("default")[0].search(images.vectors, K)
    ((caption,),) = captioner.write(images, neighbors, [b""], settings)
    exact = captioner.explain(images, neighbors, b"", caption, settings).left_out
    half = Captioner.from_pretrained(world.run, device="cpu", dtype="bfloat16")
    rounded = half.explain(images, neighbors, b"", caption, settings).left_out
    assert half.dtype is torch.bfloat16 and rounded != exact
    assert [left.change for left in rounded] == pytest.approx([left.change for left in exact], abs=2e-4)


def test_the_words_make_up_the_caption(captioner, photo):
    (result,) = captioner.caption(photo, generation=FEW, explain=True, prompt="two small")
    words = result.evidence.words
    assert [word.word for word in words] == [
        word.strip(".,!") for word in result.caption.split() if any(letter.isalnum() for letter in word)
    ][-len(words) :]
    for word in words:
        assert word.from_image + word.from_neighbors == pytest.approx(word.both - word.neither)
        known = [word.word.lower() in neighbor.caption.lower().split() for neighbor in result.neighbors]
        assert word.in_neighbors == tuple(np.nonzero(known)[0])


@pytest.mark.parametrize("retrieved_text", ["off", "bias"])
def test_forced_words_are_as_likely_as_written_ones(captioner, photo, retrieved_text):
    settings = dataclasses.replace(FEW, decoding="greedy", retrieved_text=retrieved_text, bias_strength=2.0)
    (result,) = captioner.caption(photo, generation=settings)
    encoded = captioner.encoder.encode_image([photo])
    neighbors = captioner.retriever("default")[0].search(encoded.embeddings.vectors, K)
    images, around = versions(encoded.embeddings, neighbors, len(neighbors.captions[0]))
    scores = forced_log_probabilities(
        captioner.model,
        [],
        result.candidates[0].tokens,
        captioner._tensors(images, around, torch.float32),
        **captioner._words(around, settings),
    )
    first = float(scores[0].sum()) - result.candidates[0].log_probability
    assert -0.1 < first <= 1e-4  # writing forbids the end token as the first, which makes the first a little likelier


class Deaf(RetrievalMapper):
    """A mapper that looks at no neighbour though it is given them."""

    def forward(self, image_embedding, *neighbors):
        return super().forward(image_embedding)


def model_and_inputs(tiny_lm, mapper=RetrievalMapper):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        language_model, tokenizer = load_language_model(str(tiny_lm))
        for parameter in language_model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.3)
        language_model.tie_weights()
        network = CaptionModel(mapper(D, 32, P, 2, layers=1, heads=2), language_model, tokenizer.eos_token_id).eval()
        vectors = torch.nn.functional.normalize(torch.randn(1 + K, D), dim=-1).numpy()
    embeddings, scores = vectors[None, 1:], vectors[None, :1] @ vectors[1:].T
    rows, captions = np.arange(K)[None], [["a red bicycle", "a brown dog", "an old man"]]
    neighbors = Neighbors(rows, scores[0], np.zeros_like(rows), embeddings, captions, [])
    return network, tokenizer, Embeddings(vectors[:1], np.ones(1, np.float32)), neighbors


def evidence_of(network, tokenizer, image, neighbors):
    tokens = tokenizer("a brown bicycle waits")["input_ids"] + [tokenizer.eos_token_id]
    images, around = versions(image, neighbors, len(neighbors.captions[0]))
    arrays = (images.vectors, around.embeddings, around.scores, around.mask)
    scores = forced_log_probabilities(network, [], tokens, [torch.from_numpy(array) for array in arrays])
    listed = [Neighbor(row, caption, 0.5, "own") for row, caption in enumerate(neighbors.captions[0])]
    return weigh(tokenizer, [], tokens, scores, listed, [[]] * (K + 1))


def test_what_the_model_does_not_read_supports_nothing(tiny_lm):
    network, *given = model_and_inputs(tiny_lm, Deaf)
    found = evidence_of(network, *given)
    assert [word.word for word in found.words] == ["a", "brown", "bicycle", "waits"]
    assert all(word.from_neighbors == pytest.approx(0, abs=1e-4) for word in found.words)
    assert max(abs(word.from_image) for word in found.words) > 0.01
    assert all(left.change == pytest.approx(0, abs=1e-4) and left.caption is None for left in found.left_out)
    assert [word.in_neighbors for word in found.words] == [(0, 1), (1,), (0,), ()]

    network, *given = model_and_inputs(tiny_lm)
    assert max(abs(word.from_neighbors) for word in evidence_of(network, *given).words) > 0.01
    torch.nn.init.zeros_(network.mapper.linear.weight)
    blind = evidence_of(network, *given)
    assert all(word.from_image == pytest.approx(0, abs=1e-4) for word in blind.words)


def test_support_is_twice_the_probability():
    def supported(both, image, neighbors, neither):
        return WordEvidence("dog", *(math.log(chance) for chance in (both, image, neighbors, neither)), ()).supported_by

    assert math.log(2) == SUPPORT
    assert supported(0.9, 0.8, 0.8, 0.1) == "both"  # either would have been enough
    assert supported(0.9, 0.9, 0.1, 0.1) == "image"
    assert supported(0.4, 0.1, 0.4, 0.1) == "neighbors"
    assert supported(0.19, 0.19, 0.1, 0.1) == supported(0.5, 0.5, 0.5, 0.5) == "neither"
    assert supported(0.1, 0.4, 0.1, 0.4) == "neither"  # the neighbours speak against it


@pytest.mark.parametrize(
    "prompt, text, expected",
    [
        ("", "a red bicycle isn't here.", ["a", "red", "bicycle", "isn't", "here"]),
        ("two small", " children wait", ["children", "wait"]),
        ("a red bi", "cycle", ["bicycle"]),
        ("", "un café à Köln !", ["un", "café", "à", "Köln"]),
        ("", " . ", []),
    ],
)
def test_words_of_tokens(tiny_lm, prompt, text, expected):
    tokenizer = load_tokenizer(tiny_lm)
    before, tokens = (tokenizer(part)["input_ids"] if part else [] for part in (prompt, text))
    found = _words(tokenizer, before, [*tokens, tokenizer.eos_token_id])
    assert [word for word, _ in found] == expected
    places = [place for _, own in found for place in own]
    assert places == sorted(set(places))
    for word, own in found:
        spelled = tokenizer.decode([tokens[place] for place in own]).strip()
        assert spelled == word or (before and word.endswith(spelled))


def test_without_neighbors_the_image_alone_is_weighed(captioner, world, photo, tiny_lm):
    (result,) = captioner.caption(photo, index=None, generation=FEW, explain=True)
    language_model, tokenizer = load_language_model(str(tiny_lm))
    config = ModelConfig(mapper="mlp", clip_dim=D, lm_dim=32, prefix_length=P, normalize=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = CaptionModel(build_mapper(config), tune(language_model, config), tokenizer.eos_token_id)
    checkpoint = Checkpoint(model, tokenizer, config, captioner.checkpoint.encoder, str(tiny_lm), stop_token=".")
    converted = Captioner(checkpoint, device="cpu", dtype="float32")
    (plain,) = converted.caption(photo, generation=FEW, explain=True)
    for evidence in (result.evidence, plain.evidence):
        assert evidence.neighbors == evidence.left_out == [] and evidence.all_left_out is None
        assert all(word.from_neighbors == pytest.approx(0, abs=1e-4) for word in evidence.words)
        assert {word.supported_by for word in evidence.words} <= {"image", "neither"}
        assert evidence.words and json.loads(json.dumps(evidence.to_json()))["all_left_out"] is None
