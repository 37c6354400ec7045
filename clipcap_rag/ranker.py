"""Written captions -> candidates in order, each distinct text embedded once."""

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

from clipcap_rag.config import GenerationConfig
from clipcap_rag.encoder import Encoder
from clipcap_rag.generation import Written
from clipcap_rag.rerank import Candidate, by_likelihood, by_similarity, distinct

_MEMORY = 64 * 2**20  # bytes of embeddings kept


class Ranker:
    """Orders candidates by what CLIP and the language model think of them, and remembers the texts it has seen.

    Photos of one folder get the same captions again and again; within one ranker a text is embedded once while it is
    among the last ones seen (64 MB of embeddings), so equal captions have equal embeddings.
    """

    def __init__(self, encoder: Encoder):
        self.encoder, self._most = encoder, max(1, _MEMORY // (4 * encoder.dim))
        self._known: OrderedDict[str, np.ndarray] = OrderedDict()  # the text seen longest ago comes first

    def rank(
        self, written: Sequence[Sequence[Written]], images: np.ndarray, generation: GenerationConfig
    ) -> list[list[Candidate]]:
        """Candidates of B images, best first, empty and repeated captions dropped, but for `clipcap`, which keeps all.

        Args:
            written: per image, its captions.
            images: [B, D] float32 image embeddings of unit length.
        """
        if generation.decoding != "clipcap":
            written = [distinct(captions) for captions in written]
        embedded = self.embed([found.caption for captions in written for found in captions])
        ranked, start = [], 0
        for captions, image in zip(written, images, strict=True):
            part = embedded[start : start + len(captions)]
            start += len(captions)
            if generation.decoding == "sample":
                weight = generation.log_probability_weight
                ranked.append(by_similarity(captions, part, image, self.encoder.logit_scale, weight))
            else:
                ranked.append(by_likelihood(captions, part, image))
        return ranked

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """[N, D] float32 embeddings of unit length; texts seen before keep theirs."""
        new = [text for text in dict.fromkeys(texts) if text not in self._known]
        if new:
            self._known.update(zip(new, self.encoder.encode_text(new).vectors, strict=True))
        for text in texts:
            self._known.move_to_end(text)
        embedded = [self._known[text] for text in texts]
        while len(self._known) > self._most:
            self._known.popitem(last=False)
        return np.array(embedded, np.float32).reshape(len(texts), self.encoder.dim)
