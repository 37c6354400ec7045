"""Words and sentences that are never retrieved, one to a line of a file."""

from collections.abc import Iterable
from pathlib import Path
from typing import Self

from clipcap_rag.errors import InputError
from clipcap_rag.lines import BadLines, read_lines
from clipcap_rag.sources import normalize_caption


class DenyList:
    """Refuses each caption that contains the words of an entry, whole and in order; case and marks do not count."""

    def __init__(self, entries: Iterable[str] = ()):
        self._entries = {tuple(normalize_caption(entry).split()) for entry in entries} - {()}
        self._lengths = sorted({len(entry) for entry in self._entries})

    @classmethod
    def read(cls, file: str | Path) -> Self:
        """Blank lines do not count.

        Raises:
            InputError: the file cannot be read, is not UTF-8, or holds no word.
        """
        denied = cls(text for _, text in read_lines(Path(file), BadLines()))
        if not denied._entries:
            raise InputError(f"{file} holds no word; give a file with a word, a phrase or a caption on each line")
        return denied

    def refuses(self, normalized: str) -> bool:
        """Whether a caption, as `normalize_caption` leaves it, must not be retrieved."""
        words = normalized.split()
        return any(
            tuple(words[start : start + length]) in self._entries
            for length in self._lengths
            for start in range(len(words) - length + 1)
        )
