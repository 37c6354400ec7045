"""Feature sets as the pickles that ClipCap trains on."""

import os
import pickle
import re
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from clipcap_rag.artifact import disk_errors, refuse_unwritable
from clipcap_rag.errors import InputError
from clipcap_rag.features import FeatureSet
from clipcap_rag.model import load_tokenizer
from clipcap_rag.progress import bar

_BLOCK = 4096  # captions tokenised at once
_NUMBER = re.compile("0|[1-9][0-9]{,17}")


def export_pickle(
    features: str | Path, out: str | Path, *, language_model: str | None = None, overwrite: bool = False
) -> list[Path]:
    """Writes a feature set as a pickle of ClipCap (github.com/rmokady/CLIP_prefix_caption).

    It holds `clip_embedding`, a float16 tensor [N, D] with a row per photo, and `captions`, a dictionary per caption
    with `image_id`, `caption`, `id` (its place in the list) and `clip_embedding` (its row). The image_ids are numbers
    if all of them can be, as COCO's are.

    Args:
        out: a file FILE.pkl.
        language_model: folder or hub id of a GPT-2-family model whose tokens of the captions go into FILE_tokens.pkl,
            which ClipCap takes if it is there: 1-D int64 tensors without an end token, rows, longest length.

    Returns:
        The files that were written.

    Raises:
        InputError: there are no captions, `out` exists or is not called .pkl, or there are old tokens, which ClipCap
            would take for those of the new file.
    """
    out, photos = Path(out), FeatureSet.open(features)
    tokens = out.with_name(f"{out.stem}_tokens.pkl")
    _check_names(out, tokens, language_model is not None, overwrite)
    rows = [row for row, own in enumerate(photos.captions) for _ in own]
    texts = [caption for own in photos.captions for caption in own]
    if not texts:
        raise InputError(f"the feature set {features} has no captions, which ClipCap needs; extract it with captions")
    tokenizer = None if language_model is None else load_tokenizer(language_model)
    all_numbers = all(_NUMBER.fullmatch(image_id) for image_id in photos.image_ids)
    image_ids = [int(image_id) for image_id in photos.image_ids] if all_numbers else photos.image_ids
    captions = [
        {"image_id": image_ids[row], "caption": text, "id": place, "clip_embedding": row}
        for place, (row, text) in enumerate(zip(rows, texts, strict=True))
    ]
    with disk_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        tokens.unlink(missing_ok=True)  # they are never there beside other captions, not even after a kill
        _dump({"clip_embedding": torch.from_numpy(np.array(photos.embeddings)), "captions": captions}, out, 1)
        if tokenizer is None:
            return [out]
        encoded = _tokens(texts, tokenizer)
        _dump([encoded, rows, max(map(len, encoded))], tokens, len(encoded))
        return [out, tokens]


def _check_names(out: Path, tokens: Path, with_tokens: bool, overwrite: bool) -> None:
    """Raises InputError if the files cannot be written under these names."""
    if out.suffix != ".pkl":
        raise InputError(f"{out} is not called .pkl, which ClipCap cuts off to find the tokens; choose such an --out")
    if tokens.exists() and not with_tokens:
        raise InputError(f"ClipCap would use the old tokens in {tokens}; remove it or give --language-model as well")
    for file in (out, tokens):
        if file.exists() and not (overwrite and file.is_file()):
            raise InputError(f"{file} exists already; pass --overwrite to replace it or choose another --out")
    refuse_unwritable(out)


def _tokens(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[Tensor]:
    encoded: list[Tensor] = []
    with bar("tokens", total=len(texts), unit="caption") as progress:
        for start in range(0, len(texts), _BLOCK):
            block = tokenizer(texts[start : start + _BLOCK], add_special_tokens=False)["input_ids"]
            encoded += [torch.tensor(ids, dtype=torch.int64) for ids in block]
            progress.update(len(block))
    return encoded


class _Pickler(pickle.Pickler):
    """A pickler that shows how many tensors it has written; each takes it 30 microseconds or more."""

    def __init__(self, file: IO[bytes], progress: tqdm):
        super().__init__(file)
        self.progress = progress

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            self.progress.update()
        return NotImplemented


def _dump(content: Any, out: Path, tensors: int) -> None:
    """Writes a pickle that is there whole or not at all."""
    temporary = out.with_name(out.name + ".tmp")
    with open(temporary, "wb") as file:
        with bar(out.name, total=tensors, unit="tensor") as progress:
            _Pickler(file, progress).dump(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, out)
