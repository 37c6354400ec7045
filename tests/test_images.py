"""Decoding: every mode, orientation and origin gives the right RGB pixels, everything else one sentence."""

import io
import os
import struct
import subprocess
import sys
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image

from clipcap_rag.errors import InputError
from clipcap_rag.images import IMAGE_EXTENSIONS, decode_image, expand_images, image_digest, image_name, walk_files

RAMP = np.linspace(0, 255, 24 * 16).reshape(16, 24).astype(np.uint8)
COLOR = np.stack([RAMP, RAMP[::-1], RAMP[:, ::-1]], axis=-1)
ORIENTATION = 0x0112


def grey(image):
    """The one channel [H, W] of an RGB image that must be grey."""
    pixels = np.asarray(image)
    assert (pixels == pixels[:, :, :1]).all()
    return pixels[:, :, 0]


def file_bytes(image, kind, **options):
    stream = io.BytesIO()
    if kind == "JPEG":  # coarse colors would blur across the edges that the tests look at
        options = {"quality": 95, "subsampling": 0} | options
    image.save(stream, kind, **options)
    return stream.getvalue()


def close(image, expected, tolerance=0):
    assert image.mode == "RGB" and type(image) is Image.Image
    np.testing.assert_allclose(np.asarray(image).astype(int), expected.astype(int), atol=tolerance)


# -- modes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "RGBX", "RGBa"])
def test_modes_that_pil_converts(mode):
    start = Image.fromarray(COLOR)
    image = start.convert("RGBA").convert("RGBa") if mode == "RGBa" else start.convert(mode)
    close(decode_image(image), np.asarray(image.convert("RGBA" if mode == "RGBa" else "RGB").convert("RGB")))


def test_lab():
    white = Image.merge("LAB", [Image.new("L", (8, 8), value) for value in (255, 128, 128)])
    assert np.asarray(decode_image(white)).min() > 250
    assert np.asarray(decode_image(file_bytes(white, "TIFF"))).min() > 250


@pytest.mark.parametrize("mode", ["LA", "La", "PA", "RGBA", "RGBa"])
def test_what_is_transparent_is_white(mode):
    image = Image.new("RGBA", (6, 4), (10, 10, 10, 255))
    image.paste((10, 10, 10, 0), (0, 0, 3, 4))
    if mode in ("La", "RGBa"):
        image = image.convert("LA" if mode == "La" else "RGBA").convert(mode)
    elif mode == "PA":
        alpha = image.getchannel("A")
        image = image.convert("L").convert("PA")
        image.putalpha(alpha)
    else:
        image = image.convert(mode)
    assert image.mode == mode
    pixels = grey(decode_image(image))
    assert (pixels[:, :3] == 255).all() and (pixels[:, 3:] == 10).all()


def test_half_transparent_is_mixed_with_white():
    assert grey(decode_image(Image.new("RGBA", (3, 3), (0, 0, 0, 128)))).tolist() == [[127] * 3] * 3


@pytest.mark.parametrize("mode, key", [("P", 3), ("L", 3), ("1", 0), ("RGB", (3, 3, 3))])
def test_a_transparent_color_in_png_is_white(mode, key):
    image = Image.new("L", (4, 2), 3 if mode != "1" else 0)
    image.paste(200 if mode != "1" else 255, (2, 0, 4, 2))
    if mode == "P":
        image.putpalette([value for level in range(256) for value in (level,) * 3])
    image = image.convert(mode) if mode != "P" else image
    pixels = grey(decode_image(file_bytes(image, "PNG", transparency=key)))
    assert (pixels[:, :2] == 255).all() and (pixels[:, 2:] == (255 if mode == "1" else 200)).all()


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_sixteen_bit_grey_keeps_its_brightness(kind):
    deep = Image.fromarray(RAMP.astype(np.uint16) * 257)
    assert deep.mode == "I;16"
    assert (grey(decode_image(file_bytes(deep, kind))) == RAMP).all()


def test_dark_sixteen_bit_grey_stays_dark():
    assert grey(decode_image(Image.fromarray(np.full((4, 4), 200, np.uint16)))).max() == 1


@pytest.mark.parametrize("order", ["I;16L", "I;16B", "I;16N"])
def test_byte_orders_of_sixteen_bits(order):
    kind = {"I;16L": "<u2", "I;16B": ">u2", "I;16N": "=u2"}[order]
    image = Image.frombytes(order, (24, 16), (RAMP.astype(np.uint16) * 257).astype(kind).tobytes())
    assert (grey(decode_image(image)) == RAMP).all()


@pytest.mark.parametrize("scale", [1, 257])
def test_integer_grey_of_either_range(scale):
    image = Image.fromarray(RAMP.astype(np.int32) * scale)
    assert image.mode == "I"
    assert (grey(decode_image(image)) == RAMP).all()


@pytest.mark.parametrize("scale", [1 / 255, 1, 257])
def test_float_grey_of_any_range(scale):
    image = Image.fromarray(RAMP.astype(np.float32) * np.float32(scale))
    assert image.mode == "F"
    assert (grey(decode_image(image)) == RAMP).all()
    assert (grey(decode_image(file_bytes(image, "TIFF"))) == RAMP).all()


def test_float_grey_with_holes():
    values = np.array([[np.nan, np.inf], [-np.inf, 0.5]], np.float32)
    assert decode_image(Image.fromarray(values)).size == (2, 2)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "TGA", "ICO", "JPEG2000", "AVIF"])
def test_file_formats(kind):
    source = Image.fromarray(np.full((16, 16, 3), (200, 60, 20), np.uint8))
    image = decode_image(file_bytes(source, kind))
    close(image, np.asarray(source), tolerance=12)


def test_cmyk_jpeg():
    source = Image.fromarray(COLOR).convert("CMYK")
    close(decode_image(file_bytes(source, "JPEG", quality=100)), np.asarray(source.convert("RGB")), tolerance=12)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "TIFF", "PNG"])
def test_the_first_picture_of_several(kind):
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    content = file_bytes(frames[0], kind, save_all=True, append_images=frames[1:])
    close(decode_image(content), np.asarray(frames[0]), tolerance=4)


# -- orientation ------------------------------------------------------------------------------------------------------

UPRIGHT = np.zeros((32, 64, 3), np.uint8)
UPRIGHT[:16, :32], UPRIGHT[:16, 32:], UPRIGHT[16:, :32] = (250, 0, 0), (0, 250, 0), (0, 0, 250)
# How the upright picture lies in a file of each orientation, by the definition of the tag (row 0, column 0 of storage).
STORED = {
    1: UPRIGHT,
    2: UPRIGHT[:, ::-1],
    3: UPRIGHT[::-1, ::-1],
    4: UPRIGHT[::-1],
    5: UPRIGHT.transpose(1, 0, 2),
    6: UPRIGHT.transpose(1, 0, 2)[::-1],
    7: UPRIGHT.transpose(1, 0, 2)[::-1, ::-1],
    8: UPRIGHT.transpose(1, 0, 2)[:, ::-1],
}


def oriented(kind, orientation):
    image = Image.fromarray(np.ascontiguousarray(STORED[orientation]))
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return file_bytes(image, kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {}))


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_orientation_is_applied_once(kind, orientation):
    once = decode_image(oriented(kind, orientation))
    close(once, UPRIGHT, tolerance=8)
    close(decode_image(once), np.asarray(once))
    close(decode_image(Image.open(io.BytesIO(oriented(kind, orientation)))), np.asarray(once))


def test_orientation_of_a_palette_picture():
    image = Image.fromarray(np.ascontiguousarray(STORED[6])).quantize(8)
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    close(decode_image(file_bytes(image, "PNG", exif=exif)), UPRIGHT, tolerance=8)


@pytest.mark.parametrize("value", [0, 9, 65535])
def test_unknown_orientation_is_upright(value):
    exif = Image.Exif()
    exif[ORIENTATION] = value
    close(decode_image(file_bytes(Image.fromarray(UPRIGHT), "JPEG", exif=exif)), UPRIGHT, tolerance=8)


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0", b"Exif\0\0MM\0*" + b"\xff" * 60]
)
def test_damaged_exif_does_not_cost_the_picture(exif, recwarn):
    close(decode_image(file_bytes(Image.fromarray(UPRIGHT), "JPEG", exif=exif)), UPRIGHT, tolerance=8)
    assert not recwarn


def test_the_given_picture_is_left_alone():
    image = Image.fromarray(UPRIGHT)
    image.getexif()[ORIENTATION] = 6
    before = image.tobytes()
    decoded = decode_image(image)
    assert decoded.size == (32, 64) and image.size == (64, 32)
    decoded.paste("white", (0, 0, 9, 9))
    assert image.tobytes() == before


# -- origins ----------------------------------------------------------------------------------------------------------


def test_all_origins_give_the_same_picture(tmp_path):
    path = tmp_path / "picture.png"
    Image.fromarray(COLOR).save(path)
    content = path.read_bytes()
    for image in (path, str(path), content, bytearray(content), memoryview(content), Image.open(path), COLOR):
        close(decode_image(image), COLOR)


@pytest.mark.parametrize(
    "array, expected",
    [
        (RAMP, RAMP),
        (RAMP[:, :, None], RAMP),
        (RAMP / 255, RAMP),
        ((RAMP / 255).astype(np.float32), RAMP),
        ((RAMP / 255).astype(np.float16), RAMP),
        (RAMP > 99, (RAMP > 99) * 255),
        (RAMP[::2, ::3], RAMP[::2, ::3]),
    ],
)
def test_grey_arrays(array, expected):
    tolerance = 1 if array.dtype == np.float16 else 0
    close(decode_image(array), np.repeat(expected[:, :, None], 3, axis=2), tolerance)


@pytest.mark.parametrize("array", [COLOR, COLOR / 255, np.asfortranarray(COLOR), COLOR[::-1][::-1]])
def test_color_arrays(array):
    close(decode_image(array), COLOR)


@pytest.mark.parametrize("top", [255, 1.0])
def test_arrays_with_alpha(top):
    array = np.zeros((4, 4, 4), type(top) if isinstance(top, float) else np.uint8)
    array[:2, :, 3] = top
    pixels = grey(decode_image(array))
    assert (pixels[:2] == 0).all() and (pixels[2:] == 255).all()


@pytest.mark.parametrize(
    "array, words",
    [
        (COLOR.astype(np.float32), "0..1"),
        (np.full((4, 4), np.nan), "0..1"),
        (np.full((4, 4), -0.5), "0..1"),
        (COLOR.astype(np.int64), "int64"),
        (COLOR.transpose(2, 0, 1), "channels last"),
        (np.zeros((4, 4, 2), np.uint8), "shape"),
        (np.zeros(9, np.uint8), "shape"),
        (np.zeros((1, 4, 4, 3), np.uint8), "shape"),
        (np.zeros((0, 4, 3), np.uint8), "no pixels"),
        (np.zeros((4, 4), object), "type object"),
        (np.zeros((4, 4), np.complex64), "complex64"),
    ],
)
def test_arrays_that_are_no_images(array, words):
    with pytest.raises(InputError, match=words):
        decode_image(array)


@pytest.mark.parametrize("thing", [None, 7, ["a.jpg"], object()])
def test_things_that_are_no_images(thing):
    with pytest.raises(InputError, match=type(thing).__name__):
        decode_image(thing)


# -- damage and attacks -----------------------------------------------------------------------------------------------


def one_sentence(error, *words):
    text = str(error.value)
    assert "\n" not in text and ";" in text
    for word in words:
        assert word in text


def test_missing_empty_folder_and_pipe(tmp_path):
    empty, pipe = tmp_path / "empty.jpg", tmp_path / "pipe.jpg"
    empty.touch()
    os.mkfifo(pipe)
    link = tmp_path / "link.jpg"
    link.symlink_to(tmp_path / "nowhere.jpg")
    expected = {
        tmp_path / "gone.jpg": "no image",
        link: "no image",
        tmp_path / ("x" * 5000): "no image",
        empty: "is empty",
        tmp_path: "not a file",
        pipe: "not a file",
    }
    for path, words in expected.items():
        with pytest.raises(InputError) as error:
            decode_image(path)
        one_sentence(error, str(path), words)
    for path in ("https://example.org/a.jpg", "a\0b", ""):
        with pytest.raises(InputError, match="no image"):
            decode_image(path)
    with pytest.raises(InputError, match="empty"):
        decode_image(b"")


def test_a_name_that_is_not_utf8_can_still_be_reported(tmp_path):
    path = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.jpg")
    with pytest.raises(InputError) as error:
        decode_image(path)
    assert "caf" in str(error.value).encode("utf-8").decode()
    assert image_name(path, 0).encode("utf-8")


@pytest.mark.parametrize(
    "content",
    [
        b"x",
        b"not an image at all",
        b"\xff\xd8\xff",
        b"\x89PNG\r\n\x1a\n",
        b"GIF89a",
        b"RIFF\x10\0\0\0WEBPVP8 ",
        b"II*\0\x08\0\0\0",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>",
        b"\0" * 4096,
    ],
)
def test_what_is_not_an_image(tmp_path, content):
    path = tmp_path / "photo.jpg"
    path.write_bytes(content)
    with pytest.raises(InputError) as error:
        decode_image(path)
    one_sentence(error, str(path))
    with pytest.raises(InputError, match="the image bytes"):
        decode_image(content)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF", "TGA"])
@pytest.mark.parametrize("part", [0.1, 0.5, 0.9])
def test_truncated_files(kind, part):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    content = file_bytes(Image.fromarray(noise), kind)
    with pytest.raises(InputError):
        decode_image(content[: int(len(content) * part)])


def png(width, height, data=b""):
    def chunk(name, body):
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("size", [(10_000, 10_000), (30_000, 30_000), (2**31 - 1, 2**31 - 1)])
def test_decompression_bombs(size, recwarn):
    with pytest.raises(InputError, match="decompression bomb"):
        decode_image(png(*size))
    assert not recwarn


def test_a_bomb_that_pil_would_only_warn_about_when_filters_are_off(monkeypatch):
    monkeypatch.setattr(Image, "_decompression_bomb_check", lambda size: None)
    with pytest.raises(InputError, match="decompression bomb"):
        decode_image(png(10_000, 10_000))


def test_the_limit_belongs_to_pil(monkeypatch):
    content = file_bytes(Image.fromarray(COLOR), "PNG")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(InputError, match="decompression bomb"):
        decode_image(content)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    close(decode_image(content), COLOR)


def test_strips_that_would_explode_when_resized():
    for size in ((1, 60_000), (60_000, 1)):
        with pytest.raises(InputError, match="60000"):
            decode_image(png(*size))
    assert decode_image(Image.new("RGB", (1, 200))).size == (1, 200)
    assert decode_image(Image.new("RGB", (1, 1))).size == (1, 1)


def test_text_bomb_in_a_png():
    content = file_bytes(Image.fromarray(COLOR), "PNG")
    body = b"Comment\0\0" + zlib.compress(b"x" * 200 * 2**20)
    chunk = struct.pack(">I", len(body)) + b"zTXt" + body + struct.pack(">I", zlib.crc32(b"zTXt" + body))
    try:
        close(decode_image(content[:33] + chunk + content[33:]), COLOR)
    except InputError as error:
        assert "damaged" in str(error)


def test_random_damage_is_an_image_or_an_input_error():
    random = np.random.default_rng(5)
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    for kind in ("JPEG", "PNG", "GIF", "TIFF", "WEBP", "BMP", "TGA", "ICO", "PPM"):
        content = bytearray(file_bytes(Image.fromarray(COLOR), kind, **({"exif": exif} if kind == "JPEG" else {})))
        for _ in range(60):
            damaged = bytearray(content)
            for place in random.integers(0, len(damaged), 6):
                damaged[place] = random.integers(0, 256)
            try:
                assert decode_image(damaged).mode == "RGB"
            except InputError as error:
                assert "\n" not in str(error)


def test_a_closed_picture(tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray(COLOR).save(path)
    image = Image.open(path)
    image.close()
    with pytest.raises(InputError, match="the PIL image"):
        decode_image(image)


def test_the_file_is_closed_again(tmp_path):
    path = tmp_path / "a.jpg"
    Image.fromarray(COLOR).save(path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", ResourceWarning)
        kept = [decode_image(path) for _ in range(3)]
        path.unlink()
        assert all(image.getpixel((0, 0)) == kept[0].getpixel((0, 0)) for image in kept)
    if os.path.isdir("/proc/self/fd"):
        assert str(path) not in str([os.readlink(link) for link in descriptors() if os.path.lexists(link)])


def descriptors():
    return [f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd")]


# -- names and lists --------------------------------------------------------------------------------------------------


def test_image_name(tmp_path):
    assert image_name("photos/a.jpg", 3) == "photos/a.jpg"
    assert image_name(tmp_path / "a.jpg", 3) == str(tmp_path / "a.jpg")
    assert image_name(b"...", 3) == image_name(COLOR, 3) == "image-3"


def test_digest_tells_pixels_and_shapes_apart():
    first = image_digest(decode_image(COLOR))
    assert len(first) == 16
    assert first == image_digest(decode_image(file_bytes(Image.fromarray(COLOR), "PNG")))
    changed = COLOR.copy()
    changed[3, 3, 0] ^= 1
    assert first != image_digest(decode_image(changed))
    black = [image_digest(Image.new("RGB", size)) for size in ((2, 8), (8, 2), (4, 4))]
    assert len(set(black)) == 3


@pytest.fixture
def tree(tmp_path):
    for name in (
        "b.jpg",
        "a.PNG",
        "notes.txt",
        ".hidden.jpg",
        "sub/c.webp",
        "sub/deep/d.tiff",
        ".cache/e.jpg",
        "x[1].jpg",
    ):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return tmp_path


def names(paths, tree):
    return [path.relative_to(tree).as_posix() for path in paths]


def test_a_folder_gives_its_pictures_sorted(tree):
    assert names(expand_images([tree]), tree) == ["a.PNG", "b.jpg", "x[1].jpg", "sub/c.webp", "sub/deep/d.tiff"]


def test_patterns(tree):
    assert names(expand_images([f"{tree}/*.jpg"]), tree) == ["b.jpg", "x[1].jpg"]
    assert names(expand_images([f"{tree}/**/*.webp"]), tree) == ["sub/c.webp"]
    everything = names(expand_images([f"{tree}/**"]), tree)
    assert sorted(everything) == ["a.PNG", "b.jpg", "sub/c.webp", "sub/deep/d.tiff", "x[1].jpg"]
    assert names(expand_images([f"{tree}/x[[]1].jpg", f"{tree}/x[1].jpg"]), tree) == ["x[1].jpg"] * 2


def test_named_files_are_kept_in_order_whatever_they_are(tree):
    with pytest.raises(InputError):
        decode_image(expand_images([tree / ("x" * 5000)])[0])
    arguments = [tree / "notes.txt", str(tree / "gone.jpg"), tree / "sub", tree / "b.jpg"]
    assert names(expand_images(arguments), tree) == ["notes.txt", "gone.jpg", "sub/c.webp", "sub/deep/d.tiff", "b.jpg"]


@pytest.mark.parametrize("argument", ["{}/*.bmp", "{}/*.txt", "{}/none", ""])
def test_arguments_that_name_nothing(tree, argument):
    (tree / "none").mkdir()
    argument = argument.format(tree)
    with pytest.raises(InputError, match="no image") as error:
        expand_images([tree / "b.jpg", argument])
    assert repr(argument) in str(error.value)
    with pytest.raises(InputError, match="no image is given"):
        expand_images([])


def test_links_are_followed_and_loops_end(tree):
    (tree / "sub" / "loop").symlink_to(tree)
    (tree / "z").symlink_to(tree / "sub" / "deep")
    (tree / "other.jpg").symlink_to(tree / "nowhere")
    found = names(walk_files(tree), tree)
    assert "other.jpg" in found and found.count("sub/deep/d.tiff") + found.count("z/d.tiff") == 1
    assert len(found) == len(set(found))


def test_a_folder_that_vanishes_is_an_error(tree):
    with pytest.raises(InputError, match="cannot read the folder"):
        list(walk_files(tree / "gone"))


def test_extensions_are_those_that_can_be_decoded():
    known = Image.registered_extensions()
    foreign = {suffix for suffix in IMAGE_EXTENSIONS if suffix not in known}
    assert not foreign, "PIL does not know these extensions"


def test_import_is_light():
    code = "import sys, clipcap_rag.images; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
