"""The public API: photos or embeddings in, captions with their candidates and neighbours out."""

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from clipcap_rag.caption_inputs import StoredEmbeddings, checked_texts, text_batches
from clipcap_rag.caption_result import CaptionResult
from clipcap_rag.checkpoint import Checkpoint, checkpoint_folder, read_checkpoint
from clipcap_rag.clipcap_weights import clipcap_checkpoint
from clipcap_rag.config import GenerationConfig
from clipcap_rag.encoder import Embeddings, EncodedImages, Encoder, check_encoder
from clipcap_rag.errors import InputError
from clipcap_rag.generation import write_captions
from clipcap_rag.hardware import pick_device, pick_dtype
from clipcap_rag.images import image_name
from clipcap_rag.index_choice import IndexChoice, OpenIndexes
from clipcap_rag.prefix_words import PrefixWord, prefix_words
from clipcap_rag.ranker import Ranker
from clipcap_rag.rerank import Candidate
from clipcap_rag.retrieved_text import words_for
from clipcap_rag.retriever import Neighbors, Retriever
from clipcap_rag.shipped import mending


class Captioner:
    """A trained captioner; any index built with its CLIP model can be swapped in, or none."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        device: str = "auto",
        dtype: str = "auto",
        index_device: str = "auto",
        base: Path | None = None,
    ):
        """base: the folder that relative paths in the checkpoint refer to."""
        self.checkpoint, self.device = checkpoint, pick_device(device)
        self.dtype = pick_dtype(dtype, self.device)
        self.model = checkpoint.model.to(self.device, self.dtype).eval()
        self._device_name, self._dtype_name, self._index_device, self._base = device, dtype, index_device, base

    @classmethod
    def from_pretrained(
        cls, path: str | Path, device: str = "auto", dtype: str = "auto", index_device: str = "auto"
    ) -> "Captioner":
        """Opens a checkpoint, the best one of a training run, hf-hub:ORG/NAME (with @REVISION), or "starter".

        "starter" is the captioner that comes with the package; one from the hub is fetched once and then found in its
        cache.

        Raises:
            InputError: there is none at `path`, or it is altered, incomplete or of another version.
        """
        folder = checkpoint_folder(path)
        with mending(folder):
            checkpoint = read_checkpoint(folder)
        return cls(checkpoint, device=device, dtype=dtype, index_device=index_device, base=folder)

    @classmethod
    def from_clipcap(
        cls,
        path: str | Path,
        clip: str | None = None,
        language_model: str | None = None,
        normalize: bool | None = None,
        stop_token: str = ".",
        device: str = "auto",
        dtype: str = "auto",
    ) -> "Captioner":
        """Opens weights as ClipCap publishes them; arguments and errors are those of `clipcap_checkpoint`."""
        checkpoint, encoder = clipcap_checkpoint(path, clip, language_model, normalize, stop_token, device, dtype)
        captioner = cls(checkpoint, device=device, dtype=dtype)
        captioner.encoder = encoder
        return captioner

    @cached_property
    def encoder(self) -> Encoder:
        """The CLIP model that the checkpoint was trained with, loaded when first needed and checked by its probes."""
        record = self.checkpoint.encoder
        encoder = Encoder.load(record["clip"], self._device_name, self._dtype_name, self._base)
        check_encoder(record, encoder, "the model")
        return encoder

    def caption(
        self,
        images: Any = None,
        embeddings: np.ndarray | StoredEmbeddings | None = None,
        index: IndexChoice = "default",
        num_neighbors: int | None = None,
        generation: GenerationConfig | None = None,
        batch_size: int = 64,
        workers: int = 0,
        texts: Sequence[str] | None = None,
        explain_prefix: bool = False,
        **settings: Any,
    ) -> list[CaptionResult]:
        """Captions images, one result each, in order.

        Args:
            images: one image or several: paths, PIL images, arrays [H, W, 3] or [N, H, W, 3], or encoded bytes.
            embeddings: CLIP image embeddings [N, D] instead of images, as they come from the tower, or a
                `StoredEmbeddings`, which names them.
            index: "default" for the one the model was trained with, None for no retrieval, a name or path, an open
                `CaptionIndex`, or a list of these, where a string may end in ":WEIGHT".
            num_neighbors: neighbours in all (K); 0 turns retrieval off; None takes the checkpoint's number.
            generation: how captions are written and ranked.
            batch_size: images at a time.
            workers: processes that decode images.
            texts: sentences instead of images; CLIP's text embedding takes the place of the image's.
            explain_prefix: fill `CaptionResult.prefix_words`.
            settings: fields of `GenerationConfig` by name, in place of those of `generation`.

        Raises:
            InputError: an index that is missing or was built with another CLIP model, embeddings of another width or
                another CLIP model, a prompt that does not fit, words for a model that cannot read them, or an unknown
                setting.
        """
        given = (images, embeddings, index, num_neighbors, generation, batch_size, workers, texts, explain_prefix)
        return list(self.stream(*given, **settings))

    def stream(
        self,
        images: Any = None,
        embeddings: np.ndarray | StoredEmbeddings | None = None,
        index: IndexChoice = "default",
        num_neighbors: int | None = None,
        generation: GenerationConfig | None = None,
        batch_size: int = 64,
        workers: int = 0,
        texts: Sequence[str] | None = None,
        explain_prefix: bool = False,
        **settings: Any,
    ) -> Iterator[CaptionResult]:
        """Like `caption`, but yields each result as soon as its batch is done."""
        generation = (generation or GenerationConfig()).replaced(**settings)
        retriever, k = self.retriever(index, num_neighbors)
        names, batches = self._inputs(images, embeddings, texts, batch_size, workers)
        ranker, start = Ranker(self.encoder), 0
        for batch in batches:
            good = [place for place, error in enumerate(batch.errors) if error is None]
            kept = Embeddings(batch.embeddings.vectors[good], batch.embeddings.norms[good])
            neighbors = retriever.search(kept.vectors, k)
            ranked = iter(self.write(kept, neighbors, [batch.digests[place] for place in good], generation, ranker))
            listed = iter(neighbors.listed())
            explained = iter(self._explained(kept, neighbors) if explain_prefix else [None] * len(good))
            for place, error in enumerate(batch.errors):
                name = names[start + place]
                if error is not None:
                    yield CaptionResult(name, None, error=error)
                    continue
                candidates, around, words = next(ranked), next(listed), next(explained)
                if candidates and candidates[0].caption:
                    yield CaptionResult(name, candidates[0].caption, candidates, around, prefix_words=words)
                else:
                    yield CaptionResult(name, None, error=f"{name}: the model wrote no words; try --decoding beam")
            start += len(batch.errors)

    def _inputs(
        self, images: Any, embeddings: Any, texts: Sequence[str] | None, batch_size: int, workers: int
    ) -> tuple[list[str], Iterator[EncodedImages]]:
        """The names of what is captioned, and its embeddings batch by batch."""
        if sum(given is not None for given in (images, embeddings, texts)) != 1:
            raise InputError("give either images or embeddings or texts")
        if images is not None:
            images = [images] if _is_one(images) else list(images)
            names = [image_name(image, position) for position, image in enumerate(images)]
            return names, self.encoder.iter_images(images, batch_size, workers)
        if embeddings is not None:
            stored = embeddings if isinstance(embeddings, StoredEmbeddings) else StoredEmbeddings.of(embeddings)
            stored.check(self.checkpoint.encoder)
            return stored.names, stored.batches(batch_size)
        texts = checked_texts(texts)
        return texts, text_batches(self.encoder, texts, batch_size)

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
        written = []
        limit = 64  # images whose prefix is made at once
        for start in range(0, len(images.vectors), limit):
            part = slice(start, start + limit)
            prefix = self._prefix(images, neighbors, part)
            written += write_captions(
                self.model,
                self.checkpoint.tokenizer,
                prefix,
                generation,
                list(digests[part]),
                self.checkpoint.stop_token,
                **words_for(self.checkpoint, neighbors.part(part), generation, self.encoder.logit_scale),
            )
        return (ranker or Ranker(self.encoder)).rank(written, images.vectors, generation)

    @torch.inference_mode()
    def _prefix(self, images: Embeddings, neighbors: Neighbors, part: slice) -> torch.Tensor:
        vectors = images.vectors if self.checkpoint.config.normalize else images.raw
        inputs = [vectors[part]]
        if neighbors.rows.shape[1] and self.model.mapper.uses_neighbors:
            inputs += [neighbors.embeddings[part], neighbors.scores[part]]
        tensors = [torch.from_numpy(array).to(self.device, self.dtype) for array in inputs]
        if len(tensors) > 1:
            tensors.append(torch.from_numpy(neighbors.mask[part]).to(self.device))
        return self.model.prefix(*tensors)

    def _explained(self, images: Embeddings, neighbors: Neighbors) -> list[list[list[PrefixWord]]]:
        prefix = self._prefix(images, neighbors, slice(None))
        return prefix_words(self.model, self.checkpoint.tokenizer, prefix)

    @cached_property
    def _indexes(self) -> OpenIndexes:
        return OpenIndexes(self.checkpoint, self._index_device, self._base)

    def retriever(self, index: IndexChoice, num_neighbors: int | None = None) -> tuple[Retriever, int]:
        """The retriever over the chosen indexes and the number of neighbours; both as `caption` takes them."""
        return self._indexes.retriever(index, num_neighbors)


def _is_one(images: Any) -> bool:
    return isinstance(images, str | bytes | Path | Image.Image) or (isinstance(images, np.ndarray) and images.ndim < 4)
