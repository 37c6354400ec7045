"""A prompt: words that every caption starts with, put behind the prefix for the language model to continue."""

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from clipcap_rag.errors import InputError
from clipcap_rag.model import CaptionModel


def prompt_tokens(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """The tokens of a prompt, made as training makes those of a caption; none for an empty one.

    A space at its end is left out, because the token of the next word brings its own.

    Raises:
        InputError: the end token is among them.
    """
    text = " ".join(prompt.split())
    tokens = tokenizer(text, verbose=False)["input_ids"] if text else []
    if tokenizer.eos_token_id in tokens:
        raise InputError(f"the prompt {prompt!r} holds {tokenizer.eos_token}, which ends a caption; leave it out")
    return tokens


def with_prompt(
    model: CaptionModel, tokenizer: PreTrainedTokenizerBase, prefix: Tensor, mask: Tensor, prompt: str
) -> tuple[Tensor, Tensor, list[int]]:
    """The prefix [B, P, E] with the prompt's word vectors behind it, [B, P+T, E], its mask, and the prompt's T tokens.

    Raises:
        InputError: they leave the language model no position to write at.
    """
    tokens = prompt_tokens(tokenizer, prompt)
    room = model.language_model.config.n_positions - prefix.shape[1] - 1
    if len(tokens) > room:
        raise InputError(f"the prompt has {len(tokens)} tokens, but this model has room for {room}; shorten --prompt")
    words = model.language_model.get_input_embeddings()(torch.tensor(tokens, dtype=torch.long, device=prefix.device))
    return (
        torch.cat([prefix, words.to(prefix.dtype).expand(len(prefix), -1, -1)], dim=1),
        torch.cat([mask, mask.new_ones(len(mask), len(tokens))], dim=1),
        tokens,
    )
