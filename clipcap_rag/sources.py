"""Caption files of every common format as one stream of records."""

import json
import os
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from clipcap_rag.caption_formats import READERS, SourceOptions, detect_format
from clipcap_rag.errors import InputError
from clipcap_rag.lines import BadLines, short

__all__ = [
    "BadLines",
    "CaptionRecord",
    "SourceOptions",
    "caption_records",
    "check_record",
    "normalize_caption",
    "read_captions",
]


@dataclass(frozen=True, slots=True)
class CaptionRecord:
    """One caption, its photo, if any (`image` is a file name or relative path), and where it comes from."""

    caption: str
    image_id: str | None = None
    image: str | None = None
    source: str | None = None
    meta: dict[str, str] = field(default_factory=dict)


class _Punctuation(dict):
    """A table for str.translate that drops punctuation, filled as characters are met."""

    def __missing__(self, code: int) -> int | None:
        character = chr(code)
        drop = unicodedata.category(character).startswith("P") or character in "$+<=>^`|~"
        self[code] = None if drop else code
        return self[code]


_PUNCTUATION = _Punctuation()


def check_record(place: str, record: CaptionRecord) -> CaptionRecord:
    """A record that did not come from a file, with single spaces, as `read_captions` would yield it.

    Args:
        place: what the sentence about a fault begins with.

    Raises:
        InputError: the caption is empty or holds what is no text.
    """
    values = {"captions": record.caption, "image_id": record.image_id, "source": record.source, "meta": record.meta}
    return next(caption_records(place, values, None, BadLines()))


def normalize_caption(text: str) -> str:
    """Lower case, no punctuation, single spaces: captions that agree in this count as the same sentence."""
    folded = unicodedata.normalize("NFKC", text).lower().translate(_PUNCTUATION)
    return " ".join(unicodedata.normalize("NFKC", folded).split())  # without a mark between them letters may compose


def read_captions(paths: Sequence[str | Path], options: SourceOptions, bad: BadLines) -> Iterator[CaptionRecord]:
    """Streams the captions of files and folders; only COCO and Karpathy files are held in memory, one at a time.

    All text may be gzipped. White space in captions is folded. `image_id` is the stem of `image` unless the file
    says otherwise (in a folder, the path below it without suffix), `source` the stem of the file. Blank lines at the
    end of a file do not count, elsewhere they are bad.

    Args:
        paths: files in one of the formats of `SourceOptions`, or folders of images with captions in same-stem .txt.
        bad: is told of every bad line, as `file:line: what`, or `file:annotations[number]: what` in JSON documents.

    Raises:
        InputError: at the call, a path is missing, empty or of no known format; while reading, a file is damaged or
            holds no caption, or a line is bad and `bad` does not skip.
    """
    sources = [Path(path) for path in ([paths] if isinstance(paths, str | Path) else paths)]
    if not sources:
        raise InputError("no caption file is given; name at least one")
    kinds = [_check(path, options) for path in sources]
    return (record for path, kind in zip(sources, kinds, strict=True) for record in _read(path, kind, options, bad))


def _check(path: Path, options: SourceOptions) -> str:
    """The kind of a source that is there: a format, or `json` for a document that shows it only when it is read."""
    if not os.path.exists(path):  # unlike path.exists() it takes a name that is too long
        raise InputError(f"there is no caption file {path}; check the path")
    if path.is_dir():
        if options.format not in ("auto", "folder"):
            raise InputError(f"{path} is a folder, not a {options.format} file; name the file or use --format folder")
        kind = "folder"
    elif not path.is_file() or options.format == "folder":
        raise InputError(f"{path} is not a {'folder' if options.format == 'folder' else 'file'}; check the path")
    elif not path.stat().st_size:
        raise InputError(f"{path} is empty; write its captions again")
    else:
        kind = detect_format(path, options) if options.format == "auto" else options.format
    if options.split is not None and kind not in ("json", "karpathy"):
        raise InputError(f"split {options.split!r} is for Karpathy files and {path} is none; leave --split out")
    return kind


def _read(path: Path, kind: str, options: SourceOptions, bad: BadLines) -> Iterator[CaptionRecord]:
    """The records of one source."""
    stem = path.resolve().name if path.is_dir() else Path(path.name.removesuffix(".gz")).stem
    before, empty = bad.count, True
    for place, values in READERS[kind](path, options, bad):
        for record in caption_records(place, values, stem, bad):
            empty = False
            yield record
    if empty:
        faults = bad.count - before
        why = f"all of its {faults} entries are bad, the last: {bad.last}" if faults else "check it and its --format"
        raise InputError(f"{path} holds no caption; {why}")


def caption_records(place: str, values: dict[str, Any], stem: str | None, bad: BadLines) -> Iterator[CaptionRecord]:
    """One record per caption of an entry whose values have not been checked yet; `bad` is told of those with faults.

    Args:
        place: what the entry is called in messages.
        values: `captions`, a string or a list of them, and, where there are any, the other fields of `CaptionRecord`.
        stem: the source, unless the entry names one.
    """
    captions, meta = values["captions"], values.get("meta") or {}
    try:
        image, image_id, source = (_clean(values.get(key), key) for key in ("image", "image_id", "source"))
        if not isinstance(meta, dict):
            raise ValueError(f"meta is {short(meta)}, not an object")
        texts = {key: item if isinstance(item, str) else json.dumps(item) for key, item in meta.items()}
        meta = {_clean(key, "meta") or "": _clean(item, "meta") or "" for key, item in texts.items()}
        if captions == []:
            raise ValueError("no caption")
    except ValueError as error:
        bad.report(f"{place}: {error}")
        return
    if image_id is None and image is not None:
        image_id = PurePosixPath(image).stem
    for caption in captions if isinstance(captions, list) else [captions]:
        try:
            text = _fold(caption)
        except ValueError as error:
            bad.report(f"{place}: {error}")
            continue
        yield CaptionRecord(text, image_id, image, source or stem, meta)


def _fold(caption: Any) -> str:
    """A caption that can be stored and shown, with single spaces."""
    text = " ".join((_clean(caption, "caption", numbers=False) or "").split())
    if not text.isprintable():
        kinds = {unicodedata.category(character) for character in text}
        if "Cc" in kinds:  # such as the escape sequences that terminals obey
            raise ValueError(f"caption {short(text)} holds a control character")
        text = text if kinds - {"Cf", "Zs"} else ""
    if not text:
        raise ValueError("no caption" if caption is None else "empty caption")
    return text


def _clean(value: Any, what: str, numbers: bool = True) -> str | None:
    """A string that can be stored, or None where there is nothing."""
    if value is None or value == "":
        return None
    if numbers and type(value) is int:
        return str(value)
    if not isinstance(value, str):
        raise ValueError(f"{what} is {short(value)}, not a string")
    if "\0" in value or not _encodes(value):
        raise ValueError(f"{what} {short(value)} holds a character that is no text")
    return value


def _encodes(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:  # half a surrogate pair, which JSON can spell
        return False
    return True
