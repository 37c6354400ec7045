"""Generation: one prefill serves all candidates, beams follow the rule, a caption does not know its batch mates."""

import dataclasses
from collections import Counter

import numpy as np
import pytest
import torch

from clipcap_rag import beam, generation
from clipcap_rag.config import GenerationConfig
from clipcap_rag.generation import uniforms, write_captions
from clipcap_rag.model import CaptionModel

D, P = 8, 3
DIGESTS = [bytes([number]) * 16 for number in range(4)]


@pytest.fixture(scope="module")
def captioner(make_writer):
    return make_writer(seed=3, images=4, clip_dim=D, prefix_length=P)


def forced_log_probability(model, prefix, tokens):
    """Sum of log-probabilities from one plain forward pass over prefix and tokens, without any cache."""
    words = model.language_model.get_input_embeddings()(torch.tensor([tokens]))
    with torch.no_grad():
        logits = model.language_model(inputs_embeds=torch.cat([prefix[None], words], dim=1)).logits[0, P - 1 : -1]
    logits[0, model.end_token] = -torch.inf
    return logits.log_softmax(-1)[torch.arange(len(tokens)), torch.tensor(tokens)].sum().item()


@pytest.mark.parametrize("decoding", ["greedy", "sample", "beam"])
def test_log_probabilities_equal_an_expanded_pass_without_cache(captioner, decoding):
    model, tokenizer, prefix = captioner
    config = GenerationConfig(decoding=decoding, candidates=6, num_beams=4, max_new_tokens=12, temperature=1.3)
    for image, candidates in enumerate(write_captions(model, tokenizer, prefix, config, DIGESTS)):
        for candidate in candidates:
            expected = forced_log_probability(model, prefix[image], list(candidate.tokens))
            assert candidate.log_probability == pytest.approx(expected, abs=1e-3)
            assert candidate.tokens[-1] == model.end_token or len(candidate.tokens) == 12


def test_greedy_takes_the_likeliest_token_each_time(captioner):
    model, tokenizer, prefix = captioner
    config = GenerationConfig(decoding="greedy", max_new_tokens=8)
    for image, (candidate,) in enumerate(write_captions(model, tokenizer, prefix, config, DIGESTS)):
        words = model.language_model.get_input_embeddings()(torch.tensor([candidate.tokens]))
        with torch.no_grad():
            inputs = torch.cat([prefix[image][None], words], dim=1)
            logits = model.language_model(inputs_embeds=inputs).logits[0, P - 1 : -1]
        logits[0, model.end_token] = -torch.inf
        assert logits.argmax(-1).tolist() == list(candidate.tokens)


def test_samples_come_beside_the_beams_of_a_beam_search(captioner):
    model, tokenizer, prefix = captioner
    config = GenerationConfig(decoding="sample", candidates=9, num_beams=3, max_new_tokens=10)
    beam = GenerationConfig(decoding="beam", num_beams=3, max_new_tokens=10)
    plain = dataclasses.replace(config, num_beams=1)
    written, beams, sampled = (write_captions(model, tokenizer, prefix, own, DIGESTS) for own in (config, beam, plain))
    for captions, best, drawn in zip(written, beams, sampled, strict=True):
        assert len(captions) == 9 and captions[:3] == best
        assert [found.tokens for found in captions[3:]] == [found.tokens for found in drawn[1:7]]
    (few,) = write_captions(model, tokenizer, prefix[:1], dataclasses.replace(config, candidates=4), DIGESTS[:1])
    assert few[0].tokens == sampled[0][0].tokens  # the greedy one


def reference_beam(model, prefix, beams, steps, may_be_empty=False):
    """The same rule one image at a time, recomputing everything for every token."""
    hypotheses = [([], 0.0)]
    for _ in range(steps):
        grown = []
        for tokens, total in hypotheses:
            if tokens and tokens[-1] == model.end_token:
                grown.append((tokens, total))
                continue
            words = model.language_model.get_input_embeddings()(torch.tensor([tokens], dtype=torch.long))
            with torch.no_grad():
                logits = model.language_model(inputs_embeds=torch.cat([prefix[None], words], dim=1)).logits[0, -1]
            if not tokens and not may_be_empty:
                logits[model.end_token] = -torch.inf
            best = logits.log_softmax(-1).topk(beams)
            grown += [
                ([*tokens, token], total + value)
                for value, token in zip(best.values.tolist(), best.indices.tolist(), strict=True)
            ]
        hypotheses = sorted(grown, key=lambda hypothesis: -hypothesis[1] / len(hypothesis[0]))[:beams]
        if all(tokens[-1] == model.end_token for tokens, _ in hypotheses):
            break
    return hypotheses


def test_beam_search_equals_the_plain_rule(captioner):
    model, tokenizer, prefix = captioner
    config = GenerationConfig(decoding="beam", num_beams=3, max_new_tokens=10)
    for image, candidates in enumerate(write_captions(model, tokenizer, prefix, config, DIGESTS)):
        expected = reference_beam(model, prefix[image], 3, 10)
        assert [list(candidate.tokens) for candidate in candidates] == [tokens for tokens, _ in expected]


@pytest.mark.parametrize("beams", [1, 5])
def test_clipcaps_rule_may_end_at_once(captioner, beams):
    model, tokenizer, prefix = captioner
    with torch.no_grad():
        first = model.language_model(inputs_embeds=prefix[:1]).logits[0, -1].argmax().item()
    model = CaptionModel(model.mapper, model.language_model, end_token=first)
    config = GenerationConfig(decoding="clipcap", num_beams=beams, max_new_tokens=10)
    written = write_captions(model, tokenizer, prefix, config, DIGESTS)
    for image, candidates in enumerate(written):
        expected = reference_beam(model, prefix[image], beams, 10, may_be_empty=True)
        assert [list(candidate.tokens) for candidate in candidates] == [tokens for tokens, _ in expected]
    if beams == 1:
        assert [candidate.tokens for candidate in written[0]] == [(first,)]
    assert GenerationConfig(decoding="clipcap").longest == 67 and GenerationConfig().longest == 40


@pytest.mark.parametrize("decoding", ["greedy", "sample", "beam"])
def test_a_caption_does_not_depend_on_its_batch_mates(captioner, decoding):
    model, tokenizer, prefix = captioner
    config = GenerationConfig(decoding=decoding, candidates=5, num_beams=3, max_new_tokens=10)
    together = write_captions(model, tokenizer, prefix, config, DIGESTS)
    for image in range(len(prefix)):
        alone = write_captions(model, tokenizer, prefix[image : image + 1], config, DIGESTS[image : image + 1])[0]
        assert [candidate.tokens for candidate in alone] == [candidate.tokens for candidate in together[image]]


def _often_written(model, tokenizer, prefix, config):
    written = write_captions(model, tokenizer, prefix, config, DIGESTS)
    return Counter(token for found in written for one in found for token in set(one.tokens[3:])).most_common(1)[0][0]


@pytest.mark.parametrize("decoding", ["greedy", "sample", "beam"])
def test_looking_rarely_at_what_is_finished_changes_nothing(captioner, decoding, monkeypatch):
    model, tokenizer, prefix = captioner
    config = GenerationConfig(decoding=decoding, candidates=6, num_beams=4, max_new_tokens=30, temperature=1.3)
    model = CaptionModel(model.mapper, model.language_model, end_token=_often_written(model, tokenizer, prefix, config))
    each_step = write_captions(model, tokenizer, prefix, config, DIGESTS)
    assert len({len(candidate.tokens) for candidates in each_step for candidate in candidates}) > 1
    for module in (generation, beam):
        monkeypatch.setattr(module, "looks", lambda step, device: step % 7 == 0)
    for expected, found in zip(each_step, write_captions(model, tokenizer, prefix, config, DIGESTS), strict=True):
        assert [candidate.tokens for candidate in found] == [candidate.tokens for candidate in expected]
        for a, b in zip(found, expected, strict=True):
            assert a.log_probability == pytest.approx(b.log_probability, abs=1e-4)


@pytest.mark.parametrize("beams", [1, 4])
def test_more_candidates_keep_the_first_ones_and_the_likeliest_are_among_them(captioner, beams):
    model, tokenizer, prefix = captioner

    def write(**settings):
        config = GenerationConfig(num_beams=beams, max_new_tokens=8, **settings)
        return [found.tokens for found in write_captions(model, tokenizer, prefix[:1], config, DIGESTS[:1])[0]]

    few, many = write(candidates=12), write(candidates=600)
    assert len(many) == 600 and many[:12] == few
    assert few[:beams] == write(decoding="greedy" if beams == 1 else "beam")


def test_samples_follow_the_nucleus(captioner):
    """First tokens drawn often enough must have the frequencies of the renormalised nucleus and nothing outside it."""
    model, tokenizer, prefix = captioner
    config = GenerationConfig(candidates=4001, top_p=0.6, temperature=0.9, max_new_tokens=1)
    with torch.no_grad():
        logits = model.language_model(inputs_embeds=prefix[:1]).logits[0, -1]
    logits[model.end_token] = -torch.inf
    probabilities = (logits / 0.9).softmax(-1)
    values, ids = probabilities.sort(descending=True)
    size = int((values.cumsum(-1) - values < 0.6).sum())
    expected = dict(zip(ids[:size].tolist(), (values[:size] / values[:size].sum()).tolist(), strict=True))
    drawn = [candidate.tokens[0] for candidate in write_captions(model, tokenizer, prefix[:1], config, DIGESTS)[0][1:]]
    assert set(drawn) <= set(expected)
    for token, probability in expected.items():
        assert drawn.count(token) / len(drawn) == pytest.approx(probability, abs=0.04)


def test_the_seed_and_the_image_decide(captioner):
    model, tokenizer, prefix = captioner
    config = GenerationConfig(candidates=8, temperature=2.0, top_p=1.0, max_new_tokens=8)

    def tokens(seed, digest):
        settings = dataclasses.replace(config, seed=seed)
        return [found.tokens for found in write_captions(model, tokenizer, prefix[:1], settings, [digest])[0]]

    assert tokens(0, b"a") == tokens(0, b"a")
    assert tokens(0, b"a") != tokens(1, b"a")
    assert tokens(0, b"a") != tokens(0, b"b")
    assert np.array_equal(uniforms(0, b"a", 3, 5), uniforms(0, b"a", 9, 5)[:3])


def test_the_language_models_positions_bound_the_caption(captioner):
    model, tokenizer, prefix = captioner
    positions = model.language_model.config.n_positions
    config = GenerationConfig(decoding="greedy", max_new_tokens=10 * positions)
    for (candidate,) in write_captions(model, tokenizer, prefix, config, DIGESTS):
        assert len(candidate.tokens) <= positions - P
