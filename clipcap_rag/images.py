"""Pictures of any kind and origin -> RGB images, and the names under which they are reported."""

import glob
import hashlib
import io
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from clipcap_rag.errors import InputError

ImageLike = str | Path | bytes | Image.Image | np.ndarray

# Formats are named one by one because PIL's full list has some that start other programs (EPS runs Ghostscript).
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "AVIF", "JPEG2000", "PPM", "TGA", "ICO")
IMAGE_EXTENSIONS = frozenset({
    ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".webp", ".gif", ".bmp", ".dib", ".tif", ".tiff",
    ".avif", ".jp2", ".j2k", ".ppm", ".pgm", ".pbm", ".pnm", ".tga", ".ico",
})  # fmt: skip
_MOST_OBLONG = 200  # ratio of the sides; CLIP enlarges the short side, so a strip of 1 x 60000 would fill the memory
_ORIENTATION_TAG = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def decode_image(image: ImageLike) -> Image.Image:
    """Turns a path, file content, PIL image or array into an upright RGB image that carries no metadata.

    EXIF orientation is applied, transparency is laid over white, of an animation the first picture is taken. 16-bit
    greys are scaled to 8 bits; 32-bit and float greys are read as 0..1 (float only), 0..255 or 0..65535, the smallest
    range that holds them. Decoding the result again changes nothing.

    Args:
        image: an array is [H, W], [H, W, 1], [H, W, 3] or [H, W, 4] with alpha last, uint8 or float from 0 to 1.

    Raises:
        InputError: the image is missing, empty, truncated, not an image, a decompression bomb or a hair-thin strip.
    """
    if isinstance(image, np.ndarray):
        return _to_rgb(_from_array(image), "the array")
    if isinstance(image, Image.Image):
        return _to_rgb(image, "the PIL image")
    if isinstance(image, bytes | bytearray | memoryview):
        if not len(image):
            raise InputError("the image bytes are empty; give the content of an image file")
        return _to_rgb(io.BytesIO(image), "the image bytes")
    if not isinstance(image, str | Path):
        raise InputError(f"an image cannot be a {type(image).__name__}; give a path, bytes, a PIL image or an array")
    name = _printable(image)
    if not os.path.exists(image):
        raise InputError(f"there is no image {name}; check the path")
    if not os.path.isfile(image):  # a named pipe would block for ever
        raise InputError(f"{name} is not a file; give the path of an image")
    if not os.path.getsize(image):
        raise InputError(f"{name} is empty; copy the image again")
    return _to_rgb(Path(image), name)


def _printable(path: str | Path) -> str:
    """A path as text that can be stored and printed, whatever bytes the file system allows in it."""
    return str(path).encode("utf-8", "backslashreplace").decode()


def _to_rgb(source: Path | io.BytesIO | Image.Image, name: str) -> Image.Image:
    """Decodes and converts; `name` stands for the image in errors."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd metadata; the pixels count
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            if isinstance(source, Image.Image):
                return _convert(source)
            with Image.open(source, formats=_FORMATS) as image:
                return _convert(image)
    except InputError as error:
        raise InputError(f"{name} {error}") from error
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise InputError(f"{name} {_too_large()}") from error
    except Image.UnidentifiedImageError as error:
        raise InputError(f"{name} is not an image of a known format; give a JPEG, PNG or the like") from error
    except Exception as error:  # PIL's decoders raise errors of every class on damaged files
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{name} is a damaged image ({reason}); copy it again") from error


def _too_large() -> str:
    limit = (Image.MAX_IMAGE_PIXELS or 0) / 1e6
    return f"has more than {limit:.0f} million pixels, as a decompression bomb has; make it smaller first"


def _convert(image: Image.Image) -> Image.Image:
    _check_size(image.size)  # again, because warnings filters belong to all threads and may have been changed
    image.load()
    _check_size(image.size)  # icons reveal their true size only now
    turn = _TURNS.get(_orientation(image))
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = _from_grey(image)
    elif image.has_transparency_data:
        image = _over_white(image)
    image = image.convert("RGB")  # always a new plain image, also where it is RGB
    image.info = {}  # else the orientation would be applied again when the result is decoded
    return image.transpose(turn) if turn is not None else image


def _check_size(size: tuple[int, int]) -> None:
    width, height = size
    if not width or not height:
        raise InputError("has no pixels; give another image")
    if Image.MAX_IMAGE_PIXELS is not None and width * height > Image.MAX_IMAGE_PIXELS:
        raise InputError(_too_large())
    if max(size) > _MOST_OBLONG * min(size):
        raise InputError(f"is a strip of {width} x {height} pixels; crop it to sides of at most {_MOST_OBLONG} : 1")


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(_ORIENTATION_TAG, 1)
    except Exception:  # damaged metadata of every kind; the picture is shown as it lies, as viewers do
        return 1


def _over_white(image: Image.Image) -> Image.Image:
    if image.mode == "La":
        image = image.convert("LA")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)


def _from_grey(image: Image.Image) -> Image.Image:
    """A grey image of more than 8 bits, scaled to 8."""
    values = np.nan_to_num(np.asarray(image, np.float64), posinf=65535, neginf=0)
    top = values.max()
    if image.mode.startswith("I;16"):
        peak = 65535
    elif image.mode == "F" and top <= 1:
        peak = 1
    else:
        peak = 255 if top <= 255 else 65535
    return Image.fromarray(np.rint(values.clip(0, peak) * (255 / peak)).astype(np.uint8))


def _from_array(array: np.ndarray) -> Image.Image:
    shape = list(array.shape)
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3, 4)):
        raise InputError(f"the array has shape {shape}; give [H, W], [H, W, 1], [H, W, 3] or [H, W, 4], channels last")
    if not array.size:
        raise InputError(f"the array of shape {shape} has no pixels; give another image")
    if array.dtype.kind == "f":
        low, high = float(array.min()), float(array.max())
        if not (low >= -1e-3 and high <= 1 + 1e-3):  # also true for NaN
            raise InputError(f"the float array has values from {low:g} to {high:g}; scale them to 0..1 or give uint8")
        array = np.rint(array.astype(np.float32).clip(0, 1) * 255).astype(np.uint8)
    elif array.dtype == bool:
        array = array.astype(np.uint8) * np.uint8(255)
    elif array.dtype != np.uint8:
        raise InputError(f"the array has type {array.dtype}; give uint8 from 0 to 255 or float from 0 to 1")
    return Image.fromarray(np.ascontiguousarray(array[:, :, 0] if array.shape[2:] == (1,) else array))


def image_name(image: ImageLike, position: int) -> str:
    """The label of an image in output: its path as given, else `image-<position>`."""
    return _printable(image) if isinstance(image, str | Path) else f"image-{position}"


def image_suffix(content: bytes) -> str:
    """The file extension that fits the content of an image file which `decode_image` takes."""
    with Image.open(io.BytesIO(content), formats=_FORMATS) as image:
        return {"JPEG": ".jpg", "MPO": ".jpg", "JPEG2000": ".jp2"}.get(image.format, f".{image.format.lower()}")


def image_digest(image: Image.Image) -> bytes:
    """16-byte hash of the size and pixels of an RGB image; it seeds what is random about this image."""
    header = f"{image.mode} {image.width} {image.height} ".encode()
    return hashlib.blake2b(header + image.tobytes(), digest_size=16).digest()


def expand_images(arguments: Sequence[str | Path]) -> list[Path]:
    """The image files that files, folders and glob patterns name, in the order given.

    Folders are searched with all below them, in sorted order, for files with a known image extension; the same holds
    for what a pattern finds. A file that is named itself is kept whatever it is called, also when it does not exist.

    Raises:
        InputError: an argument names no image, or there is no argument.
    """
    found: list[Path] = []
    for argument in arguments:
        part = _expand(argument)
        if not part:
            raise InputError(f"no image is found under {_printable(argument)!r}; check the path")
        found += part
    if not found:
        raise InputError("no image is given; name files, folders or patterns such as 'photos/*.jpg'")
    return found


def _expand(argument: str | Path) -> list[Path]:
    path, pattern = Path(argument), str(argument)
    if not pattern:  # Path("") is the current folder
        return []
    if os.path.exists(path) or not glob.has_magic(pattern):
        return _pictures(path) if os.path.isdir(path) else [path]
    matches = sorted(glob.glob(pattern, recursive=True))
    pictures = [
        picture for match in map(Path, matches) for picture in (_pictures(match) if match.is_dir() else [match])
    ]
    # "photos/**" matches a folder and its files
    return [picture for picture in dict.fromkeys(pictures) if picture.suffix.lower() in IMAGE_EXTENSIONS]


def _pictures(folder: Path) -> list[Path]:
    return [file for file in walk_files(folder) if file.suffix.lower() in IMAGE_EXTENSIONS]


def photo_finder(folder: Path) -> Callable[[str, str], Path]:
    """A function that finds photos of a folder by (name, stem).

    It returns `folder / name`, else, as people flatten the folders that COCO names, a picture with that stem anywhere
    below; where there is neither, the first.
    """
    by_stem: dict[str, Path] = {}

    def find(name: str, stem: str) -> Path:
        path = folder / name
        if path.is_file():
            return path
        if not by_stem:
            by_stem.update({picture.stem: picture for picture in _pictures(folder)})
        return by_stem.get(stem, path)

    return find


def walk_files(folder: Path) -> Iterator[Path]:
    """All files of a folder and then of the folders in it, each sorted by name, without hidden ones.

    Links to folders are followed, each folder is visited once. The files of one folder come in a row.

    Raises:
        InputError: a folder cannot be read.
    """
    waiting, seen = [folder], set()
    while waiting:
        current = waiting.pop()
        real = os.path.realpath(current)
        if real in seen:
            continue
        seen.add(real)
        try:
            with os.scandir(current) as scan:
                entries = sorted((entry.name, entry.is_dir()) for entry in scan if not entry.name.startswith("."))
        except OSError as error:
            raise InputError(f"cannot read the folder {_printable(current)}: {error.strerror}") from error
        yield from (current / name for name, is_dir in entries if not is_dir)
        waiting += [current / name for name, is_dir in reversed(entries) if is_dir]
