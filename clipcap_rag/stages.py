"""What a training consists of: captions of an index, captions of photos, and at last rewards of sampled captions."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from clipcap_rag.batches import CaptionBatches
from clipcap_rag.caption_index import CaptionIndex
from clipcap_rag.caption_photos import caption_photos
from clipcap_rag.config import ModelConfig, TrainConfig
from clipcap_rag.errors import InputError
from clipcap_rag.features import FeatureSet
from clipcap_rag.photo_neighbors import nearest_rows, stored_neighbors
from clipcap_rag.self_critical import CaptionReward
from clipcap_rag.word_bonus import words_of


@dataclass(frozen=True)
class Stage:
    """Some epochs with one objective and one learning-rate schedule.

    Attributes:
        name: `text`, `photos` or `reward`.
        batches: what an epoch goes through.
        epochs: how many.
        rates: peak learning rates of mapper and language model.
        reward: of sampled captions; None trains on the captions as they are.
    """

    name: str
    batches: CaptionBatches
    epochs: int
    rates: tuple[float, float]
    reward: CaptionReward | None = None

    @property
    def steps(self) -> int:
        """Batches of one epoch."""
        return len(self.batches) if self.reward is None else self.batches.photo_batches


class TrainingData:
    """The batches of every stage and those of validation.

    Attributes:
        stages: in order.
        photos: training batches of the photos.
        validation: batches of the photos kept apart.
        words: case-folded words of all captions that are trained on.
    """

    def __init__(
        self,
        features: FeatureSet,
        validation: FeatureSet | None,
        index: CaptionIndex | None,
        text_index: CaptionIndex | None,
        tokenizer: PreTrainedTokenizerBase,
        model: ModelConfig,
        config: TrainConfig,
        room: int,
    ):
        """Prepares.

        Args:
            validation: None keeps a part of `features`, by hash of image_id.
            text_index: its captions are the first stage.
            room: most tokens of the neighbours' words.
        """
        self._index, self._shared = index, (tokenizer, model, config)
        self._room, self._config = room, config
        kept, held_out = _split(features, validation, config.validation_fraction)
        self.photos = self._batches(features, kept, self._stored(features))
        judged = features if validation is None else validation
        self.validation = self._batches(judged, held_out, self._stored(judged))
        self.words = _words(features, kept)
        rates = (config.learning_rate, config.lm_learning_rate)
        self.stages = [Stage("photos", self.photos, config.epochs, rates)] if config.epochs else []
        if text_index is not None and config.text_epochs:
            captions = caption_photos(text_index, features)
            self.words |= _words(captions, range(len(captions)))
            batches = self._batches(captions, range(len(captions)), self._nearest(captions))
            self.stages.insert(0, Stage("text", batches, config.text_epochs, rates))
        if config.reward_epochs:
            rewards = (config.reward_learning_rate, config.reward_learning_rate)
            reward = CaptionReward(features.captions)
            self.stages.append(Stage("reward", self.photos, config.reward_epochs, rewards, reward))
        if not self.stages:
            raise InputError("epochs is 0 and nothing else is trained; give --epochs, --text-index or --reward-epochs")

    def _batches(self, features: FeatureSet, rows: Sequence[int], neighbors: np.ndarray | None) -> CaptionBatches:
        return CaptionBatches(features, rows, *self._shared, self._index, neighbors, room=self._room)

    def _stored(self, features: FeatureSet) -> np.ndarray | None:
        if self._index is None:
            return None
        return stored_neighbors(features, self._index, max(self._config.neighbor_pool, self._config.num_neighbors))

    def _nearest(self, captions: FeatureSet) -> np.ndarray | None:
        """As `_stored`, but not kept, and of a pool that takes less time to find for so many."""
        pool = min(self._config.neighbor_pool, 2 * self._config.max_neighbors)
        return None if self._index is None else nearest_rows(captions, self._index, pool)


def _words(features: FeatureSet, rows: Sequence[int]) -> frozenset[str]:
    return frozenset(word for row in rows for text in features.captions[row] for word in words_of(text))


def _is_validation(image_id: str, fraction: float) -> bool:
    """Whether a photo is kept for validation; a property of its id alone."""
    return int(hashlib.sha256(image_id.encode()).hexdigest()[:8], 16) / 16**8 < fraction


def _split(features: FeatureSet, validation: FeatureSet | None, fraction: float) -> tuple[list[int], list[int]]:
    """Rows of `features` to train on, and rows to validate on, of `validation` where it is given."""
    held_out = [
        row
        for row, image_id in enumerate(features.image_ids)
        if validation is None and _is_validation(image_id, fraction)
    ]
    kept = sorted(set(range(len(features))) - set(held_out))
    rows = held_out if validation is None else list(range(len(validation)))
    if not kept or not rows:
        raise InputError(
            f"{features.path} has {len(features)} photos: {len(kept)} to train on, {len(rows)} to validate on; "
            "give more photos, another --validation-fraction or --validation-features"
        )
    return kept, rows
