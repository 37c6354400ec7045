"""A report as one HTML page that needs nothing else: no network, no other file."""

import base64
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from clipcap_rag.images import decode_image

_TEMPLATE = Path(__file__).with_name("report.html")
_PLACE = "REPORT_JSON"
_SIDE, _QUALITY = 240, 75  # pixels of the longest side, and JPEG quality, of a photo on the page
_ESCAPES = {ord(sign): f"\\u{ord(sign):04x}" for sign in "<>&"}  # so that no text ends the script element it is in


def page(report: Mapping[str, Any], thumbnails: Mapping[str, str]) -> str:
    """The page, whose script shows what `report.gather` returned.

    Args:
        thumbnails: by the name of its image the `data:` URL of a photo.
    """
    data = json.dumps({**report, "thumbnails": thumbnails}, allow_nan=False).translate(_ESCAPES)
    return _TEMPLATE.read_text(encoding="utf-8").replace(_PLACE, data, 1)


def thumbnail(photo: Path) -> str:
    """A small JPEG of a photo as `data:` URL.

    Raises:
        InputError: as `images.decode_image`.
    """
    picture, stream = decode_image(photo), io.BytesIO()
    picture.thumbnail((_SIDE, _SIDE), Image.Resampling.LANCZOS)
    picture.save(stream, "JPEG", quality=_QUALITY, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode()
