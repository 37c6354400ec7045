"""The public API: photos or embeddings in, captions with their candidates and neighbours out."""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from clipcap_rag.caption_index import CaptionIndex
from clipcap_rag.checkpoint import Checkpoint, read_checkpoint
from clipcap_rag.clipcap_weights import clipcap_checkpoint
from clipcap_rag.config import GenerationConfig
from clipcap_rag.encoder import Embeddings, Encoder, check_encoder, check_same_encoder
from clipcap_rag.errors import InputError
from clipcap_rag.generation import Written, write_captions
from clipcap_rag.hardware import pick_device, pick_dtype
from clipcap_rag.images import image_name
from clipcap_rag.progress import say
from clipcap_rag.rerank import Candidate, by_likelihood, by_similarity, distinct
from clipcap_rag.retriever import Neighbor, Neighbors, Retriever, index_choice
from clipcap_rag.shipped import STARTER, mending, starter_checkpoint

IndexChoice = str | Path | CaptionIndex | Sequence[str | Path | CaptionIndex] | None


@dataclass(frozen=True)
class CaptionResult:
    """What came of one image; `error` is a sentence when it could not be captioned, and then `caption` is None."""

    image: str
    caption: str | None
    candidates: list[Candidate] = field(default_factory=list)
    neighbors: list[Neighbor] = field(default_factory=list)
    error: str | None = None

    def to_json(self) -> dict[str, Any]:
        """The object that `clipcap-rag caption --json` prints for this image."""
        candidates = [candidate.to_json() for candidate in self.candidates]
        return dataclasses.asdict(self) | {"candidates": candidates}


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
        """base: the folder that a relative CLIP path in the checkpoint refers to."""
        self.checkpoint, self.device = checkpoint, pick_device(device)
        self.dtype = pick_dtype(dtype, self.device)
        self.model = checkpoint.model.to(self.device, self.dtype).eval()
        self._device_name, self._dtype_name, self._index_device, self._base = device, dtype, index_device, base
        self._indexes: dict[str, CaptionIndex] = {}

    @classmethod
    def from_pretrained(
        cls, path: str | Path, device: str = "auto", dtype: str = "auto", index_device: str = "auto"
    ) -> "Captioner":
        """Opens a checkpoint, the best one of a training run, or "starter", the captioner that comes with the package.

        Raises:
            InputError: there is none at `path`, or it is altered, incomplete or of another version.
        """
        options = {"device": device, "dtype": dtype, "index_device": index_device}
        if path == STARTER:
            with mending(starter_checkpoint()):
                return cls(read_checkpoint(starter_checkpoint()), **options)
        folder = Path(path)
        if not folder.is_dir():
            raise InputError(
                f"no model at {folder}; give --model the folder that `clipcap-rag train` wrote, or starter"
            )
        if (folder / "run.json").is_file():
            folder = folder / "best"
            if not folder.is_dir():
                raise InputError(f"{path} has no checkpoint yet; let `clipcap-rag train` finish its first epoch")
        return cls(read_checkpoint(folder), base=folder, **options)

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
        embeddings: np.ndarray | None = None,
        index: IndexChoice = "default",
        num_neighbors: int | None = None,
        generation: GenerationConfig | None = None,
        batch_size: int = 16,
        workers: int = 0,
        **settings: Any,
    ) -> list[CaptionResult]:
        """Captions images, one result each, in order.

        Args:
            images: one image or several: paths, PIL images, arrays [H, W, 3] or [N, H, W, 3], or encoded bytes.
            embeddings: CLIP image embeddings [N, D] instead of images, as they come from the tower.
            index: "default" for the one the model was trained with, None for no retrieval, a name or path, an open
                `CaptionIndex`, or a list of these, where a string may end in ":WEIGHT".
            num_neighbors: neighbours in all (K); 0 turns retrieval off; None takes the checkpoint's number.
            generation: how captions are written and ranked.
            batch_size: images at a time.
            workers: processes that decode images.
            settings: fields of `GenerationConfig` by name, in place of those of `generation`.

        Raises:
            InputError: an index that is missing or was built with another CLIP model, embeddings of another width, or
                an unknown setting.
        """
        return list(self.stream(images, embeddings, index, num_neighbors, generation, batch_size, workers, **settings))

    def stream(
        self,
        images: Any = None,
        embeddings: np.ndarray | None = None,
        index: IndexChoice = "default",
        num_neighbors: int | None = None,
        generation: GenerationConfig | None = None,
        batch_size: int = 16,
        workers: int = 0,
        **settings: Any,
    ) -> Iterator[CaptionResult]:
        """Like `caption`, but yields each result as soon as its batch is done."""
        if (images is None) == (embeddings is None):
            raise InputError("give either images or embeddings")
        generation = (generation or GenerationConfig()).replaced(**settings)
        retriever, k = self.retriever(index, num_neighbors)
        if images is not None:
            images = [images] if _is_one(images) else list(images)
            names = [image_name(image, position) for position, image in enumerate(images)]
            batches = ((part.embeddings, part.digests, part.errors) for part in
                       self.encoder.iter_images(images, batch_size, workers))  # fmt: skip
        else:
            raw = self._checked(embeddings)
            names = [f"embedding-{position}" for position in range(len(raw))]
            batches = _embedding_batches(raw, batch_size)
        start = 0
        for vectors, digests, errors in batches:
            good = [place for place, error in enumerate(errors) if error is None]
            kept = Embeddings(vectors.vectors[good], vectors.norms[good])
            neighbors = retriever.search(kept.vectors, k)
            ranked = iter(self.write(kept, neighbors, [digests[place] for place in good], generation))
            listed = iter(neighbors.listed())
            for place, error in enumerate(errors):
                name = names[start + place]
                if error is not None:
                    yield CaptionResult(name, None, error=error)
                    continue
                candidates, around = next(ranked), next(listed)
                if candidates and candidates[0].caption:
                    yield CaptionResult(name, candidates[0].caption, candidates, around)
                else:
                    yield CaptionResult(name, None, error=f"{name}: the model wrote no words; try --decoding beam")
            start += len(errors)

    def write(
        self, images: Embeddings, neighbors: Neighbors, digests: Sequence[bytes], generation: GenerationConfig
    ) -> list[list[Candidate]]:
        """Candidates, best first, for image embeddings and the neighbours they are to be written with.

        Args:
            images: B image embeddings.
            neighbors: K neighbours of each; K may be 0.
            digests: per image, the bytes that with the seed determine its samples.
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
            )
        if generation.decoding != "clipcap":  # which gives all its beams
            written = [distinct(candidates) for candidates in written]
        return self._rank(written, images.vectors, generation)

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

    def _rank(
        self, written: list[list[Written]], images: np.ndarray, generation: GenerationConfig
    ) -> list[list[Candidate]]:
        """Embeds each distinct text once and orders the candidates of each image."""
        texts = list(dict.fromkeys(candidate.caption for candidates in written for candidate in candidates))
        if not texts:
            return [[] for _ in written]
        place = {text: number for number, text in enumerate(texts)}
        embedded = self.encoder.encode_text(texts).vectors
        ranked = []
        for candidates, image in zip(written, images, strict=True):
            similarities = embedded[[place[candidate.caption] for candidate in candidates]] @ image
            if generation.decoding == "sample":
                weight = generation.log_probability_weight
                ranked.append(by_similarity(candidates, similarities, self.encoder.logit_scale, weight))
            else:
                ranked.append(by_likelihood(candidates, similarities))
        return ranked

    def _checked(self, embeddings: np.ndarray) -> np.ndarray:
        raw = np.atleast_2d(np.asarray(embeddings, np.float32))
        dim = self.checkpoint.config.clip_dim
        if raw.ndim != 2 or raw.shape[1] != dim:
            raise InputError(f"embeddings have shape {raw.shape}; this model reads [N, {dim}]")
        if not np.isfinite(raw).all() or not np.linalg.norm(raw, axis=1).all():
            raise InputError("an embedding is zero or not finite; leave it out")
        return raw

    # -- indexes

    def open_index(self, index: str | Path | CaptionIndex) -> CaptionIndex:
        """Opens an index, once, and checks that this model's CLIP made it."""
        if isinstance(index, CaptionIndex):
            opened = index
        else:
            opened = self._indexes.get(str(index)) or CaptionIndex.open(index, self._index_device)
            self._indexes[str(index)] = opened
        check_same_encoder(self.checkpoint.encoder, "the model", opened.encoder, f"the index {opened.path}")
        return opened

    def retriever(self, index: IndexChoice, num_neighbors: int | None = None) -> tuple[Retriever, int]:
        """The retriever over the chosen indexes and the number of neighbours; both as `caption` takes them."""
        k = self.checkpoint.num_neighbors if num_neighbors is None else num_neighbors
        if k < 0:
            raise InputError(f"num_neighbors is {k}; it must be 0 or more")
        if isinstance(index, str) and index == "default":
            index = self._default_index() if k else None
        elif index is not None and not self.model.mapper.uses_neighbors:
            raise InputError(
                f"this model's {self.checkpoint.config.mapper} mapper looks at no neighbours; "
                "drop --index or train one with --mapper retrieval"
            )
        if index is None or k == 0:
            return Retriever([]), 0
        choices = [index] if isinstance(index, (str, Path, CaptionIndex)) else list(index)
        named = [(choice, 1.0) if isinstance(choice, CaptionIndex) else index_choice(str(choice)) for choice in choices]
        retriever = Retriever([self.open_index(choice) for choice, _ in named], [weight for _, weight in named])
        held = sum(len(opened) for opened in retriever.indexes)
        if k > held:
            say(f"{k} neighbours were asked for but the index holds {held} captions; using what there is")
        return retriever, k

    def _default_index(self) -> str | None:
        recorded = self.checkpoint.index
        if recorded is None:
            return None
        if recorded["path"] == STARTER or Path(recorded["path"]).is_dir():
            return recorded["path"]
        raise InputError(
            f"the index this model was trained with, {recorded['path']}, is gone; "
            "pass --index NAME|PATH for another, or --no-retrieval"
        )


def _is_one(images: Any) -> bool:
    return isinstance(images, str | bytes | Path | Image.Image) or (isinstance(images, np.ndarray) and images.ndim < 4)


def _embedding_batches(raw: np.ndarray, size: int) -> Iterator[tuple[Embeddings, list[bytes], list[None]]]:
    for start in range(0, len(raw), size):
        part = raw[start : start + size]
        norms = np.linalg.norm(part, axis=1)
        yield Embeddings(part / norms[:, None], norms), [row.tobytes() for row in part], [None] * len(part)
