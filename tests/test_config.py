"""Configurations: the way to JSON and back, documentation of every field, contradictions."""

import dataclasses
import json

import pytest

from clipcap_rag.config import GenerationConfig, IndexConfig, ModelConfig, TrainConfig
from clipcap_rag.errors import InputError

CONFIGS = [ModelConfig, GenerationConfig, TrainConfig, IndexConfig]


@pytest.mark.parametrize("config", CONFIGS)
def test_json_round_trip(config):
    value = config()
    assert config.from_json(json.loads(json.dumps(value.to_json()))) == value


def test_json_round_trip_keeps_what_was_changed():
    value = TrainConfig(epochs=3, learning_rate=1e-5, schedule="linear")
    again = TrainConfig.from_json(json.loads(json.dumps(value.to_json())))
    assert (again.epochs, again.learning_rate, again.schedule) == (3, 1e-5, "linear")


@pytest.mark.parametrize("config", CONFIGS)
def test_unknown_keys_are_named_and_missing_ones_take_their_defaults(config):
    with pytest.raises(InputError, match="no_such_key"):
        config.from_json(config().to_json() | {"no_such_key": 1})
    values = config().to_json()
    del values[next(iter(values))]
    assert config.from_json(values) == config()


@pytest.mark.parametrize("config", CONFIGS)
def test_every_field_is_documented_and_frozen(config):
    for field in dataclasses.fields(config):
        assert len(field.metadata["help"]) > 10, field.name
        choices = field.metadata["choices"]
        assert not choices or field.default in choices, field.name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(config(), dataclasses.fields(config)[0].name, 1)


@pytest.mark.parametrize(
    "config, values, named",
    [
        (ModelConfig, {"mapper": "lstm"}, "retrieval, transformer, mlp, linear"),
        (ModelConfig, {"prefix_length": 0}, "prefix_length is 0"),
        (ModelConfig, {"clip_length": 0}, "clip_length is 0"),
        (ModelConfig, {"mapper_layers": 0}, "mapper_layers is 0"),
        (ModelConfig, {"mapper_heads": 7, "lm_dim": 64}, "7 does not divide .* 64"),
        (ModelConfig, {"mapper_dropout": 1.0}, "mapper_dropout is 1.0"),
        (ModelConfig, {"lora_rank": 0}, "lora_rank is 0"),
        (ModelConfig, {"language_model_tuning": "half"}, "frozen, lora, layers, full"),
        (GenerationConfig, {"decoding": "best"}, "sample, beam, greedy, clipcap"),
        (GenerationConfig, {"candidates": 0}, "candidates is 0"),
        (GenerationConfig, {"top_p": 0.0}, "top_p is 0.0"),
        (GenerationConfig, {"top_p": 1.01}, "top_p is 1.01"),
        (GenerationConfig, {"temperature": 0.0}, "temperature is 0.0"),
        (GenerationConfig, {"temperature": float("nan")}, "temperature is nan"),
        (GenerationConfig, {"num_beams": 0}, "num_beams is 0"),
        (GenerationConfig, {"max_new_tokens": -1}, "max_new_tokens is -1"),
        (GenerationConfig, {"seed": -1}, "seed is -1"),
        (TrainConfig, {"epochs": -1}, "epochs is -1"),
        (TrainConfig, {"batch_size": 0}, "batch_size is 0"),
        (TrainConfig, {"warmup": 1.5}, "warmup is 1.5"),
        (TrainConfig, {"warmup": -5000}, "warmup is -5000"),
        (TrainConfig, {"warmup": float("inf")}, "whole number of batches"),
        (TrainConfig, {"learning_rate": 0.0}, "learning_rate is 0.0"),
        (TrainConfig, {"schedule": "step"}, "cosine, linear"),
        (TrainConfig, {"max_neighbors": 60}, "60 exceeds neighbor_pool 50"),
        (TrainConfig, {"max_neighbors": -1}, "max_neighbors is -1"),
        (TrainConfig, {"gradient_clip": -1.0}, "gradient_clip is -1"),
        (TrainConfig, {"patience": -1}, "patience is -1"),
        (TrainConfig, {"image_noise": -0.1}, "image_noise is -0.1"),
        (GenerationConfig, {"log_probability_weight": -1}, "log_probability_weight is -1"),
        (TrainConfig, {"neighbor_noise": -0.1}, "neighbor_noise is -0.1"),
        (TrainConfig, {"seed": -1}, "seed is -1"),
        (IndexConfig, {"index_key": ""}, "index_key is empty"),
        (IndexConfig, {"index_memory": -1.0}, "index_memory is -1.0"),
        (IndexConfig, {"index_latency": 0.0}, "index_latency is 0.0"),
    ],
)
def test_contradictions_are_refused_with_the_value(config, values, named):
    with pytest.raises(InputError, match=named):
        config(**values)


def test_edges_are_allowed():
    ModelConfig(mapper="mlp", mapper_heads=7, lm_dim=64)  # an MLP has no heads
    ModelConfig(mapper="linear", mapper_heads=7, lm_dim=64)
    ModelConfig(mapper_heads=8, lm_dim=64)
    GenerationConfig(top_p=1.0, seed=0, candidates=1)
    TrainConfig(warmup=5000.0)
    TrainConfig(max_neighbors=50, neighbor_pool=50, warmup=0.0, patience=0, gradient_clip=0.0)


def test_settings_are_replaced_by_name():
    changed = GenerationConfig(top_p=0.5).replaced(num_beams=3, decoding="beam")
    assert (changed.top_p, changed.num_beams, changed.decoding) == (0.5, 3, "beam")
    with pytest.raises(InputError, match="beams is no setting of GenerationConfig; choose among decoding"):
        changed.replaced(beams=3)
    with pytest.raises(InputError, match="num_beams is 0"):
        changed.replaced(num_beams=0)
