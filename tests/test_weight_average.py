"""The mean of weights: what it counts, and that a model gets its own weights back."""

import pytest
import torch
from torch import nn

from clipcap_rag.weight_average import WeightAverage


@pytest.fixture
def model():
    model = nn.Linear(2, 1)
    model.bias.requires_grad_(False)
    with torch.no_grad():
        model.weight.fill_(1.0)
    return model


def put(model, value):
    with torch.no_grad():
        model.weight.fill_(value)


def test_the_mean_counts_the_first_weights_and_those_after_each_step(model):
    average = WeightAverage(model)
    for value in (3.0, 8.0):
        put(model, value)
        average.add(model)
    with average.used_by(model):
        assert model.weight.tolist() == [[4.0, 4.0]]
    assert model.weight.tolist() == [[8.0, 8.0]]
    put(model, 0.0)
    average.add(model)
    with average.used_by(model):
        assert model.weight.tolist() == [[3.0, 3.0]]


def test_a_model_has_its_own_weights_back_after_an_error(model):
    average = WeightAverage(model)
    put(model, 3.0)
    with pytest.raises(ValueError, match="stop"), average.used_by(model):
        raise ValueError("stop")
    assert model.weight.tolist() == [[3.0, 3.0]]


def test_a_mean_goes_on_from_what_was_saved(model):
    average, bias = WeightAverage(model), model.bias.clone()
    put(model, 3.0)
    average.add(model)
    other = WeightAverage(model)
    other.load_state_dict(average.state_dict())
    put(model, 5.0)
    other.add(model)
    with other.used_by(model):
        assert model.weight.tolist() == [[3.0, 3.0]]
        assert torch.equal(model.bias, bias)
