"""Mappers from an image embedding, and the embeddings of its neighbour captions, to a language-model prefix.

Shape letters: B batch, D clip_dim, E lm_dim, C clip_length, P prefix_length, K neighbours, S sequence, H heads.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class MLPMapper(nn.Module):
    """Linear, tanh, linear: ClipCap's mapper for a tuned language model (Mokady et al. 2021, arXiv 2111.09734)."""

    uses_neighbors = False

    def __init__(self, clip_dim: int, lm_dim: int, prefix_length: int):
        super().__init__()
        hidden = lm_dim * prefix_length // 2
        self.prefix_length, self.lm_dim = prefix_length, lm_dim
        self.model = nn.Sequential(nn.Linear(clip_dim, hidden), nn.Tanh(), nn.Linear(hidden, lm_dim * prefix_length))

    def forward(
        self,
        image_embedding: Tensor,
        neighbor_embeddings: Tensor | None = None,
        neighbor_scores: Tensor | None = None,
        neighbor_mask: Tensor | None = None,
    ) -> Tensor:
        """image_embedding [B, D] -> prefix [B, P, E]; neighbours are not looked at."""
        return self.model(image_embedding).view(-1, self.prefix_length, self.lm_dim)  # [B, P, E]


class LinearMapper(nn.Linear):
    """One linear layer: what ClipCap's notebooks build in place of the MLP for prefixes longer than 10."""

    uses_neighbors = False

    def __init__(self, clip_dim: int, lm_dim: int, prefix_length: int):
        super().__init__(clip_dim, lm_dim * prefix_length)
        self.prefix_length, self.lm_dim = prefix_length, lm_dim

    def forward(
        self,
        image_embedding: Tensor,
        neighbor_embeddings: Tensor | None = None,
        neighbor_scores: Tensor | None = None,
        neighbor_mask: Tensor | None = None,
    ) -> Tensor:
        """image_embedding [B, D] -> prefix [B, P, E]; neighbours are not looked at."""
        return super().forward(image_embedding).view(-1, self.prefix_length, self.lm_dim)  # [B, P, E]


class SelfAttention(nn.Module):
    """Multi-head self-attention with ClipCap's parameter layout: no bias on queries, keys and values."""

    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.to_queries = nn.Linear(width, width, bias=False)
        self.to_keys_values = nn.Linear(width, 2 * width, bias=False)
        self.project = nn.Linear(width, width)

    def forward(self, x: Tensor, key_mask: Tensor | None) -> Tensor:
        """x [B, S, E], key_mask [B, S] bool (True = may be attended to) or None -> [B, S, E]."""
        B, S, E = x.shape
        queries = self.to_queries(x).view(B, S, self.heads, -1).transpose(1, 2)  # [B, H, S, E/H]
        keys, values = (
            part.transpose(1, 2)  # [B, H, S, E/H]
            for part in self.to_keys_values(x).view(B, S, 2, self.heads, -1).unbind(2)
        )
        mask = None if key_mask is None else key_mask[:, None, None, :]  # [B, 1, 1, S]
        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, dropout_p=dropout)
        return self.project(mixed.transpose(1, 2).reshape(B, S, E))


class FeedForward(nn.Module):
    """The two-layer ReLU network inside a mapper layer."""

    def __init__(self, width: int, dropout: float):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.fc2(self.dropout(F.relu(self.fc1(x)))))


class MapperLayer(nn.Module):
    """A pre-norm transformer layer."""

    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(width), SelfAttention(width, heads, dropout)
        self.norm2, self.mlp = nn.LayerNorm(width), FeedForward(width, dropout)

    def forward(self, x: Tensor, key_mask: Tensor | None) -> Tensor:
        x = x + self.attn(self.norm1(x), key_mask)
        return x + self.mlp(self.norm2(x))


class Transformer(nn.Module):
    """A stack of mapper layers without positions or a final norm."""

    def __init__(self, width: int, heads: int, layers: int, dropout: float):
        super().__init__()
        self.layers = nn.ModuleList(MapperLayer(width, heads, dropout) for _ in range(layers))

    def forward(self, x: Tensor, key_mask: Tensor | None = None) -> Tensor:
        for layer in self.layers:
            x = layer(x, key_mask)
        return x


class TransformerMapper(nn.Module):
    """ClipCap's transformer mapper (Mokady et al. 2021, arXiv 2111.09734), parameter names as published.

    The image embedding is unfolded into C tokens, P learned constants follow them, and what the transformer makes of
    the constants is the prefix.
    """

    uses_neighbors = False

    def __init__(
        self,
        clip_dim: int,
        lm_dim: int,
        prefix_length: int,
        clip_length: int,
        layers: int,
        heads: int,
        dropout: float = 0.0,
    ):
        super().__init__()
        self.clip_length, self.prefix_length = clip_length, prefix_length
        self.linear = nn.Linear(clip_dim, clip_length * lm_dim)
        self.prefix_const = nn.Parameter(torch.randn(prefix_length, lm_dim))
        self.transformer = Transformer(lm_dim, heads, layers, dropout)

    def forward(
        self,
        image_embedding: Tensor,
        neighbor_embeddings: Tensor | None = None,
        neighbor_scores: Tensor | None = None,
        neighbor_mask: Tensor | None = None,
    ) -> Tensor:
        """image_embedding [B, D] -> prefix [B, P, E]; neighbours are not looked at."""
        image_tokens, constants = self.own_tokens(image_embedding)
        return self.transformer(torch.cat([image_tokens, constants], dim=1))[:, -self.prefix_length :]  # [B, P, E]

    def own_tokens(self, image_embedding: Tensor) -> tuple[Tensor, Tensor]:
        """image_embedding [B, D] -> the image's tokens [B, C, E] and the constants [B, P, E]."""
        B = len(image_embedding)
        return self.linear(image_embedding).view(B, self.clip_length, -1), self.prefix_const.expand(B, -1, -1)


class RetrievalMapper(TransformerMapper):
    """The transformer mapper with one more token per neighbour caption; without neighbours it is TransformerMapper.

    Neighbours are a set: they get no positions, but a projection and a type embedding of their own, because texts and
    images live apart in CLIP space (Liang et al. 2022, arXiv 2203.02053), and their similarity as an input.
    `text_mean` and `text_std` [D] centre and scale the caption embeddings of one encoder; `score_mean` and `score_std`
    do so for the similarities. They are set once before training and stay when the index is swapped.
    """

    uses_neighbors = True

    def __init__(
        self,
        clip_dim: int,
        lm_dim: int,
        prefix_length: int,
        clip_length: int,
        layers: int,
        heads: int,
        dropout: float = 0.0,
    ):
        super().__init__(clip_dim, lm_dim, prefix_length, clip_length, layers, heads, dropout)
        self.neighbor_linear = nn.Linear(clip_dim, lm_dim)
        self.neighbor_type = nn.Parameter(0.02 * torch.randn(lm_dim))
        self.score_linear = nn.Linear(1, lm_dim)
        self.register_buffer("text_mean", torch.zeros(clip_dim))
        self.register_buffer("text_std", torch.ones(clip_dim))
        self.register_buffer("score_mean", torch.zeros(()))
        self.register_buffer("score_std", torch.ones(()))

    def set_statistics(self, text_embeddings: Tensor, scores: Tensor) -> None:
        """Stores mean and standard deviation of caption embeddings [N, D] and of neighbour similarities [M]."""
        self.text_mean.copy_(text_embeddings.mean(0))
        self.text_std.copy_(text_embeddings.std(0).clamp_min(1e-6))
        self.score_mean.copy_(scores.mean())
        self.score_std.copy_(scores.std().clamp_min(1e-6))

    def neighbor_tokens(self, embeddings: Tensor, scores: Tensor) -> Tensor:
        """embeddings [B, K, D] unit length, scores [B, K] cosines -> [B, K, E]."""
        standardised = (embeddings - self.text_mean) / self.text_std
        similarity = ((scores - self.score_mean) / self.score_std)[..., None]  # [B, K, 1]
        return self.neighbor_linear(standardised) + self.score_linear(similarity) + self.neighbor_type

    def forward(
        self,
        image_embedding: Tensor,
        neighbor_embeddings: Tensor | None = None,
        neighbor_scores: Tensor | None = None,
        neighbor_mask: Tensor | None = None,
    ) -> Tensor:
        """Image embedding and neighbours to a prefix.

        Args:
            image_embedding: [B, D].
            neighbor_embeddings: [B, K, D] unit length, or None for K = 0.
            neighbor_scores: [B, K] cosines between image and neighbour.
            neighbor_mask: [B, K] bool, True = present. A row of all False gives what K = 0 gives.

        Returns:
            prefix [B, P, E].
        """
        if neighbor_embeddings is None or neighbor_embeddings.shape[1] == 0:
            return super().forward(image_embedding)
        B, P, C = len(image_embedding), self.prefix_length, self.clip_length
        image_tokens, constants = self.own_tokens(image_embedding)  # [B, C, E], [B, P, E]
        neighbors = self.neighbor_tokens(neighbor_embeddings, neighbor_scores)  # [B, K, E]
        neighbors = neighbors.masked_fill(~neighbor_mask[..., None], 0.0)
        present = neighbor_mask.new_ones(B, C + P)
        key_mask = torch.cat([present[:, :C], neighbor_mask, present[:, C:]], dim=1)  # [B, C+K+P]
        return self.transformer(torch.cat([image_tokens, neighbors, constants], dim=1), key_mask)[:, -P:]  # [B, P, E]
