"""A CLIP text tower that runs only over the tokens that can change its result."""

import torch


class TextTower:
    """The text side of an open_clip model, cut to the tokens that are there where that changes nothing.

    open_clip runs every caption over the whole context (77 tokens for most models) although a caption has about 15. In
    a causal tower whose result is read at the end token, nothing behind that token can reach the result, so a batch may
    be cut behind its last end token. Towers that look both ways (SigLIP), append a class token (CoCa), read another
    position or come from Hugging Face run whole, through open_clip itself.

    Attributes:
        cuts: whether this tower may be cut.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._model = model
        self._parts = getattr(model, "text", model)  # `CLIP` holds the parts of its text tower itself
        self._pool = getattr(self._parts, "text_pool_type", getattr(self._parts, "pool_type", None))
        self._end = getattr(self._parts, "text_eos_id", getattr(self._parts, "eos_id", None))
        self.cuts = (
            self._pool in ("argmax", "eos")
            and getattr(self._parts, "cls_emb", None) is None
            and _is_causal(getattr(self._parts, "attn_mask", None))
        )

    def lengths(self, tokens: torch.Tensor) -> torch.Tensor:
        """How many leading tokens of each text [N, T] decide its embedding, [N]; all of them where nothing is cut."""
        if not self.cuts:
            return torch.full((len(tokens),), tokens.shape[1])
        return self._read_position(tokens) + 1

    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        """Raw embeddings [B, D] of tokens [B, T]; in a tower that cuts, T may be any number that `lengths` allows."""
        if not self.cuts:
            return self._model.encode_text(tokens, normalize=False)
        parts, length = self._parts, tokens.shape[1]
        dtype = parts.transformer.get_cast_dtype()
        x = parts.token_embedding(tokens).to(dtype) + parts.positional_embedding[:length].to(dtype)  # [B, T, W]
        x = parts.transformer(x, attn_mask=parts.attn_mask[:length, :length])
        rows = torch.arange(len(tokens), device=tokens.device)
        x = parts.ln_final(x[rows, self._read_position(tokens)])  # [B, W]
        projection = parts.text_projection
        if projection is None:
            return x
        return projection(x) if isinstance(projection, torch.nn.Module) else x @ projection  # [B, D]

    def _read_position(self, tokens: torch.Tensor) -> torch.Tensor:
        """Where the embedding is read: the first end token, which for `argmax` is the largest token number."""
        return (tokens if self._pool == "argmax" else (tokens == self._end).int()).argmax(dim=-1)


def _is_causal(mask: torch.Tensor | None) -> bool:
    if mask is None or mask.ndim != 2:
        return False
    return torch.equal(mask, torch.full_like(mask, float("-inf")).triu(1))
