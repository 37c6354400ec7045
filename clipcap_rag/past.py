"""What the language model has read of sequences that are being written, so that each token is read once."""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor
from transformers import DynamicCache

from clipcap_rag.model import CaptionModel
from clipcap_rag.token_bonus import TokenBonus

_LOOK_EVERY = 8  # steps between two looks, on a GPU, at what is finished: each look makes the host wait for the GPU


@dataclass
class Past:
    """The state of S sequences.

    Attributes:
        cache: keys and values of what was read.
        mask: [S, read] bool, False where left padding was read; None where there is none.
        bonus: what is added to the logits of the next token.
    """

    cache: DynamicCache
    mask: Tensor | None = None
    bonus: TokenBonus | None = None

    @classmethod
    def prefill(
        cls, model: CaptionModel, prefix: Tensor, mask: Tensor | None = None, bonus: TokenBonus | None = None
    ) -> tuple[Self, Tensor]:
        """Reads prefixes [B, P, E], `mask` [B, P] False at padding on the left; gives the first logits [B, V]."""
        mask = None if mask is None or mask.all() else mask
        padding = {} if mask is None else {"attention_mask": mask.long(), "position_ids": _positions(mask)}
        output = model.language_model(
            inputs_embeds=prefix.to(model.language_model.dtype), use_cache=True, logits_to_keep=1, **padding
        )
        logits = output.logits[:, -1].float()
        return cls(output.past_key_values, mask, bonus), logits if bonus is None else bonus.add(logits)

    def read(self, model: CaptionModel, tokens: Tensor) -> Tensor:
        """Reads one token [S] of each sequence; returns the logits [S, V] of the next."""
        padding = {}
        if self.mask is not None:
            self.mask = torch.cat([self.mask, self.mask.new_ones(len(tokens), 1)], dim=1)
            padding = {"attention_mask": self.mask.long(), "position_ids": _positions(self.mask)[:, -1:]}
        output = model.language_model(input_ids=tokens[:, None], past_key_values=self.cache, use_cache=True, **padding)
        logits = output.logits[:, -1].float()
        if self.bonus is None:
            return logits
        self.bonus = self.bonus.without(tokens)
        return self.bonus.add(logits)

    def rows(self, rows: Tensor) -> Self:
        """The state of some of the sequences, in any number and order; this one stays as it is."""
        chosen = DynamicCache()
        for number, layer in enumerate(self.cache.layers):
            chosen.update(layer.keys[rows], layer.values[rows], number)
        return type(self)(
            chosen,
            None if self.mask is None else self.mask[rows],
            None if self.bonus is None else self.bonus.rows(rows),
        )


def left_padded(vectors: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """vectors [B, S, E] and mask [B, S] with the padding moved to the left of what is present."""
    order = mask.int().argsort(dim=1, stable=True)
    return vectors.gather(1, order[..., None].expand_as(vectors)), mask.gather(1, order)


def _positions(mask: Tensor) -> Tensor:
    return (mask.long().cumsum(1) - 1).clamp_min(0)


def ended(tokens: Tensor, ends: list[int]) -> Tensor:
    """Where a token ends its caption."""
    return torch.stack([tokens == end for end in ends]).any(0)


def looks(step: int, device: torch.device) -> bool:
    """Whether to look, after this step, at what is finished."""
    return device.type == "cpu" or step % _LOOK_EVERY == 0
