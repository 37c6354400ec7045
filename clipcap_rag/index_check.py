"""Whether a caption index still is what it says: whole files, unit vectors, and a CLIP model that gives them again."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from clipcap_rag.artifact import check_whole_files
from clipcap_rag.caption_template import fill_template, template_of
from clipcap_rag.errors import InputError
from clipcap_rag.index_names import resolve_index
from clipcap_rag.index_store import KIND, IndexFiles, open_files

_BLOCK = 65536  # rows read at a time
_LENGTH_TOLERANCE = 0.01  # float16 components of a unit vector are off by less
_SAME_CAPTION = 0.99  # cosine; bfloat16 towers pass


@dataclass(frozen=True)
class IndexCheck:
    """A sound index: its rows, how many captions were encoded again, and the smallest cosine of old and new."""

    path: Path
    rows: int
    encoded: int
    smallest_cosine: float


def verify_index(
    name_or_path: str | Path, clip: str | None = None, device: str = "auto", dtype: str = "auto", sample: int = 256
) -> IndexCheck:
    """Checks an index from its files, every byte of them, to its meaning.

    Args:
        clip: CLIP model string, where the one named in the index has moved.
        sample: captions, evenly spaced, that are encoded again; 0 loads no model.

    Raises:
        InputError: a file is missing or altered, a vector is not of unit length, an id stands twice or is yet to be
            given, a search structure does not find what is stored, or the CLIP model gives other vectors.
    """
    files = open_files(resolve_index(name_or_path))
    check_whole_files(files.path, files.manifest["files"], KIND)
    _check_lengths(files.path, files.blocks(_BLOCK))
    _check_images(files)
    _check_ids(files)
    live = np.flatnonzero(files.live)
    if any(segment.entry["search"] for segment in files.segments):
        _check_search(files, live[:: max(1, len(live) // 64)])
    rows = live[np.unique(np.linspace(0, len(live) - 1, min(sample, len(live))).astype(np.int64))]
    worst = _encode_again(files, rows, clip, device, dtype) if len(rows) else 1.0
    return IndexCheck(files.path, files.rows, len(rows), worst)


def _encode_again(files: IndexFiles, rows: np.ndarray, clip: str | None, device: str, dtype: str) -> float:
    """The smallest cosine of the stored vectors of rows and those that the CLIP model gives now."""
    from clipcap_rag.encoder import Encoder, check_encoder

    record = files.manifest["encoder"]
    encoder = Encoder.load(clip or record["clip"], device, dtype, base=files.path)
    check_encoder(record, encoder, f"the index {files.path}")
    captions, stored = files.captions(rows), files.embeddings(rows)
    texts = fill_template(template_of(files.manifest), captions)
    cosines = np.einsum("nd,nd->n", stored, encoder.encode_text(texts).vectors)
    worst = int(cosines.argmin())
    if cosines[worst] < _SAME_CAPTION:
        raise InputError(
            f"row {rows[worst]} of {files.path} ({captions[worst]!r}) has a vector that {encoder.clip} does not give "
            f"(cosine {cosines[worst]:.3f}); build the index again"
        )
    return float(cosines[worst])


def _check_ids(files: IndexFiles) -> None:
    ids = pa.chunked_array([ids for _, ids in files.columns("caption_id")], pa.string()).filter(pa.array(files.live))
    counts = pc.value_counts(ids)
    for twice in counts.filter(pc.greater(counts.field("counts"), 1))[:1].to_pylist():
        raise InputError(
            f"{twice['counts']} captions of {files.path} have the caption_id {twice['values']!r}; build the index again"
        )
    known = files.manifest.get("next_caption_id")
    for caption_id in counts.field("values").to_pylist() if known is not None else ():
        if caption_id.isdecimal() and int(caption_id[:18]) >= known:
            raise InputError(
                f"{files.path} holds the caption_id {caption_id!r} and would give it again; build the index again"
            )


def _check_search(files: IndexFiles, rows: np.ndarray) -> None:
    from clipcap_rag.caption_index import CaptionIndex

    index = CaptionIndex(files, "cpu")
    scores = index.search(files.embeddings(rows), 1)[0][:, 0]
    lost = rows[scores < 1 - _LENGTH_TOLERANCE]
    if len(lost) > len(rows) // 2:
        raise InputError(
            f"the search structure of {files.path} does not find its own captions (row {lost[0]} is one); "
            "make it again with index compact"
        )


def _check_images(files: IndexFiles) -> None:
    if files.images is None:
        return
    file, images = files.path / files.manifest["images"], files.images
    _check_lengths(file, ((start, images.vectors[start : start + _BLOCK]) for start in range(0, len(images), _BLOCK)))
    if len(pc.unique(images.ids)) < len(images):
        raise InputError(f"{file} holds a photo twice; run index add-images again")


def _check_lengths(path: Path, blocks: Iterable[tuple[int, np.ndarray]]) -> None:
    for start, block in blocks:
        lengths = np.linalg.norm(block.astype(np.float32), axis=1)
        wrong = np.flatnonzero(~(np.abs(lengths - 1) < _LENGTH_TOLERANCE))  # catches NaN too
        if len(wrong):
            raise InputError(
                f"row {start + wrong[0]} of {path} has a vector of length {lengths[wrong[0]]:.3f} instead of 1; "
                "build the index again"
            )
