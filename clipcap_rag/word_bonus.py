"""A bonus for the words and runs of tokens that a photo's neighbours have and the index at large has not."""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from clipcap_rag.caption_index import CaptionIndex
from clipcap_rag.caption_votes import Votes, joint_votes, near_weights
from clipcap_rag.token_bonus import TokenBonus
from clipcap_rag.vote_sums import VoteSums

WORD = re.compile(r"[^\W_]+(?:[-'’][^\W_]+)*")
_SAMPLE = 20_000  # captions of an index whose words are counted
_GRAM_SAMPLE = 5_000  # likewise, for runs of tokens
_KNOWN = 0.75  # of s log(s / p) for words that the captioner was trained on
_GRAMS = {2: 1.5, 3: 2.0}  # likewise for two and for three tokens in a row
_LEAST = 0.1  # nats; less is not worth the time
_REMEMBERED = 50_000  # captions whose words are kept, since those of an index vote again and again

Gram = tuple[int, ...]


@lru_cache(maxsize=_REMEMBERED)
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


def _gain(share: float, usual: float) -> float:
    """s log(s / p) in nats for the share of votes that have something."""
    return share * math.log(share / usual) if share > usual else 0.0


def word_nats(
    votes: Votes,
    near: Votes,
    indexes: Sequence[CaptionIndex],
    trained: frozenset[str] = frozenset(),
    new_word_share: float = 0.2,
) -> dict[str, float]:
    """The bonus in nats of the words of one photo's neighbours, at strength 1.

    With s the share of the votes for a word and p the share of the indexes' captions that have it, a
    word gets 0.75 s log(s / p), a part of the Kullback-Leibler divergence; words as frequent everywhere, such as "a"
    and "the", get next to nothing. A word that the captioner was never trained on gets more, since training has only
    ever made it less likely: log(s / p) once s (of `near`) is `new_word_share`, and less before.

    Args:
        votes: of all captions that were found (`joint_votes`).
        near: of the neighbours alone, by how near they are (`near_weights`).
        trained: the words of the captioner's training captions, case folded; empty if they are not known, which counts
            as all of them.
    """
    nearness, forms = defaultdict(float), {}
    for caption in votes.captions:
        forms |= words_of(caption)
    for caption, weight in near:
        for word in words_of(caption):
            nearness[word] += weight
    counted, unsaid = [word_counts(index, index.revision) for index in indexes], 1.0 - votes.weights.sum()
    total, nats = _SAMPLE * len(counted) + 2, {}
    shares = _shares(_word_sums(), votes, 1 / total)
    for word, share in (dict.fromkeys(nearness, 0.0) | shares).items():
        usual = (sum(counts[word] for counts in counted) + 1) / total
        if not trained or word in trained:
            value = _KNOWN * _gain(share + unsaid * usual, usual)
        else:
            value = min(1.0, nearness[word] / new_word_share) * math.log(max(1.0, nearness[word] / usual))
        if value > 0:
            nats[forms[word]] = float(value)
    return nats


def gram_nats(
    votes: Votes,
    indexes: Sequence[CaptionIndex],
    tokenizer: PreTrainedTokenizerBase,
) -> dict[Gram, float]:
    """The bonus in nats of two and three tokens in a row, 1.5 and 2 times s log(s / p) as for words."""
    counted, unsaid = [_gram_counts(index, index.revision, tokenizer) for index in indexes], 1.0 - votes.weights.sum()
    total, nats = _GRAM_SAMPLE * len(counted) + 2, {}
    enough = _LEAST / (max(_GRAMS.values()) * math.log(2 * total))  # with a smaller share nothing reaches the least
    for gram, share in _shares(_gram_sums(tokenizer), votes, enough).items():
        usual = (sum(counts[gram] for counts in counted) + 0.5) / total
        value = _GRAMS[len(gram)] * _gain(share + unsaid * usual, usual)
        if value > _LEAST:
            nats[gram] = float(value)
    return nats


def _shares(sums: VoteSums, votes: Votes, least: float) -> dict[Any, float]:
    """The share of the votes for each term that has at least so much."""
    total = sums.total(votes)
    numbers = np.flatnonzero(total >= least)
    return {sums.terms[number]: share for number, share in zip(numbers.tolist(), total[numbers].tolist(), strict=True)}


@lru_cache(maxsize=1)
def _word_sums() -> VoteSums:
    return VoteSums(lambda caption: dict.fromkeys(words_of(caption), 1.0))


@lru_cache(maxsize=4)
def _gram_sums(tokenizer: PreTrainedTokenizerBase) -> VoteSums:
    return VoteSums(lambda caption: dict.fromkeys(_grams(tokenizer, caption), 1.0))


def _grams(tokenizer: PreTrainedTokenizerBase, caption: str) -> set[Gram]:
    """Two and three tokens in a row of a caption."""
    (ids,) = caption_tokens(tokenizer, [caption])
    return {*pairwise(ids), *zip(ids, ids[1:], ids[2:], strict=False)}


@lru_cache(maxsize=8)
def _gram_counts(index: CaptionIndex, revision: int, tokenizer: PreTrainedTokenizerBase) -> Counter[Gram]:
    """How many of 5,000 captions drawn from an index, at this revision, hold two or three tokens in a row."""
    captions = index.captions(index.random_rows(_GRAM_SAMPLE, np.random.default_rng(0)))
    return Counter(gram for caption in captions for gram in _grams(tokenizer, caption))


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
    photos: Sequence[Votes] | None = None,
) -> TokenBonus:
    """The bonus that B photos get; other arguments as above.

    Args:
        captions, scores: of each photo's neighbours.
        photos: per photo, the votes of the captions of photos like it.
    """
    photos = photos or [Votes()] * len(captions)
    rows = []
    for listed, own, seen in zip(captions, scores, photos, strict=True):
        votes, near = joint_votes(listed, own, seen), Votes(listed, near_weights(own))
        row = gram_nats(votes, indexes, tokenizer)
        words = word_nats(votes, near, indexes, trained, new_word_share)
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
