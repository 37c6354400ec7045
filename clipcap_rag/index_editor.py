"""Changes of an index that is there: captions added, removed, updated, and everything made one segment again."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from clipcap_rag import hub, shipped
from clipcap_rag.artifact import resumable_directory
from clipcap_rag.caption_template import fill_template, template_of
from clipcap_rag.config import IndexConfig
from clipcap_rag.errors import InputError
from clipcap_rag.index_commit import ADDED, IndexChange, index_change
from clipcap_rag.index_filter import Where, matching, values_met
from clipcap_rag.index_names import resolve_index
from clipcap_rag.index_store import EMBEDDINGS, SEARCH, read_index_manifest
from clipcap_rag.sources import BadLines, CaptionRecord, SourceOptions, check_record, read_captions

if TYPE_CHECKING:  # the other changes of an index load neither torch nor open_clip
    from clipcap_rag.encoder import Encoder

_BATCH = 4096  # captions encoded and written at a time


@dataclass(frozen=True)
class IndexEdit:
    """A change that is on the disk: the index, its new revision, and the caption_ids that it concerned."""

    path: Path
    revision: int
    caption_ids: list[str]


def index_encoder(index: str | Path, clip: str | None = None, device: str = "auto", dtype: str = "auto") -> "Encoder":
    """The CLIP model that an index was built with.

    Args:
        index: name or path.
        clip: where the model that the index names has moved.

    Raises:
        InputError: there is no such index or model, or the model is another one.
    """
    from clipcap_rag.encoder import Encoder, check_encoder

    path = resolve_index(index)
    record = read_index_manifest(path)["encoder"]
    encoder = Encoder.load(clip or record["clip"], device, dtype, base=path)
    check_encoder(record, encoder, f"the index {path}")
    return encoder


def add_captions(
    index: str | Path,
    captions: Sequence[str | CaptionRecord],
    encoder: "Encoder | None" = None,
    *,
    wait: float = math.inf,
) -> IndexEdit:
    """Adds captions to an index; a reader sees them at `CaptionIndex.refresh`.

    The cost beyond encoding does not grow with the index: nothing that is there is read or written again, except that
    more than 16 small segments are made one.

    Args:
        index: name or path.
        captions: sentences, or records with `image_id`, `source` and `meta`.
        encoder: the CLIP model of the index; left out, the one that the index names is loaded.
        wait: seconds to wait for another process that writes the index.

    Returns:
        The new revision and the caption_ids that were given to the captions, in order.

    Raises:
        InputError: a caption is empty, the CLIP model is another one, the index came with the package or is damaged,
            another process holds it, or the disk is full. The index is then as it was.
    """
    if isinstance(captions, str) or not captions:
        raise InputError("there is no list of captions to add; give at least one caption, in a list")
    records = [record if isinstance(record, CaptionRecord) else CaptionRecord(record) for record in captions]
    records = [check_record(f"caption {number}", record) for number, record in enumerate(records, start=1)]
    return _add(editable_path(index), records, encoder, wait, sources=[])


def add_caption_files(
    index: str | Path,
    files: Sequence[str | Path],
    encoder: "Encoder | None" = None,
    *,
    source_options: SourceOptions | None = None,
    batch_size: int = 256,
    skip_bad: bool = False,
    wait: float = math.inf,
) -> IndexEdit:
    """Adds the captions of files; work that was killed continues when the same files are added again.

    Args:
        index, encoder, wait: as for `add_captions`.
        files: caption files or folders in any format of `sources.read_captions`.
        source_options: format and columns of the files.
        batch_size: captions encoded at a time.
        skip_bad: count and list bad lines instead of stopping at the first.

    Raises:
        InputError: as `add_captions` and `index_builder.build_caption_index`.
    """
    from clipcap_rag.index_builder import count_captions
    from clipcap_rag.index_entries import IndexEntries, encoding_job, source_records
    from clipcap_rag.segment_encoding import CHUNK, encode_records, encode_segment

    path, paths, options = editable_path(index), [Path(file) for file in files], source_options or SourceOptions()
    if batch_size < 1:
        raise InputError(f"batch_size is {batch_size}; it must be at least 1")
    rows = count_captions(paths, options, BadLines(skip_bad))

    def read() -> Iterator[CaptionRecord]:
        return read_captions(paths, options, BadLines(skip_bad))

    if rows <= CHUNK:
        return _add(path, list(read()), encoder, wait, source_records(paths))
    manifest, encoder = _checked(path, encoder)
    entries = IndexEntries(rows, read, paths, options.to_json(), template_of(manifest))
    with index_change(path, wait) as change:
        _check_unchanged(change, manifest)
        first = change.first_new_id()
        job = encoding_job(entries, encoder, batch_size) | {"first_id": first}
        embed = encode_records(encoder, entries.template, batch_size)
        with resumable_directory(path / ADDED, job) as staging:
            encode_segment(read(), rows, embed, encoder.dim, staging / "chunks", staging / "segment", first)
        change.take(rows)
        revision = change.commit(first + rows, source_records(paths))
    return IndexEdit(path, revision, [str(number) for number in range(first, first + rows)])


def remove_captions(index: str | Path, where: Where, *, wait: float = math.inf) -> IndexEdit:
    """Removes all captions that meet conditions; what they take on the disk is freed by `compact_index`.

    Args:
        index: name or path.
        where: per field (caption, caption_id, image_id, source or meta.KEY) the values it may have; all fields have to
            fit.
        wait: seconds to wait for another process that writes the index.

    Raises:
        InputError: a value is met by no caption, so that nothing is removed; otherwise as `add_captions`.
    """
    if not where:
        raise InputError("nothing says which captions to remove; give at least one condition")
    path = editable_path(index)
    with index_change(path, wait) as change:
        mask = _found(change, where)
        ids = change.files.caption_ids(np.flatnonzero(mask))
        change.remove(mask)
        revision = change.commit()
    return IndexEdit(path, revision, ids)


def update_caption(
    index: str | Path,
    caption_id: str,
    caption: str,
    encoder: "Encoder | None" = None,
    *,
    wait: float = math.inf,
) -> IndexEdit:
    """Gives a caption other words; its caption_id, image_id, source and meta stay.

    Args:
        index, encoder, wait: as for `add_captions`.

    Raises:
        InputError: no caption has this id; otherwise as `add_captions`.
    """
    from clipcap_rag.segment_encoding import record_batch

    path = editable_path(index)
    text = check_record("the caption", CaptionRecord(caption)).caption
    manifest, encoder = _checked(path, encoder)
    vectors = encoder.encode_text(fill_template(template_of(manifest), [text])).vectors
    with index_change(path, wait) as change:
        _check_unchanged(change, manifest)
        mask = _found(change, {"caption_id": [caption_id]})
        (old,) = change.files.records(np.flatnonzero(mask)[-1:])
        change.remove(mask)
        new = CaptionRecord(text, old["image_id"], None, old["source"], old["meta"])
        change.add([(record_batch([new], [caption_id]), vectors)])
        return IndexEdit(path, change.commit(), [caption_id])


def compact_index(index: str | Path, index_key: str | None = None, *, wait: float = math.inf) -> IndexEdit:
    """Makes an index one segment without the removed captions.

    Args:
        index: name or path.
        index_key: how it is searched from now on, as for building; left out, as its largest segment is.
        wait: seconds to wait for another process that writes the index.

    Raises:
        InputError: the key does not suit what is left; otherwise as `add_captions`.
    """
    path = editable_path(index)
    with index_change(path, wait) as change:
        entries = change.manifest["segments"]
        largest = max(entries, key=lambda entry: entry["rows"], default={"search": None})
        key = index_key or (largest["search"] or {}).get("key", "Flat")
        if key != "Flat":
            from clipcap_rag.search_structure import build_search_structure, plan_search

            config = IndexConfig(index_key=key)
            plan_search(config, int(change.files.live.sum()), change.files.dim)  # refuses before the copying
        folder = change.merge(range(len(entries)))
        if key != "Flat":
            change.segments[0]["search"] = build_search_structure(folder / EMBEDDINGS, config, folder / SEARCH)
        change.drop_images()
        revision = change.commit()
        change.clear()  # freeing space is what this is for; readers keep what they have mapped
    return IndexEdit(path, revision, [])


def editable_path(index: str | Path) -> Path:
    """The folder of an index that may be changed; InputError for one of the hub or of the package."""
    if str(index).startswith(hub.PREFIX):
        raise InputError(f"{index} lies on the hub; push a changed copy of its folder instead of changing it")
    path = resolve_index(index)
    if shipped.is_shipped(path):
        raise InputError(f"{path} comes with the package and is not changed; copy the folder and change the copy")
    return path


def _add(
    path: Path, records: list[CaptionRecord], encoder: "Encoder | None", wait: float, sources: list[dict[str, Any]]
) -> IndexEdit:
    from clipcap_rag.segment_encoding import record_batch

    manifest, encoder = _checked(path, encoder)
    template = template_of(manifest)
    parts = [records[start : start + _BATCH] for start in range(0, len(records), _BATCH)]
    texts = [fill_template(template, [record.caption for record in part]) for part in parts]
    vectors = [encoder.encode_text(part).vectors for part in texts]
    with index_change(path, wait) as change:
        _check_unchanged(change, manifest)
        first = change.first_new_id()
        numbers = iter(range(first, first + len(records)))
        batches = [record_batch(part, [next(numbers) for _ in part]) for part in parts]
        change.add(zip(batches, vectors, strict=True))
        revision = change.commit(first + len(records), sources)
    return IndexEdit(path, revision, [str(number) for number in range(first, first + len(records))])


def _checked(path: Path, encoder: "Encoder | None") -> tuple[dict[str, Any], "Encoder"]:
    """What index.json says now, and the CLIP model of the index."""
    manifest = read_index_manifest(path)
    if encoder is None:
        return manifest, index_encoder(path)
    from clipcap_rag.encoder import check_encoder

    check_encoder(manifest["encoder"], encoder, f"the index {path}")
    return manifest, encoder


def _check_unchanged(change: IndexChange, manifest: dict[str, Any]) -> None:
    """Raises InputError if captions that were encoded for the index of `manifest` do not suit it any more."""
    if change.manifest["encoder"] != manifest["encoder"] or template_of(change.manifest) != template_of(manifest):
        raise InputError(f"the index {change.path} was built anew meanwhile; run the same command again")


def _found(change: IndexChange, where: Where) -> np.ndarray:
    """Rows [N] bool that meet the conditions, each value of which some caption has."""
    for field, values in where.items():
        met = values_met(change.files, field, values)
        unmet = [value for value in values if value not in met]
        if unmet:
            raise InputError(
                f"no caption of the index {change.path} has {field}={unmet[0]}; nothing was changed, give another value"
            )
    mask = matching(change.files, where)
    if not mask.any():
        raise InputError(f"no caption of the index {change.path} meets all conditions; nothing was changed, give fewer")
    return mask
