"""What a training starts from: a language model with a fresh mapper, or a captioner."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from clipcap_rag.checkpoint import checkpoint_folder, read_checkpoint
from clipcap_rag.config import ModelConfig, TrainConfig
from clipcap_rag.encoder import check_same_encoder
from clipcap_rag.errors import InputError
from clipcap_rag.features import FeatureSet
from clipcap_rag.model import CaptionModel, build_mapper, load_language_model, tune


@dataclass(frozen=True)
class StartingModel:
    """A model on the CPU in float32, what learns marked.

    Attributes:
        config: its shape.
        language_model: folder or hub id of the language model that it came from.
        words: case-folded words that it was trained on before.
    """

    model: CaptionModel
    tokenizer: PreTrainedTokenizerBase
    config: ModelConfig
    language_model: str
    words: frozenset[str] = frozenset()

    @classmethod
    def fresh(cls, language_model: str, config: ModelConfig, features: FeatureSet) -> "StartingModel":
        """A language model with a mapper of random weights."""
        network, tokenizer = load_language_model(language_model)
        config = dataclasses.replace(config, clip_dim=features.embeddings.shape[1], lm_dim=network.config.n_embd)
        model = CaptionModel(build_mapper(config), tune(network, config), tokenizer.eos_token_id)
        return cls(model, tokenizer, config, language_model)

    @classmethod
    def of_captioner(cls, start: str | Path, features: FeatureSet) -> "StartingModel":
        """A captioner as `checkpoint_folder` names it; raises InputError if another CLIP made the features."""
        known = read_checkpoint(checkpoint_folder(start))
        check_same_encoder(features.encoder, f"the feature set {features.path}", known.encoder, f"the model {start}")
        return cls(known.model, known.tokenizer, known.config, known.language_model, known.words)

    def room(self, config: TrainConfig) -> int:
        """Positions left for the neighbours' words; negative if the longest captions do not fit."""
        positions = self.model.language_model.config.n_positions
        return positions - self.config.prefix_length - 1 - config.max_caption_tokens

    def check(self, config: TrainConfig, has_index: bool) -> None:
        """Raises InputError if the model cannot be trained so."""
        mapper = self.config.mapper
        if not has_index and mapper == "retrieval":
            raise InputError("the retrieval mapper needs an index; pass --index, or --mapper transformer to do without")
        if has_index and mapper != "retrieval":
            raise InputError(f"the {mapper} mapper looks at no neighbours; drop --index")
        if not has_index and config.text_neighbors:
            raise InputError("text_neighbors needs an index whose words are shown; pass --index, or leave it at 0")
        if self.room(config) < 0:
            longest = config.max_caption_tokens
            raise InputError(
                f"max_caption_tokens {longest} and prefix_length {self.config.prefix_length} exceed the "
                f"{self.model.language_model.config.n_positions} positions of {self.language_model}; "
                f"at most {self.room(config) + longest} tokens fit"
            )
