"""Weights as ClipCap publishes them, a bare state dict without any setting, as a checkpoint of ours."""

from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from clipcap_rag.artifact import new_directory, refuse_existing
from clipcap_rag.checkpoint import Checkpoint, copy_weights
from clipcap_rag.clipcap_state import ClipCapState
from clipcap_rag.config import ModelConfig
from clipcap_rag.encoder import Encoder
from clipcap_rag.errors import InputError
from clipcap_rag.model import (
    CaptionModel,
    build_mapper,
    language_model_config,
    language_model_from_config,
    load_language_model,
    load_tokenizer,
    tune,
)
from clipcap_rag.progress import say

_HEAD_WIDTH = 64  # in every GPT-2
_GPT2 = {  # by vocabulary, width and blocks
    (50257, 768, 6): "distilgpt2",
    (50257, 768, 12): "gpt2",
    (50257, 1024, 24): "gpt2-medium",
    (50257, 1280, 36): "gpt2-large",
    (50257, 1600, 48): "gpt2-xl",
}
_PUBLISHED = {  # by mapper, D, P, C and layers, the last two as ModelConfig has them for the MLP; each with gpt2
    ("mlp", 512, 10, 10, 8): {"clip": "ViT-B-32:openai", "normalize": False},  # COCO, Conceptual Captions
    ("transformer", 640, 40, 40, 8): {"clip": "RN50x4:openai", "normalize": True},  # COCO
}
_CLIPS = {512: ", as of ViT-B-32 and RN101", 640: ", as of RN50x4", 1024: ", as of RN50"}  # what ClipCap offers


def clipcap_checkpoint(
    weights: str | Path,
    clip: str | None = None,
    language_model: str | None = None,
    normalize: bool | None = None,
    stop_token: str = ".",
    device: str = "auto",
    dtype: str = "auto",
) -> tuple[Checkpoint, Encoder]:
    """Reads weights of ClipCap (Mokady et al. 2021, arXiv 2111.09734).

    Widths, lengths and layers follow from the shapes. What shapes cannot tell is known of the published weights, and
    said when it is used; for others it must be given.

    Args:
        weights: file written by torch.save(model.state_dict()), of the whole model or of `clip_project` alone.
        clip: the CLIP model whose embeddings the mapper reads.
        language_model: folder or hub id of a GPT-2-family model for its tokenizer and settings, and for its weights
            if `weights` has none. If `weights` has them, a folder with a tokenizer alone will do.
        normalize: whether the mapper reads unit-length embeddings.
        stop_token: text whose first token ends a caption; empty for none.
        device: where the CLIP model computes, as in `Encoder.load`.
        dtype: number format of the CLIP model, as in `Encoder.load`.

    Returns:
        The checkpoint, in float32 on the CPU, and its CLIP model.

    Raises:
        InputError: the file holds anything but weights, has unknown or missing keys or other shapes, or does not tell
            what was left out; or a model does not fit or cannot be loaded.
    """
    state = ClipCapState(Path(weights))
    given = {"clip": clip, "normalize": normalize, "language_model": language_model}
    chosen = _settled(state, {name: value for name, value in given.items() if value is not None})
    encoder = Encoder.load(chosen["clip"], device, dtype)
    if encoder.dim != state.clip_dim:
        raise InputError(
            f"{weights} reads embeddings {state.clip_dim} wide, but those of {chosen['clip']} are {encoder.dim} wide; "
            "give --clip the model that it was trained with"
        )
    network, tokenizer = _language_model(state, chosen["language_model"])
    config = ModelConfig(
        **state.mapper(network.config.n_embd),
        language_model_tuning="full" if state.language_model else "frozen",
        normalize=chosen["normalize"],
    )
    model = CaptionModel(build_mapper(config), tune(network, config), tokenizer.eos_token_id)
    parts = {"clip_project": model.mapper} | ({"gpt": network} if state.language_model else {})
    expected = {f"{part}.{name}": weight for part in parts for name, weight in parts[part].named_parameters()}
    remedy = "give the unchanged state dict, and --language-model the one that it was trained with"
    copy_weights(state.tensors, expected, state.path, "ClipCap's model", remedy)
    checkpoint = Checkpoint(
        model=model.eval(),
        tokenizer=tokenizer,
        config=config,
        encoder=encoder.record(),
        language_model=chosen["language_model"],
        training={"clipcap_weights": state.path.name},
        stop_token=stop_token,
    )
    return checkpoint, encoder


def convert_clipcap(weights: str | Path, out: str | Path, overwrite: bool = False, **options: Any) -> Checkpoint:
    """Writes weights of ClipCap as a checkpoint that `Captioner.from_pretrained` opens.

    Args:
        weights: as in `clipcap_checkpoint`.
        out: the directory to write.
        overwrite: replace `out` if it exists.
        options: the other arguments of `clipcap_checkpoint`.

    Raises:
        InputError: as `clipcap_checkpoint`, or `out` exists or cannot be written.
    """
    refuse_existing(Path(out), overwrite)
    checkpoint, _ = clipcap_checkpoint(weights, **options)
    config = checkpoint.config
    card = (
        f"# Captioner\n\nClipCap's weights {Path(weights).name}, converted by clipcap-rag: {config.mapper} mapper from "
        f"{checkpoint.encoder['clip']} ({config.clip_dim} wide, {'unit length' if config.normalize else 'raw'}) to "
        f"{config.prefix_length} prefix vectors for {checkpoint.language_model} ({config.lm_dim} wide).\n\n"
        "`--decoding clipcap` writes as ClipCap does.\n"
    )
    with new_directory(Path(out), overwrite) as folder:
        checkpoint.write(folder, card=card)
    return checkpoint


def _known(state: ClipCapState) -> dict[str, Any]:
    """What is known beside the weights of a model of this shape, as arguments of `clipcap_checkpoint`."""
    sizes = state.language_model
    name = sizes and _GPT2.get((sizes["vocab_size"], sizes["n_embd"], sizes["n_layer"]))
    if not name:
        return {}
    shape = ModelConfig(**state.mapper(sizes["n_embd"]))
    key = (shape.mapper, shape.clip_dim, shape.prefix_length, shape.clip_length, shape.mapper_layers)
    return {"language_model": name} | (_PUBLISHED.get(key, {}) if name == "gpt2" else {})


def _settled(state: ClipCapState, given: dict[str, Any]) -> dict[str, Any]:
    """What was given, and what is known for the rest, which is said; asks in one sentence for what is neither."""
    known, width = _known(state), state.clip_dim
    questions = {
        "clip": f"--clip MODEL (whose embeddings are {width} wide{_CLIPS.get(width, '')})",
        "normalize": "--normalize or --no-normalize (whether it was trained with --normalize_prefix)",
        "language_model": "--language-model MODEL (the GPT-2 that it writes with)",
    }
    asked = [question for name, question in questions.items() if name not in known | given]
    if asked:
        raise InputError(f"{state.path} does not tell how it was trained; give {' and '.join(asked)}")
    taken = [f"{name} {value}" for name, value in known.items() if name not in given]
    if taken:
        owner = "ClipCap's published" if "clip" in known else "GPT-2's"
        say(f"{state.path} has the shape of {owner} weights; taking {', '.join(taken)}")
    return known | given


def _language_model(state: ClipCapState, name: str) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """The language model, with weights only if the state dict has none, and its tokenizer."""
    sizes = state.language_model
    if not sizes:
        return load_language_model(name)
    tokenizer = load_tokenizer(name)
    if Path(name).is_dir() and not (Path(name) / "config.json").is_file():
        end, heads = tokenizer.eos_token_id, max(1, sizes["n_embd"] // _HEAD_WIDTH)
        config = {"model_type": "gpt2", "n_head": heads, "bos_token_id": end, "eos_token_id": end} | sizes
    else:
        config = language_model_config(name)
    for setting, size in sizes.items():
        if config[setting] != size:
            raise InputError(
                f"the language model in {state.path} has {setting} {size}, but {name} has {config[setting]}; "
                "give --language-model the one that it was trained with"
            )
    if len(tokenizer) > sizes["vocab_size"]:
        raise InputError(
            f"the tokenizer of {name} has {len(tokenizer)} tokens, but {state.path} knows {sizes['vocab_size']}; "
            "give --language-model the one that it was trained with"
        )
    return language_model_from_config(config), tokenizer
