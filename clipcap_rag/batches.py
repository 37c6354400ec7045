"""Training batches: captions in length buckets, each with an image and neighbours as bad as they may be in use."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from clipcap_rag.caption_index import CaptionIndex
from clipcap_rag.config import ModelConfig, TrainConfig
from clipcap_rag.features import FeatureSet
from clipcap_rag.model import padded_tokens
from clipcap_rag.retrieved_text import context_tokens
from clipcap_rag.sources import normalize_caption
from clipcap_rag.token_bonus import TokenBonus
from clipcap_rag.word_bonus import neighbor_bonus

_BUCKET = 64  # batches sorted by length together
_ORDER, _NOISE = 0, 1  # streams of random numbers


@dataclass(frozen=True)
class Batch:
    """tokens [B, T] with the end token and IGNORED padding; inputs = image embedding [B, D] and, with an index,
    neighbour embeddings [B, K, D], scores [B, K] and mask [B, K]; context = the neighbours' words [B, C]; bonus = what
    the neighbours' words raise when captions are written."""

    tokens: Tensor
    inputs: tuple[Tensor, ...]
    context: Tensor
    bonus: TokenBonus | None = None

    def to(self, device: torch.device) -> "Batch":
        inputs, bonus = tuple(part.to(device) for part in self.inputs), self.bonus and self.bonus.to(device)
        return Batch(self.tokens.to(device), inputs, self.context.to(device), bonus)


class CaptionBatches:
    """The captions of some photos of a feature set as batches.

    The order and the retrieval noise are functions of (seed, epoch, batch number), so a resumed run sees what an
    uninterrupted one would have seen.
    """

    def __init__(
        self,
        features: FeatureSet,
        rows: Sequence[int],
        tokenizer: PreTrainedTokenizerBase,
        model: ModelConfig,
        config: TrainConfig,
        index: CaptionIndex | None = None,
        neighbor_rows: np.ndarray | None = None,
        room: int = 0,
    ):
        """A view of a feature set.

        Args:
            neighbor_rows: [N, pool] rows of `index` for every photo of `features`, best first, -1 where absent.
            room: most tokens of the neighbours' words.
        """
        self.features, self.index, self.neighbor_rows = features, index, neighbor_rows
        self.tokenizer, self.room = tokenizer, room
        self.model, self.config = model, config
        self.captioned = np.array([row for row in rows if features.captions[row]], np.int64)
        self.photo = np.array([row for row in rows for _ in features.captions[row]], np.int64)
        texts = [caption for row in rows for caption in features.captions[row]]
        encoded = tokenizer(texts)["input_ids"] if texts else []
        end = tokenizer.eos_token_id
        self.tokens = [ids[: config.max_caption_tokens] + [end] for ids in encoded]
        self.own_texts = {row: {normalize_caption(text) for text in features.captions[row]} for row in rows}

    def __len__(self) -> int:
        """Batches of one epoch."""
        return -(-len(self.tokens) // self.config.batch_size)

    def order(self, epoch: int) -> list[np.ndarray]:
        """The captions of each batch of an epoch: shuffled, then sorted by length inside buckets of 64 batches."""
        random = self._random(_ORDER, epoch, 0)
        lengths = np.array([len(tokens) for tokens in self.tokens])
        shuffled = random.permutation(len(self.tokens))
        size = self.config.batch_size
        batches = []
        for start in range(0, len(shuffled), size * _BUCKET):
            bucket = shuffled[start : start + size * _BUCKET]
            bucket = bucket[np.argsort(lengths[bucket], kind="stable")]
            batches += [bucket[first : first + size] for first in range(0, len(bucket), size)]
        return [batches[number] for number in random.permutation(len(batches))]

    def epoch(self, epoch: int, skip: int = 0) -> Iterator[Batch]:
        """The training batches of an epoch from batch number `skip` on."""
        for number, captions in list(enumerate(self.order(epoch)))[skip:]:
            random = self._random(_NOISE, epoch, number)
            rows = None if self.index is None else self._noisy_rows(self.photo[captions], random)
            yield self._batch(captions, rows, random)

    @property
    def photo_batches(self) -> int:
        """Batches of one epoch over photos."""
        return -(-len(self.captioned) // self.config.batch_size)

    def photo_epoch(self, epoch: int, skip: int = 0) -> Iterator[tuple[np.ndarray, Batch]]:
        """The photos' rows [B] of each batch, and the batch without captions, in a random order."""
        shuffled = self._random(_ORDER, epoch, 1).permutation(self.captioned)
        for number in range(skip, self.photo_batches):
            photos = shuffled[number * self.config.batch_size : (number + 1) * self.config.batch_size]
            random = self._random(_NOISE, epoch, number)
            rows = None if self.index is None else self._noisy_rows(photos, random)
            inputs = self.inputs(photos, rows, random)
            wordless = random.random() < self.config.text_dropout
            context = self.context(None if wordless else rows, len(photos))
            retrieved = None if rows is None else rows[:, 0] >= 0
            bonus = self.bonus(photos, retrieved)
            yield photos, Batch(torch.zeros(len(photos), 0, dtype=torch.long), inputs, context, bonus)

    def plain(self) -> Iterator[Batch]:
        """Every caption once, in length order, with the nearest neighbours and no noise."""
        by_length = np.argsort([len(tokens) for tokens in self.tokens], kind="stable")
        for start in range(0, len(by_length), self.config.batch_size):
            captions = by_length[start : start + self.config.batch_size]
            yield self._batch(captions, self.nearest(self.photo[captions]), None)

    def nearest(self, photos: np.ndarray) -> np.ndarray | None:
        """Rows [B, K] of the nearest neighbours of some photos, None without an index."""
        return None if self.index is None else self.neighbor_rows[photos, : self.config.max_neighbors]

    def statistics(self) -> tuple[Tensor, Tensor]:
        """Embeddings [N, D] of captions drawn from the index, and cosines [M] of photos with their neighbours."""
        random = np.random.default_rng(self.config.seed)
        texts = self.index.embeddings(self.index.random_rows(min(20_000, len(self.index)), random))
        photos = random.permutation(np.unique(self.photo))[:1000]
        _, _, scores, mask = self.inputs(photos, self.nearest(photos))
        return torch.from_numpy(texts.astype(np.float32)), scores[mask]

    def inputs(
        self, photos: np.ndarray, rows: np.ndarray | None, random: np.random.Generator | None = None
    ) -> tuple[Tensor, ...]:
        """The model's inputs for photos and their neighbour rows; noise is added when `random` is given."""
        unit = self.features.unit_embeddings(photos)  # [B, D]
        image = unit if self.model.normalize else np.asarray(self.features.embeddings[photos], np.float32)
        if random is not None and self.config.image_noise:
            image = image + self._noise(random, image, self.config.image_noise)
        if rows is None:
            return (torch.from_numpy(image),)
        mask = rows >= 0  # [B, K]
        embeddings = self.index.embeddings(np.where(mask, rows, 0)).astype(np.float32)  # [B, K, D]
        if random is not None and self.config.neighbor_noise:
            embeddings = embeddings + self._noise(random, embeddings, self.config.neighbor_noise)
            embeddings /= np.linalg.norm(embeddings, axis=-1, keepdims=True)
        scores = np.einsum("bd,bkd->bk", unit, embeddings)
        return tuple(torch.from_numpy(part) for part in (image, embeddings, scores, mask))

    @staticmethod
    def _noise(random: np.random.Generator, vectors: np.ndarray, length: float) -> np.ndarray:
        """Gaussian noise of the expected `length` relative to each vector's."""
        noise = random.standard_normal(vectors.shape, np.float32) / np.sqrt(vectors.shape[-1], dtype=np.float32)
        return length * np.linalg.norm(vectors, axis=-1, keepdims=True) * noise

    def _batch(self, captions: np.ndarray, rows: np.ndarray | None, random: np.random.Generator | None) -> Batch:
        tokens = padded_tokens([self.tokens[caption] for caption in captions])
        inputs = self.inputs(self.photo[captions], rows, random)
        wordless = random is not None and random.random() < self.config.text_dropout
        return Batch(tokens, inputs, self.context(None if wordless else rows, len(captions)))

    def context(self, rows: np.ndarray | None, captions: int) -> Tensor:
        """The words of the neighbour rows [B, K] of B captions as tokens [B, C]; C = 0 for None."""
        count, shown = self.config.text_neighbors, [[]] * captions
        if rows is not None and count:
            shown = [self.index.captions(own[own >= 0][:count]) for own in rows]
        return context_tokens(self.tokenizer, shown, count, self.room)

    def bonus(self, photos: np.ndarray, retrieved: np.ndarray | None = None) -> TokenBonus | None:
        """What the words of the nearest `num_neighbors` raise for photos [B]; None for a model that does without.

        Args:
            retrieved: [B] bool, the photos that have neighbours at all; None for all.
        """
        if self.index is None or not self.config.raises_words:
            return None
        rows = self.neighbor_rows[photos, : self.config.num_neighbors]
        present = rows >= 0 if retrieved is None else (rows >= 0) & retrieved[:, None]
        captions = [self.index.captions(own[kept]) for own, kept in zip(rows, present, strict=True)]
        scores = [np.zeros(len(listed)) for listed in captions]  # in training all neighbours count the same
        return neighbor_bonus(self.tokenizer, captions, scores, [self.index])

    def _noisy_rows(self, photos: np.ndarray, random: np.random.Generator) -> np.ndarray:
        """Neighbour rows [B, K] as training shows them: fewer, from further down, random ones, or none.

        Top 1 plus a sample of the pool follows Li et al. 2024 (arXiv 2406.02265), with fresh draws for every caption.
        """
        config, pool = self.config, self.neighbor_rows[photos, : self.config.neighbor_pool]  # [B, pool]
        B, K = len(photos), config.max_neighbors
        places = np.broadcast_to(np.arange(pool.shape[1], dtype=np.float64), pool.shape).copy()
        sampled = random.random(B) < config.pool_sampling
        draws = random.random(pool.shape)
        draws[:, 0] = -1.0
        places[sampled] = draws[sampled]
        places[pool < 0] = np.inf
        rows = np.take_along_axis(pool, np.argsort(places, axis=1, kind="stable")[:, :K], axis=1)
        replaced = (random.random(rows.shape) < config.random_neighbors) & (rows >= 0)
        rows[replaced] = self._foreign(photos[np.nonzero(replaced)[0]], random)
        count = np.where(random.random(B) < config.vary_neighbors, random.integers(1, K + 1, B), K)
        count[random.random(B) < config.retrieval_dropout] = 0
        rows[np.arange(rows.shape[1]) >= count[:, None]] = -1
        return rows

    def _foreign(self, photos: np.ndarray, random: np.random.Generator) -> np.ndarray:
        """A random row of the index for each photo, -1 where the draw hit the photo's own words."""
        rows = self.index.random_rows(len(photos), random)
        for place, (photo, image_id, text) in enumerate(
            zip(photos, self.index.image_ids(rows), self.index.captions(rows), strict=True)
        ):
            if image_id == self.features.image_ids[photo] or normalize_caption(text) in self.own_texts[photo]:
                rows[place] = -1
        return rows

    def _random(self, stream: int, epoch: int, number: int) -> np.random.Generator:
        return np.random.default_rng([self.config.seed, stream, epoch, number])
