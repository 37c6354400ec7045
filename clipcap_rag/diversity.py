"""How varied captions are, how long, and how many are copies of what was retrieved."""

from collections.abc import Sequence

from clipcap_rag.bootstrap import Measure, Variety, mean
from clipcap_rag.index_names import resolve_index
from clipcap_rag.index_store import open_files
from clipcap_rag.sources import normalize_caption


def variety(captions: Sequence[str]) -> dict[str, Measure | Variety]:
    """distinct-1 and distinct-2 (Li et al. 2016), the number of different words, and the mean number of words.

    Args:
        captions: words joined by spaces.
    """
    words = [caption.split() for caption in captions]
    pairs = [list(zip(line, line[1:], strict=False)) for line in words]
    return {
        "distinct-1": Variety(words, relative=True),
        "distinct-2": Variety(pairs, relative=True),
        "vocabulary": Variety(words, relative=False),
        "length": mean([len(line) for line in words]),
    }


def copied_neighbors(captions: Sequence[str], neighbors: Sequence[Sequence[str]]) -> dict[str, Measure]:
    """The share of captions that equal one of their neighbours but for case and punctuation; empty ones do not."""
    copies = []
    for caption, near in zip(captions, neighbors, strict=True):
        text = normalize_caption(caption)
        copies.append(bool(text) and text in map(normalize_caption, near))
    return {"copied-neighbor": mean(copies)}


class IndexCopies:
    """The share of captions that equal any entry of some indexes but for case and punctuation."""

    def __init__(self, indexes: Sequence[str]):
        self.files = [open_files(resolve_index(name)) for name in indexes]

    def __call__(self, references: Sequence[Sequence[str]], captions: Sequence[str]) -> dict[str, Measure]:
        texts = [normalize_caption(caption) for caption in captions]
        wanted, found = set(texts) - {""}, set()
        for files in self.files:
            for start, entries in files.column_batches("caption"):
                live = files.live[start : start + len(entries)]
                found |= wanted & {normalize_caption(entry) for entry, kept in zip(entries, live, strict=True) if kept}
        return {"copied-index": mean([text in found for text in texts])}
