"""index.json: how it is written, and the check of every field, for an index may come from anyone."""

import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from clipcap_rag.artifact import file_record, read_unchecked, write_manifest
from clipcap_rag.errors import InputError
from clipcap_rag.index_segment import CAPTIONS, EMBEDDINGS, SEARCH

KIND, VERSION, MANIFEST = "caption index", 1, "index.json"
_LARGEST = 2**48  # rows, and what else is counted; keeps every sum of them far from overflow
_WIDEST = 2**20
_REQUIRED = ("revision", "rows", "segments", "tombstones", "provenance", "encoder", "licence", "files")


def write_index_manifest(
    folder: Path,
    *,
    revision: int,
    encoder: dict[str, Any],
    segments: Sequence[dict[str, Any]],
    tombstones: str | None = None,
    images: str | None = None,
    next_caption_id: int | None = None,
    provenance: dict[str, Any],
    licence: str | None,
    recorded: dict[str, dict[str, Any]] | None = None,
) -> None:
    """Writes index.json, which makes the files of `folder` an index.

    Args:
        segments: per segment `name`, `rows` and `search` (what built search.faiss, or None for exact search).
        tombstones: name of a .npy file in `folder` with the rows that were removed, int64 ascending.
        images: name of an Arrow file in `folder` with the embeddings of photos.
        next_caption_id: above the number of every caption_id that was ever given; left out, the number of rows.
        encoder: the record of the encoder with `clip`, `dim` and `probes`.
        provenance: what the index was made from.
        licence: the terms of the captions, where they are known.
        recorded: the records of the manifest that is replaced, so that its files are not read again; left out, every
            file in `folder` is recorded.
    """
    rows = sum(segment["rows"] for segment in segments)
    fields = {
        "revision": revision,
        "metric": "inner product of unit vectors (cosine)",
        "rows": rows,
        "segments": list(segments),
        "tombstones": tombstones,
        "images": images,
        "next_caption_id": rows if next_caption_id is None else next_caption_id,
        "licence": licence,
        "provenance": provenance,
        "encoder": encoder,
    }
    files = None
    if recorded is not None:  # what is no part of an index proper, such as a CLIP model that lies in it, stays
        files = {
            name: record for name, record in recorded.items() if not re.match("segments/|tombstones-|images-", name)
        }
        for name in index_files(segments, tombstones, images):
            files[name] = recorded.get(name) or file_record(folder / name)
    write_manifest(folder, MANIFEST, KIND, VERSION, fields, files)


def index_files(segments: Sequence[dict[str, Any]], *others: str | None) -> list[str]:
    """Names of the files that an index consists of: those of its segments, and the others that there are."""
    return [name for segment in segments for name in segment_files(segment)] + [name for name in others if name]


def segment_files(segment: dict[str, Any]) -> list[str]:
    """Names of the files of one segment."""
    files = (CAPTIONS, EMBEDDINGS, *([SEARCH] if segment["search"] else []))
    return [f"segments/{segment['name']}/{file}" for file in files]


def read_index_manifest(path: Path) -> dict[str, Any]:
    """Reads and checks index.json alone, not the files that it names.

    Raises:
        InputError: it is missing, of another kind or version, or says what cannot be.
    """
    manifest = read_unchecked(path, MANIFEST, KIND, VERSION)
    _check(path / MANIFEST, manifest)
    needed = index_files(manifest["segments"], manifest["tombstones"], manifest.get("images"))
    files = manifest["files"] if isinstance(manifest["files"], dict) else {}
    unrecorded = [file for file in needed if file not in files]
    if unrecorded:
        raise InputError(
            f"{path / MANIFEST} has no record of {', '.join(unrecorded)[:300]}; copy the index again or make it again"
        )
    return manifest


def _check(file: Path, manifest: dict[str, Any]) -> None:
    """Makes sure that every field is there, of its type and in its range, and that names stay inside the folder."""
    missing = [field for field in _REQUIRED if field not in manifest]
    if missing:
        raise InputError(f"{file} lacks {', '.join(missing)}; copy the index again or make it again")
    for what, value, fits in _claims(manifest):
        if not fits(value):
            raise InputError(
                f"{file} says {what} is {repr(value)[:60]}, which cannot be; copy the index again or make it again"
            )


def _claims(manifest: dict[str, Any]) -> Iterable[tuple[str, Any, Callable[[Any], bool]]]:
    """What is said, and the test that it has to pass; a later one may rely on those before it."""
    yield "revision", manifest["revision"], _count
    yield "tombstones", manifest["tombstones"], _optional(_matches(r"tombstones-\d{1,20}\.npy"))
    yield "images", manifest.get("images"), _optional(_matches(r"images-\d{1,20}\.arrow"))
    yield "licence", manifest["licence"], _optional(_is(str))
    yield "provenance", manifest["provenance"], _is(dict)
    yield "next_caption_id", manifest.get("next_caption_id", 0), _count
    yield "encoder", manifest["encoder"], _is(dict)
    yield "clip", manifest["encoder"].get("clip"), _is(str)
    yield "dim", manifest["encoder"].get("dim"), lambda value: _count(value) and 1 <= value <= _WIDEST
    yield "segments", manifest["segments"], _is(list)
    for segment in manifest["segments"]:
        yield "a segment", segment, _is(dict)
        yield "name", segment.get("name"), _matches(r"[\w-]{1,60}")
        yield "rows", segment.get("rows"), _count
        yield "search", segment.get("search", 0), _optional(_is(dict))
    names = [segment["name"] for segment in manifest["segments"]]
    yield "segments", names, lambda value: len(set(value)) == len(value)
    total = sum(segment["rows"] for segment in manifest["segments"])
    yield "rows", manifest["rows"], lambda value: _count(value) and value == total


def _count(value: Any) -> bool:
    return type(value) is int and 0 <= value < _LARGEST


def _is(kind: type) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, kind)


def _matches(pattern: str) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, str) and re.fullmatch(pattern, value) is not None


def _optional(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or fits(value)
