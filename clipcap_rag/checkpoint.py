"""A trained captioner on disk: config.json, model.safetensors, the tokenizer and a model card."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from clipcap_rag import hub
from clipcap_rag.artifact import read_manifest, write_manifest
from clipcap_rag.config import ModelConfig
from clipcap_rag.errors import InputError
from clipcap_rag.model import (
    CaptionModel,
    build_mapper,
    language_model_from_config,
    learned_state,
    load_language_model,
    load_tokenizer,
    tune,
)
from clipcap_rag.shipped import STARTER, starter_checkpoint

KIND, VERSION, MANIFEST = "checkpoint", 1, "config.json"
_WORDS = "words.txt"


@dataclass
class Checkpoint:
    """A captioner and what made it.

    Attributes:
        encoder: the record of the CLIP model whose embeddings it understands (`Encoder.record`).
        language_model: folder or hub id that it started from.
        index: path, name and revision of the index it was trained with, or None.
        num_neighbors: neighbours per image unless a call says otherwise.
        mapper_neighbors: most of them that the mapper is shown; 0 shows it all.
        text_neighbors: how many neighbours' words it has learned to read; 0 if none.
        training: settings and scores of the training run.
        words: those of its training captions, case folded; empty if they are not known.
        stop_token: text whose first token ends a caption and belongs to it, beside the end token; empty if none does.
    """

    model: CaptionModel
    tokenizer: PreTrainedTokenizerBase
    config: ModelConfig
    encoder: dict[str, Any]
    language_model: str
    index: dict[str, Any] | None = None
    num_neighbors: int = 0
    mapper_neighbors: int = 0
    text_neighbors: int = 0
    training: dict[str, Any] = field(default_factory=dict)
    stop_token: str = ""
    words: frozenset[str] = frozenset()

    @property
    def raises_words(self) -> bool:
        """Whether it was trained to write with its neighbours' words raised."""
        return 0 < self.mapper_neighbors < self.num_neighbors and not self.text_neighbors

    def write(self, folder: Path, dtype: torch.dtype = torch.float32, card: str | None = None) -> None:
        """Fills the directory `folder`; weights that were not tuned stay where they came from.

        Args:
            folder: what lies in it already becomes part of the checkpoint.
            dtype: number format of the stored weights; they are read as float32 again.
            card: text of README.md instead of the usual one.
        """
        state = {name: tensor.to("cpu", dtype).contiguous() for name, tensor in learned_state(self.model).items()}
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "model.safetensors").chmod(0o644)  # safetensors lets nobody else read it
        self.tokenizer.save_pretrained(folder)
        (folder / "README.md").write_text(card or self._card(), encoding="utf-8")
        if self.words:
            (folder / _WORDS).write_text("".join(f"{word}\n" for word in sorted(self.words)), encoding="utf-8")
        config = self.model.language_model.config.to_dict()
        config.pop("_name_or_path", None)  # where it lay on this machine
        fields = {
            "model": self.config.to_json(),
            "encoder": self.encoder,
            "language_model": {"name": self.language_model, "config": config},
            "index": self.index,
            "num_neighbors": self.num_neighbors,
            "mapper_neighbors": self.mapper_neighbors,
            "text_neighbors": self.text_neighbors,
            "training": self.training,
            "stop_token": self.stop_token,
        }
        write_manifest(folder, MANIFEST, KIND, VERSION, fields)

    def _card(self) -> str:
        learned = sum(tensor.numel() for tensor in learned_state(self.model).values())
        scores = self.training.get("scores", {})
        shown = {name: f"{value:.4f}" if isinstance(value, float) else value for name, value in scores.items()}
        rows = "\n".join(f"| {name} | {value} |" for name, value in shown.items())
        index = f"index {self.index['name']} (revision {self.index['revision']})" if self.index else "no index"
        return (
            f"# Captioner\n\nMade by clipcap-rag. {self.config.mapper} mapper from {self.encoder['clip']} "
            f"({self.config.clip_dim} wide) to {self.language_model} ({self.config.lm_dim} wide, "
            f"{self.config.language_model_tuning}), {learned:,} stored weights, trained with {index} "
            f"on the feature set {self.training.get('features', 'unknown')}.\n\n"
            f"| on its validation photos | value |\n|---|---|\n{rows}\n"
        )


def checkpoint_folder(model: str | Path) -> Path:
    """The folder of a checkpoint, of the best one of a training run, of `starter`, or of hf-hub:ORG/NAME.

    Raises:
        InputError: there is none.
    """
    if model == STARTER:
        return starter_checkpoint()
    if str(model).startswith(hub.PREFIX):
        return hub.fetch_artifact(str(model), MANIFEST, KIND)
    folder = Path(model)
    if not folder.is_dir():
        raise InputError(
            f"no model at {folder}; give --model the folder that `clipcap-rag train` wrote, starter or hf-hub:ORG/NAME"
        )
    if not (folder / "run.json").is_file():
        return folder
    if not (folder / "best").is_dir():
        raise InputError(f"{model} has no checkpoint yet; let `clipcap-rag train` finish its first epoch")
    return folder / "best"


def read_checkpoint(folder: Path) -> Checkpoint:
    """Opens a checkpoint in float32 on the CPU.

    Raises:
        InputError: missing or altered files, another format version, unknown or missing weights, or a language model
            that it refers to cannot be found.
    """
    manifest = read_manifest(folder, MANIFEST, KIND, VERSION)
    config = ModelConfig.from_json(manifest["model"])
    source = manifest["language_model"]
    if config.tunes_language_model:
        language_model = language_model_from_config(source["config"])
    else:
        beside = folder / source["name"]  # a pushed checkpoint brings the language model along
        language_model, _ = load_language_model(str(beside if beside.is_dir() else source["name"]))
    tokenizer = load_tokenizer(folder)
    model = CaptionModel(build_mapper(config), tune(language_model, config), tokenizer.eos_token_id)
    load_weights(model, folder / "model.safetensors")
    return Checkpoint(
        model=model.eval(),
        tokenizer=tokenizer,
        config=config,
        encoder=manifest["encoder"],
        language_model=source["name"],
        index=manifest["index"],
        num_neighbors=manifest["num_neighbors"],
        mapper_neighbors=manifest.get("mapper_neighbors", 0),
        text_neighbors=manifest.get("text_neighbors", 0),
        training=manifest["training"],
        stop_token=manifest.get("stop_token", ""),
        words=_read_words(folder / _WORDS),
    )


def _read_words(file: Path) -> frozenset[str]:
    try:
        return frozenset(file.read_text(encoding="utf-8").splitlines()) if file.exists() else frozenset()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file} is not a readable list of words ({error}); copy the checkpoint again") from error


def load_weights(model: CaptionModel, file: Path) -> None:
    """Loads the learned weights, refusing unknown keys, missing keys and other shapes by name."""
    try:
        state = load_file(file)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{file} is not a readable safetensors file ({error}); copy the checkpoint again") from error
    copy_weights(state, learned_state(model), file, "its config.json", "use the config.json that was saved with it")


def copy_weights(state: dict[str, Tensor], expected: dict[str, Tensor], file: Path, shapes: str, remedy: str) -> None:
    """Copies weights read from `file` into those of a model.

    Args:
        state: what was read.
        expected: the tensors to fill, by the names that `state` has for them.
        shapes: what says which weights there must be, for the error.
        remedy: how to get weights that fit, for the error.

    Raises:
        InputError: there are unknown keys, missing keys or other shapes; it names them.
    """
    unknown, missing = sorted(set(state) - set(expected)), sorted(set(expected) - set(state))
    if unknown or missing:
        raise InputError(
            f"{file} does not fit {shapes}: unknown keys {_few(unknown)}, missing keys {_few(missing)}; {remedy}"
        )
    for name, tensor in state.items():
        if tensor.shape != expected[name].shape:
            raise InputError(
                f"{file}: {name} has shape {list(tensor.shape)} where {shapes} asks for "
                f"{list(expected[name].shape)}; {remedy}"
            )
    with torch.no_grad():
        for name, tensor in state.items():
            expected[name].copy_(tensor)


def _few(names: list[str]) -> str:
    if not names:
        return "none"
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
