"""The public API: photos or embeddings in, captions with their candidates and neighbours out."""

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from clipcap_rag.abstention import Abstention
from clipcap_rag.caption_inputs import StoredEmbeddings, checked_texts, text_batches
from clipcap_rag.caption_result import CaptionResult
from clipcap_rag.checkpoint import Checkpoint, checkpoint_folder, read_checkpoint
from clipcap_rag.clipcap_weights import clipcap_checkpoint
from clipcap_rag.config import GenerationConfig, RetrievalConfig
from clipcap_rag.embeddings import EncodedImages
from clipcap_rag.errors import InputError
from clipcap_rag.images import image_name
from clipcap_rag.index_choice import IndexChoice, OpenIndexes
from clipcap_rag.neighbors import LISTED
from clipcap_rag.ranker import Ranker
from clipcap_rag.retriever import Retriever
from clipcap_rag.shipped import mending
from clipcap_rag.writer import Writer


class Captioner(Writer):
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
        super().__init__(checkpoint, device, dtype, base)
        self._index_device = index_device

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
        explain: bool = False,
        abstention: Abstention | None = None,
        retrieval: RetrievalConfig | None = None,
        **settings: Any,
    ) -> list[CaptionResult]:
        """Captions images, one result each, in order.

        Args:
            images: one image or several: paths, PIL images, arrays [H, W, 3] or [N, H, W, 3], or encoded bytes.
            embeddings: CLIP image embeddings [N, D] instead of images, as they come from the tower, or a
                `StoredEmbeddings`, which names them.
            index: "default" for the one the model was trained with, None for no retrieval, a name or path, an open
                `CaptionIndex`, or a list of these, where a string may end in ":WEIGHT" or ":WEIGHT:MOST".
            num_neighbors: neighbours in all (K); 0 turns retrieval off; None takes the checkpoint's number.
            generation: how captions are written and ranked.
            batch_size: images at a time.
            workers: processes that decode images.
            texts: sentences instead of images; CLIP's text embedding takes the place of the image's.
            explain_prefix: fill `CaptionResult.prefix_words`.
            explain: fill `CaptionResult.evidence`, for which each image is captioned once more per neighbour.
            abstention: fill `CaptionResult.confidence`, as this calibration has it.
            retrieval: which captions of the indexes may be retrieved, and by which route.
            settings: fields of `GenerationConfig` by name, in place of those of `generation`.

        Raises:
            InputError: an index that is missing or was built with another CLIP model, embeddings of another width or
                another CLIP model, a prompt that does not fit, words for a model that cannot read them, a calibration
                of another model or way of writing, or an unknown setting.
        """
        given = (images, embeddings, index, num_neighbors, generation, batch_size, workers, texts, explain_prefix)
        return list(self.stream(*given, explain=explain, abstention=abstention, retrieval=retrieval, **settings))

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
        explain: bool = False,
        abstention: Abstention | None = None,
        retrieval: RetrievalConfig | None = None,
        **settings: Any,
    ) -> Iterator[CaptionResult]:
        """Like `caption`, but yields each result as soon as its batch is done."""
        generation = (generation or GenerationConfig()).replaced(**settings)
        retriever, k = self.retriever(index, num_neighbors, retrieval)
        if abstention is not None:
            abstention.check(self.checkpoint, generation, k)
        names, batches = self._inputs(images, embeddings, texts, batch_size, workers, trunk=retriever.wants_trunk)
        ranker, start = Ranker(self.encoder), 0
        for batch in batches:
            good = [place for place, error in enumerate(batch.errors) if error is None]
            kept = batch.embeddings.part(good)
            neighbors = retriever.search(kept.vectors, k, trunk=kept.trunk)
            digests = [batch.digests[place] for place in good]
            ranked = self.write(kept, neighbors, digests, generation, ranker)
            listed = neighbors.first(LISTED).listed()
            _, scores = neighbors.matches()
            words = self.prefix_words(kept, neighbors) if explain_prefix else [None] * len(good)
            rows = iter(range(len(good)))
            for place, error in enumerate(batch.errors):
                name, row = names[start + place], None if error else next(rows)
                if error is None and not (ranked[row] and ranked[row][0].caption):
                    error = f"{name}: the model wrote no words; try --decoding beam"
                if error is not None:
                    yield CaptionResult(name, None, error=error)
                    continue
                one, best = slice(row, row + 1), ranked[row][0]
                inputs = kept.part(one), neighbors.part(one)
                yield CaptionResult(
                    name,
                    best.caption,
                    ranked[row],
                    listed[row],
                    prefix_words=words[row],
                    evidence=self.explain(*inputs, digests[row], best, generation, ranker) if explain else None,
                    confidence=abstention and abstention.confidence(kept.vectors[row], ranked[row], scores[row]),
                )
            start += len(batch.errors)

    def _inputs(
        self, images: Any, embeddings: Any, texts: Sequence[str] | None, batch_size: int, workers: int, trunk: bool
    ) -> tuple[list[str], Iterator[EncodedImages]]:
        """The names of what is captioned, and its embeddings batch by batch."""
        if sum(given is not None for given in (images, embeddings, texts)) != 1:
            raise InputError("give either images or embeddings or texts")
        if images is not None:
            images = [images] if _is_one(images) else list(images)
            names = [image_name(image, position) for position, image in enumerate(images)]
            return names, self.encoder.iter_images(images, batch_size, workers, trunk)
        if embeddings is not None:
            stored = embeddings if isinstance(embeddings, StoredEmbeddings) else StoredEmbeddings.of(embeddings)
            stored.check(self.checkpoint.encoder)
            return stored.names, stored.batches(batch_size)
        texts = checked_texts(texts)
        return texts, text_batches(self.encoder, texts, batch_size)

    @cached_property
    def _indexes(self) -> OpenIndexes:
        return OpenIndexes(self.checkpoint, self._index_device, self._base)

    def retriever(
        self, index: IndexChoice, num_neighbors: int | None = None, retrieval: RetrievalConfig | None = None
    ) -> tuple[Retriever, int]:
        """The retriever over the chosen indexes and the number of neighbours; all as `caption` takes them."""
        return self._indexes.retriever(index, num_neighbors, retrieval)


def _is_one(images: Any) -> bool:
    return isinstance(images, str | bytes | Path | Image.Image) or (isinstance(images, np.ndarray) and images.ndim < 4)
