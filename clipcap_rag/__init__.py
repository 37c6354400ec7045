"""clipcap-rag: an image captioner that you can teach without training it."""

import importlib
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "Captioner": "captioner",
    "CaptionIndex": "caption_index",
    "CaptionResult": "caption_result",
    "GenerationConfig": "config",
    "InputError": "errors",
    "build_caption_index": "index_builder",
    "extract_features": "features",
    "train": "training",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first used, so that `clipcap-rag --help` needs no torch."""
    if name not in _HOME:
        raise AttributeError(f"module 'clipcap_rag' has no attribute {name!r}")
    return getattr(importlib.import_module(f"clipcap_rag.{_HOME[name]}"), name)
