"""Images and texts -> CLIP embeddings of unit length, with what identifies the encoder."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from clipcap_rag.clip_models import open_model, parse_clip, stored_clip
from clipcap_rag.embeddings import Embeddings, EncodedImages
from clipcap_rag.encoder_record import PROBE_SENTENCES, check_same_encoder, encoder_record, probe_image, probe_sentences
from clipcap_rag.errors import InputError
from clipcap_rag.hardware import pick_device, pick_dtype
from clipcap_rag.image_loader import Preprocess, load_images
from clipcap_rag.image_tower import ImageTower, Views
from clipcap_rag.images import ImageLike, image_name
from clipcap_rag.text_tower import TextTower

__all__ = [
    "Encoder",
    "check_encoder",
    "check_same_encoder",
    "parse_clip",
    "stored_clip",
]

# Tokens whose time one more batch costs (ViT-B-32 on two cores); in bfloat16 each new shape has to be prepared.
_BATCH_COST, _BATCH_COST_HALF = 400, 1200


class Encoder:
    """A CLIP model that is ready to embed.

    Attributes:
        clip: the string that loads this model again: NAME:TAG, local-dir:ABSOLUTE-PATH or hf-hub:ORG/NAME.
        dim: width of the embeddings (D).
        device: where it computes.
        dtype: the number format of its weights; bfloat16 leaves out image towers that it would hurt.
        logit_scale: factor between a cosine and the model's logit.
        context_length: most tokens of a text that it reads; longer texts are cut as open_clip does.
        preprocess: RGB picture -> pixels [3, H, W] float32.
        model, tokenizer: open_clip's own.
    """

    def __init__(
        self,
        clip: str,
        dim: int,
        model: torch.nn.Module,
        tokenizer: Callable[[list[str]], torch.Tensor],
        preprocess: Preprocess,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.clip, self.dim, self.device, self.dtype, self.preprocess = clip, dim, device, dtype, preprocess
        self.logit_scale = model.logit_scale.exp().item()
        self.context_length: int = tokenizer.context_length
        self.tokenizer = tokenizer
        tower = model.visual
        self._pixel_dtype = torch.float32 if dtype is torch.bfloat16 and _is_delicate(tower) else dtype
        model.visual = torch.nn.Identity()  # taken out, because what was rounded once stays rounded
        model.to(device=device, dtype=dtype)
        # convolutions on a CPU are nearly twice as fast when the channels of a pixel lie side by side
        model.visual = tower.to(device=device, dtype=self._pixel_dtype, memory_format=torch.channels_last)
        self.model = model.eval().requires_grad_(False)
        self._text_tower, self._image_tower = TextTower(self.model), ImageTower(self.model.visual)
        self._records: dict[tuple[str, ...], dict[str, Any]] = {}

    @classmethod
    def load(cls, clip: str, device: str = "auto", dtype: str = "auto", base: Path | None = None) -> "Encoder":
        """Loads a CLIP model.

        Args:
            clip: NAME, NAME:TAG, local-dir:PATH, the path of a folder, or hf-hub:ORG/NAME.
            device: auto, cpu, cuda or cuda:N.
            dtype: auto, float32, bfloat16 or float16.
            base: the folder that a relative PATH is looked up in first, then the current one.

        Raises:
            InputError: there is no such model, it is not here and cannot be fetched, or its files are faulty.
        """
        chosen = pick_device(device)
        number_format = pick_dtype(dtype, chosen)
        name, tag = parse_clip(clip, base)
        return cls(name if tag is None else f"{name}:{tag}", *open_model(name, tag), chosen, number_format)

    def encode_text(
        self, texts: Sequence[str], batch_size: int = 256, on_progress: Callable[[int], None] | None = None
    ) -> Embeddings:
        """Embeds N texts; long ones are batched with long ones and no batch is longer than it must be.

        Args:
            texts: captions; those longer than the tower's context are cut as open_clip does.
            batch_size: most texts at a time.
            on_progress: called with the number of texts that were just done.

        Raises:
            InputError: the model gives a text an embedding that is zero or not finite.
        """
        if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
            raise InputError("texts must be a list of strings; one text goes in a list of its own")
        if batch_size < 1:
            raise InputError(f"batch_size is {batch_size}; it must be at least 1")
        raw = np.zeros((len(texts), self.dim), np.float32)
        if not len(texts):
            return Embeddings.of(raw)
        tokens = torch.cat([self.tokenizer(list(texts[start : start + batch_size])).int()
                            for start in range(0, len(texts), batch_size)])  # fmt: skip
        lengths = self._text_tower.lengths(tokens)
        cost = _BATCH_COST if self.dtype is torch.float32 else _BATCH_COST_HALF
        order = lengths.argsort(descending=True, stable=True)  # the longest first: a lack of memory shows at once
        for rows in _batches(order, lengths, batch_size, cost):
            batch = tokens[rows, : int(lengths[rows[0]])].to(self.device, torch.long)
            with torch.inference_mode(), _enough_memory(batch_size):
                raw[rows.numpy()] = self._text_tower(batch).float().cpu().numpy()
            if on_progress:
                on_progress(len(rows))
        embeddings = Embeddings.of(raw)
        faulty = np.flatnonzero(~_usable(embeddings))
        if len(faulty):
            raise InputError(f"{self.clip} gives no usable embedding for {texts[faulty[0]]!r}; use --dtype float32")
        return embeddings

    def encode_pixels(self, pixels: torch.Tensor) -> Embeddings:
        """Embeds preprocessed images [B, 3, H, W]."""
        with torch.inference_mode(), _enough_memory(len(pixels)):
            pixels = pixels.to(self.device, self._pixel_dtype, memory_format=torch.channels_last)
            raw = self.model.encode_image(pixels, normalize=False)
        return Embeddings.of(raw.float().cpu().numpy())

    def encode_views(self, pixels: torch.Tensor) -> Embeddings:
        """Embeds B photos, with trunk features, by their preprocessed views [B, V, 3, H, W] (`image_tower.Views`)."""
        with torch.inference_mode(), _enough_memory(len(pixels)):
            raw, trunk = self._image_tower.views(pixels.to(self.device, self._pixel_dtype))
        return Embeddings.of(raw.float().cpu().numpy(), trunk.cpu().numpy())

    def iter_images(
        self, images: Sequence[ImageLike], batch_size: int = 32, workers: int = 0, trunk: bool = False
    ) -> Iterator[EncodedImages]:
        """Embeds images and yields them batch by batch, in order; arguments and errors as for `encode_image`."""
        preprocess, encode, start = self.preprocess, self.encode_pixels, 0
        if trunk:
            preprocess, encode = Views(preprocess), self.encode_views
        for loaded in load_images(images, preprocess, batch_size, workers):
            errors, size = list(loaded.errors), len(loaded.errors)
            vectors, norms = np.zeros((size, self.dim), np.float32), np.zeros(size, np.float32)
            features = np.zeros((size, self.trunk_dim), np.float32) if trunk else None
            good = [place for place, error in enumerate(errors) if error is None]
            if good:
                encoded = encode(torch.from_numpy(loaded.pixels))
                vectors[good], norms[good] = encoded.vectors, encoded.norms
                if trunk:
                    features[good] = encoded.trunk
                for place in np.array(good)[~_usable(encoded)]:
                    name = image_name(images[start + place], start + place)
                    errors[place] = f"{self.clip} gives no usable embedding for {name}; use --dtype float32"
                    vectors[place], norms[place] = 0, 0
            yield EncodedImages(Embeddings(vectors, norms, features), errors, loaded.digests)
            start += size

    def encode_image(
        self,
        images: Sequence[ImageLike],
        batch_size: int = 32,
        workers: int = 0,
        on_progress: Callable[[int], None] | None = None,
        trunk: bool = False,
    ) -> EncodedImages:
        """Embeds N images; one that cannot be read gets an error and a zero vector, the others are encoded.

        Args:
            images: paths, file contents, PIL images or arrays.
            batch_size: images at a time.
            workers: processes that decode; 0 decodes in this one.
            on_progress: called with the number of images that were just done.
            trunk: also gives features of the trunk, for which several views of each image are encoded.

        Raises:
            InputError: a worker process was killed, or the arguments are impossible.
        """
        nothing = np.zeros((0, self.trunk_dim), np.float32) if trunk else None
        done = [
            EncodedImages(Embeddings(np.zeros((0, self.dim), np.float32), np.zeros(0, np.float32), nothing), [], [])
        ]
        for part in self.iter_images(images, batch_size, workers, trunk):
            done.append(part)
            if on_progress:
                on_progress(len(part.errors))
        return EncodedImages(
            Embeddings.joined([part.embeddings for part in done]),
            [error for part in done for error in part.errors],
            [digest for part in done for digest in part.digests],
        )

    @cached_property
    def trunk_dim(self) -> int:
        """Width T of the features of the trunk."""
        return self.encode_views(Views(self.preprocess)(probe_image())[None]).trunk.shape[1]

    def record(self) -> dict[str, Any]:
        """What an artefact stores of its encoder: `clip`, `dim` and the embeddings of fixed probes; ready for JSON."""
        return self._record(PROBE_SENTENCES)

    def _record(self, sentences: Sequence[str]) -> dict[str, Any]:
        known = tuple(sentences)
        if known not in self._records:
            image = self.encode_pixels(self.preprocess(probe_image())[None]).vectors[0]
            self._records[known] = encoder_record(self.clip, sentences, self.encode_text(sentences).vectors, image)
        return self._records[known]


def check_encoder(record: dict[str, Any], encoder: Encoder, owner: str) -> None:
    """Raises InputError, naming both models, if `encoder` is not the one that the record of `owner` describes."""
    sentences = probe_sentences(record, owner)
    check_same_encoder(record, owner, encoder._record(sentences), "the CLIP model that was loaded")


def _batches(order: torch.Tensor, lengths: torch.Tensor, size: int, cost: int) -> Iterator[torch.Tensor]:
    """Cuts rows in falling order of length into batches of at most `size`, and where that saves more than it costs.

    A shorter batch saves the padding of all texts that follow; a further batch costs as much as `cost` tokens.
    """
    start, ordered = 0, lengths[order].tolist()
    for place, length in enumerate(ordered):
        following = min(start + size, len(ordered)) - place
        if place - start == size or (ordered[start] - length) * following > cost:
            yield order[start:place]
            start = place
    yield order[start:]


def _is_delicate(tower: torch.nn.Module) -> bool:
    """Whether bfloat16 is too coarse for an image tower: one with depthwise convolutions.

    Each of their outputs is a sum of few products, so errors of the weights do not average out. Measured with a
    MobileNetV2 on 96 photos, smallest cosine to the exact embedding: 0.9964 with all weights rounded to bfloat16,
    0.9996 with all but theirs and the normalisations'. float16 does no harm (0.99999).
    """
    return any(isinstance(part, torch.nn.Conv2d) and part.groups > 1 for part in tower.modules())


def _usable(embeddings: Embeddings) -> np.ndarray:
    return np.isfinite(embeddings.vectors).all(axis=1) & np.isfinite(embeddings.norms) & (embeddings.norms > 0)


@contextmanager
def _enough_memory(batch_size: int) -> Iterator[None]:
    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        raise InputError(f"the GPU has not enough memory for batches of {batch_size}; lower --batch-size") from error
