"""Why a caption says what it says: what each neighbour changed, and which words image and neighbours support."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from clipcap_rag.embeddings import Embeddings
from clipcap_rag.model import CaptionModel
from clipcap_rag.neighbors import Neighbor, Neighbors
from clipcap_rag.rerank import Candidate
from clipcap_rag.token_bonus import TokenBonus
from clipcap_rag.word_bonus import WORD, words_of

SUPPORT = math.log(2)  # nats; what supports a word makes it at least twice as likely
_BOTH, _NEIGHBORS, _NEITHER, _IMAGE, _EACH = range(5)  # the versions of an image, as `versions` has them
LEFT_OUT = slice(_IMAGE, None)  # those without all neighbours and without each


@dataclass(frozen=True)
class LeftOut:
    """What is different without one neighbour, or without all of them.

    Attributes:
        change: nats that the caption's log-probability gains; negative where what was left out spoke for the caption.
        caption: what is written then, under the same settings and random numbers; None if that has no words.
    """

    change: float
    caption: str | None


@dataclass(frozen=True)
class WordEvidence:
    """A written word and its log-probabilities in nats, given the caption's words before it.

    Attributes:
        both: as it was written, with image and neighbours.
        image: with the image alone.
        neighbors: with the neighbours alone, a zero vector in place of the image's embedding.
        neither: with that zero vector and no neighbours.
        in_neighbors: the places of the neighbours that have the word, from 0.
    """

    word: str
    both: float
    image: float
    neighbors: float
    neither: float
    in_neighbors: tuple[int, ...]

    @property
    def from_image(self) -> float:
        """Nats that the image adds, the mean of adding it to the neighbours and to nothing (the Shapley value)."""
        return (self.both - self.neighbors + self.image - self.neither) / 2

    @property
    def from_neighbors(self) -> float:
        """Nats that the neighbours add, likewise; with `from_image` they make `both` out of `neither`."""
        return (self.both - self.image + self.neighbors - self.neither) / 2

    @property
    def supported_by(self) -> str:
        """both, image, neighbors or neither: what adds at least `SUPPORT` nats."""
        image, neighbors = self.from_image >= SUPPORT, self.from_neighbors >= SUPPORT
        return "both" if image and neighbors else "image" if image else "neighbors" if neighbors else "neither"


@dataclass(frozen=True)
class Evidence:
    """What a caption rests on.

    Attributes:
        neighbors: K neighbours, best first.
        left_out: what is different without each.
        all_left_out: what is different without all of them; None if there were none.
        words: those of the caption in order; punctuation and the end token are no words.
    """

    neighbors: list[Neighbor]
    left_out: list[LeftOut]
    all_left_out: LeftOut | None
    words: list[WordEvidence]

    def to_json(self) -> dict[str, Any]:
        derived = ("supported_by", "from_image", "from_neighbors")
        return {
            "neighbors": [
                asdict(neighbor) | {"left_out": asdict(without)}
                for neighbor, without in zip(self.neighbors, self.left_out, strict=True)
            ],
            "all_left_out": self.all_left_out and asdict(self.all_left_out),
            "words": [asdict(word) | {name: getattr(word, name) for name in derived} for word in self.words],
            "support_nats": SUPPORT,
        }


def versions(image: Embeddings, neighbors: Neighbors, K: int) -> tuple[Embeddings, Neighbors]:
    """The inputs of one image in S = 4 + K versions for the first K of its neighbours.

    They are: as they are, without the image, without both, without neighbours, then without each of the K.
    """
    seen, kept = np.ones(_EACH + K, np.float32), np.ones((_EACH + K, neighbors.rows.shape[1]), bool)
    seen[[_NEIGHBORS, _NEITHER]] = 0
    kept[[_IMAGE, _NEITHER]] = False
    kept[_EACH + np.arange(K), np.arange(K)] = False
    return Embeddings(image.vectors * seen[:, None], image.norms * seen), neighbors.versions(kept)


@torch.inference_mode()
def forced_log_probabilities(
    model: CaptionModel,
    prompt: Sequence[int],
    tokens: Sequence[int],
    inputs: Sequence[Tensor],
    context: Tensor | None = None,
    bonus: TokenBonus | None = None,
) -> np.ndarray:
    """Log-probabilities [S, T] in nats of the same tokens behind the same prompt under S versions of the inputs.

    Args:
        inputs: image embedding [S, D] and, with K > 0, neighbour embeddings [S, K, D], scores [S, K], mask [S, K].
        context, bonus: what the words of the neighbours do, as `words_for` gives it for the S versions.
    """
    forced = torch.tensor([*prompt, *tokens], device=inputs[0].device).expand(len(inputs[0]), -1)
    logits = model(forced, *inputs, context=context)[:, len(prompt) :].float()  # [S, T, V]
    forced = forced[:, len(prompt) :]  # [S, T]
    if bonus is not None:
        logits = logits + bonus.along(forced, logits.shape[2])
    return logits.log_softmax(-1).gather(2, forced[..., None])[..., 0].cpu().numpy()


def weigh(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Sequence[int],
    tokens: Sequence[int],
    scores: np.ndarray,
    neighbors: Sequence[Neighbor],
    without: Sequence[Sequence[Candidate]],
) -> Evidence:
    """The evidence for a caption.

    Args:
        prompt: tokens that stood before it.
        tokens: T tokens that were written.
        scores: [4 + K, T], what `forced_log_probabilities` gives for `versions`.
        without: candidates, best first, written without all neighbours, and without each; none if there are none.
    """
    totals = scores.sum(1)
    left_out = [
        LeftOut(float(total - totals[_BOTH]), captions[0].caption if captions else None)
        for total, captions in zip(totals[LEFT_OUT], without, strict=False)
    ]
    spoken = [set(words_of(neighbor.caption)) for neighbor in neighbors]
    words = []
    for word, places in _words(tokenizer, prompt, tokens):
        both, by_neighbors, neither, by_image = scores[:_EACH, places].sum(1).tolist()
        having = tuple(place for place, known in enumerate(spoken) if word.casefold() in known)
        words.append(WordEvidence(word, both, by_image, by_neighbors, neither, having))
    return Evidence(list(neighbors), left_out[1:], left_out[0] if left_out else None, words)


def _words(
    tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], tokens: Sequence[int]
) -> list[tuple[str, list[int]]]:
    """The words that written tokens spell, each with the places of its tokens; a token is where its last letter is."""

    def read(count: int) -> str:
        ids = [*prompt, *tokens][: len(prompt) + count]
        return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    spelled = [(match, []) for match in WORD.finditer(read(len(tokens)))]
    for place, token in enumerate(tokens):
        last = len(read(place + 1)) - 1
        for match, places in spelled:
            if match.start() <= last < match.end() and token not in tokenizer.all_special_ids:
                places.append(place)
    return [(match.group(), places) for match, places in spelled if places]
