"""A bonus for the words and runs of tokens that a photo's neighbours have and the index at large has not."""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise

import numpy as np
from transformers import PreTrainedTokenizerBase

from clipcap_rag.caption_index import CaptionIndex
from clipcap_rag.token_bonus import TokenBonus

WORD = re.compile(r"[^\W_]+(?:[-'’][^\W_]+)*")
_SAMPLE = 20_000  # captions of an index whose words are counted
_GRAM_SAMPLE = 5_000  # likewise, for runs of tokens
_KNOWN = 0.75  # of s log(s / p) for words that the captioner was trained on
_GRAMS = {2: 1.5, 3: 2.0}  # likewise for two and for three tokens in a row
_PRIOR = 16  # neighbours who say what is usual that are counted as well, so that few neighbours raise little
_LEAST = 0.1  # nats; less is not worth the time
_OUTLIER = 5.0  # standard deviations by which a match stands out; of 100 neighbours the best does for 2 % of photos
_MOST = 4.0  # nats that a match may weigh more than another
_SPREAD = 0.005  # least standard deviation of cosines

Gram = tuple[int, ...]


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
    """How much each of K neighbours counts, 1 in all, by their cosines [K].

    The same for all, but for a match that stands out by more than 5 standard deviations of the others: it counts for as
    many as exp(its distance beyond that), at most 55. Weights that fall with every cosine wrote worse captions.
    """
    K = len(scores)
    if K < 2:
        return np.ones(K)
    others = (scores.sum() - scores) / (K - 1)
    variance = ((scores**2).sum() - scores**2) / (K - 1) - others**2
    beyond = (scores - others) / np.sqrt(np.maximum(variance, _SPREAD**2)) - _OUTLIER
    weights = np.exp(np.clip(beyond, 0.0, _MOST))
    return weights / weights.sum()


def _gain(share: float, usual: float, neighbors: int) -> float:
    """s log(s / p) in nats for the share of K neighbours that have something, as if 16 more had what is usual."""
    own = (share * neighbors + usual * _PRIOR) / (neighbors + _PRIOR)
    return own * math.log(own / usual) if own > usual else 0.0


def near_weights(scores: np.ndarray) -> np.ndarray:
    """How much each of K neighbours counts for a new word, 1 in all: softmax of the standard scores of their cosines.

    Such a word stands in few captions and has no other evidence than how near they are.
    """
    weights = np.exp((scores - scores.max()) / max(_SPREAD, scores.std()))
    return weights / weights.sum()


def word_nats(
    captions: Sequence[str],
    scores: np.ndarray,
    indexes: Sequence[CaptionIndex],
    trained: frozenset[str] = frozenset(),
    new_word_share: float = 0.2,
) -> dict[str, float]:
    """The bonus in nats of the words of one photo's neighbours, at strength 1.

    With s the share of the neighbours (by `match_weights`, smoothed) that have a word and p the share of the indexes'
    captions that have it, a word gets 0.75 s log(s / p), a part of the Kullback-Leibler divergence; words as frequent
    everywhere, such as "a" and "the", get next to nothing. A word that the captioner was never trained on gets more,
    since training has only ever made it less likely: log(s / p) once s (by `near_weights`) is `new_word_share`,
    and less before.

    Args:
        captions, scores: the neighbours' captions and cosines.
        trained: the words of the captioner's training captions, case folded; empty if they are not known, which counts
            as all of them.
    """
    if not captions:
        return {}

    def new(word: str) -> bool:
        return bool(trained) and word not in trained

    share, forms = defaultdict(float), {}
    for caption, even, near in zip(captions, match_weights(scores), near_weights(scores), strict=True):
        for word, form in words_of(caption).items():
            share[word] += near if new(word) else even
            forms[word] = form
    counted = [word_counts(index, index.revision) for index in indexes]
    nats = {}
    for word, form in forms.items():
        usual = (sum(counts[word] for counts in counted) + 1) / (_SAMPLE * len(counted) + 2)
        if not new(word):
            value = _KNOWN * _gain(share[word], usual, len(captions))
        else:
            value = min(1.0, share[word] / new_word_share) * math.log(max(1.0, share[word] / usual))
        if value > 0:
            nats[form] = float(value)
    return nats


def gram_nats(
    tokens: Sequence[Sequence[int]],
    scores: np.ndarray,
    indexes: Sequence[CaptionIndex],
    tokenizer: PreTrainedTokenizerBase,
) -> dict[Gram, float]:
    """The bonus in nats of two and three tokens in a row, 1.5 and 2 times s log(s / p) as for words.

    Args:
        tokens: those of each of the neighbours' captions.
        scores: the neighbours' cosines.
    """
    share = defaultdict(float)
    for ids, weight in zip(tokens, match_weights(scores), strict=True):
        for gram in _grams(ids):
            share[gram] += weight
    counted = [_gram_counts(index, index.revision, tokenizer) for index in indexes]
    total = _GRAM_SAMPLE * len(counted) + 2
    nats = {}
    for gram, own in share.items():
        usual = (sum(counts[gram] for counts in counted) + 0.5) / total
        value = _GRAMS[len(gram)] * _gain(own, usual, len(tokens))
        if value > _LEAST:
            nats[gram] = float(value)
    return nats


def _grams(ids: Sequence[int]) -> set[Gram]:
    """Two and three tokens in a row."""
    return {*pairwise(ids), *zip(ids, ids[1:], ids[2:], strict=False)}


@lru_cache(maxsize=8)
def _gram_counts(index: CaptionIndex, revision: int, tokenizer: PreTrainedTokenizerBase) -> Counter[Gram]:
    """How many of 5,000 captions drawn from an index, at this revision, hold two or three tokens in a row."""
    captions = index.captions(index.random_rows(_GRAM_SAMPLE, np.random.default_rng(0)))
    return Counter(gram for ids in caption_tokens(tokenizer, captions) for gram in _grams(ids))


def caption_tokens(tokenizer: PreTrainedTokenizerBase, captions: Sequence[str]) -> list[list[int]]:
    """The tokens of each caption as training writes them, without the end token."""
    texts = [" ".join(caption.split()) for caption in captions]
    return tokenizer(texts, verbose=False)["input_ids"] if texts else []


def neighbor_bonus(
    tokenizer: PreTrainedTokenizerBase,
    captions: Sequence[Sequence[str]],
    scores: Sequence[np.ndarray],
    indexes: Sequence[CaptionIndex],
    trained: frozenset[str] = frozenset(),
    strength: float = 1.0,
    new_word_share: float = 0.2,
) -> TokenBonus:
    """The bonus that B photos get from the captions and cosines of their neighbours; other arguments as above."""
    distinct = list(dict.fromkeys(caption for listed in captions for caption in listed))
    tokens = dict(zip(distinct, caption_tokens(tokenizer, distinct), strict=True))
    rows = []
    for listed, own in zip(captions, scores, strict=True):
        row = gram_nats([tokens[caption] for caption in listed], own, indexes, tokenizer)
        words = word_nats(listed, own, indexes, trained, new_word_share)
        for gram, value in _spelled(tokenizer, words).items():
            row[gram] = max(row.get(gram, 0.0), value)
        rows.append({gram: strength * value for gram, value in row.items()})
    return TokenBonus.of(rows)


def _spelled(tokenizer: PreTrainedTokenizerBase, words: dict[str, float]) -> dict[Gram, float]:
    """The nats of words as those of tokens: the first of a word, and each further one behind the one before."""
    nats: dict[Gram, float] = {}
    for word, value in words.items():
        ids = _word_tokens(tokenizer, word)
        for gram in [(ids[0],), *pairwise(ids)]:
            nats[gram] = max(nats.get(gram, 0.0), value)
    return nats


@lru_cache(maxsize=100_000)
def _word_tokens(tokenizer: PreTrainedTokenizerBase, word: str) -> list[int]:
    return tokenizer.encode(f" {word}", add_special_tokens=False)
