"""How good a model in training is: loss and greedy CIDEr on photos kept apart, their own captions never retrieved."""

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from clipcap_rag.batches import CaptionBatches
from clipcap_rag.config import GenerationConfig
from clipcap_rag.generation import write_captions
from clipcap_rag.metrics import caption_metrics
from clipcap_rag.model import CaptionModel

_PHOTOS = 128  # captioned at once


@torch.inference_mode()
def validate(
    model: CaptionModel, tokenizer: PreTrainedTokenizerBase, batches: CaptionBatches, device: torch.device
) -> dict[str, float]:
    """Loss in nats per token over all captions, greedy CIDEr and BLEU-4 (raw fractions) over `validation_images`."""
    model.eval()
    total, count = 0.0, 0
    for batch in batches.plain():
        batch = batch.to(device)
        loss, tokens = model.loss(batch.tokens, *batch.inputs, context=batch.context)
        total, count = total + float(loss), count + tokens
    photos = np.unique(batches.photo)[: batches.config.validation_images]
    captions: list[str] = []
    for start in range(0, len(photos), _PHOTOS):
        part = photos[start : start + _PHOTOS]
        rows = batches.nearest(part)
        prefix = model.prefix(*(tensor.to(device) for tensor in batches.inputs(part, rows)))
        context = batches.context(rows, len(part)).to(device)
        greedy = GenerationConfig(decoding="greedy", max_new_tokens=batches.config.max_caption_tokens)
        bonus = batches.bonus(part)
        said = {"context": context, "bonus": bonus and bonus.to(device)}
        written = write_captions(model, tokenizer, prefix, greedy, [b""] * len(part), **said)
        captions += [found[0].caption for found in written]
    scores = caption_metrics([batches.features.captions[photo] for photo in photos], captions)
    return {"validation_loss": total / count, "CIDEr": scores["CIDEr"], "BLEU-4": scores["BLEU-4"]}
