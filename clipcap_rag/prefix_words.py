"""The prefix read as words: the vocabulary tokens whose input embeddings lie nearest to each of its vectors."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

from clipcap_rag.model import CaptionModel


@dataclass(frozen=True)
class PrefixWord:
    """A token as text, with the space in front of it if it has one, and its cosine with a prefix vector."""

    word: str
    similarity: float


@torch.inference_mode()
def prefix_words(
    model: CaptionModel, tokenizer: PreTrainedTokenizerBase, prefix: Tensor, count: int = 5
) -> list[list[list[PrefixWord]]]:
    """Reads prefixes as the ClipCap paper does (Mokady et al. 2021, arXiv 2111.09734, "prefix interpretability").

    With a tuned language model the words mean little, as that paper found: the prefix need not lie near any of them.

    Args:
        prefix: [B, P, E].
        count: words for each vector.

    Returns:
        Per image and prefix vector the nearest tokens, best first.
    """
    words = F.normalize(model.language_model.get_input_embeddings().weight.float(), dim=-1)  # [V, E]
    cosines = F.normalize(prefix.float(), dim=-1) @ words.T  # [B, P, V]
    best, ids = cosines.topk(min(count, len(words)))  # [B, P, count]
    return [
        [
            [PrefixWord(tokenizer.decode([token]), cosine) for token, cosine in zip(tokens, values, strict=True)]
            for tokens, values in zip(image_ids, image_best, strict=True)
        ]
        for image_ids, image_best in zip(ids.tolist(), best.tolist(), strict=True)
    ]
