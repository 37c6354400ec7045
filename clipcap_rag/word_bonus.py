"""A bonus for the words that a photo's neighbours have and the index at large has not."""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Self

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from clipcap_rag.caption_index import CaptionIndex

WORD = re.compile(r"[^\W_]+(?:[-'’][^\W_]+)*")
_SAMPLE = 20_000  # captions of an index whose words are counted
_KNOWN = 0.6  # of the bonus for words that the captioner was trained on; 0.5 to 0.7 wrote the best captions


@dataclass(frozen=True)
class WordBonus:
    """Nats to add to the logits of some tokens of S sequences.

    A word's first token may come anywhere, but is favoured only until it was written; each further token only
    directly behind the one before it.

    Attributes:
        tokens: [S, N].
        after: [S, N], the token that must come directly before, -1 if any may.
        nats: [S, N], 0 where there is none.
    """

    tokens: Tensor
    after: Tensor
    nats: Tensor

    def add(self, logits: Tensor, last: Tensor | None = None) -> Tensor:
        """logits [S, V] with the bonus, given the last token [S], None for the start of a caption."""
        fits = self.after < 0
        if last is not None:
            fits = fits | (self.after == last[:, None])
        return logits.scatter_add(1, self.tokens, self.nats.to(logits.dtype) * fits)

    def without(self, written: Tensor) -> Self:
        """The bonus once these tokens [S] were written."""
        spent = (self.after < 0) & (self.tokens == written[:, None])
        return type(self)(self.tokens, self.after, self.nats.masked_fill(spent, 0.0))

    def rows(self, rows: Tensor) -> Self:
        """The bonus of some of the sequences, in any number and order."""
        return type(self)(self.tokens[rows], self.after[rows], self.nats[rows])

    def to(self, device: torch.device) -> Self:
        return type(self)(self.tokens.to(device), self.after.to(device), self.nats.to(device))


def words_of(caption: str) -> dict[str, str]:
    """The words of a caption, case folded, and how each is written; a capital at the start does not count."""
    words = WORD.findall(caption)
    written = {word.casefold(): word for word in words[1:]}
    return {words[0].casefold(): words[0].lower()} | written if words else {}


@lru_cache(maxsize=8)
def word_counts(index: CaptionIndex, revision: int) -> Counter[str]:
    """How many of 20,000 captions drawn from an index, at this revision, hold each word."""
    rows = index.random_rows(_SAMPLE, np.random.default_rng(0))
    return Counter(word for caption in index.captions(rows) for word in words_of(caption))


def word_nats(
    captions: Sequence[str],
    scores: np.ndarray,
    indexes: Sequence[CaptionIndex],
    logit_scale: float,
    trained: frozenset[str] = frozenset(),
) -> dict[str, float]:
    """The bonus in nats of the words of one photo's neighbours, at strength 1.

    A neighbour weighs softmax(logit_scale x cosine), CLIP's own reading of cosines (Radford et al. 2021, arXiv
    2103.00020), so that a match far above the others counts for several. With s the weight of the neighbours that have
    a word and p the share of the indexes' captions that have it, a word that the captioner was never trained on gets
    log(s / p), since training has only ever made it less likely. Others get 0.6 s log(s / p), a part of the
    Kullback-Leibler divergence; words as frequent everywhere, such as "a" and "the", get next to nothing.

    Args:
        captions, scores: the neighbours' captions and cosines.
        trained: the words of the captioner's training captions, case folded; empty if they are not known, which counts
            as all of them.
    """
    if not captions:
        return {}
    weights = np.exp(logit_scale * (scores - scores.max()))
    support, forms = defaultdict(float), {}
    for caption, weight in zip(captions, weights / weights.sum(), strict=True):
        for word, form in words_of(caption).items():
            support[word] += float(weight)
            forms[word] = form
    counted = [word_counts(index, index.revision) for index in indexes]
    nats = {}
    for word, share in support.items():
        usual = (sum(counts[word] for counts in counted) + 1) / (_SAMPLE * len(counted) + 2)
        known = not trained or word in trained
        if share > usual:
            nats[forms[word]] = math.log(share / usual) * (_KNOWN * share if known else 1.0)
    return nats


def word_bonus(tokenizer: PreTrainedTokenizerBase, nats: Sequence[dict[str, float]], strength: float) -> WordBonus:
    """The bonus of each of B photos, from the nats of its words."""
    rows: list[dict[tuple[int, int], float]] = []
    for words in nats:
        row: dict[tuple[int, int], float] = {}
        for word, value in words.items():
            ids = tokenizer.encode(f" {word}", add_special_tokens=False)
            for after, token in zip([-1, *ids], ids, strict=False):
                row[after, token] = max(row.get((after, token), 0.0), strength * value)
        rows.append(row)
    B, N = len(rows), max(map(len, rows), default=0)
    tokens, after = torch.zeros(B, N, dtype=torch.long), torch.full((B, N), -1)
    bonus = torch.zeros(B, N)
    for place, row in enumerate(rows):
        for column, ((before, token), value) in enumerate(row.items()):
            tokens[place, column], after[place, column], bonus[place, column] = token, before, value
    return WordBonus(tokens, after, bonus)
