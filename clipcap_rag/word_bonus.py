"""A bonus for the words and pairs of tokens that a photo's neighbours have and the index at large has not."""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise, zip_longest
from typing import Self

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from clipcap_rag.caption_index import CaptionIndex

WORD = re.compile(r"[^\W_]+(?:[-'’][^\W_]+)*")
_SAMPLE = 20_000  # captions of an index whose words are counted
_PAIR_SAMPLE = 5_000  # likewise, for pairs of tokens
_KNOWN = 0.6  # of s log(s / p) for words that the captioner was trained on
_PAIRS = 0.8  # likewise for pairs of tokens; 0.4 to 1.2 with 0.4 to 1 for words wrote captions as good


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

    @torch.no_grad()
    def along(self, tokens: Tensor, vocabulary: int) -> Tensor:
        """What writing the tokens [S, T] left of the bonus for each of them: [S, T, V]."""
        left, steps = self, []
        for step in range(tokens.shape[1]):
            last = tokens[:, step - 1] if step else None
            left = left if last is None else left.without(last)
            steps.append(left.add(self.nats.new_zeros(len(tokens), vocabulary), last))
        return torch.stack(steps, dim=1)

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


def match_weights(scores: np.ndarray) -> np.ndarray:
    """How much each of K neighbours counts, 1 in all: softmax of the standard scores of their cosines [K].

    A match far above the others so counts for several, whatever the spread of the cosines of an encoder.
    """
    spread = scores.std()
    weights = np.exp((scores - scores.max()) / spread) if spread > 1e-6 else np.ones(len(scores))
    return weights / weights.sum()


def word_nats(
    captions: Sequence[str],
    scores: np.ndarray,
    indexes: Sequence[CaptionIndex],
    trained: frozenset[str] = frozenset(),
    new_word_share: float = 0.2,
) -> dict[str, float]:
    """The bonus in nats of the words of one photo's neighbours, at strength 1.

    With s the share of the neighbours that have a word and p the share of the indexes' captions that have it, a word
    gets 0.6 s log(s / p), a part of the Kullback-Leibler divergence; words as frequent everywhere, such as "a" and
    "the", get next to nothing. A word that the captioner was never trained on gets more, since training has only ever
    made it less likely: s is the weight of its neighbours (`match_weights`), and the bonus is log(s / p) once s is
    `new_word_share`, and less before.

    Args:
        captions, scores: the neighbours' captions and cosines.
        trained: the words of the captioner's training captions, case folded; empty if they are not known, which counts
            as all of them.
    """
    if not captions:
        return {}
    share, matched, forms = defaultdict(float), defaultdict(float), {}
    for caption, weight in zip(captions, match_weights(scores).tolist(), strict=True):
        for word, form in words_of(caption).items():
            share[word] += 1 / len(captions)
            matched[word] += weight
            forms[word] = form
    counted = [word_counts(index, index.revision) for index in indexes]
    nats = {}
    for word, form in forms.items():
        known = not trained or word in trained
        found, factor = (
            (share[word], _KNOWN * share[word]) if known else (matched[word], matched[word] / new_word_share)
        )
        usual = (sum(counts[word] for counts in counted) + 1) / (_SAMPLE * len(counted) + 2)
        if found > usual:
            nats[form] = math.log(found / usual) * min(1.0, factor)
    return nats


def pair_nats(
    tokens: Sequence[Sequence[int]], indexes: Sequence[CaptionIndex], tokenizer: PreTrainedTokenizerBase
) -> dict[tuple[int, int], float]:
    """The bonus in nats of two tokens in a row, 0.8 s log(s / p) as for words; the end token is one of them.

    Args:
        tokens: those of each of the neighbours' captions, with the end token.
    """
    support = Counter(pair for ids in tokens for pair in set(pairwise(ids)))
    counted = [_pair_counts(index, index.revision, tokenizer) for index in indexes]
    total = _PAIR_SAMPLE * len(counted) + 2
    nats = {}
    for pair, times in support.items():
        share = times / len(tokens)
        usual = (sum(counts[pair] for counts in counted) + 0.5) / total
        if share > usual:
            nats[pair] = _PAIRS * share * math.log(share / usual)
    return nats


@lru_cache(maxsize=8)
def _pair_counts(index: CaptionIndex, revision: int, tokenizer: PreTrainedTokenizerBase) -> Counter[tuple[int, int]]:
    """How many of 5,000 captions drawn from an index, at this revision, hold each pair of tokens in a row."""
    captions = index.captions(index.random_rows(_PAIR_SAMPLE, np.random.default_rng(0)))
    return Counter(pair for ids in caption_tokens(tokenizer, captions) for pair in set(pairwise(ids)))


def caption_tokens(tokenizer: PreTrainedTokenizerBase, captions: Sequence[str]) -> list[list[int]]:
    """The tokens of each caption as training writes them, with the end token."""
    texts = [" ".join(caption.split()) for caption in captions]
    ids = tokenizer(texts, verbose=False)["input_ids"] if texts else []
    return [[*own, tokenizer.eos_token_id] for own in ids]


def neighbor_bonus(
    tokenizer: PreTrainedTokenizerBase,
    captions: Sequence[Sequence[str]],
    scores: Sequence[np.ndarray],
    indexes: Sequence[CaptionIndex],
    trained: frozenset[str] = frozenset(),
    strength: float = 1.0,
    new_word_share: float = 0.2,
) -> WordBonus:
    """The bonus that B photos get from the captions and cosines of their neighbours; other arguments as above."""
    distinct = list(dict.fromkeys(caption for listed in captions for caption in listed))
    tokens = dict(zip(distinct, caption_tokens(tokenizer, distinct), strict=True))
    photos = zip(captions, scores, strict=True)
    words = [word_nats(listed, own, indexes, trained, new_word_share) for listed, own in photos]
    pairs = [pair_nats([tokens[caption] for caption in listed], indexes, tokenizer) for listed in captions]
    return word_bonus(tokenizer, words, strength, pairs)


@lru_cache(maxsize=100_000)
def _word_tokens(tokenizer: PreTrainedTokenizerBase, word: str) -> list[int]:
    return tokenizer.encode(f" {word}", add_special_tokens=False)


def word_bonus(
    tokenizer: PreTrainedTokenizerBase,
    nats: Sequence[dict[str, float]],
    strength: float,
    pairs: Sequence[dict[tuple[int, int], float]] = (),
) -> WordBonus:
    """The bonus of each of B photos, from the nats of its words and of its pairs of tokens."""
    rows: list[dict[tuple[int, int], float]] = []
    for words, following in zip_longest(nats, pairs, fillvalue={}):
        row = {pair: strength * value for pair, value in following.items()}
        for word, value in words.items():
            ids = _word_tokens(tokenizer, word)
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
