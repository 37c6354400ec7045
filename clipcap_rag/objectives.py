"""What each batch of a stage is trained for: its captions as they are, or the rewards of captions that are sampled."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from clipcap_rag.config import TrainConfig
from clipcap_rag.model import CaptionModel
from clipcap_rag.self_critical import CaptionReward, sample_captions, self_critical_loss
from clipcap_rag.stages import Stage


def batch_losses(
    stage: Stage,
    epoch: int,
    skip: int,
    model: CaptionModel,
    tokenizer: PreTrainedTokenizerBase,
    config: TrainConfig,
    dtype: torch.dtype,
) -> Iterator[tuple[Tensor, float]]:
    """For each batch of an epoch its loss per token, and the figure that a log shows of it: that loss, or the reward.

    Args:
        skip: batches that were trained on before.
        dtype: number format of autocast.
    """
    device = model.language_model.device
    precision = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    if stage.reward is not None:
        yield from _reward_losses(stage, stage.reward, epoch, skip, model, tokenizer, config, precision)
        return
    for batch in stage.batches.epoch(epoch, skip):
        batch = batch.to(device)
        with precision:
            total, count = model.loss(batch.tokens, *batch.inputs, context=batch.context)
        yield total / count, (total / count).item()


def _reward_losses(
    stage: Stage,
    reward: CaptionReward,
    epoch: int,
    skip: int,
    model: CaptionModel,
    tokenizer: PreTrainedTokenizerBase,
    config: TrainConfig,
    precision: torch.autocast,
) -> Iterator[tuple[Tensor, float]]:
    device = model.language_model.device
    model.eval()  # the captions are those that it would write
    for number, (photos, batch) in enumerate(stage.batches.photo_epoch(epoch, skip), start=skip):
        batch = batch.to(device)
        seeds = [f"{config.seed}:{epoch}:{number}:{photo}".encode() for photo in photos]
        with torch.no_grad():
            prefix = model.prefix(*batch.inputs)
        limits, said = (config.reward_samples, config.max_caption_tokens), (batch.context, batch.bonus)
        written = sample_captions(model, tokenizer, prefix, *limits, seeds, *said)
        rewards = [
            reward.rewards(photo, [found.caption for found in captions])
            for photo, captions in zip(photos, written, strict=True)
        ]
        with precision:
            total, count = self_critical_loss(model, written, rewards, batch.inputs, *said)
        yield total / count, float(np.mean(rewards))
