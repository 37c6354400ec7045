"""What goes into an index, and what tells whether unfinished work on it can be continued."""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from clipcap_rag.encoder import Encoder
from clipcap_rag.segment_encoding import CHUNK
from clipcap_rag.sources import CaptionRecord


@dataclass(frozen=True)
class IndexEntries:
    """What goes into an index, counted and found free of faults.

    Attributes:
        rows: number of records.
        read: gives the records, the same at every call.
        paths: the files and folders that they come from.
        options: what else decides which records these are, ready for JSON.
        template: what is encoded for a caption, which stands in it for {}.
        report: what index.json says of their origin, beside sources and template.
    """

    rows: int
    read: Callable[[], Iterator[CaptionRecord]]
    paths: list[Path]
    options: dict[str, Any]
    template: str
    report: dict[str, Any] = field(default_factory=dict)


def encoding_job(entries: IndexEntries, encoder: Encoder, batch_size: int) -> dict[str, Any]:
    """What determines the bytes of captions.arrow and embeddings.npy."""
    return {
        "sources": [_stamp(file) for path in entries.paths for file in _files(path)],
        "options": entries.options,
        "template": entries.template,
        "rows": entries.rows,
        "clip": encoder.clip,
        "probes": hashlib.sha256(np.round(encoder.record()["probes"]["text"], 3).tobytes()).hexdigest(),
        "dtype": str(encoder.dtype),
        "device": str(encoder.device),
        "batch_size": batch_size,
        "chunk": CHUNK,
    }


def source_records(paths: list[Path]) -> list[dict[str, Any]]:
    """What index.json says of the files that captions came from."""
    return [{"name": path.name, "bytes": sum(file.stat().st_size for file in _files(path))} for path in paths]


def _files(path: Path) -> list[Path]:
    return sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]


def _stamp(file: Path) -> list[Any]:
    status = file.stat()
    return [str(file.absolute()), status.st_size, status.st_mtime_ns]
