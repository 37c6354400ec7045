"""Neighbours' words as context: how they are written, cut and padded, and that padding and absence change nothing."""

import pytest
import torch

from clipcap_rag.config import GenerationConfig
from clipcap_rag.errors import InputError
from clipcap_rag.generation import write_captions
from clipcap_rag.model import IGNORED, load_tokenizer
from clipcap_rag.past import left_padded
from clipcap_rag.retrieved_text import context_tokens, text_mode

D, P = 8, 3
DIGESTS = [bytes([number]) * 16 for number in range(3)]
NEIGHBORS = [["a brown dog rests by the sea", "an old man in a hat", "a red bicycle"], [], ["two  small\n children"]]


@pytest.fixture(scope="module")
def parts(make_writer):
    return make_writer(seed=5, images=3, clip_dim=D, prefix_length=P)


def test_captions_are_written_best_first_as_in_training(tiny_lm):
    tokenizer = load_tokenizer(tiny_lm)
    context, end = context_tokens(tokenizer, NEIGHBORS, 2, 60), tokenizer.eos_token_id
    ids = [tokenizer(text)["input_ids"] for text in ("a brown dog rests by the sea", "an old man in a hat")]
    assert [token for token in context[0].tolist() if token != IGNORED] == [*ids[0], end, *ids[1], end]
    assert (context[1] == IGNORED).all()
    only = tokenizer("two small children")["input_ids"]
    assert context[2].tolist() == [*only, end] + [IGNORED] * (context.shape[1] - len(only) - 1)


def test_what_does_not_fit_is_cut(tiny_lm):
    tokenizer = load_tokenizer(tiny_lm)
    whole = context_tokens(tokenizer, NEIGHBORS, 3, 60)[0].tolist()
    cut = context_tokens(tokenizer, NEIGHBORS, 3, 7)
    assert cut.shape == (3, 7) and cut[0].tolist() == [*whole[:6], tokenizer.eos_token_id]
    for room in (0, -5):
        assert context_tokens(tokenizer, NEIGHBORS, 3, room).shape == (3, 0)
    assert context_tokens(tokenizer, [[], []], 3, 60).shape == (2, 0)


@pytest.mark.parametrize("decoding", ["greedy", "sample", "beam", "clipcap"])
def test_contexts_of_other_lengths_in_the_batch_change_nothing(parts, decoding):
    model, tokenizer, prefix = parts
    config = GenerationConfig(decoding=decoding, candidates=5, num_beams=3, max_new_tokens=10, prompt="two small")
    context = context_tokens(tokenizer, NEIGHBORS, 2, 30)
    together = write_captions(model, tokenizer, prefix, config, DIGESTS, context=context)
    for image in range(3):
        own = context[image : image + 1, : int((context[image] != IGNORED).sum())]
        words = model.language_model.get_input_embeddings()(own)
        one = torch.cat([prefix[image : image + 1], words], dim=1)
        alone = write_captions(model, tokenizer, one, config, DIGESTS[image : image + 1])[0]
        assert [found.tokens for found in together[image]] == [found.tokens for found in alone]
        for found, expected in zip(together[image], alone, strict=True):
            assert found.log_probability == pytest.approx(expected.log_probability, abs=1e-3)


def test_an_absent_context_equals_none(parts):
    model, tokenizer, prefix = parts
    config = GenerationConfig(candidates=5, max_new_tokens=10)
    without = write_captions(model, tokenizer, prefix, config, DIGESTS)
    assert without == write_captions(
        model, tokenizer, prefix, config, DIGESTS, context=context_tokens(tokenizer, [[], [], []], 4, 30)
    )
    padded = write_captions(model, tokenizer, prefix, config, DIGESTS, context=torch.full((3, 6), IGNORED))
    assert [[one.tokens for one in found] for found in padded] == [[one.tokens for one in found] for found in without]


def test_padding_moves_to_the_left():
    vectors = torch.arange(8.0).view(1, 4, 2)
    moved, mask = left_padded(vectors, torch.tensor([[True, True, False, True]]))
    assert mask.tolist() == [[False, True, True, True]]
    assert moved[0, 1:].tolist() == [[0.0, 1.0], [2.0, 3.0], [6.0, 7.0]]


def test_the_mode_follows_the_model():
    assert text_mode("auto", 0, False) == "off" and text_mode("auto", 4, False) == "prompt"
    assert text_mode("auto", 0, True) == "bias" and text_mode("off", 0, True) == "off"
    assert text_mode("bias", 0, False) == "bias" and text_mode("off", 4, False) == "off"
    with pytest.raises(InputError, match="--text-neighbors"):
        text_mode("prompt", 0, False)
