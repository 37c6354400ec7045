"""The captioner's network: a mapper's prefix in front of a GPT-2-family language model.

Legend of shape letters, used throughout the package: B batch, T text tokens, P prefix length, K neighbours,
D clip_dim, E lm_dim, V vocabulary, N rows, H heads, C tokens of a context (the neighbours' words).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from clipcap_rag import hub
from clipcap_rag.config import ModelConfig
from clipcap_rag.errors import InputError, missing_extra
from clipcap_rag.mapper import LinearMapper, MLPMapper, RetrievalMapper, TransformerMapper

IGNORED = -100  # label of positions that carry no loss

transformers_logging.disable_progress_bar()


def padded_tokens(rows: Sequence[Sequence[int]]) -> Tensor:
    """Rows of tokens as [B, T], IGNORED behind each."""
    tokens = torch.full((len(rows), max(map(len, rows), default=0)), IGNORED)
    for place, row in enumerate(rows):
        tokens[place, : len(row)] = torch.tensor(row, dtype=torch.long)
    return tokens


class CaptionModel(nn.Module):
    """Mapper and language model; what learns is said by `requires_grad`, a frozen language model stays in eval mode."""

    def __init__(self, mapper: nn.Module, language_model: nn.Module, end_token: int):
        super().__init__()
        self.mapper, self.language_model, self.end_token = mapper, language_model, end_token

    def train(self, mode: bool = True) -> "CaptionModel":
        super().train(mode)
        if not any(parameter.requires_grad for parameter in self.language_model.parameters()):
            self.language_model.eval()
        return self

    def prefix(self, image_embedding: Tensor, *neighbors: Tensor) -> Tensor:
        """image_embedding [B, D] and neighbours (embeddings [B, K, D], scores [B, K], mask [B, K]) -> [B, P, E]."""
        return self.mapper(image_embedding, *neighbors)

    def with_context(self, prefix: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """The prefix [B, P, E] and the context tokens [B, C] behind it, padded with IGNORED, as vectors.

        Returns:
            [B, P+C, E], and the mask [B, P+C] of what is no padding.
        """
        mask = prefix.new_ones(prefix.shape[:2], dtype=torch.bool)
        if context is None:
            return prefix, mask
        words = self.language_model.get_input_embeddings()(context.clamp_min(0))  # [B, C, E]
        return torch.cat([prefix, words.to(prefix.dtype)], dim=1), torch.cat([mask, context != IGNORED], dim=1)

    def _hidden(self, tokens: Tensor, prefix: Tensor, context: Tensor | None) -> Tensor:
        words = self.language_model.get_input_embeddings()(tokens)  # [B, T, E]
        before, present = self.with_context(prefix.to(words.dtype), context)  # [B, P+C, E], [B, P+C]
        inputs = torch.cat([before, words], dim=1)  # [B, P+C+T, E]
        if before.shape[1] == prefix.shape[1]:
            return self._read(inputs)[:, prefix.shape[1] - 1 : -1]  # [B, T, E]
        packed = torch.cat([present, present.new_ones(tokens.shape)], dim=1)
        hidden = self._read(_ordered(inputs, (~packed).int().argsort(dim=1, stable=True)))  # padding comes last
        places = torch.arange(-1, tokens.shape[1] - 1, device=tokens.device) + present.sum(1, keepdim=True)  # [B, T]
        return _ordered(hidden, places)  # [B, T, E]

    def _read(self, inputs: Tensor) -> Tensor:
        """What the language model's last layer makes of inputs [B, S, E]."""
        return self.language_model.transformer(inputs_embeds=inputs, use_cache=False).last_hidden_state

    def forward(
        self, tokens: Tensor, image_embedding: Tensor, *neighbors: Tensor, context: Tensor | None = None
    ) -> Tensor:
        """Logits [B, T, V] of each of the tokens [B, T], given the prefix, the context [B, C] and the tokens before."""
        return self.language_model.lm_head(self._hidden(tokens, self.prefix(image_embedding, *neighbors), context))

    def loss(
        self, tokens: Tensor, image_embedding: Tensor, *neighbors: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, int]:
        """Summed negative log-likelihood in nats and the number of tokens that it counts.

        Args:
            tokens: [B, T] with the end token after each caption and IGNORED behind it.
            context: [B, C] tokens to read between prefix and caption, IGNORED behind them; they do not count.
        """
        counted, prefix = tokens != IGNORED, self.prefix(image_embedding, *neighbors)
        hidden = self._hidden(tokens.masked_fill(~counted, self.end_token), prefix, context)
        logits = self.language_model.lm_head(hidden[counted])  # [counted, V]
        return F.cross_entropy(logits.float(), tokens[counted], reduction="sum"), int(counted.sum())


def _ordered(vectors: Tensor, places: Tensor) -> Tensor:
    """vectors [B, S, E] and places [B, T] -> [B, T, E]."""
    return vectors.gather(1, places[..., None].expand(-1, -1, vectors.shape[2]))


def load_language_model(name: str) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """A GPT-2-family language model in float32 and its tokenizer, from a folder or the Hugging Face hub.

    Raises:
        InputError: not found, not of the GPT-2 family, or without an end token.
    """
    folder = _folder(name, hub.LANGUAGE_MODEL_FILES)
    language_model_config(folder)
    with _named(name):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, use_safetensors=True)
    return model, load_tokenizer(folder)


def language_model_config(name: str) -> dict[str, Any]:
    """The settings of a GPT-2-family language model, from a folder or the Hugging Face hub; errors as there."""
    folder = _folder(name, ["config.json"])
    with _named(name):
        config = AutoConfig.from_pretrained(folder).to_dict()
    _check_family(name, config)
    return config


def _folder(name: str | Path, files: Sequence[str]) -> str:
    """Where a language model lies: its folder, or that of the copies of `files` from the hub."""
    return str(name if Path(name).is_dir() else hub.fetch(str(name), files))


def language_model_from_config(config: dict[str, Any]) -> nn.Module:
    """An untrained language model of the shape that a checkpoint stores."""
    _check_family("the checkpoint", config)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=torch.float32)


def load_tokenizer(name: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a language model folder, hub id or checkpoint."""
    folder = _folder(name, ["config.json", *hub.TOKENIZER_FILES])
    with _named(str(name)):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    if tokenizer.eos_token_id is None:
        raise InputError(f"the tokenizer of {name} has no end token; give a GPT-2-family model with its tokenizer")
    return tokenizer


class _named:
    """Turns what transformers raises for a model that cannot be read into one sentence that names it."""

    def __init__(self, name: str):
        self.name = name

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, (OSError, ValueError)) and not isinstance(error, InputError):
            reason = str(error).strip().splitlines()[0]
            raise InputError(
                f"cannot load the language model {self.name!r} ({reason}); "
                "give a folder with config.json, model.safetensors and tokenizer files, or a hub id such as gpt2"
            ) from error


def _check_family(name: str, config: dict[str, Any]) -> None:
    if config.get("model_type") != "gpt2":
        raise InputError(
            f"the language model {name} is of type {config.get('model_type')}; "
            "give one of the GPT-2 family (gpt2, distilgpt2, gpt2-medium, a folder)"
        )


def build_mapper(config: ModelConfig) -> nn.Module:
    """The mapper that `config` describes, with fresh weights."""
    if config.mapper in ("mlp", "linear"):
        plain = MLPMapper if config.mapper == "mlp" else LinearMapper
        return plain(config.clip_dim, config.lm_dim, config.prefix_length)
    kind = RetrievalMapper if config.mapper == "retrieval" else TransformerMapper
    return kind(
        config.clip_dim,
        config.lm_dim,
        config.prefix_length,
        config.clip_length,
        layers=config.mapper_layers,
        heads=config.mapper_heads,
        dropout=config.mapper_dropout,
    )


def tune(language_model: nn.Module, config: ModelConfig) -> nn.Module:
    """Marks what of the language model learns: nothing, LoRA matrices beside it (arXiv 2106.09685), or its weights."""
    language_model.requires_grad_(config.tunes_language_model)
    if config.language_model_tuning == "layers":
        language_model.get_input_embeddings().requires_grad_(False)
    if config.language_model_tuning != "lora":
        return language_model
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise missing_extra("peft", "train") from error
    lora = LoraConfig(
        r=config.lora_rank,
        lora_alpha=2 * config.lora_rank,
        target_modules=["c_attn", "c_proj", "c_fc"],
        fan_in_fan_out=True,
    )
    return inject_adapter_in_model(lora, language_model)


def learned_parameters(model: nn.Module) -> int:
    """How many numbers of the model learn."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def learned_state(model: CaptionModel) -> dict[str, Tensor]:
    """The weights that a checkpoint must store: the mapper, and LoRA matrices or a tuned language model as a whole."""
    learned = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    if any(name.startswith("language_model.") and "lora_" not in name for name in learned):
        learned |= {name for name, _ in model.named_parameters()}
    return {
        name: tensor.detach()
        for name, tensor in model.state_dict().items()
        if name.startswith("mapper.") or name in learned
    }
