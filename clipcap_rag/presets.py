"""Presets of training: the settings of one recipe under one name, which a setting that is given overrules.

`clipcap-mlp` and `clipcap-transformer` are the two models of Mokady et al. 2021 (arXiv 2111.09734) as its code, README
and notebooks train them. Kept from this project: an end token after each caption instead of stopping at a full stop,
captions cut at 40 tokens, batches of captions of similar length, the last incomplete batch of an epoch, a part of the
photos for validation, and AdamW's epsilon. Captions are trained on as they are written, as ClipCap does with COCO.
"""

import dataclasses
from typing import Any

from clipcap_rag.config import ModelConfig, TrainConfig
from clipcap_rag.errors import InputError

_CLIPCAP = {
    "batch_size": 40,
    "epochs": 10,
    "patience": 0,  # all ten are run; there was no validation
    "learning_rate": 2e-5,  # one rate for all that learns
    "lm_learning_rate": 2e-5,
    "warmup": 5000,  # batches, whatever the size of the data
    "schedule": "linear",
    "weight_decay": 0.0,
    "gradient_clip": 0.0,
    "mapper_dropout": 0.0,
    "image_noise": 0.0,
}
_RAG = {  # found on Flickr8k with a small CLIP and a small GPT-2; README has what each of it gained
    "mapper_layers": 2,
    "epochs": 2,
    "batch_size": 20,
    "learning_rate": 1e-3,
    "lm_learning_rate": 5e-4,
    "image_noise": 0.5,
    "neighbor_noise": 0.3,
    "pool_sampling": 0.2,
    "random_neighbors": 0.05,
    "reward_epochs": 1,
    "reward_learning_rate": 1e-4,
}
PRESETS: dict[str, dict[str, Any]] = {
    "rag": _RAG,
    "clipcap-mlp": {
        "mapper": "mlp",
        "language_model_tuning": "full",
        "prefix_length": 10,
        "normalize": False,  # the published weights want the raw vector
        **_CLIPCAP,
    },
    "clipcap-transformer": {
        "mapper": "transformer",
        "language_model_tuning": "frozen",
        "prefix_length": 40,  # 40 in README and published weights; the paper's count of 43M parameters is that of 10
        "clip_length": 40,
        "mapper_layers": 8,
        "mapper_heads": 8,
        "normalize": True,  # its notebook does; nothing in the published file says so
        **_CLIPCAP,
    },
}
FIELDS = {
    field.name: field
    for config in (ModelConfig, TrainConfig)
    for field in dataclasses.fields(config)
    if field.name not in ("clip_dim", "lm_dim")
}


def configure(preset: str, **settings: Any) -> tuple[ModelConfig, TrainConfig]:
    """The configurations of a preset.

    Args:
        settings: fields of either configuration; they win over the preset.

    Raises:
        InputError: there is no such preset or setting, or a value contradicts another.
    """
    if preset not in PRESETS:
        raise InputError(f"there is no preset {preset!r}; choose one of {', '.join(PRESETS)}")
    unknown = sorted(settings.keys() - FIELDS.keys())
    if unknown:
        raise InputError(f"there is no setting {unknown[0]!r}; the settings are {', '.join(FIELDS)}")
    values = PRESETS[preset] | settings
    model, train = (
        config(**{field.name: values[field.name] for field in dataclasses.fields(config) if field.name in values})
        for config in (ModelConfig, TrainConfig)
    )
    return model, train


def description(preset: str, settings: dict[str, Any]) -> str:
    """One line: what the preset sets and what of it `settings` overrule."""
    parts = [
        f"{name} {value}" if settings.get(name, value) == value else f"{name} {settings[name]} instead of {value}"
        for name, value in PRESETS[preset].items()
    ]
    return f"preset {preset}: {', '.join(parts) or 'the defaults'}"
