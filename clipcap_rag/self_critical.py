"""Self-critical training: sampled captions are made likelier by how much better they are than their like."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

from clipcap_rag.config import GenerationConfig
from clipcap_rag.generation import Written, write_captions
from clipcap_rag.model import IGNORED, CaptionModel, padded_tokens
from clipcap_rag.ngram_agreement import NgramWeights, Vector, agreement, pieces
from clipcap_rag.token_bonus import TokenBonus

_SIGMA = 6.0  # words; CIDEr-D's tolerance of another length


class CaptionReward:
    """How good a caption of a photo is, by its reference captions.

    The mean over the references of the cosine of CIDEr's vectors times CIDEr-D's penalty of another length (Vedantam
    et al. 2015, arXiv 1411.5726), times 10 as there. The end of a caption counts as a word, without which training on
    CIDEr teaches to stop after "with a".
    """

    def __init__(self, references: Sequence[Sequence[str]]):
        """references: [N] lists of captions, one for each photo."""
        self._references = references
        self._weights = NgramWeights(references)
        self._known: dict[int, list[tuple[Vector, int]]] = {}

    def rewards(self, photo: int, captions: Sequence[str]) -> list[float]:
        """The reward of each caption of a photo, 0 (no n-gram in common) to 10."""
        known = self._known.get(photo)
        if known is None:
            known = self._known[photo] = [self._measured(text) for text in self._references[photo]]
        found = []
        for vector, length in map(self._measured, captions):
            alike = [agreement(vector, other) * _forgiven(length - own) for other, own in known]
            found.append(10 * sum(alike) / len(alike))
        return found

    def _measured(self, caption: str) -> tuple[Vector, int]:
        return self._weights.vector(caption), len(pieces(caption))


def _forgiven(difference: int) -> float:
    return math.exp(-(difference**2) / (2 * _SIGMA**2))


def sample_captions(
    model: CaptionModel,
    tokenizer: PreTrainedTokenizerBase,
    prefix: Tensor,
    samples: int,
    longest: int,
    seeds: Sequence[bytes],
    context: Tensor | None = None,
    bonus: TokenBonus | None = None,
) -> list[list[Written]]:
    """Greedy caption and `samples` - 1 draws from the model's own distribution for each prefix [B, P, E]."""
    settings = GenerationConfig(
        decoding="sample", candidates=samples, num_beams=1, top_p=1.0, temperature=1.0, max_new_tokens=longest
    )
    return write_captions(model, tokenizer, prefix, settings, seeds, context=context, bonus=bonus)


def self_critical_loss(
    model: CaptionModel,
    written: Sequence[Sequence[Written]],
    rewards: Sequence[Sequence[float]],
    inputs: Sequence[Tensor],
    context: Tensor,
    bonus: TokenBonus | None,
) -> tuple[Tensor, int]:
    """Sum over tokens of -advantage x log-probability, and the number of tokens.

    A sample's advantage is its reward less the mean reward of the photo's other captions: the baseline of Luo 2020
    (arXiv 2003.09971) for the method of Rennie et al. 2017 (arXiv 1612.00563). The greedy caption serves the baseline
    only, as it is no draw from the model's distribution.

    Args:
        written: S captions of each of B photos, the greedy one first.
        rewards: theirs.
        inputs: the model's, for B photos.
        context, bonus: with which they were written.
    """
    device = inputs[0].device
    reward = torch.tensor(np.asarray(rewards, np.float32), device=device)  # [B, S]
    samples = reward.shape[1] - 1
    advantage = ((reward - reward.mean(1, keepdim=True)) * (samples + 1) / samples)[:, 1:].flatten()
    sequences = [found.tokens for captions in written for found in captions[1:]]
    tokens = padded_tokens(sequences).to(device)
    repeated = [part.repeat_interleave(samples, 0) for part in inputs]
    counted = tokens != IGNORED
    forced = tokens.masked_fill(~counted, model.end_token)
    logits = model(forced, *repeated, context=context.repeat_interleave(samples, 0))  # [B x samples, T, V]
    if bonus is not None:
        owners = torch.arange(len(inputs[0]), device=device).repeat_interleave(samples)
        logits = logits + bonus.rows(owners).along(forced, logits.shape[2]).to(logits.dtype)
    surprise = F.cross_entropy(logits[counted].float(), tokens[counted], reduction="none")
    return (advantage[:, None].expand_as(tokens)[counted] * surprise).sum(), int(counted.sum())
