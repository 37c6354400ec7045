"""AdamW and the learning-rate schedule."""

import math

import torch

from clipcap_rag.config import TrainConfig
from clipcap_rag.model import CaptionModel


def make_optimizer(model: CaptionModel, rates: tuple[float, float], weight_decay: float) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101) over what learns.

    Matrices decay, vectors do not; mapper and language model each have their learning rate, in this order.
    """
    groups: dict[tuple[float, bool], list[torch.nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            rate = rates[0] if name.startswith("mapper.") else rates[1]
            groups.setdefault((rate, parameter.ndim > 1), []).append(parameter)
    return torch.optim.AdamW(
        {"params": parameters, "lr": rate, "peak": rate, "weight_decay": weight_decay * decays}
        for (rate, decays), parameters in groups.items()
    )


def warmup_batches(config: TrainConfig, steps: int) -> int:
    """In how many of `steps` batches the learning rate rises; may be more than there are."""
    return max(1, round(config.warmup if config.warmup >= 1 else config.warmup * steps))


def set_learning_rate(optimizer: torch.optim.Optimizer, config: TrainConfig, step: int, steps: int) -> None:
    """Sets the rate of step number `step` out of `steps`: up in the warm-up, then down to 0."""
    warmup = warmup_batches(config, steps)
    if step < warmup:
        factor = (step + 1) / warmup
    else:
        rest = (step - warmup) / max(1, steps - warmup)
        factor = 1 - rest if config.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * rest))
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * factor
