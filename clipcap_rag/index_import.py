"""Indexes of other projects become caption indexes, with their embeddings if a sample shows that our CLIP made them."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from clipcap_rag.artifact import refuse_existing
from clipcap_rag.caption_index import CaptionIndex
from clipcap_rag.caption_template import PLAIN, check_template, fill_template
from clipcap_rag.config import ImportConfig, IndexConfig
from clipcap_rag.encoder import Encoder
from clipcap_rag.errors import InputError
from clipcap_rag.foreign_indexes import ForeignIndex, open_foreign
from clipcap_rag.index_builder import tell_bad_lines, write_index
from clipcap_rag.index_entries import IndexEntries
from clipcap_rag.progress import say, track
from clipcap_rag.segment_encoding import encode_records
from clipcap_rag.sources import BadLines, CaptionRecord, caption_records

_SAMPLE = 64  # captions that are encoded again
_SAME, _SHARE = 0.99, 0.95  # smallest cosine of an embedding and its like, and how many have to reach it
_LENGTH_TOLERANCE = 0.01


@dataclass(frozen=True, slots=True)
class EmbeddedCaption(CaptionRecord):
    """A caption with the embedding [D] that is stored with it."""

    embedding: np.ndarray | None = None


def import_index(
    paths: Sequence[str | Path],
    clip: str,
    out: str | Path,
    *,
    import_config: ImportConfig | None = None,
    index_config: IndexConfig | None = None,
    device: str = "auto",
    dtype: str = "auto",
    batch_size: int = 256,
    skip_bad: bool = False,
    overwrite: bool = False,
    licence: str | None = None,
) -> CaptionIndex:
    """Writes an index of another project as a caption index.

    Its embeddings are kept, as float16 of unit length, if those of a sample of captions agree with what `clip` gives
    for them; captions without embeddings are encoded. Everything is streamed, and a killed import continues when it
    is run again. FAISS files are not read: exact search needs none, and what it finds is known by its embedding.

    Args:
        paths: what `foreign_indexes.open_foreign` takes.
        clip: the CLIP model that made the embeddings, or that makes them.
        out: the index directory to write.
        import_config: whose layout it is, what its columns are called, whether its embeddings are kept.
        index_config, device, dtype, batch_size, skip_bad, overwrite, licence: as in `build_caption_index`.

    Raises:
        InputError: the files are missing, damaged or do not belong together, another CLIP model made the embeddings, a
            caption or embedding is bad and `skip_bad` is false, or `out` cannot be written.
    """
    out, config = Path(out), import_config or ImportConfig()
    refuse_existing(out, overwrite)
    foreign = open_foreign(paths, config)
    if foreign.left_aside:
        say(f"not used: {foreign.left_aside}")
    template = foreign.template if config.template is None else config.template
    check_template(template)
    bad = BadLines(skip_bad)
    survey = _survey(_records(foreign, bad), foreign)
    if not survey.rows:
        raise InputError(f"there is no caption in {foreign.path}; check it and its --format")
    tell_bad_lines(bad)
    encoder = Encoder.load(clip, device, dtype)
    origin: dict[str, Any] = {"format": foreign.format, "bad_lines_left_out": bad.count}
    if foreign.dim is None:
        embed = encode_records(encoder, template, batch_size)
        origin["embeddings"] = "encoded again" if config.reencode else "encoded"
    else:
        cosine = _check_sample(foreign, survey.sample, encoder, template)
        say(
            f"the embeddings are those of {encoder.clip}: median cosine {cosine:.4f} over {len(survey.sample)} captions"
        )
        if survey.normalized:
            say("the embeddings are not of unit length and are normalised")
        embed = _stored
        origin["embeddings"] = "taken over" + (" and normalised" if survey.normalized else "")
        origin["sample_cosine"] = round(cosine, 4)
    decided = config.to_json() | {"format": foreign.format}
    entries = IndexEntries(
        survey.rows, lambda: _records(foreign, BadLines(skip_bad)), foreign.files, decided, template, {"import": origin}
    )
    return write_index(
        entries, embed, encoder, out,
        index_config=index_config, batch_size=batch_size, overwrite=overwrite, licence=licence,
    )  # fmt: skip


def _records(foreign: ForeignIndex, bad: BadLines) -> Iterator[CaptionRecord]:
    """The sound captions, with their embeddings where these are stored."""
    for place, values, vector in foreign.read(bad):
        for record in caption_records(place, values, foreign.path.stem, bad):
            if foreign.dim is None:
                yield record
                continue
            length = np.linalg.norm(np.asarray(vector, np.float32))
            if not 0 < length < np.inf:  # false for NaN
                bad.report(f"{place}: its embedding has the length {length}")
                continue
            yield EmbeddedCaption(record.caption, record.image_id, record.image, record.source, record.meta, vector)


@dataclass(frozen=True)
class _Survey:
    """What one reading has shown: sound captions, an evenly spaced sample of them, whether some are not of length 1."""

    rows: int
    sample: list[CaptionRecord]
    normalized: bool


def _survey(records: Iterator[CaptionRecord], foreign: ForeignIndex) -> _Survey:
    wanted = set(np.linspace(0, foreign.rows - 1, min(_SAMPLE, foreign.rows)).astype(int).tolist())
    rows, sample, normalized = 0, [], False
    for record in track(records, "reading captions", total=foreign.rows, unit="caption"):
        if foreign.dim is not None:
            normalized = normalized or abs(np.linalg.norm(_float32(record)) - 1) > _LENGTH_TOLERANCE
            if rows in wanted:
                sample.append(record)
        rows += 1
    return _Survey(rows, sample, normalized)


def _check_sample(foreign: ForeignIndex, sample: list[CaptionRecord], encoder: Encoder, template: str) -> float:
    """The median cosine of the stored embeddings and those that `encoder` gives for the same captions.

    Raises:
        InputError: they differ in more than a few captions.
    """
    stored = f"the embeddings in {foreign.path} ({foreign.dim} wide) are not"
    remedy = "name the CLIP model that made them with --clip, or pass --reencode to encode the captions with this one"
    if foreign.dim != encoder.dim:
        raise InputError(f"{stored} those of {encoder.clip} ({encoder.dim} wide); {remedy}")
    texts = fill_template(template, [record.caption for record in sample])
    cosines = np.einsum("nd,nd->n", _stored(sample), encoder.encode_text(texts).vectors)
    median = float(np.median(cosines))
    if np.mean(cosines >= _SAME) < _SHARE:
        hint = "" if template != PLAIN else ", or the sentence that they were encoded in with --template"
        raise InputError(
            f"{stored} those that {encoder.clip} gives for these captions (median cosine {median:.2f} over "
            f"{len(sample)} of them); {remedy.replace(', or', f'{hint}, or', 1)}"
        )
    return median


def _stored(records: Sequence[CaptionRecord], on_progress: Callable[[int], None] = lambda done: None) -> np.ndarray:
    """The stored embeddings [n, D] of records, of unit length."""
    vectors = np.stack([_float32(record) for record in records])
    on_progress(len(records))
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def _float32(record: CaptionRecord) -> np.ndarray:
    return np.asarray(record.embedding, np.float32)
