"""A caption index written in the layouts of other projects: antarctic-captions and clip-retrieval."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from clipcap_rag.artifact import new_directory, write_manifest
from clipcap_rag.caption_template import template_of
from clipcap_rag.config import EXPORT_FORMATS
from clipcap_rag.errors import InputError
from clipcap_rag.index_names import resolve_index
from clipcap_rag.index_store import SCHEMA, IndexFiles, caption_batch, open_files
from clipcap_rag.progress import bar

PART = 1_000_000  # rows of a file in the layout of clip-retrieval
_BLOCK = 16_384  # rows in memory at a time
_NOTE, _KIND, _VERSION = "export.json", "exported caption index", 1


def export_index(name_or_path: str | Path, format: str, out: str | Path, *, overwrite: bool = False) -> Path:
    """Writes the captions of an index, removed ones left out, and their embeddings for other programs.

    antarctic: NAME.txt with one caption a line, and NAME.npy with their embeddings in the same order. clip-retrieval:
    metadata/metadata_N.parquet with the columns of an index and text_emb/text_emb_N.npy, at most PART rows each.
    Embeddings are float32 of unit length. export.json beside them says where they come from.

    Returns:
        `out`.

    Raises:
        InputError: there is no such index or format, the index is empty, or `out` cannot be written.
    """
    out = Path(out)
    if format not in EXPORT_FORMATS:
        raise InputError(f"there is no format {format!r} to export to; choose one of {', '.join(EXPORT_FORMATS)}")
    files = open_files(resolve_index(name_or_path))
    rows = np.flatnonzero(files.live)
    if not len(rows):
        raise InputError(f"the index {files.path} holds no caption; there is nothing to export")
    with (
        new_directory(out, overwrite) as folder,
        bar("writing captions", total=len(rows), unit="caption") as progress,
    ):
        write = _write_antarctic if format == "antarctic" else _write_clip_retrieval
        for done in write(files, rows, folder):
            progress.update(done)
        manifest, name = files.manifest, files.path.resolve().name
        fields = {
            "format": format,
            "rows": len(rows),
            "index": {"name": name, "revision": manifest["revision"]},
            "encoder": {key: manifest["encoder"][key] for key in ("clip", "dim")},
            "template": template_of(manifest),
            "licence": manifest["licence"],
        }
        write_manifest(folder, _NOTE, _KIND, _VERSION, fields)
    return out


def _write_antarctic(files: IndexFiles, rows: np.ndarray, folder: Path) -> Iterator[int]:
    name = files.path.resolve().name
    with open(folder / f"{name}.txt", "w", encoding="utf-8", newline="\n") as text:
        for part in _write_array(folder / f"{name}.npy", files, rows):
            text.writelines(f"{caption}\n" for caption in files.captions(part))
            yield len(part)


def _write_clip_retrieval(files: IndexFiles, rows: np.ndarray, folder: Path) -> Iterator[int]:
    (folder / "metadata").mkdir()
    (folder / "text_emb").mkdir()
    parts = [rows[start : start + PART] for start in range(0, len(rows), PART)]
    digits = len(str(len(parts) - 1))
    for number, part in enumerate(parts):
        label = str(number).zfill(digits)
        with pq.ParquetWriter(folder / "metadata" / f"metadata_{label}.parquet", SCHEMA) as table:
            for block in _write_array(folder / "text_emb" / f"text_emb_{label}.npy", files, part):
                table.write_batch(_batch(files, block))
                yield len(block)


def _write_array(file: Path, files: IndexFiles, rows: np.ndarray) -> Iterator[np.ndarray]:
    """Writes the embeddings of `rows` block by block; yields the rows of each block when they are written."""
    array = np.lib.format.open_memmap(file, "w+", np.float32, (len(rows), files.dim))
    for start in range(0, len(rows), _BLOCK):
        block = rows[start : start + _BLOCK]
        vectors = files.embeddings(block)
        array[start : start + len(block)] = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        yield block
    array.flush()


def _batch(files: IndexFiles, rows: np.ndarray) -> Any:
    records = files.records(rows)
    return caption_batch({name: [record[name] for record in records] for name in SCHEMA.names})
