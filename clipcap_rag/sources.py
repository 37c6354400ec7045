"""Caption files of every common format as one stream of records."""

import csv
import gzip
import json
import unicodedata
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import IO, Any

from clipcap_rag.config import Config, option
from clipcap_rag.errors import InputError
from clipcap_rag.images import IMAGE_EXTENSIONS, walk_files

FORMATS = ("auto", "jsonl", "text", "csv", "tsv", "coco", "karpathy", "folder")
_FORMAT_OF = {
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv", ".tsv": "tsv", ".tab": "tsv", ".txt": "text", ".text": "text"
}  # fmt: skip
_LONGEST_LINE = 16 * 2**20  # bytes; what is longer is no line of captions, and must not fill the memory
_LARGEST_JSON = 2 * 2**30  # bytes; one JSON document has to be in memory as a whole
_LISTED = 20


@dataclass(frozen=True, slots=True)
class CaptionRecord:
    """One caption, the photo it belongs to, if any, and where it comes from; `image` is a file name or relative path."""

    caption: str
    image_id: str | None = None
    image: str | None = None
    source: str | None = None
    meta: dict[str, str] = field(default_factory=dict)


class BadLines:
    """What cannot be read: an error at once, or counted in `count` and the first 20 kept in `listed` if `skip`."""

    def __init__(self, skip: bool = False) -> None:
        self.skip, self.count, self.listed = skip, 0, list[str]()

    def report(self, sentence: str) -> None:
        """Takes note of a bad line.

        Raises:
            InputError: bad lines are not to be skipped.
        """
        sentence = sentence.encode("utf-8", "backslashreplace").decode()  # it may quote what no file can hold
        if not self.skip:
            raise InputError(f"{sentence}; mend it, or pass --skip-bad to leave out what is bad")
        self.count += 1
        if len(self.listed) < _LISTED:
            self.listed.append(sentence)


@dataclass(frozen=True)
class SourceOptions(Config):
    """How caption files are read."""

    format: str = option("auto", "format of the caption files", FORMATS)
    caption_column: str = option("caption", "CSV column or JSONL key that holds the caption")
    image_id_column: str = option("image_id", "CSV column or JSONL key that holds the id of the photo")
    image_column: str = option("image", "CSV column or JSONL key that holds the file name of the photo")
    split: str | None = option(None, "splits taken from a Karpathy file, such as train,restval; all if not given")


class _Punctuation(dict):
    """A table for str.translate that maps punctuation to nothing, filled as characters are met."""

    def __missing__(self, code: int) -> int | None:
        character = chr(code)
        strip = unicodedata.category(character).startswith("P") or character in "$+<=>^`|~"
        self[code] = None if strip else code
        return self[code]


_PUNCTUATION = _Punctuation()


def normalize_caption(text: str) -> str:
    """Lower case, no punctuation, single spaces: captions that agree in this are the same sentence."""
    return " ".join(unicodedata.normalize("NFKC", text).lower().translate(_PUNCTUATION).split())


def read_captions(paths: Sequence[str | Path], options: SourceOptions, bad: BadLines) -> Iterator[CaptionRecord]:
    """Streams the captions of files and folders; only COCO and Karpathy files are held in memory, one at a time.

    All text may be gzipped. Blank lines at the end of a file are nothing, elsewhere they are bad. White space within
    a caption is folded. `image_id` is the stem of `image` unless the file says otherwise (in a folder the path
    within it, without suffix), `source` the stem of the file.

    Args:
        paths: files in the formats of `SourceOptions.format`, or folders of images with captions in same-stem .txt.
        bad: takes note of every bad line as `file:line: what`.

    Raises:
        InputError: at once if a path is missing, empty or of no known format; while reading if a source is damaged
            or holds no caption, or has a bad line and `bad` does not skip.
    """
    sources = [Path(path) for path in ([paths] if isinstance(paths, str | Path) else paths)]
    if not sources:
        raise InputError("no caption file is given; name at least one")
    formats = [_check(path, options) for path in sources]
    return (record for path, name in zip(sources, formats, strict=True) for record in _read(path, name, options, bad))


def _check(path: Path, options: SourceOptions) -> str:
    """The format of a source that is there; `json` for a document whose kind shows only when it is read."""
    if not path.exists():
        raise InputError(f"there is no caption file {path}; check the path")
    if path.is_dir() and options.format not in ("auto", "folder"):
        raise InputError(f"{path} is a folder, not a {options.format} file; name the file or pass --format folder")
    if not path.is_dir() and (options.format == "folder" or not path.is_file()):
        raise InputError(f"{path} is not a {'folder' if options.format == 'folder' else 'file'}; check the path")
    if path.is_file() and not path.stat().st_size:
        raise InputError(f"{path} is empty; write its captions again")
    detected = "folder" if path.is_dir() else _detect(path, options) if options.format == "auto" else options.format
    if options.split is not None and detected not in ("json", "karpathy"):
        raise InputError(f"split {options.split!r} is for Karpathy files and {path} is none; leave --split out")
    return detected


def _detect(path: Path, options: SourceOptions) -> str:
    suffix = Path(path.name.removesuffix(".gz")).suffix.lower()
    if suffix in _FORMAT_OF:
        return _FORMAT_OF[suffix]
    with _open(path) as stream:
        first = next((line for line in iter(lambda: stream.readline(_LONGEST_LINE), b"") if line.strip()), b"")
    if first.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] in (b"{", b"["):
        try:
            row = _parse(first.decode("utf-8-sig"))
        except ValueError:
            return "json"
        return "jsonl" if isinstance(row, dict) and {options.caption_column, "captions"} & set(row) else "json"
    if suffix:
        raise InputError(f"cannot tell the format of {path}; pass --format with one of {', '.join(FORMATS[1:])}")
    return "text"


@contextmanager
def _open(path: Path) -> Iterator[IO[bytes]]:
    """The bytes of a file, unpacked if it is gzipped, whatever its name."""
    try:
        with open(path, "rb") as file, gzip.open(file) if _is_gzip(file) else nullcontext(file) as stream:
            yield stream
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"{path} is a damaged gzip file ({error}); copy it again") from error
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}; check the path and its permissions") from error


def _is_gzip(file: Any) -> bool:
    return file.peek(2)[:2] == b"\x1f\x8b"


def _lines(path: Path, bad: BadLines) -> Iterator[tuple[int, str]]:
    """Numbered lines without their ends, blank ones too except at the end of the file."""
    number = blank = 0
    with _open(path) as stream:
        while raw := stream.readline(_LONGEST_LINE):
            if not number and raw[:2] in (b"\xff\xfe", b"\xfe\xff"):
                raise InputError(f"{path} is UTF-16; convert it: iconv -f UTF-16 -t UTF-8 {path}")
            if len(raw) == _LONGEST_LINE and not raw.endswith(b"\n"):
                while raw and not raw.endswith(b"\n"):
                    raw = stream.readline(_LONGEST_LINE)
                number, blank = number + 1, 0
                bad.report(f"{path}:{number}: longer than {_LONGEST_LINE >> 20} MB")
                continue
            for line in raw.splitlines():  # a carriage return alone ends a line, too
                number += 1
                try:
                    text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError as error:
                    bad.report(f"{path}:{number}: not UTF-8 (byte 0x{line[error.start]:02x} at {error.start + 1})")
                    continue
                if not text.strip():
                    blank += 1
                    continue
                yield from ((earlier, "") for earlier in range(number - blank, number))
                blank = 0
                yield number, text


def _parse(text: str | bytes) -> Any:
    """Parses JSON; whatever is wrong with it is a ValueError."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def _clean(value: Any, what: str) -> str | None:
    """A string that can be stored, or None for nothing."""
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if value is None or value == "":
        return None
    if not isinstance(value, str):
        raise ValueError(f"{what} is {_short(value)}, not a string")
    if "\0" in value or not (value.isascii() or _encodes(value)):
        raise ValueError(f"{what} {_short(value)} holds a character that is no text")
    return value


def _short(value: Any) -> str:
    quoted = repr(value)
    return quoted if len(quoted) <= 60 else quoted[:57] + "..."


def _encodes(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:  # half a surrogate pair
        return False
    return True


def _records(
    place: str,
    captions: Any,
    bad: BadLines,
    *,
    image: Any = None,
    image_id: Any = None,
    source: Any = None,
    meta: Any = None,
) -> Iterator[CaptionRecord]:
    """The records of one caption or a list of them, from values that have not been checked yet."""
    try:
        image, image_id, source = _clean(image, "image"), _clean(image_id, "image_id"), _clean(source, "source")
        if not isinstance(meta or {}, dict):
            raise ValueError(f"meta is {_short(meta)}, not an object")
        pairs = {
            _clean(key, "meta key") or "": _clean(value if isinstance(value, str) else json.dumps(value), "meta") or ""
            for key, value in (meta or {}).items()
        }
        captions = captions if isinstance(captions, list) else [captions]
        if not captions:
            raise ValueError("no caption")
    except ValueError as error:
        bad.report(f"{place}: {error}")
        return
    if image_id is None and image is not None:
        image_id = PurePosixPath(image).stem
    for caption in captions:
        try:
            if isinstance(caption, int | float):
                raise ValueError(f"caption is {caption}, not a string")
            text = " ".join((_clean(caption, "caption") or "").split())
            if not text:
                raise ValueError("no caption" if caption is None else "empty caption")
        except ValueError as error:
            bad.report(f"{place}: {error}")
            continue
        yield CaptionRecord(text, image_id, image, source, pairs)


def _read(path: Path, name: str, options: SourceOptions, bad: BadLines) -> Iterator[CaptionRecord]:
    """The records of one source, with its stem as their `source` where they name none."""
    stem = path.resolve().name if path.is_dir() else Path(path.name.removesuffix(".gz")).stem
    before, empty = bad.count, True
    for record in _READERS[name](path, options, bad, _clean(stem, "file name")):
        empty = False
        yield record
    if empty:
        found = f"all {bad.count - before} entries in it are bad, such as {bad.listed[-1]}" if bad.count > before else ""
        raise InputError(f"{path} holds no caption; {found or 'check the file and --format'}")


def _text(path: Path, options: SourceOptions, bad: BadLines, stem: str) -> Iterator[CaptionRecord]:
    for number, line in _lines(path, bad):
        yield from _records(f"{path}:{number}", line, bad, source=stem)


def _json_lines(path: Path, options: SourceOptions, bad: BadLines, stem: str) -> Iterator[CaptionRecord]:
    keys = dict.fromkeys((options.caption_column, "captions"))
    for number, line in _lines(path, bad):
        place = f"{path}:{number}"
        try:
            row = _parse(line)
        except ValueError as error:
            bad.report(f"{place}: not JSON ({error})")
            continue
        given = [row[key] for key in keys if row.get(key) is not None] if isinstance(row, dict) else []
        if len(given) != 1:
            bad.report(f"{place}: {'both' if given else 'neither'} of the keys {' and '.join(map(repr, keys))}")
            continue
        yield from _records(
            place,
            given[0],
            bad,
            image=row.get(options.image_column),
            image_id=row.get(options.image_id_column),
            source=row.get("source") or stem,
            meta=row.get("meta"),
        )


def _table(path: Path, options: SourceOptions, bad: BadLines, stem: str, delimiter: str) -> Iterator[CaptionRecord]:
    rows = _rows(path, delimiter, bad)
    header = [name.strip() for name in next(rows, (1, []))[1]]
    columns = {"captions": options.caption_column, "image": options.image_column, "image_id": options.image_id_column}
