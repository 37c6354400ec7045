"""Builds a caption index from caption files: counts, encodes chunk by chunk, resumes after a kill."""

from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from clipcap_rag import __version__
from clipcap_rag.artifact import disk_errors, refuse_existing, resumable_directory
from clipcap_rag.caption_index import CaptionIndex
from clipcap_rag.caption_template import PLAIN, check_template
from clipcap_rag.config import IndexConfig
from clipcap_rag.encoder import Encoder, check_same_encoder, stored_clip
from clipcap_rag.errors import InputError
from clipcap_rag.features import FeatureSet
from clipcap_rag.index_entries import IndexEntries, encoding_job, source_records
from clipcap_rag.index_store import EMBEDDINGS, SEARCH, index_lock, write_index_manifest
from clipcap_rag.ngrams import PhraseOptions, mine_phrases
from clipcap_rag.progress import say, track
from clipcap_rag.search_structure import build_search_structure, plan_search
from clipcap_rag.segment_encoding import Embed, encode_records, encode_segment
from clipcap_rag.sources import BadLines, CaptionRecord, SourceOptions, read_captions

_SEGMENT = "000001"


def build_caption_index(
    captions: Sequence[str | Path],
    clip: str,
    out: str | Path,
    *,
    source_options: SourceOptions | None = None,
    phrase_options: PhraseOptions | None = None,
    template: str = PLAIN,
    index_config: IndexConfig | None = None,
    device: str = "auto",
    dtype: str = "auto",
    batch_size: int = 256,
    skip_bad: bool = False,
    overwrite: bool = False,
    licence: str | None = None,
    query_features: str | Path | None = None,
) -> CaptionIndex:
    """Encodes all captions of the files, or phrases mined from them, and writes them as a searchable index.

    The files are read twice: once to count and to find every fault before the long work, once to encode. Memory does
    not grow with their size. Run the same command again after a kill or a full disk and it continues at the last
    finished chunk; the files it writes do not depend on how often it was interrupted.

    Args:
        captions: caption files or folders in any format of `sources.read_captions`.
        clip: CLIP model string.
        out: the index directory to write.
        source_options: format and columns of the files.
        phrase_options: which phrases of the texts become entries, and whether the texts themselves do.
        template: what is encoded for a caption, which stands in it for {}; the caption is stored as it is.
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
    options, phrases = source_options or SourceOptions(), phrase_options or PhraseOptions()
    if batch_size < 1:
        raise InputError(f"batch_size is {batch_size}; it must be at least 1")
    check_template(template)
    refuse_existing(out, overwrite)
    _refuse_pipes(paths)
    accounts: list[BadLines] = []  # one for each time that the files are read, all alike

    def texts() -> Iterator[CaptionRecord]:
        accounts.append(BadLines(skip_bad))
        return read_captions(paths, options, accounts[-1], prose=bool(phrases.lengths))

    mined = mine_phrases(texts, phrases)

    def read() -> Iterator[CaptionRecord]:
        return chain(texts() if phrases.keeps_lines else (), mined)

    rows = _count(read())
    if not rows:
        raise _nothing_in(paths, f"phrase that occurs {phrases.min_count} times" if phrases.lengths else "caption")
    tell_bad_lines(accounts[0])
    decided = {"source_options": options.to_json()} | ({"phrases": phrases.to_json()} if phrases.lengths else {})
    entries = IndexEntries(rows, read, paths, decided, template, {**decided, "bad_lines_left_out": accounts[0].count})
    encoder = Encoder.load(clip, device, dtype)
    queries = photo_queries(query_features, encoder.record(), f"the CLIP model {clip}") if query_features else None
    return write_index(
        entries, encode_records(encoder, template, batch_size), encoder, out,
        index_config=index_config, queries=queries, batch_size=batch_size, overwrite=overwrite, licence=licence,
    )  # fmt: skip


def write_index(
    entries: IndexEntries,
    embed: Embed,
    encoder: Encoder,
    out: Path,
    *,
    index_config: IndexConfig | None = None,
    queries: np.ndarray | None = None,
    batch_size: int = 256,
    overwrite: bool = False,
    licence: str | None = None,
) -> CaptionIndex:
    """Writes entries and their embeddings as an index, chunk by chunk; run again after a kill it continues.

    Args:
        entries: the captions and what they come from.
        embed: gives the embeddings of records.
        encoder: the CLIP model whose space the embeddings are in.
        queries: image embeddings [Q, D] that the search is tuned with, where it is not exact.
        batch_size: what `embed` encodes at a time; it has a part in the last bits of what comes out.

    Raises:
        InputError: an unknown index key, `out` exists, no space is left, or the sources changed meanwhile.
    """
    config = index_config or IndexConfig()
    plan_search(config, entries.rows, encoder.dim)  # refuses what cannot be built before hours of encoding
    job = encoding_job(entries, encoder, batch_size)
    with disk_errors(out), index_lock(out), resumable_directory(out, job, overwrite) as staging:
        segment = staging / "segments" / _SEGMENT
        encode_segment(entries.read(), entries.rows, embed, encoder.dim, staging / "chunks", segment)
        # the segment is whole from here on; what a killed run left of the later steps is made again
        (segment / SEARCH).unlink(missing_ok=True)
        search = build_search_structure(segment / EMBEDDINGS, config, segment / SEARCH, queries)
        write_index_manifest(
            staging,
            revision=1,
            encoder={**encoder.record(), "clip": stored_clip(encoder.clip, out.absolute())},
            segments=[{"name": _SEGMENT, "rows": entries.rows, "search": search}],
            provenance=_provenance(entries, encoder),
            licence=licence,
        )
    return CaptionIndex.open(out, device="cpu")


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
    _refuse_pipes(paths)
    rows = _count(read_captions(paths, options, bad))
    if not rows:
        raise _nothing_in(paths, "caption")
    tell_bad_lines(bad)
    return rows


def tell_bad_lines(bad: BadLines) -> None:
    """Says what is left out."""
    if bad.count:
        say(f"{bad.count} bad lines are left out, the first are: {'; '.join(bad.listed)}")


def _refuse_pipes(paths: list[Path]) -> None:
    for path in paths:
        if path.exists() and not path.is_file() and not path.is_dir():
            raise InputError(f"{path} is a pipe or a device, which cannot be read twice; save the captions to a file")


def _count(records: Iterable[CaptionRecord]) -> int:
    return sum(1 for _ in track(records, "counting captions", unit="caption"))


def _nothing_in(paths: list[Path], what: str) -> InputError:
    names = ", ".join(map(str, paths)) or "no file"
    return InputError(f"there is no {what} in {names}; give --captions files that hold some")


def _provenance(entries: IndexEntries, encoder: Encoder) -> dict[str, Any]:
    return {
        "clipcap_rag": __version__,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "sources": source_records(entries.paths),
        "template": entries.template,
        **entries.report,
        "encoded_on": encoder.device.type,
        "dtype": str(encoder.dtype).removeprefix("torch."),
    }
