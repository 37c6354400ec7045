"""Photos to tags: the entries of a caption index that are nearest to each photo."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from clipcap_rag.artifact import disk_errors, write_bytes
from clipcap_rag.caption_index import CaptionIndex
from clipcap_rag.encoder import Encoder, check_encoder
from clipcap_rag.errors import InputError
from clipcap_rag.images import ImageLike, expand_images, image_name
from clipcap_rag.neighbors import Neighbor
from clipcap_rag.retriever import Retriever

_SUFFIX = ".knn"


@dataclass(frozen=True)
class ImageTags:
    """The tags of one image, best first; none where there is an error."""

    image: str
    tags: list[Neighbor]
    error: str | None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class Tagger:
    """An index and the CLIP model that made it, ready to tag.

    Attributes:
        index: what the tags come from.
        encoder: embeds the photos.
    """

    def __init__(self, index: CaptionIndex, encoder: Encoder):
        """Raises InputError if `encoder` is not the model that the index was made with."""
        check_encoder(index.encoder, encoder, f"the index {index.path}")
        self.index, self.encoder, self._retriever = index, encoder, Retriever([index])

    @classmethod
    def load(
        cls,
        index: str | Path,
        clip: str | None = None,
        device: str = "auto",
        dtype: str = "auto",
        index_device: str = "auto",
    ) -> "Tagger":
        """Opens an index by name or path and loads its CLIP model, or `clip` where that has moved."""
        opened = CaptionIndex.open(index, index_device)
        return cls(opened, Encoder.load(clip or opened.encoder["clip"], device, dtype, base=opened.path))

    def tag_images(
        self, images: Sequence[ImageLike], k: int = 10, batch_size: int = 32, workers: int = 0
    ) -> Iterator[ImageTags]:
        """Yields for each image, in order, the k nearest entries; entries that differ in case or marks count once.

        Args:
            images: paths, file contents, PIL images or arrays.
            batch_size: images at a time.
            workers: processes that decode; 0 decodes in this one.
        """
        done = 0
        for encoded in self.encoder.iter_images(images, batch_size, workers):
            found = self._retriever.search(encoded.embeddings.vectors, k).listed()
            for tags, error in zip(found, encoded.errors, strict=True):
                yield ImageTags(image_name(images[done], done), tags if error is None else [], error)
                done += 1


def side_files(arguments: Sequence[str | Path], out: str | Path | None = None) -> dict[Path, Path]:
    """The tag file of each image that files, folders and patterns name: its whole name and .knn, `photo.jpg.knn`.

    Args:
        arguments: as in `expand_images`.
        out: folder for the tag files, in the folders of the images below what the arguments have in common; None
            writes each beside its image.
    """
    found = {argument: expand_images([argument]) for argument in arguments}
    images = list(dict.fromkeys(image for part in found.values() for image in part))
    if not images:
        raise InputError("no image is given; name files, folders or patterns such as 'photos/*.jpg'")
    if out is None:
        return {image: image.with_name(image.name + _SUFFIX) for image in images}
    folders = [Path(argument) if Path(argument).is_dir() else image.parent for argument, part in found.items()
               for image in part]  # fmt: skip
    base = os.path.commonpath([os.path.abspath(folder) for folder in folders])
    return {
        image: Path(out) / (os.path.relpath(os.path.abspath(image), base) + _SUFFIX) for image in images
    }  # fmt: skip


def write_tags(file: Path, tags: ImageTags) -> None:
    """Writes a tag file, whole or not at all: one entry a line, best first, as clip-grams does.

    Raises:
        InputError: the disk is full or read-only.
    """
    with disk_errors(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(file, "".join(f"{tag.caption}\n" for tag in tags.tags).encode())
