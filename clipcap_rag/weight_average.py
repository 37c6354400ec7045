"""The mean of a model's weights over the steps of a training."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


class WeightAverage:
    """The mean of the weights that learn, from those before the first step to those after the last.

    What a few steps of strong training broke is so partly mended by the weights that they began from: the average of
    Polyak and Juditsky 1992 over a stage, with the effect of Wortsman et al. 2022 (arXiv 2109.01903), who average the
    two ends.
    """

    def __init__(self, model: nn.Module):
        self._mean = {name: weight.detach().clone() for name, weight in _learning(model)}
        self._count = 1

    @torch.no_grad()
    def add(self, model: nn.Module) -> None:
        """Counts the weights as they are now."""
        self._count += 1
        for name, weight in _learning(model):
            self._mean[name] += (weight - self._mean[name]) / self._count

    @contextmanager
    def used_by(self, model: nn.Module) -> Iterator[None]:
        """Inside the block the model has the mean weights."""
        self._swap(model)
        try:
            yield
        finally:
            self._swap(model)

    @torch.no_grad()
    def _swap(self, model: nn.Module) -> None:
        for name, weight in _learning(model):
            own = weight.detach().clone()
            weight.copy_(self._mean[name])
            self._mean[name] = own

    def state_dict(self) -> dict[str, Any]:
        return {"mean": self._mean, "count": self._count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._count = state["count"]
        for name, mean in self._mean.items():
            mean.copy_(state["mean"][name])


def _learning(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, weight) for name, weight in model.named_parameters() if weight.requires_grad)
