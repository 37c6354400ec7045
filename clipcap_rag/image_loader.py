"""Pictures -> batches of pixels in order, decoded here or in worker processes."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from clipcap_rag.errors import InputError
from clipcap_rag.images import ImageLike, decode_image, image_digest, image_name

Preprocess = Callable[[Image.Image], torch.Tensor]


@dataclass(frozen=True)
class LoadedImages:
    """A batch of B images, of which G could be read.

    Attributes:
        pixels: [G, 3, H, W] float32, what the CLIP model sees of the images that could be read, in order.
        errors: per image None, or a sentence that says why it could not be read.
        digests: per image the hash of its content, empty where it could not be read.
    """

    pixels: np.ndarray
    errors: list[str | None]
    digests: list[bytes]


def load_images(
    images: Sequence[ImageLike], preprocess: Preprocess, batch_size: int, workers: int
) -> Iterator[LoadedImages]:
    """Reads images batch by batch, in the order given.

    Args:
        images: paths, file contents, PIL images or arrays.
        preprocess: RGB picture -> pixels [3, H, W] float32; with workers it must be picklable.
        batch_size: images in a batch; the last may have fewer.
        workers: processes that read ahead; 0 reads in this process.

    Raises:
        InputError: a worker process was killed, a size is impossible, or `images` is one image.
    """
    if isinstance(images, str | bytes | Image.Image) or not hasattr(images, "__len__"):
        raise InputError(f"images is a {type(images).__name__}; give a list of images")
    if batch_size < 1:
        raise InputError(f"batch_size is {batch_size}; it must be at least 1")
    if workers < 0:
        raise InputError(f"workers is {workers}; it must be 0 or more")
    batches = -(-len(images) // batch_size)
    loader = DataLoader(
        _Pictures(images, preprocess),
        batch_size=batch_size,
        num_workers=0 if batches == 1 else min(workers, batches),
        collate_fn=_collate,
        generator=torch.Generator(),  # its own, or each pass would advance the generator of the whole program
    )
    try:
        yield from loader
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise InputError(
            f"a process that decodes images was killed, most often for lack of memory ({_one_line(error)}); "
            "use --workers 0 or a smaller --batch-size"
        ) from error


class _Picture(NamedTuple):
    pixels: np.ndarray | None
    error: str | None
    digest: bytes


class _Pictures(Dataset):
    def __init__(self, images: Sequence[ImageLike], preprocess: Preprocess) -> None:
        self.images, self.preprocess = images, preprocess

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, position: int) -> _Picture:
        image = self.images[position]
        try:
            picture = decode_image(image)
            return _Picture(self.preprocess(picture).numpy(), None, image_digest(picture))
        except InputError as error:
            return _Picture(None, str(error), b"")
        except Exception as error:  # one picture that breaks a decoder must not stop the others; it is reported
            reason = f"{type(error).__name__}: {_one_line(error)}"
            return _Picture(None, f"{image_name(image, position)} cannot be read ({reason}); give another image", b"")


def _collate(pictures: list[_Picture]) -> LoadedImages:
    # numpy arrays travel from a worker through a pipe, tensors through /dev/shm, which has 64 MB in a container
    pixels = [picture.pixels for picture in pictures if picture.pixels is not None]
    return LoadedImages(
        pixels=np.stack(pixels) if pixels else np.empty((0, 3, 0, 0), np.float32),
        errors=[picture.error for picture in pictures],
        digests=[picture.digest for picture in pictures],
    )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
