"""Builds a caption index from caption files: counts, encodes chunk by chunk, resumes after a kill."""

import hashlib
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from clipcap_rag import __version__
from clipcap_rag.artifact import disk_errors, refuse_existing, resumable_directory, write_bytes
from clipcap_rag.caption_index import CaptionIndex
from clipcap_rag.config import IndexConfig
from clipcap_rag.encoder import Encoder, check_same_encoder, stored_clip
from clipcap_rag.errors import InputError
from clipcap_rag.features import FeatureSet
from clipcap_rag.index_store import (
    EMBEDDINGS,
    SCHEMA,
    SEARCH,
    SegmentWriter,
    caption_batch,
    index_lock,
    write_index_manifest,
)
from clipcap_rag.progress import bar, say, track
from clipcap_rag.search_structure import build_search_structure, plan_search
from clipcap_rag.sources import BadLines, CaptionRecord, SourceOptions, read_captions

CHUNK = 16_384  # captions between two points at which a killed build can continue
_SEGMENT = "000001"
_EMBEDDING = "embedding"  # the column of a chunk that holds float16 bytes


def build_caption_index(
    captions: Sequence[str | Path],
    clip: str,
    out: str | Path,
    *,
    source_options: SourceOptions | None = None,
    index_config: IndexConfig | None = None,
    device: str = "auto",
    dtype: str = "auto",
    batch_size: int = 256,
    skip_bad: bool = False,
    overwrite: bool = False,
    licence: str | None = None,
    query_features: str | Path | None = None,
) -> CaptionIndex:
    """Encodes all captions of the files and writes them as a searchable index.

    The files are read twice: once to count and to find every fault before the long work, once to encode. Memory does
    not grow with their size. Run the same command again after a kill or a full disk and it continues at the last
    finished chunk; the files it writes do not depend on how often it was interrupted.

    Args:
        captions: caption files or folders in any format of `sources.read_captions`.
        clip: CLIP model string.
        out: the index directory to write.
        source_options: format and columns of the files.
        index_config: how the index is searched.
        device, dtype: where and in which number format captions are encoded.
        batch_size: captions encoded at a time.
        skip_bad: count and list bad lines instead of stopping at the first.
        overwrite: replace `out` if it exists.
        licence: the terms of the captions, stored in index.json.
        query_features: a feature set whose photos the search is tuned with, where it is not exact.

    Returns:
        The index, opened on the CPU.

    Raises:
        InputError: no captions, bad lines, an unknown model or index key, `out` exists, or no space is left.
    """
    out, paths = Path(out), [Path(path) for path in captions]
    options, config = source_options or SourceOptions(), index_config or IndexConfig()
    if batch_size < 1:
        raise InputError(f"batch_size is {batch_size}; it must be at least 1")
    refuse_existing(out, overwrite)
    bad = BadLines(skip_bad)
    rows = count_captions(paths, options, bad)
    encoder = Encoder.load(clip, device, dtype)
    queries = photo_queries(query_features, encoder.record(), f"the CLIP model {clip}") if query_features else None
    plan_search(config, rows, encoder.dim)  # refuses what cannot be built before hours of encoding
    job = encoding_job(paths, options, encoder, batch_size, rows)
    with disk_errors(out), index_lock(out), resumable_directory(out, job, overwrite) as staging:
        segment = staging / "segments" / _SEGMENT
        records = read_captions(paths, options, BadLines(skip_bad))
        encode_segment(records, rows, encoder, batch_size, staging / "chunks", segment)
        # the segment is whole from here on; what a killed run left of the later steps is made again
        (segment / SEARCH).unlink(missing_ok=True)
        search = build_search_structure(segment / EMBEDDINGS, config, segment / SEARCH, queries)
        write_index_manifest(
            staging,
            revision=1,
            encoder={**encoder.record(), "clip": stored_clip(encoder.clip, out.absolute())},
            segments=[{"name": _SEGMENT, "rows": rows, "search": search}],
            provenance=_provenance(paths, options, encoder, bad),
            licence=licence,
        )
    return CaptionIndex.open(out, device="cpu")


def encode_segment(
    records: Iterator[CaptionRecord],
    rows: int,
    encoder: Encoder,
    batch_size: int,
    chunks: Path,
    segment: Path,
    first_id: int = 0,
) -> None:
    """Encodes records into the folder `segment`, which appears whole; a killed run continues at the last chunk.

    Args:
        records: `rows` captions, from the first on.
        chunks: folder for what is done; it is removed in the end.
        first_id: the caption_id of the first record.

    Raises:
        InputError: there are more or fewer records than `rows`.
    """
    if not segment.is_dir():
        _encode(records, encoder, batch_size, rows, chunks, first_id)
        _join(chunks, segment, encoder.dim, rows)
    shutil.rmtree(chunks, ignore_errors=True)


def photo_queries(features: str | Path, encoder: dict[str, Any], owner: str) -> np.ndarray:
    """Image embeddings [Q, D] float32 of unit length of a feature set made by the model of `owner`.

    Raises:
        InputError: there is no such feature set, it holds no photo, or another model made it.
    """
    photos = FeatureSet.open(features)
    check_same_encoder(photos.encoder, f"the feature set {features}", encoder, owner)
    if not len(photos):
        raise InputError(f"the feature set {features} holds no photo; give another one")
    return photos.unit_embeddings()


def count_captions(paths: list[Path], options: SourceOptions, bad: BadLines) -> int:
    """The number of captions of files that will be read again; every fault of theirs is found by this.

    Raises:
        InputError: there is none, a file cannot be read twice, or as `read_captions`.
    """
    for path in paths:
        if path.exists() and not path.is_file() and not path.is_dir():
            raise InputError(f"{path} is a pipe or a device, which cannot be read twice; save the captions to a file")
    rows = sum(1 for _ in track(read_captions(paths, options, bad), "counting captions", unit="caption"))
    if not rows:
        raise InputError(
            f"there is no caption in {', '.join(map(str, paths)) or 'no file'}; give --captions files that hold some"
        )
    if bad.count:
        say(f"{bad.count} bad lines are left out, the first are: {'; '.join(bad.listed)}")
    return rows


def encoding_job(
    paths: list[Path], options: SourceOptions, encoder: Encoder, batch_size: int, rows: int
) -> dict[str, Any]:
    """What determines the bytes of captions.arrow and embeddings.npy."""
    return {
        "sources": [_stamp(file) for path in paths for file in _files(path)],
        "options": options.to_json(),
        "rows": rows,
        "clip": encoder.clip,
        "probes": hashlib.sha256(np.round(encoder.record()["probes"]["text"], 3).tobytes()).hexdigest(),
        "dtype": str(encoder.dtype),
        "device": str(encoder.device),
        "batch_size": batch_size,
        "chunk": CHUNK,
    }


def _files(path: Path) -> list[Path]:
    return sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]


def _stamp(file: Path) -> list[Any]:
    status = file.stat()
    return [str(file.absolute()), status.st_size, status.st_mtime_ns]


def _encode(
    records: Iterator[CaptionRecord], encoder: Encoder, batch_size: int, rows: int, chunks: Path, first_id: int
) -> None:
    """Writes one file per CHUNK of records: their columns and, as bytes, their float16 embeddings."""
    chunks.mkdir(exist_ok=True)
    done = 0
    while _chunk_file(chunks, done).is_file():
        done += 1
    if done:
        say(f"{min(rows, done * CHUNK)} of {rows} captions are encoded already")
    next(islice(records, done * CHUNK, done * CHUNK), None)
    read = min(rows, done * CHUNK)
    with bar("encoding captions", total=rows, done=read, unit="caption") as progress:
        while part := list(islice(records, CHUNK)):
            encoded = encoder.encode_text(
                [record.caption for record in part], batch_size=batch_size, on_progress=progress.update
            )
            _save_chunk(_chunk_file(chunks, done), part, first_id + done * CHUNK, encoded.vectors)
            done, read = done + 1, read + len(part)
    if read != rows:
        raise InputError(f"the caption files changed while they were read ({rows} captions, then {read}); run it again")


def _chunk_file(chunks: Path, number: int) -> Path:
    return chunks / f"{number:06d}.arrow"


def _save_chunk(file: Path, records: list[CaptionRecord], first: int, vectors: np.ndarray) -> None:
    stored = vectors.astype(np.float16)
    batch = record_batch(records, range(first, first + len(records)))
    width = pa.binary(2 * stored.shape[1])
    embedding = pa.FixedSizeBinaryArray.from_buffers(width, len(stored), [None, pa.py_buffer(stored)])
    schema = SCHEMA.append(pa.field(_EMBEDDING, width))
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, schema) as writer:
        writer.write_batch(pa.record_batch([*batch.columns, embedding], schema=schema))
    write_bytes(file, sink.getvalue())


def record_batch(records: Sequence[CaptionRecord], caption_ids: Iterable[int | str]) -> pa.RecordBatch:
    """Records as a batch of `index_store.SCHEMA`."""
    return caption_batch(
        {
            "caption": [record.caption for record in records],
            "caption_id": [str(caption_id) for caption_id in caption_ids],
            "image_id": [record.image_id for record in records],
            "source": [record.source for record in records],
            "meta": [record.meta for record in records],
        }
    )


def _join(chunks: Path, segment: Path, dim: int, rows: int) -> None:
    """Turns the chunks into a segment that appears whole."""
    unfinished = chunks / "segment"
    with SegmentWriter(unfinished, dim) as writer:
        for number in range(-(-rows // CHUNK)):
            table = pa.ipc.open_file(pa.memory_map(str(_chunk_file(chunks, number)))).get_batch(0)
            embedding = np.frombuffer(table.column(_EMBEDDING).buffers()[1], np.float16, len(table) * dim)
            writer.append(table.select(SCHEMA.names), embedding.reshape(-1, dim))
    segment.parent.mkdir(exist_ok=True)
    os.rename(unfinished, segment)


def source_records(paths: list[Path]) -> list[dict[str, Any]]:
    """What index.json says of the files that captions came from."""
    return [{"name": path.name, "bytes": sum(file.stat().st_size for file in _files(path))} for path in paths]


def _provenance(paths: list[Path], options: SourceOptions, encoder: Encoder, bad: BadLines) -> dict[str, Any]:
    return {
        "clipcap_rag": __version__,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "sources": source_records(paths),
        "source_options": options.to_json(),
        "bad_lines_left_out": bad.count,
        "encoded_on": encoder.device.type,
        "dtype": str(encoder.dtype).removeprefix("torch."),
    }
