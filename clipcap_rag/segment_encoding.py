"""Captions to one segment of an index, chunk by chunk, so that a killed run continues at the last finished chunk."""

import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa

from clipcap_rag.artifact import write_bytes
from clipcap_rag.caption_template import fill_template
from clipcap_rag.encoder import Encoder
from clipcap_rag.errors import InputError
from clipcap_rag.index_store import SCHEMA, SegmentWriter, caption_batch
from clipcap_rag.progress import bar, say
from clipcap_rag.sources import CaptionRecord

CHUNK = 16_384  # captions between two points at which killed work can continue
# n records -> their embeddings [n, D] of unit length; tells its second argument how many more are done
Embed = Callable[[list[CaptionRecord], Callable[[int], None]], np.ndarray]
_EMBEDDING = "embedding"  # the column of a chunk that holds float16 bytes


def encode_records(encoder: Encoder, template: str, batch_size: int) -> Embed:
    """Embeds the captions of records in a template."""

    def embed(records: list[CaptionRecord], on_progress: Callable[[int], None]) -> np.ndarray:
        texts = fill_template(template, [record.caption for record in records])
        return encoder.encode_text(texts, batch_size=batch_size, on_progress=on_progress).vectors

    return embed


def encode_segment(
    records: Iterator[CaptionRecord],
    rows: int,
    embed: Embed,
    dim: int,
    chunks: Path,
    segment: Path,
    first_id: int = 0,
) -> None:
    """Embeds records into the folder `segment`, which appears whole; a killed run continues at the last chunk.

    Args:
        records: `rows` captions, from the first on.
        dim: width D of the embeddings.
        chunks: folder for what is done; it is removed in the end.
        first_id: the caption_id of the first record.

    Raises:
        InputError: there are more or fewer records than `rows`.
    """
    if not segment.is_dir():
        _encode(records, rows, embed, chunks, first_id)
        _join(chunks, segment, dim, rows)
    shutil.rmtree(chunks, ignore_errors=True)


def _encode(records: Iterator[CaptionRecord], rows: int, embed: Embed, chunks: Path, first_id: int) -> None:
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
            _save_chunk(_chunk_file(chunks, done), part, first_id + done * CHUNK, embed(part, progress.update))
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
