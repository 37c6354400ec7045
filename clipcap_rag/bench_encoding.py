"""Comparisons of embedding: captions, pixels, JPEG files, and the candidates of one photo."""

from collections.abc import Iterator

import numpy as np
import torch
from PIL import Image

from clipcap_rag.bench_protocol import Comparison, Disagreement
from clipcap_rag.bench_subjects import Subjects, with_amx
from clipcap_rag.encoder import Encoder

_BATCH = 32


def comparisons(subjects: Subjects) -> Iterator[Comparison]:
    """Each is made when the one before it is done, so that their inputs do not add up."""
    captions = subjects.captions(subjects.sizes.captions)
    words = sum(len(caption.split()) for caption in captions) / len(captions)
    size = f"{len(captions)} captions, {words:.1f} words in the mean"
    whole = "open_clip's encode_text over the whole context, float32"
    yield _text("captions, float32", size, subjects.float32, subjects.float32, captions, whole, 6.0)
    yield _text("captions, bfloat16", size, subjects.bfloat16, subjects.float32, captions, whole, with_amx(12.0))
    candidates = subjects.captions(subjects.sizes.candidates)
    size = f"{len(candidates)} captions of one photo"
    yield _text("rerank candidates", size, subjects.bfloat16, subjects.float32, candidates, whole, 6.0)
    pixels = torch.stack([subjects.float32.preprocess(Image.open(file)) for file in subjects.photos[:_BATCH]])
    yield _tower("image tower, float32", subjects.float32, subjects.float32, pixels, 0.95)
    yield _tower("image tower, bfloat16", subjects.bfloat16, subjects.float32, pixels, with_amx(6.0))
    yield _files("JPEG files, bfloat16", subjects, subjects.bfloat16, with_amx(4.0))


def same(a: np.ndarray, b: np.ndarray, exact: bool) -> str:
    """How closely two sets of unit embeddings [N, D] agree: 1e-4 in float32, a cosine of 0.999 in bfloat16."""
    if exact:
        difference = float(np.abs(a - b).max())
        if difference > 1e-4:
            raise Disagreement(f"the embeddings differ by {difference:.2g}")
        return f"largest difference {difference:.1g}"
    cosine = float((a * b).sum(axis=1).min())
    if cosine < 0.999:
        raise Disagreement(f"the smallest cosine is {cosine:.5f}")
    return f"smallest cosine {cosine:.5f}"


def _plain_text(encoder: Encoder, texts: list[str]) -> np.ndarray:
    with torch.inference_mode():
        parts = [
            encoder.model.encode_text(encoder.tokenizer(texts[start : start + _BATCH]).to(encoder.device), True)
            for start in range(0, len(texts), _BATCH)
        ]
    return torch.cat(parts).float().cpu().numpy()


def _text(
    name: str, size: str, encoder: Encoder, plain: Encoder, texts: list[str], slow: str, target: float | None
) -> Comparison:
    exact = encoder.dtype is torch.float32
    return Comparison(
        name, size, f"length-sorted, cut to the tokens that are there, {_format(encoder)}", slow, target,
        lambda: encoder.encode_text(texts),
        lambda: _plain_text(plain, texts),
        lambda: same(encoder.encode_text(texts).vectors, _plain_text(plain, texts), exact),
    )  # fmt: skip


def _plain_tower(encoder: Encoder, pixels: torch.Tensor) -> np.ndarray:
    with torch.inference_mode():
        return encoder.model.encode_image(pixels.to(encoder.device), normalize=True).float().cpu().numpy()


def _tower(name: str, encoder: Encoder, plain: Encoder, pixels: torch.Tensor, target: float | None) -> Comparison:
    exact = encoder.dtype is torch.float32
    return Comparison(
        name, f"{len(pixels)} images", f"our encoder, {_format(encoder)}", "open_clip's tower, float32", target,
        lambda: encoder.encode_pixels(pixels),
        lambda: _plain_tower(plain, pixels),
        lambda: same(encoder.encode_pixels(pixels).vectors, _plain_tower(plain, pixels), exact),
    )  # fmt: skip


def _files(name: str, subjects: Subjects, encoder: Encoder, target: float | None) -> Comparison:
    files, plain = subjects.photos, subjects.float32

    def one_by_one() -> np.ndarray:
        pictures = (plain.preprocess(Image.open(file).convert("RGB"))[None] for file in files)
        return np.concatenate([_plain_tower(plain, picture) for picture in pictures])

    def ours() -> np.ndarray:
        return encoder.encode_image(files, _BATCH, workers=1).embeddings.vectors

    return Comparison(
        name, f"{len(files)} JPEG files of 500 x 375 pixels", f"batches, decoded beside the tower, {_format(encoder)}",
        "open, preprocess and encode one by one, float32", target, ours, one_by_one,
        lambda: same(ours(), one_by_one(), exact=False),
    )  # fmt: skip


def _format(encoder: Encoder) -> str:
    return str(encoder.dtype).removeprefix("torch.")
