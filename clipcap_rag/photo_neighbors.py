"""The nearest captions of every photo of a feature set, worked out once and kept beside it."""

import numpy as np

from clipcap_rag.artifact import read_json, save_array, write_json
from clipcap_rag.caption_index import CaptionIndex
from clipcap_rag.features import FeatureSet
from clipcap_rag.progress import bar, say
from clipcap_rag.retrievable import Exclusion
from clipcap_rag.retriever import Retriever


def stored_neighbors(features: FeatureSet, index: CaptionIndex, k: int) -> np.ndarray:
    """Rows [N, k] int64 of each photo's nearest captions, its own excluded; -1 where there are fewer.

    They are computed once and kept beside the features, stamped with the index's revision.
    """
    file = features.path / f"neighbors-{index.name}.npy"
    stamp = file.with_suffix(".json")
    made_from = {"index": str(index.path.resolve()), "revision": index.revision, "rows": len(index), "neighbors": k}
    if stamp.is_file() and file.is_file() and read_json(stamp, "neighbour stamp") == made_from:
        return np.load(file, mmap_mode="r")
    rows = nearest_rows(features, index, k)
    try:
        stamp.unlink(missing_ok=True)
        save_array(file, rows)
        write_json(stamp, made_from)
    except OSError as error:
        say(f"neighbours of {features.path} are not kept for the next run ({error.strerror})")
    return rows


def nearest_rows(features: FeatureSet, index: CaptionIndex, k: int) -> np.ndarray:
    """Rows [N, k] int64 of each photo's nearest captions, its own excluded; -1 where there are fewer."""
    retriever, parts = Retriever([index]), []
    exclusions = [Exclusion.of(*photo) for photo in zip(features.image_ids, features.captions, strict=True)]
    with bar(f"neighbours in {index.name}", total=len(features), unit="photo") as progress:
        for start in range(0, len(features), 256):
            part = slice(start, start + 256)
            parts.append(retriever.search(features.unit_embeddings(part), k, exclusions[part]).rows)
            progress.update(len(parts[-1]))
    return np.concatenate(parts)
