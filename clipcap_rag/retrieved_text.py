"""Neighbours' captions as tokens that a language model reads between its prefix and the caption."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from clipcap_rag.errors import InputError
from clipcap_rag.model import IGNORED


def context_tokens(
    tokenizer: PreTrainedTokenizerBase, captions: Sequence[Sequence[str]], count: int, room: int
) -> Tensor:
    """The first `count` captions of each of B images as tokens [B, C], IGNORED behind them.

    Each caption is written as training writes one, with the end token behind it, best first; what exceeds `room`
    tokens is cut. Words of neighbours in front of the caption follow SmallCap (Ramos et al. 2023, arXiv 2209.15323).

    Args:
        captions: per image, its neighbours' captions, best first; none gives a row of IGNORED.
    """
    end = tokenizer.eos_token_id
    chosen = [[" ".join(caption.split()) for caption in listed[:count]] for listed in captions]
    texts = list(dict.fromkeys(text for listed in chosen for text in listed))
    ids = dict(zip(texts, tokenizer(texts, verbose=False)["input_ids"] if texts else [], strict=True))
    rows = [[token for text in listed for token in (*ids[text], end)] for listed in chosen]
    rows = [row if len(row) <= room else [*row[: room - 1], end][: max(0, room)] for row in rows]
    context = torch.full((len(rows), max(map(len, rows), default=0)), IGNORED)
    for place, row in enumerate(rows):
        context[place, : len(row)] = torch.tensor(row, dtype=torch.long)
    return context


def text_mode(asked: str, text_neighbors: int) -> str:
    """off, prompt or bias for `GenerationConfig.retrieved_text` and a model trained with so many neighbours' words.

    Raises:
        InputError: the model has not learned to read them.
    """
    if asked == "prompt" and not text_neighbors:
        raise InputError(
            "this model was trained without its neighbours' words, so --retrieved-text prompt would confuse it; "
            "use bias or off, or train one with --text-neighbors 4"
        )
    return asked if asked != "auto" else "prompt" if text_neighbors else "off"
