"""A prompt: every decoding continues it, tokenised as a caption is in training, within the model's positions."""

import dataclasses

import pytest
import torch

from clipcap_rag.config import GenerationConfig
from clipcap_rag.errors import InputError
from clipcap_rag.generation import write_captions
from clipcap_rag.prompt import prompt_tokens

D, P = 8, 3
DIGESTS = [bytes([number]) * 16 for number in range(4)]


@pytest.fixture(scope="module")
def captioner(make_writer):
    return make_writer(seed=3, images=4, clip_dim=D, prefix_length=P)


PROMPT = "two small children"


def extended(model, tokenizer, prefix, prompt):
    """The prefix with the word vectors of a prompt behind it, tokenised as a caption of the training set."""
    words = model.language_model.get_input_embeddings()(torch.tensor(tokenizer([prompt])["input_ids"][0]))
    with torch.no_grad():
        return torch.cat([prefix, words.expand(len(prefix), -1, -1)], dim=1)


@pytest.mark.parametrize("decoding", ["greedy", "sample", "beam", "clipcap"])
def test_a_prompt_is_continued_from_where_it_ends(captioner, decoding):
    model, tokenizer, prefix = captioner
    plain = GenerationConfig(decoding=decoding, candidates=6, num_beams=3, max_new_tokens=8)
    prompted = dataclasses.replace(plain, prompt=PROMPT)
    by_hand = write_captions(model, tokenizer, extended(model, tokenizer, prefix, PROMPT), plain, DIGESTS)
    for found, expected in zip(write_captions(model, tokenizer, prefix, prompted, DIGESTS), by_hand, strict=True):
        assert [candidate.tokens for candidate in found] == [candidate.tokens for candidate in expected]
        for candidate, other in zip(found, expected, strict=True):
            assert candidate.log_probability == pytest.approx(other.log_probability, abs=1e-4)  # of the new words alone
            words = [
                *tokenizer(PROMPT)["input_ids"],
                *(token for token in candidate.tokens if token != model.end_token),
            ]
            assert candidate.caption.startswith(PROMPT)
            assert candidate.caption == " ".join(tokenizer.decode(words).split())


def test_spaces_around_a_prompt_change_nothing(captioner):
    tokenizer = captioner[1]
    assert prompt_tokens(tokenizer, "  two small\n children ") == tokenizer("two small children")["input_ids"]
    assert prompt_tokens(tokenizer, "two small children")[0] == tokenizer("two")["input_ids"][0]
    assert prompt_tokens(tokenizer, " ") == []


def test_a_prompt_that_does_not_fit_says_how_much_does(captioner):
    model, tokenizer, prefix = captioner
    room = model.language_model.config.n_positions - P
    words = (PROMPT + " ") * room
    fitting = next(
        text for cut in range(len(words), 0, -1) if len(prompt_tokens(tokenizer, text := words[:cut])) == room - 1
    )
    config = GenerationConfig(decoding="greedy", prompt=fitting)
    assert [len(found.tokens) for (found,) in write_captions(model, tokenizer, prefix, config, DIGESTS)] == [1] * 4
    with pytest.raises(InputError, match=f"room for {room - 1}; shorten --prompt"):
        write_captions(model, tokenizer, prefix, dataclasses.replace(config, prompt=words), DIGESTS)
    with pytest.raises(InputError, match="which ends a caption"):
        prompt_tokens(tokenizer, f"a dog {tokenizer.eos_token} runs")
