"""What the words of neighbours do when captions are written: stand before the caption, or raise what they say."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from clipcap_rag.checkpoint import Checkpoint
from clipcap_rag.config import GenerationConfig
from clipcap_rag.errors import InputError
from clipcap_rag.model import padded_tokens
from clipcap_rag.neighbors import Neighbors
from clipcap_rag.prompt import prompt_tokens
from clipcap_rag.word_bonus import caption_tokens, neighbor_bonus


def words_for(checkpoint: Checkpoint, neighbors: Neighbors, generation: GenerationConfig) -> dict[str, Any]:
    """The `context` or the `bonus` of `write_captions` that the neighbours of B images ask for, or neither.

    Raises:
        InputError: the model has not learned to read its neighbours' words.
    """
    tokenizer, device = checkpoint.tokenizer, checkpoint.model.language_model.device
    mode = text_mode(generation.retrieved_text, checkpoint.text_neighbors, checkpoint.raises_words)
    if mode == "prompt":
        room = checkpoint.model.language_model.config.n_positions - checkpoint.config.prefix_length
        room -= len(prompt_tokens(tokenizer, generation.prompt)) + generation.longest
        context = context_tokens(tokenizer, neighbors.captions, checkpoint.text_neighbors, room)
        return {"context": context.to(device)}
    if mode == "bias":
        settings = (neighbors.indexes, checkpoint.words, generation.bias_strength, generation.new_word_share)
        return {"bonus": neighbor_bonus(tokenizer, *neighbors.matches(), *settings, neighbors.photo_votes).to(device)}
    return {}


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
    texts = list(dict.fromkeys(text for listed in captions for text in listed[:count]))
    ids = dict(zip(texts, caption_tokens(tokenizer, texts), strict=True))
    rows = [[token for text in listed[:count] for token in (*ids[text], end)] for listed in captions]
    rows = [row if len(row) <= room else [*row[: room - 1], end][: max(0, room)] for row in rows]
    return padded_tokens(rows)


def text_mode(asked: str, text_neighbors: int, raises_words: bool) -> str:
    """off, prompt or bias for `GenerationConfig.retrieved_text` and a model trained with so many neighbours' words.

    Args:
        raises_words: whether the model was trained to write with its neighbours' words raised.

    Raises:
        InputError: the model has not learned to read them.
    """
    if asked == "prompt" and not text_neighbors:
        raise InputError(
            "this model was trained without its neighbours' words, so --retrieved-text prompt would confuse it; "
            "use bias or off, or train one with --text-neighbors 4"
        )
    if asked != "auto":
        return asked
    return "prompt" if text_neighbors else "bias" if raises_words else "off"
