"""The learning rate: up in the warm-up, of a part of the training or of so many batches, then down to 0."""

import pytest
import torch

from clipcap_rag.config import TrainConfig
from clipcap_rag.optimizer import set_learning_rate, warmup_batches


def rates(steps: int, **settings) -> list[float]:
    """The factor of the learning rate at every step."""
    optimizer = torch.optim.AdamW([{"params": [torch.nn.Parameter(torch.zeros(1))], "peak": 1.0}])
    found = []
    for step in range(steps):
        set_learning_rate(optimizer, TrainConfig(**settings), step, steps)
        found.append(optimizer.param_groups[0]["lr"])
    return found


def test_a_warm_up_is_a_part_of_the_training_or_a_number_of_batches():
    for warmup, steps, batches in [(0.05, 1000, 50), (0.0, 1000, 1), (1, 1000, 1), (5000, 1000, 5000), (20.0, 100, 20)]:
        assert warmup_batches(TrainConfig(warmup=warmup), steps) == batches
    assert rates(100, warmup=0.2) == rates(100, warmup=20) != rates(100, warmup=10)


def test_the_linear_schedule_is_that_of_transformers():
    from transformers import get_linear_schedule_with_warmup

    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = get_linear_schedule_with_warmup(optimizer, 20, 100)
    theirs = []
    for _ in range(100):
        theirs.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    ours = rates(100, warmup=20, schedule="linear")
    assert ours[:19] == pytest.approx(theirs[1:20])  # theirs wastes its first step on a rate of 0
    assert ours[20:] == pytest.approx(theirs[20:])


def test_a_training_shorter_than_its_warm_up_never_reaches_the_peak():
    assert max(rates(100, warmup=5000)) == pytest.approx(0.02)
