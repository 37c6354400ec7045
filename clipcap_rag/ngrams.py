"""Phrases mined from text: frequent words, and pairs and triples that occur together more often than by chance."""

import heapq
import math
import re
import tempfile
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields
from itertools import groupby
from typing import IO

from clipcap_rag.config import Config, option
from clipcap_rag.errors import InputError
from clipcap_rag.progress import track
from clipcap_rag.sources import CaptionRecord, normalize_caption

TABLE = 1_000_000  # different phrases that are counted in memory, about 200 bytes each
_RUNS = 32  # sorted files that are merged, and open, at a time
_LONGEST = 5
_EDGE = re.compile(r"(?<!\w)['’-]+|['’-]+(?!\w)")  # an apostrophe or hyphen belongs to a word only within it


@dataclass(frozen=True)
class PhraseOptions(Config):
    """Which phrases of a text become entries of an index."""

    ngrams: str | None = option(None, "index phrases mined from the texts, of so many words each: such as 1,2,3")
    top: int = option(10_000, "phrases kept of each length: single words by frequency, longer ones by PMI")
    min_count: int = option(3, "times that a phrase has to occur")
    fold_case: bool = option(False, "count phrases in lower case")
    lines: bool = option(False, "index the texts, too; a phrase that is a text of its own stands once")

    def __post_init__(self) -> None:
        super().__post_init__()
        default = all(getattr(self, field.name) == field.default for field in fields(self))
        if self.ngrams is None and not default:
            raise InputError("top, min_count, fold_case and lines are for phrases; say of how many words with --ngrams")
        parts = self.ngrams.split(",") if self.ngrams is not None else []
        if not all(part.strip() in {str(length) for length in range(1, _LONGEST + 1)} for part in parts):
            raise InputError(f"ngrams is {self.ngrams!r}; give numbers of words from 1 to {_LONGEST}, such as 1,2,3")
        if self.top < 1 or self.min_count < 1:
            raise InputError(f"top is {self.top} and min_count {self.min_count}; both must be at least 1")

    @property
    def lengths(self) -> list[int]:
        """Numbers of words, ascending; empty where no phrase is wanted."""
        return sorted({int(part) for part in self.ngrams.split(",")}) if self.ngrams is not None else []

    @property
    def keeps_lines(self) -> bool:
        """Whether the texts themselves become entries."""
        return self.lines or not self.lengths


def mine_phrases(texts: Callable[[], Iterable[CaptionRecord]], options: PhraseOptions) -> list[CaptionRecord]:
    """The best phrases of all texts, the short ones first, best first among phrases of one length.

    A phrase is a run of words that stand side by side in one text with nothing but spaces between them, so none spans
    two texts or sentences or holds punctuation. Counts are exact; memory is bounded by TABLE, the words that occur at
    least `min_count` times and the phrases that are kept: fuller tables go to sorted temporary files which are merged.
    Single words are ranked by frequency; phrases of n words by pointwise mutual information, log2 of p(phrase) over
    the product of p(word) (Church and Hanks 1990; for three words as NLTK and clip-grams do), then by frequency.

    Args:
        texts: gives the texts, each call from the start; called twice where the texts become entries, too.

    Returns:
        Records whose meta says `words`, `count` and, for two words and more, `pmi`.
    """
    if not options.lengths:
        return []
    counts = PhraseCounts(set(options.lengths) | {1})
    for record in track(texts(), "counting phrases", unit="text"):
        counts.add(record.caption.lower() if options.fold_case else record.caption)
    mined = list(_best(counts, options))
    if not options.keeps_lines:
        return mined
    wanted = {normalize_caption(record.caption) for record in mined}
    lines = {line for record in texts() if (line := normalize_caption(record.caption)) in wanted}
    return [record for record in mined if normalize_caption(record.caption) not in lines]


def _best(counts: "PhraseCounts", options: PhraseOptions) -> Iterator[CaptionRecord]:
    frequent: dict[str, int] = {}

    def scored(words: int, group: Iterator[tuple[int, str, int]]) -> Iterator[tuple[float, int, str]]:
        """(-score, -count, phrase), which sorts from best to worst."""
        for _, phrase, count in group:
            if count >= options.min_count:
                if words == 1:
                    frequent[phrase] = count
                yield (-count if words == 1 else -_pmi(phrase, count, frequent, counts.words)), -count, phrase

    for words, group in groupby(counts, key=lambda entry: entry[0]):
        best = heapq.nsmallest(options.top, scored(words, group))
        if words in options.lengths:
            for score, count, phrase in best:
                meta = {"words": str(words), "count": str(-count)} | ({} if words == 1 else {"pmi": f"{-score:.3f}"})
                yield CaptionRecord(phrase, source="ngrams", meta=meta)


def _pmi(phrase: str, count: int, frequent: dict[str, int], words: int) -> float:
    """Each word of a phrase occurs at least as often as the phrase, so it is among the frequent ones."""
    return math.log2(count / words) - sum(math.log2(frequent[word] / words) for word in phrase.split(" "))


class _Breaks(dict):
    """A table for str.translate that turns all punctuation and symbols but apostrophes and hyphens into line ends."""

    def __missing__(self, code: int) -> int:
        character = chr(code)
        self[code] = ord("\n") if unicodedata.category(character)[0] in "PS" and character not in "'’-" else code
        return self[code]


_BREAKS = _Breaks()


def word_runs(text: str) -> Iterator[list[str]]:
    """The words of a text, in runs between which there is punctuation."""
    for run in _EDGE.sub("\n", text.translate(_BREAKS)).split("\n"):
        if words := run.split():
            yield words


class PhraseCounts:
    """Exact counts of the phrases of some lengths; what does not fit in memory lies in sorted temporary files.

    Iterating gives (number of words, phrase, count) in sorted order, once.

    Attributes:
        words: words that were added.
    """

    def __init__(self, lengths: Iterable[int]):
        self.lengths, self.words = sorted(lengths), 0
        self._table: Counter[tuple[int, str]] = Counter()
        self._runs: list[IO[str]] = []

    def add(self, text: str) -> None:
        """Counts the phrases of a text."""
        for words in word_runs(text):
            self.words += len(words)
            for length in self.lengths:
                self._table.update(
                    (length, " ".join(words[start : start + length])) for start in range(len(words) - length + 1)
                )
        if len(self._table) >= TABLE:
            self._spill((length, phrase, count) for (length, phrase), count in sorted(self._table.items()))
            self._table.clear()
            if len(self._runs) == _RUNS:
                merged, self._runs = _merged([_read(run) for run in self._runs]), []
                self._spill(merged)

    def __iter__(self) -> Iterator[tuple[int, str, int]]:
        last = ((length, phrase, count) for (length, phrase), count in sorted(self._table.items()))
        return _merged([*(_read(run) for run in self._runs), last])

    def _spill(self, entries: Iterable[tuple[int, str, int]]) -> None:
        run = tempfile.TemporaryFile("w+", encoding="utf-8", newline="\n")  # noqa: SIM115 (nameless: gone with us)
        run.writelines(f"{length}\t{phrase}\t{count}\n" for length, phrase, count in entries)
        self._runs.append(run)


def _read(run: IO[str]) -> Iterator[tuple[int, str, int]]:
    run.seek(0)
    for line in run:
        length, phrase, count = line.split("\t")
        yield int(length), phrase, int(count)


def _merged(runs: list[Iterator[tuple[int, str, int]]]) -> Iterator[tuple[int, str, int]]:
    for (length, phrase), group in groupby(heapq.merge(*runs), key=lambda entry: entry[:2]):
        yield length, phrase, sum(count for _, _, count in group)
