"""CLIPScore and RefCLIPScore: how near a caption is to its photo, and to its references, in a CLIP space."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from clipcap_rag.artifact import read_unchecked
from clipcap_rag.bootstrap import Measure, mean
from clipcap_rag.caption_template import fill_template
from clipcap_rag.checkpoint import KIND, MANIFEST, VERSION, checkpoint_folder
from clipcap_rag.encoder import Encoder
from clipcap_rag.encoder_record import same_encoder
from clipcap_rag.errors import InputError
from clipcap_rag.images import photo_finder
from clipcap_rag.progress import bar

TEMPLATE, _WEIGHT = "A photo depicts {}", 2.5


class ClipScores:
    """CLIPScore and RefCLIPScore (Hessel et al. 2021) by one CLIP model.

    A captioner that is conditioned on the same model, or reranks with it, is judged by its own yardstick.
    """

    def __init__(self, encoder: Encoder, images: np.ndarray):
        """images: [N, D] unit-length embeddings of the photos by `encoder`."""
        self.encoder, self.images = encoder, images

    def __call__(self, references: Sequence[Sequence[str]], captions: Sequence[str]) -> dict[str, Measure]:
        """Both as the paper defines them, raw: 2.5 times the cosine with the photo, and its harmonic mean with the
        largest cosine with a reference; cosines below 0 count as 0."""
        texts = self._encode(captions)
        near = _WEIGHT * np.maximum(np.einsum("nd,nd->n", texts, self.images), 0)
        owner = np.repeat(np.arange(len(captions)), [len(photo) for photo in references])
        others = self._encode([text for photo in references for text in photo])
        like = np.zeros(len(captions))
        np.maximum.at(like, owner, np.einsum("md,md->m", others, texts[owner]))
        total = near + like
        both = np.divide(2 * near * like, total, out=np.zeros_like(total), where=total > 0)
        return {"CLIPScore": mean(near), "RefCLIPScore": mean(both)}

    def _encode(self, captions: Sequence[str]) -> np.ndarray:
        return self.encoder.encode_text(fill_template(TEMPLATE, captions)).vectors.astype(float)


def clip_scores(
    clip: str, folder: Path, images: Sequence[tuple[str, str]], captioner: str | None, device: str, dtype: str
) -> tuple[ClipScores, dict[str, Any]]:
    """The judge for photos of a folder, and what a result says of it: {"clip", "independent", "note"}.

    Args:
        clip: CLIP model string.
        images: per photo, its name below the folder and its stem.
        captioner: the model that wrote the captions, if that is known; its CLIP model is compared.

    Raises:
        InputError: the model or the captioner cannot be opened, or a photo is not there or cannot be read.
    """
    if not folder.is_dir():
        raise InputError(f"the image folder {folder} does not exist; give --photos the folder of the photos")
    find = photo_finder(folder)
    paths = [find(name, stem) for name, stem in images]
    lost = [path.name for path in paths if not path.is_file()]
    if lost:
        raise InputError(
            f"{len(lost)} of the photos are not below {folder}, such as {lost[0]}; give --photos their folder"
        )
    encoder = Encoder.load(clip, device, dtype)
    with bar("photos for CLIPScore", total=len(paths), unit="photo") as progress:
        encoded = encoder.encode_image(paths, on_progress=progress.update)
    error = next((error for error in encoded.errors if error), None)
    if error:
        raise InputError(f"{error}; CLIPScore needs every photo")
    return ClipScores(encoder, encoded.embeddings.vectors), independence(encoder, captioner)


def independence(encoder: Encoder, captioner: str | None) -> dict[str, Any]:
    """Whether a CLIP model is another than a captioner's: {"clip", "independent" (None if not known), "note"}."""
    if captioner is None:
        note = "it is not known whether this CLIP model also conditioned or reranked the captions; --model says it"
        return {"clip": encoder.clip, "independent": None, "note": note}
    folder = checkpoint_folder(captioner)
    record = read_unchecked(folder, MANIFEST, KIND, VERSION)["encoder"]
    if same_encoder(record, f"the model {captioner}", encoder.record(), "the CLIP model of CLIPScore"):
        note = f"{encoder.clip} is the captioner's own CLIP model, which also reranked; CLIPScore flatters it"
        return {"clip": encoder.clip, "independent": False, "note": note}
    return {"clip": encoder.clip, "independent": True, "note": ""}
