"""The feature pickles of ClipCap and clip-text-decoder as feature sets."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from clipcap_rag.artifact import new_directory, refuse_existing, save_array
from clipcap_rag.encoder import Encoder
from clipcap_rag.errors import InputError
from clipcap_rag.features import FeatureSet, write_tables
from clipcap_rag.progress import say, track
from clipcap_rag.safe_pickle import read_pickle
from clipcap_rag.sources import BadLines, caption_records

_SAME = 0.999  # smallest cosine of two rows that are one photo
_PAIRS, _FEWEST = 256, 32  # captions that are compared with their rows, and fewest that say anything
_BLOCK = 8192  # rows handled at once


@dataclass
class _Photo:
    """The row of a photo and its captions."""

    row: int
    captions: list[str]


def import_pickle(
    file: str | Path,
    clip: str,
    out: str | Path,
    *,
    device: str = "auto",
    dtype: str = "auto",
    skip_bad: bool = False,
    overwrite: bool = False,
) -> FeatureSet:
    """Makes a feature set of a pickle of ClipCap (github.com/rmokady/CLIP_prefix_caption) or clip-text-decoder.

    ClipCap's is `{"clip_embedding": tensor [N, D], "captions": [{"image_id", "caption", "clip_embedding": row}, ...]}`,
    clip-text-decoder's a list of (array [1, D], captions). Captions with one image_id become one photo; those without
    take their row for one. Rows that no caption names are left out, with a message.

    Checked are: that the rows are of the width of `clip`, finite and not zero; that all rows of an image_id agree and
    no row belongs to two; and that the captions do not count their rows from 0 again, as those of ClipCap's
    Conceptual Captions script do. Without the photos nothing proves that `clip` made the rows. But if it did, captions
    lie nearer to their own rows than to others; where they do not, a message says so. Not checked are that the rows
    are as the tower gave them, not scaled to length 1, and that they belong to their image_id.

    `images` holds the image_ids, as a pickle names no files, and what is random about a photo depends on its image_id.

    Args:
        clip: the CLIP model that made the rows.
        skip_bad: count and list bad captions instead of stopping at the first.

    Raises:
        InputError: the pickle is damaged, is not read (`safe_pickle`), fails a check, or `out` exists.
    """
    file, out = Path(file), Path(out)
    refuse_existing(out, overwrite)
    matrix, entries = _contents(read_pickle(file), file)
    _refuse_restart([entry["clip_embedding"] for entry in entries], len(matrix), file)
    bad = BadLines(skip_bad)
    photos = _photos(entries, matrix, file, bad)
    encoder = Encoder.load(clip, device, dtype)
    if encoder.dim != matrix.shape[1]:
        raise InputError(
            f"the embeddings of {file} are {matrix.shape[1]} wide and those of {encoder.clip} {encoder.dim}; "
            "name the CLIP model that made them with --clip"
        )
    embeddings = matrix[[photo.row for photo in photos.values()]]
    captions = [photo.captions for photo in photos.values()]
    _doubt(embeddings, captions, encoder, file)
    with new_directory(out, overwrite) as staging:
        save_array(staging / "embeddings.npy", embeddings)
        digests = [hashlib.blake2b(image_id.encode(), digest_size=16).digest() for image_id in photos]
        fields = {"encoder": encoder.record(), "errors": [], "bad_lines": bad.listed, "bad_line_count": bad.count}
        write_tables(staging, list(photos), list(photos), digests, captions, fields)
    return FeatureSet.open(out)


def _contents(content: Any, file: Path) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """The embeddings [N, D] float16, all usable, and the entries: a row, `clip_embedding`, and unchecked captions."""
    if isinstance(content, dict) and {"clip_embedding", "captions"} <= content.keys():
        matrix, entries = content["clip_embedding"], content["captions"]
        if isinstance(entries, list) and all(isinstance(entry, dict) for entry in entries):
            entries = [entry | {"captions": entry.get("caption")} for entry in entries]
    elif isinstance(content, list) and all(isinstance(item, tuple | list) and len(item) == 2 for item in content):
        vectors = [np.ravel(vector) for vector, _ in content if isinstance(vector, np.ndarray | torch.Tensor)]
        matrix = np.stack(vectors) if len({len(vector) for vector in vectors}) == 1 else None
        entries = [{"clip_embedding": row, "captions": captions} for row, (_, captions) in enumerate(content)]
    else:
        raise InputError(
            f"{file} holds neither ClipCap's dictionary of clip_embedding and captions nor clip-text-decoder's list of "
            "(embedding, captions); give the file that parse_coco.py or parse_conceptual.py wrote"
        )
    matrix = _half(matrix, file)
    if not isinstance(entries, list) or not entries:
        raise InputError(f"{file} holds no list of captions; make it again from the photos")
    for number, entry in enumerate(entries):
        row = entry.get("clip_embedding") if isinstance(entry, dict) else None
        if type(row) is not int or not 0 <= row < len(matrix):
            raise InputError(
                f"{file}: captions[{number}] names no row from 0 to {len(matrix) - 1} as its clip_embedding; "
                "make the file again from the photos"
            )
    return matrix, entries


def _half(matrix: Any, file: Path) -> np.ndarray:
    """The embeddings [N, D] as float16, if they are embeddings, and none is zero or not finite."""
    if isinstance(matrix, torch.Tensor) and matrix.layout is torch.strided and matrix.is_contiguous():
        matrix = (matrix.float() if matrix.dtype is torch.bfloat16 else matrix.detach()).numpy()
    if not isinstance(matrix, np.ndarray) or matrix.ndim != 2 or matrix.dtype.kind != "f" or not matrix.size:
        raise InputError(f"{file} holds no matrix of embeddings, one row per image; make it again from the photos")
    with np.errstate(over="ignore"):
        half = matrix.astype(np.float16, copy=False)
    for start in range(0, len(half), _BLOCK):
        block = half[start : start + _BLOCK]
        usable = np.isfinite(block).all(axis=1) & block.any(axis=1)
        if not usable.all():
            row = start + int(np.argmin(usable))
            raise InputError(f"row {row} of {file} is zero or not finite; make the file again from the photos")
    return half


def _refuse_restart(rows: list[int], count: int, file: Path) -> None:
    """Raises InputError if captions and rows were added in step, but the captions' row numbers start again at 0.

    That is what ClipCap's parse_conceptual.py writes for the training photos: it counts from 0 again but keeps the
    rows and captions of the validation photos, so that there are as many rows as captions and the last are unused. A
    right file with more captions than rows, or all of whose rows are in use, never looks like that.
    """
    rows = np.array(rows)
    starts = np.flatnonzero(rows == 0)
    if len(rows) != count or len(starts) < 2 or starts[0]:
        return
    counted = np.arange(count) - np.repeat(starts, np.diff([*starts, count]))
    if np.array_equal(rows, counted):
        raise InputError(
            f"{file} is misaligned: its captions count their rows from 0 again at captions[{starts[1]}], as those of "
            "ClipCap's parse_conceptual.py do, so that captions stand with other photos; encode the photos again with "
            "clipcap-rag extract"
        )


def _photos(entries: list[dict[str, Any]], matrix: np.ndarray, file: Path, bad: BadLines) -> dict[str, _Photo]:
    """The photos by image_id, in order of first appearance."""
    photos: dict[str, _Photo] = {}
    owners: dict[int, str] = {}
    for number, entry in enumerate(track(entries, "captions", total=len(entries), unit="caption")):
        row = entry["clip_embedding"]
        values = {"captions": entry["captions"], "image_id": entry.get("image_id")}
        for record in caption_records(f"{file}: captions[{number}]", values, file.stem, bad):
            image_id = record.image_id or f"row-{row}"
            if owners.setdefault(row, image_id) != image_id:
                raise InputError(
                    f"{file} is misaligned: row {row} belongs to the images {owners[row]} and {image_id}; encode the "
                    "photos again with clipcap-rag extract"
                )
            photos.setdefault(image_id, _Photo(row, [])).captions.append(record.caption)
    if not photos:
        raise InputError(f"{file} holds no usable caption, the last fault: {bad.last}; make it again from the photos")
    _check_agreement(owners, photos, matrix, file)
    if bad.count:
        say(f"{bad.count} captions of {file} are left out, the last: {bad.last}")
    if len(owners) < len(matrix):
        say(f"{len(matrix) - len(owners)} of the {len(matrix)} rows of {file} have no caption and are left out")
    return photos


def _check_agreement(owners: dict[int, str], photos: dict[str, _Photo], matrix: np.ndarray, file: Path) -> None:
    """Raises InputError if two rows of one image_id are not the same embedding."""
    pairs = np.array([(row, photos[image_id].row) for row, image_id in owners.items()])
    pairs = pairs[pairs[:, 0] != pairs[:, 1]]
    for start in range(0, len(pairs), _BLOCK):
        first, second = (_unit(matrix[rows]) for rows in pairs[start : start + _BLOCK].T)
        cosines = (first * second).sum(axis=1)
        if cosines.min() < _SAME:
            place = int(cosines.argmin())
            row, other = pairs[start + place].tolist()
            raise InputError(
                f"{file} is misaligned: rows {other} and {row} both belong to image {owners[row]} and differ (cosine "
                f"{cosines[place]:.2f}); encode the photos again with clipcap-rag extract"
            )


def _unit(raw: np.ndarray) -> np.ndarray:
    raw = np.asarray(raw, np.float32)
    return raw / np.linalg.norm(raw, axis=1, keepdims=True)


def _doubt(embeddings: np.ndarray, captions: list[list[str]], encoder: Encoder, file: Path) -> None:
    """Says so if captions are no nearer to their own rows than to others, which they are in the space of one CLIP."""
    if len(captions) < _FEWEST:
        return
    chosen = np.unique(np.linspace(0, len(captions) - 1, _PAIRS).astype(int))
    cosines = _unit(embeddings[chosen]) @ encoder.encode_text([captions[photo][0] for photo in chosen]).vectors.T
    gains = np.diag(cosines) - (cosines.mean(axis=0) + cosines.mean(axis=1)) / 2
    if gains.mean() < 3 * gains.std() / np.sqrt(len(gains)):
        say(
            f"warning: to {encoder.clip} the captions of {file} are no nearer to their own rows than to others; "
            "is it the CLIP model that made them?"
        )
