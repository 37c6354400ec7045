"""From embeddings and neighbours to ranked captions, and to what these rest on."""

import copy
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from clipcap_rag.checkpoint import Checkpoint
from clipcap_rag.config import GenerationConfig
from clipcap_rag.embeddings import Embeddings
from clipcap_rag.encoder import Encoder, check_encoder
from clipcap_rag.evidence import LEFT_OUT, Evidence, forced_log_probabilities, versions, weigh
from clipcap_rag.generation import Written, write_captions
from clipcap_rag.hardware import pick_device, pick_dtype
from clipcap_rag.model import CaptionModel
from clipcap_rag.neighbors import Neighbors
from clipcap_rag.prefix_words import PrefixWord, prefix_words
from clipcap_rag.prompt import prompt_tokens
from clipcap_rag.ranker import Ranker
from clipcap_rag.rerank import Candidate
from clipcap_rag.retrieved_text import words_for


class Writer:
    """A checkpoint on a device, and the CLIP model that ranks what it writes."""

    def __init__(self, checkpoint: Checkpoint, device: str, dtype: str, base: Path | None):
        """base: the folder that relative paths in the checkpoint refer to."""
        self.checkpoint, self.device = checkpoint, pick_device(device)
        self.dtype = pick_dtype(dtype, self.device)
        self.model = checkpoint.model.to(self.device, self.dtype).eval()
        self._device_name, self._dtype_name, self._base = device, dtype, base

    @cached_property
    def encoder(self) -> Encoder:
        """The CLIP model that the checkpoint was trained with, loaded when first needed and checked by its probes."""
        record = self.checkpoint.encoder
        encoder = Encoder.load(record["clip"], self._device_name, self._dtype_name, self._base)
        check_encoder(record, encoder, "the model")
        return encoder

    def write(
        self,
        images: Embeddings,
        neighbors: Neighbors,
        digests: Sequence[bytes],
        generation: GenerationConfig,
        ranker: Ranker | None = None,
    ) -> list[list[Candidate]]:
        """Candidates, best first, for image embeddings and the neighbours they are to be written with.

        Args:
            images: B image embeddings.
            neighbors: K neighbours of each; K may be 0.
            digests: per image, the bytes that with the seed determine its samples.
            ranker: the one of earlier calls, which knows the texts that it has seen.
        """
        if not len(images.vectors):
            return []
        written = self.written(images, neighbors, digests, generation)
        judges = self.judges(neighbors)
        return (ranker or Ranker(self.encoder)).rank(written, images.vectors, generation, judges)

    def written(
        self, images: Embeddings, neighbors: Neighbors, digests: Sequence[bytes], generation: GenerationConfig
    ) -> list[list[Written]]:
        """What the language model writes for each image, as it was drawn, unranked; arguments as of `write`."""
        written = []
        limit = 64  # images whose prefix is made at once
        for start in range(0, len(images.vectors), limit):
            part = slice(start, start + limit)
            around = neighbors.part(part)
            written += write_captions(
                self.model,
                self.checkpoint.tokenizer,
                self._prefix(images.part(part), around),
                generation,
                list(digests[part]),
                self.checkpoint.stop_token,
                **self._words(around, generation),
            )
        return written

    def shown(self, neighbors: Neighbors) -> Neighbors:
        """Those neighbours that the mapper is shown; the words of all of them help to write and to rank."""
        return neighbors.first(self.checkpoint.mapper_neighbors)

    def judges(self, neighbors: Neighbors) -> Neighbors | None:
        """Those whose captions candidates are compared with; None for a model that retrieves few."""
        return neighbors if self.checkpoint.raises_words else None

    def _tensors(self, images: Embeddings, neighbors: Neighbors, dtype: torch.dtype) -> list[torch.Tensor]:
        """What the model's `prefix` and `forward` take of images and neighbours."""
        inputs, neighbors = [images.vectors if self.checkpoint.config.normalize else images.raw], self.shown(neighbors)
        if neighbors.rows.shape[1] and self.model.mapper.uses_neighbors:
            inputs += [neighbors.embeddings, neighbors.scores]
        tensors = [torch.from_numpy(array).to(self.device, dtype) for array in inputs]
        if len(tensors) > 1:
            tensors.append(torch.from_numpy(neighbors.mask).to(self.device))
        return tensors

    @torch.inference_mode()
    def _prefix(self, images: Embeddings, neighbors: Neighbors) -> torch.Tensor:
        return self.model.prefix(*self._tensors(images, neighbors, self.dtype))

    def _words(self, neighbors: Neighbors, generation: GenerationConfig) -> dict[str, Any]:
        return words_for(self.checkpoint, neighbors, generation)

    @cached_property
    def _exact(self) -> CaptionModel:
        """The model in float32: leaving out one of eight neighbours changes as little as bfloat16 rounds away."""
        return self.model if self.dtype is torch.float32 else copy.deepcopy(self.model).float()

    def prefix_words(self, images: Embeddings, neighbors: Neighbors) -> list[list[list[PrefixWord]]]:
        """Per image and prefix vector the nearest words."""
        return prefix_words(self.model, self.checkpoint.tokenizer, self._prefix(images, neighbors))

    def explain(
        self,
        image: Embeddings,
        neighbors: Neighbors,
        digest: bytes,
        caption: Candidate,
        generation: GenerationConfig,
        ranker: Ranker | None = None,
    ) -> Evidence:
        """What the caption of one image rests on; arguments as those of `write`, for this image alone."""
        tokenizer, (listed,) = self.checkpoint.tokenizer, self.shown(neighbors).listed()
        prompt = prompt_tokens(tokenizer, generation.prompt)
        images, around = versions(image, neighbors, len(listed))
        inputs, said = self._tensors(images, around, torch.float32), self._words(around, generation)
        scores = forced_log_probabilities(self._exact, prompt, caption.tokens, inputs, **said)
        without = []
        if listed:
            images, around = images.part(LEFT_OUT), around.part(LEFT_OUT)
            without = self.write(images, around, [digest] * len(around.rows), generation, ranker)
        return weigh(tokenizer, prompt, caption.tokens, scores, listed, without)
