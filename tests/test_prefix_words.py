"""The prefix read as words: nearest by cosine, whatever the lengths of the vectors."""

import pytest
import torch

from clipcap_rag.model import CaptionModel, load_language_model
from clipcap_rag.prefix_words import prefix_words


@pytest.fixture(scope="module")
def model(tiny_lm):
    language_model, tokenizer = load_language_model(str(tiny_lm))
    return CaptionModel(torch.nn.Identity(), language_model, tokenizer.eos_token_id), tokenizer


def test_word_vectors_are_their_own_nearest_words(model):
    model, tokenizer = model
    tokens = torch.tensor([[5, 70, 300], [9, 10, 11]])
    with torch.no_grad():
        prefix = 7 * model.language_model.get_input_embeddings()(tokens)  # the length of a vector does not count
    read = prefix_words(model, tokenizer, prefix, count=4)
    assert [len(vectors) for vectors in read] == [3, 3]
    for row, vectors in zip(tokens.tolist(), read, strict=True):
        for token, words in zip(row, vectors, strict=True):
            assert words[0].word == tokenizer.decode([token]) and words[0].similarity == pytest.approx(1, abs=1e-5)
            similarities = [word.similarity for word in words]
            assert len(words) == 4 and similarities == sorted(similarities, reverse=True) and similarities[1] < 0.99


def test_the_cosines_are_those_of_a_plain_loop(model):
    model, tokenizer = model
    prefix = torch.randn(1, 2, 32, generator=torch.Generator().manual_seed(1))
    vectors = model.language_model.get_input_embeddings().weight.detach()
    for vector, words in zip(prefix[0], prefix_words(model, tokenizer, prefix)[0], strict=True):
        cosines = torch.nn.functional.cosine_similarity(vectors, vector[None]).sort(descending=True)
        assert [word.similarity for word in words] == pytest.approx(cosines.values[:5].tolist(), abs=1e-5)
        assert [word.word for word in words] == [tokenizer.decode([token]) for token in cosines.indices[:5].tolist()]
