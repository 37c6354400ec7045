"""Whether a caption index still is what it says: whole files, unit vectors, and a CLIP model that gives them again."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from clipcap_rag.encoder import Encoder, check_encoder
from clipcap_rag.errors import InputError
from clipcap_rag.index_names import resolve_index
from clipcap_rag.index_store import IndexFiles, open_files

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
    """Checks an index from its files to its meaning.

    Args:
        clip: CLIP model string, where the one named in the index has moved.
        sample: captions, evenly spaced, that are encoded again.

    Raises:
        InputError: a file is missing or altered, a vector is not of unit length, or the CLIP model gives other vectors.
    """
    files = open_files(resolve_index(name_or_path))
    _check_lengths(files)
    record = files.manifest["encoder"]
    encoder = Encoder.load(clip or record["clip"], device, dtype, base=files.path)
    check_encoder(record, encoder, f"the index {files.path}")
    live = np.flatnonzero(files.live)
    rows = live[np.unique(np.linspace(0, len(live) - 1, min(sample, len(live))).astype(np.int64))]
    captions, stored = files.captions(rows), files.embeddings(rows)
    cosines = np.einsum("nd,nd->n", stored, encoder.encode_text(captions).vectors)
    worst = int(cosines.argmin())
    if cosines[worst] < _SAME_CAPTION:
        raise InputError(
            f"row {rows[worst]} of {files.path} ({captions[worst]!r}) has a vector that {encoder.clip} does not give "
            f"(cosine {cosines[worst]:.3f}); build the index again"
        )
    return IndexCheck(files.path, files.rows, len(rows), float(cosines[worst]))


def _check_lengths(files: IndexFiles) -> None:
    for start, block in files.blocks(_BLOCK):
        lengths = np.linalg.norm(block.astype(np.float32), axis=1)
        wrong = np.flatnonzero(~(np.abs(lengths - 1) < _LENGTH_TOLERANCE))  # catches NaN too
        if len(wrong):
            raise InputError(
                f"row {start + wrong[0]} of {files.path} has a vector of length {lengths[wrong[0]]:.3f} instead of 1; "
                "build the index again"
            )
