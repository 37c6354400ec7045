"""Feature sets: the embeddings, ids and captions of a folder of photos, encoded once and memory-mapped afterwards."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import feather

from clipcap_rag.artifact import join_arrays, read_manifest, resumable_directory, save_array, write_json, write_manifest
from clipcap_rag.embeddings import Embeddings
from clipcap_rag.encoder import Encoder
from clipcap_rag.errors import InputError
from clipcap_rag.images import photo_finder
from clipcap_rag.progress import bar
from clipcap_rag.sources import BadLines, CaptionRecord, SourceOptions, read_captions

KIND, VERSION = "feature set", 1
_TRUNK = "trunk.npy"
_CHUNK = 512  # images between two points at which a killed extraction can continue


@dataclass(frozen=True)
class FeatureSet:
    """N photos: their ids, file names, captions and raw embeddings [N, D] float16, and what could not be read.

    `folder` is where they were when they were encoded, None where that is not known; `trunk` [N, T] float16 features of
    the image tower (`image_tower`), None where they were not extracted.
    """

    path: Path
    encoder: dict
    image_ids: list[str]
    images: list[str]
    digests: list[bytes]
    captions: list[list[str]]
    embeddings: np.ndarray
    errors: list[str] = field(default_factory=list)
    folder: Path | None = None
    trunk: np.ndarray | None = None

    @property
    def name(self) -> str:
        return self.path.name

    def __len__(self) -> int:
        return len(self.image_ids)

    def unit_embeddings(self, rows: Sequence[int] | slice = slice(None)) -> np.ndarray:
        """Embeddings [len(rows), D] float32 of length 1."""
        raw = np.asarray(self.embeddings[rows], np.float32)
        return raw / np.linalg.norm(raw, axis=-1, keepdims=True)

    def encoded(self, rows: slice = slice(None)) -> Embeddings:
        """What the CLIP model made of some of the photos."""
        return Embeddings.of(self.embeddings[rows], None if self.trunk is None else self.trunk[rows])

    @classmethod
    def open(cls, path: str | Path) -> "FeatureSet":
        """Opens a feature set.

        Raises:
            InputError: it is missing, unfinished, altered or of another format version.
        """
        path = Path(path)
        manifest = read_manifest(path, "features.json", KIND, VERSION)
        images = feather.read_table(path / "images.arrow").to_pydict()
        captions: list[list[str]] = [[] for _ in images["image_id"]]
        table = feather.read_table(path / "captions.arrow").to_pydict()
        for row, caption in zip(table["image_row"], table["caption"], strict=True):
            captions[row].append(caption)
        return cls(
            path=path,
            encoder=manifest["encoder"],
            image_ids=images["image_id"],
            images=images["image"],
            digests=images["digest"],
            captions=captions,
            embeddings=np.load(path / "embeddings.npy", mmap_mode="r"),
            errors=manifest["errors"],
            folder=Path(manifest["folder"]) if manifest.get("folder") else None,
            trunk=np.load(path / _TRUNK, mmap_mode="r") if _TRUNK in manifest["files"] else None,
        )


@dataclass
class _Photo:
    image_id: str
    path: Path
    captions: list[str]


def extract_features(
    captions: Sequence[str | Path],
    images: str | Path,
    clip: str,
    out: str | Path,
    *,
    source_options: SourceOptions | None = None,
    device: str = "auto",
    dtype: str = "auto",
    batch_size: int = 32,
    workers: int = 2,
    trunk: bool = False,
    skip_bad: bool = False,
    overwrite: bool = False,
) -> FeatureSet:
    """Encodes the photos that caption files name and stores them with their captions.

    A photo that is missing or cannot be read is left out and listed in `FeatureSet.errors`. A killed run continues
    where it was.

    Args:
        captions: caption files whose records carry `image` or `image_id` (the file's stem).
        images: the folder of the photos.
        clip: CLIP model string.
        out: where the feature set is written.
        workers: processes that decode photos.
        trunk: also store features of the image tower's trunk, which takes seven times as long.
        skip_bad: count and list bad caption lines instead of stopping at the first.

    Raises:
        InputError: no usable photo, bad captions, or `out` exists.
    """
    folder, out = Path(images), Path(out)
    if not folder.is_dir():
        raise InputError(f"the image folder {folder} does not exist; give --images the folder that holds the photos")
    bad = BadLines(skip_bad)
    photos = _group(read_captions(captions, source_options or SourceOptions(), bad), folder)
    if not photos:
        raise InputError(f"no caption in {', '.join(map(str, captions))} names an image; add image or image_id to them")
    encoder = Encoder.load(clip, device, dtype)
    job = {
        "clip": encoder.clip,
        "dtype": str(encoder.dtype),
        "photos": len(photos),
        "trunk": trunk,
        "content": hashlib.sha256(
            repr([(photo.image_id, str(photo.path), photo.captions) for photo in photos]).encode()
        ).hexdigest(),
    }
    with resumable_directory(out, job, overwrite) as staging:
        _encode(photos, encoder, staging, batch_size, workers, trunk)
        _join(photos, folder, staging, encoder, bad)
    return FeatureSet.open(out)


def _group(records: Iterable[CaptionRecord], folder: Path) -> list[_Photo]:
    """One entry per photo, in order of first appearance, with all its captions."""
    photos: dict[str, _Photo] = {}
    named: dict[str, str] = {}
    find = photo_finder(folder)
    for record in records:
        if record.image is None and record.image_id is None:
            continue
        key = record.image_id or Path(record.image).stem
        if key not in photos:
            path = find(record.image, Path(record.image).stem) if record.image else find(key, key)
            photos[key], named[key] = _Photo(key, path, []), record.image
        if record.image != named[key]:
            raise InputError(
                f"{named[key]} and {record.image} share the image_id {key}; give each photo an image_id of its own"
            )
        photos[key].captions.append(record.caption)
    return list(photos.values())


def _encode(photos: list[_Photo], encoder: Encoder, staging: Path, batch_size: int, workers: int, trunk: bool) -> None:
    """Writes, chunk by chunk, the embeddings of the photos that can be read and a log of which these are."""
    with bar("photos", total=len(photos), unit="photo") as progress:
        for start in range(0, len(photos), _CHUNK):
            part, log = photos[start : start + _CHUNK], staging / f"chunk-{start:09d}.json"
            if log.is_file():
                progress.update(len(part))
                continue
            paths = [photo.path for photo in part]
            encoded = encoder.encode_image(paths, batch_size, workers, progress.update, trunk)
            kept = [row for row, error in enumerate(encoded.errors) if error is None]
            if trunk:
                save_array(log.with_suffix(f".{_TRUNK}"), encoded.embeddings.trunk[kept].astype(np.float16))
            save_array(log.with_suffix(".npy"), encoded.embeddings.raw[kept].astype(np.float16))
            write_json(
                log,
                {
                    "kept": [start + row for row in kept],
                    "digests": [encoded.digests[row].hex() for row in kept],
                    "errors": [error for error in encoded.errors if error is not None],
                },
            )


def _join(photos: list[_Photo], folder: Path, staging: Path, encoder: Encoder, bad: BadLines) -> None:
    """Makes the files of the feature set from the chunks, and removes these."""
    logs = sorted(staging.glob("chunk-*.json"))
    chunks = [json.loads(log.read_text()) for log in logs]
    kept = [photos[row] for chunk in chunks for row in chunk["kept"]]
    errors = [error for chunk in chunks for error in chunk["errors"]]
    if not kept:
        raise InputError(f"none of the {len(photos)} photos can be read; the first: {errors[0]}")
    files = {".npy": "embeddings.npy"} | ({f".{_TRUNK}": _TRUNK} if logs[0].with_suffix(f".{_TRUNK}").is_file() else {})
    for suffix, file in files.items():
        join_arrays([log.with_suffix(suffix) for log in logs], staging / file)
    for log in logs:
        log.unlink()
        for suffix in files:
            log.with_suffix(suffix).unlink()
    digests = [bytes.fromhex(digest) for chunk in chunks for digest in chunk["digests"]]
    fields = {"encoder": encoder.record(), "errors": errors, "bad_lines": bad.listed, "bad_line_count": bad.count}
    fields["folder"] = str(folder.resolve()).encode(errors="replace").decode()
    captions = [photo.captions for photo in kept]
    write_tables(
        staging, [photo.image_id for photo in kept], [photo.path.name for photo in kept], digests, captions, fields
    )


def write_tables(
    staging: Path,
    image_ids: list[str],
    images: list[str],
    digests: list[bytes],
    captions: list[list[str]],
    fields: dict[str, Any],
) -> None:
    """Completes a feature set that so far is `embeddings.npy`; the lists have an entry per row of it.

    Args:
        fields: what the manifest says: `encoder`, `errors`, `bad_lines`, `bad_line_count`; `folder` if it is known.
    """
    photos = pa.table({"image_id": image_ids, "image": images, "digest": digests})
    texts = pa.table(
        {
            "image_row": pa.array([row for row, own in enumerate(captions) for _ in own], pa.int32()),
            "caption": [caption for own in captions for caption in own],
        }
    )
    feather.write_feather(photos, staging / "images.arrow", compression="uncompressed")
    feather.write_feather(texts, staging / "captions.arrow", compression="uncompressed")
    write_manifest(staging, "features.json", KIND, VERSION, fields)
