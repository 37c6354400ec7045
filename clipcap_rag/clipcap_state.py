"""The state dict that ClipCap saves: read without executing anything, and what its shapes tell of the model."""

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clipcap_rag.errors import InputError

_MASKS = re.compile(r"gpt\.transformer\.h\.\d+\.attn\.(masked_)?bias")  # buffers that transformers used to store
_WORDS, _HEAD = "gpt.transformer.wte.weight", "gpt.lm_head.weight"
_READERS = {  # the matrix that reads the embedding, by which a mapper is recognised
    "clip_project.model.0.weight": "mlp",
    "clip_project.linear.weight": "transformer",
    "clip_project.weight": "linear",
}
_MAPPER_HEADS = 8  # in every mapper that ClipCap builds


class ClipCapState:
    """Weights by ClipCap's names, without what DataParallel and old releases of transformers add to them.

    Attributes:
        path: the file they come from.
        tensors: `clip_project.*`, and `gpt.*` unless only the mapper was saved; the tied output layer is left out.
        clip_dim: width of the embeddings that the mapper reads (D).
        language_model: what the shapes tell of the language model, as GPT-2's settings; empty if it was not saved.
    """

    def __init__(self, path: Path):
        """Raises InputError if the file is missing, holds anything but weights, or is not ClipCap's."""
        self.path, self.tensors = path, _read(path)
        self._reader = next((name for name in _READERS if name in self.tensors), "clip_project.model.0.weight")
        _, self.clip_dim = self._matrix(self._reader)
        self.language_model: dict[str, int] = {}
        if any(name.startswith("gpt.") for name in self.tensors):
            self.language_model = self._language_model()

    def mapper(self, lm_dim: int) -> dict[str, Any]:
        """What the shapes tell of the mapper to a language model `lm_dim` wide, as fields of ModelConfig."""
        kind = _READERS[self._reader]
        writer = "clip_project.model.2.weight" if kind == "mlp" else self._reader
        rows, _ = self._matrix(writer)
        if rows % lm_dim:
            raise InputError(
                f"{self.path}: {writer} has {rows} rows, no multiple of the language model's width {lm_dim}; "
                "give --language-model the one that it was trained with"
            )
        length, sizes = rows // lm_dim, {"mapper": kind, "clip_dim": self.clip_dim, "lm_dim": lm_dim}
        if kind != "transformer":
            return sizes | {"prefix_length": length}
        constants, _ = self._matrix("clip_project.prefix_const")
        layers = self._layers("clip_project.transformer.layers.")
        return sizes | {
            "prefix_length": constants,
            "clip_length": length,
            "mapper_layers": layers,
            "mapper_heads": _MAPPER_HEADS,
        }

    def _language_model(self) -> dict[str, int]:
        vocabulary, width = self._matrix(_WORDS)
        positions, _ = self._matrix("gpt.transformer.wpe.weight")
        head = self.tensors.pop(_HEAD, None)
        if head is not None and not torch.equal(head, self.tensors[_WORDS]):
            raise InputError(f"{self.path}: {_HEAD} differs from {_WORDS}, which GPT-2 has equal; save it again")
        blocks = self._layers("gpt.transformer.h.")
        return {"vocab_size": vocabulary, "n_embd": width, "n_layer": blocks, "n_positions": positions}

    def _matrix(self, name: str) -> tuple[int, int]:
        """Rows and columns of a matrix from which sizes are read."""
        if name not in self.tensors:
            raise InputError(f"{self.path} lacks the key {name}; give the state dict of a ClipCap model")
        shape = self.tensors[name].shape
        if len(shape) != 2 or not shape.numel():
            raise InputError(f"{self.path}: {name} has shape {list(shape)} where ClipCap has a matrix; save it again")
        return shape[0], shape[1]

    def _layers(self, start: str) -> int:
        """How many layers have weights called `start`, a number, and more."""
        return len({name.removeprefix(start).partition(".")[0] for name in self.tensors if name.startswith(start)})


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise InputError(f"there is no file {path}; give the weights that ClipCap's training wrote")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a faulty file makes torch.load raise
        raise InputError(
            f"{path} is damaged or holds more than weights, and nothing in it is executed; "
            "copy it again, or save no more than model.state_dict()"
        ) from error
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in state.items()
    ):
        raise InputError(f"{path} is not a state dict, tensors by name; save no more than model.state_dict()")
    state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    return {name: tensor for name, tensor in state.items() if not _MASKS.fullmatch(name)}
