"""Presets: the published numbers, and what is given wins."""

import pytest

import clipcap_parameters
from clipcap_rag.config import ModelConfig, TrainConfig
from clipcap_rag.errors import InputError
from clipcap_rag.presets import PRESETS, configure, description


def test_rag_retrieves_and_ends_on_rewards():
    model, train = configure("rag")
    assert model.mapper == "retrieval" and train.reward_epochs and train.raises_words
    assert train == TrainConfig(**{name: value for name, value in PRESETS["rag"].items() if name != "mapper_layers"})
    assert model == ModelConfig(mapper_layers=PRESETS["rag"]["mapper_layers"])


@pytest.mark.parametrize(
    "preset, mapper, tuning, prefix_length, normalize",
    [("clipcap-mlp", "mlp", "full", 10, False), ("clipcap-transformer", "transformer", "frozen", 40, True)],
)
def test_the_presets_of_clipcap_are_as_published(preset, mapper, tuning, prefix_length, normalize):
    model, train = configure(preset)
    assert (model.mapper, model.language_model_tuning) == (mapper, tuning)
    assert (model.prefix_length, model.normalize) == (prefix_length, normalize)
    assert (train.batch_size, train.epochs, train.accumulate, train.patience) == (40, 10, 1, 0)
    assert train.learning_rate == train.lm_learning_rate == 2e-5
    assert (train.warmup, train.schedule) == (5000, "linear")
    assert (train.weight_decay, train.gradient_clip) == (0, 0)
    assert (model.mapper_dropout, train.image_noise) == (0, 0)


def test_the_transformer_has_the_published_shape():
    model, _ = configure("clipcap-transformer")
    assert (model.clip_length, model.mapper_layers, model.mapper_heads) == (40, 8, 8)


def test_they_learn_as_many_weights_as_published():
    assert clipcap_parameters.learned("clipcap-mlp", 512, 10) == 155_908_608
    assert clipcap_parameters.learned("clipcap-transformer", 640, 10) == 42_728_448
    assert clipcap_parameters.learned("clipcap-transformer", 640, 40) == 57_520_128


def test_what_is_given_wins():
    model, train = configure("clipcap-transformer", prefix_length=5, epochs=2, language_model_tuning="lora", seed=7)
    assert (model.prefix_length, model.clip_length, model.language_model_tuning) == (5, 40, "lora")
    assert (train.epochs, train.seed, train.learning_rate) == (2, 7, 2e-5)


def test_a_preset_says_what_it_sets_and_what_was_given_instead():
    said = description("clipcap-mlp", {"epochs": 2, "seed": 1})
    assert said.startswith("preset clipcap-mlp: mapper mlp, ") and "learning_rate 2e-05" in said
    assert "epochs 2 instead of 10" in said and "seed" not in said
    assert description("rag", {"epochs": 7}).startswith("preset rag: mapper_layers 2, epochs 7 instead of 2")


def test_what_does_not_exist_is_named():
    with pytest.raises(InputError, match="no preset 'clipcap'; choose one of rag, clipcap-mlp"):
        configure("clipcap")
    with pytest.raises(InputError, match="no setting 'clip_dim'"):
        configure("rag", clip_dim=512)
    assert list(PRESETS)[0] == "rag"
