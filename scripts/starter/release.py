"""Stages `release` and `starter_index`: from what was trained to what the package carries, in float16."""

import dataclasses
import shutil
from pathlib import Path

import torch

from clipcap_rag.artifact import new_directory
from clipcap_rag.checkpoint import read_checkpoint
from clipcap_rag.index_builder import build_caption_index
from clipcap_rag.shipped import STARTER
from starter.phrases import FILE

MODEL, INDEX = Path("clipcap_rag/models/starter"), Path("index/starter")
LICENCE = "MIT: the phrases were composed by this project from its own word lists"


def release(work: Path, root: Path, card: str | None = None) -> None:
    """Writes the captioner and its CLIP into the package; its index is called by its name."""
    trained = read_checkpoint(work / "captioner/best")
    trained = dataclasses.replace(
        trained,
        encoder=trained.encoder | {"clip": STARTER},
        language_model=STARTER,
        index={"path": STARTER, "name": STARTER, "revision": 1},
        training=trained.training | {"features": "Flickr8k training photos"},
    )
    with new_directory(root / MODEL, overwrite=True) as folder:
        shutil.copytree(work / "clip", folder / "clip", ignore=shutil.ignore_patterns("log.jsonl"))
        trained.write(folder, dtype=torch.float16, card=card)
    if card is None:
        (work / "release").mkdir()


def release_index(work: Path, root: Path) -> None:
    """Builds index/starter from the phrases."""
    build_caption_index([work / "phrases" / FILE], STARTER, root / INDEX, licence=LICENCE, overwrite=True)
    (work / "starter_index").mkdir()
