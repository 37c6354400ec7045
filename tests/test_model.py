"""The captioner's network: losses, tuning, and language models that do not fit."""

import json

import pytest
import torch
from torch.nn import functional as F
from transformers import GPT2Config

from clipcap_rag.config import ModelConfig
from clipcap_rag.errors import InputError
from clipcap_rag.model import (
    IGNORED,
    CaptionModel,
    build_mapper,
    language_model_from_config,
    learned_state,
    load_language_model,
    tune,
)

D, P = 8, 4


def build(tiny_lm, **settings):
    torch.manual_seed(0)
    language_model, tokenizer = load_language_model(str(tiny_lm))
    config = ModelConfig(
        clip_dim=D, lm_dim=language_model.config.n_embd, prefix_length=P, mapper_layers=1, mapper_heads=2, **settings
    )
    return CaptionModel(build_mapper(config), tune(language_model, config), tokenizer.eos_token_id)


def test_loss_is_cross_entropy_over_the_counted_tokens(tiny_lm):
    model = build(tiny_lm).eval()
    end = model.end_token
    tokens = torch.tensor([[5, 6, 7, end], [0, end, IGNORED, IGNORED]])
    image = torch.randn(2, D)
    total, count = model.loss(tokens, image)
    logits = model(tokens.clamp_min(0), image)
    expected = F.cross_entropy(logits.flatten(0, 1), tokens.flatten(), ignore_index=IGNORED, reduction="sum")
    assert count == 6
    torch.testing.assert_close(total, expected)


def test_padding_changes_nothing(tiny_lm):
    model = build(tiny_lm).eval()
    tokens, image = torch.tensor([[5, 6, model.end_token]]), torch.randn(1, D)
    padded = F.pad(tokens, (0, 5), value=IGNORED)
    torch.testing.assert_close(model.loss(padded, image)[0], model.loss(tokens, image)[0], atol=1e-4, rtol=0)


def test_a_context_is_read_between_prefix_and_caption_and_does_not_count(tiny_lm):
    model = build(tiny_lm).eval()
    end, image = model.end_token, torch.randn(3, D)
    contexts = [[9, 8, 7, 6, end], [], [4, end]]
    tokens = torch.tensor([[5, 6, 7, end], [3, end, IGNORED, IGNORED], [2, 2, end, IGNORED]])
    context = torch.tensor([row + [IGNORED] * (5 - len(row)) for row in contexts])
    together, count = model.loss(tokens, image, context=context)
    assert count == 9
    expected = 0.0
    for row, own, one in zip(tokens.tolist(), contexts, image, strict=True):
        caption = [token for token in row if token != IGNORED]
        words = model.language_model.get_input_embeddings()(torch.tensor([own + caption], dtype=torch.long))
        inputs = torch.cat([model.prefix(one[None]), words], dim=1)
        logits = model.language_model(inputs_embeds=inputs).logits[0, P + len(own) - 1 : -1]
        expected = expected + F.cross_entropy(logits, torch.tensor(caption), reduction="sum")
    torch.testing.assert_close(together, expected, atol=1e-3, rtol=0)


def test_an_absent_context_equals_none(tiny_lm):
    model = build(tiny_lm).eval()
    tokens, image = torch.tensor([[5, 6, model.end_token]]), torch.randn(1, D)
    absent = model.loss(tokens, image, context=torch.empty(1, 0, dtype=torch.long))[0]
    assert absent == model.loss(tokens, image)[0]
    padded = model.loss(tokens, image, context=torch.full((1, 7), IGNORED))[0]
    torch.testing.assert_close(padded, absent, atol=1e-4, rtol=0)


@pytest.mark.parametrize("tuning", ["frozen", "lora", "layers", "full"])
def test_only_what_is_tuned_learns(tiny_lm, tuning):
    model = build(tiny_lm, language_model_tuning=tuning).train()
    assert model.language_model.training == (tuning != "frozen")
    model.loss(torch.tensor([[5, 6, model.end_token]]), torch.randn(1, D))[0].backward()
    learning = {name for name, parameter in model.language_model.named_parameters() if parameter.grad is not None}
    if tuning == "frozen":
        assert not learning
    elif tuning == "lora":
        assert learning and all("lora_" in name for name in learning)
    else:
        names = {name for name, _ in model.language_model.named_parameters()}
        assert learning == (names if tuning == "full" else names - {"transformer.wte.weight"})
    assert any(name.startswith("mapper.") for name in learned_state(model))


def test_language_models_that_do_not_fit_are_named(tmp_path, tiny_lm):
    with pytest.raises(InputError, match="nowhere/at-all"):
        load_language_model("nowhere/at-all")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "opt"}))
    with pytest.raises(InputError, match="type opt"):
        load_language_model(str(tmp_path))


def test_any_width_works(tiny_lm):
    model = build(tiny_lm, mapper="mlp")
    assert model.prefix(torch.randn(2, D)).shape == (2, P, model.language_model.config.n_embd)


@pytest.mark.parametrize(
    ("shape", "tuning", "expected"),
    [
        ({"mapper": "mlp", "clip_dim": 512, "prefix_length": 10}, "full", 155_908_608),
        ({"mapper": "transformer", "clip_dim": 640, "prefix_length": 10, "clip_length": 10}, "frozen", 42_728_448),
        ({"mapper": "transformer", "clip_dim": 640, "prefix_length": 40, "clip_length": 40}, "frozen", 57_520_128),
    ],
)
def test_as_many_weights_learn_as_in_clipcap(shape, tuning, expected):
    """The paper (arXiv 2111.09734) says 156M for the MLP and 43M for the transformer, which is that of 10 and 10."""
    config = ModelConfig(**shape, lm_dim=768, language_model_tuning=tuning)
    with torch.device("meta"):
        language_model = tune(language_model_from_config(GPT2Config().to_dict()), config)
        model = CaptionModel(build_mapper(config), language_model, 50256)
    assert sum(weight.numel() for weight in model.parameters() if weight.requires_grad) == expected
