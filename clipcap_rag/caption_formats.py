"""The formats of caption files: which one a file has, and its entries as they stand in it."""

import csv
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from clipcap_rag.config import Config, option
from clipcap_rag.errors import InputError
from clipcap_rag.images import IMAGE_EXTENSIONS, walk_files
from clipcap_rag.json_documents import read_document
from clipcap_rag.lines import LONGEST_LINE, BadLines, open_bytes, parse_json, read_lines
from clipcap_rag.packed import read_parquet, read_tar

FORMATS = ("auto", "jsonl", "text", "csv", "tsv", "coco", "karpathy", "flickr", "tar", "parquet", "folder")
_FORMAT_OF = {
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv", ".tsv": "tsv", ".tab": "tsv", ".txt": "text",
    ".text": "text", ".tar": "tar", ".tgz": "tar", ".parquet": "parquet", ".token": "flickr"
}  # fmt: skip


@dataclass(frozen=True)
class SourceOptions(Config):
    """How caption files are read."""

    format: str = option("auto", "format of the caption files", FORMATS)
    caption_column: str = option("caption", "column or key that holds the caption")
    image_id_column: str = option("image_id", "column or key that holds the id of the photo")
    image_column: str = option("image", "column or key that holds the file name of the photo")
    split: str | None = option(None, "splits to take from a Karpathy file, such as train,restval; default: all")


def detect_format(path: Path, options: SourceOptions) -> str:
    """The format of a file from its name, else from its first line; `json` is COCO or Karpathy.

    Raises:
        InputError: neither tells.
    """
    name = path.name.lower().removesuffix(".gz")
    suffix = Path(name.removesuffix(".txt") if name.endswith(".token.txt") else name).suffix  # Flickr8k.token.txt
    if suffix in _FORMAT_OF:
        return _FORMAT_OF[suffix]
    with open_bytes(path) as stream:
        first = next((line for line in iter(lambda: stream.readline(LONGEST_LINE), b"") if line.strip()), b"")
    first = first.removeprefix(b"\xef\xbb\xbf")
    if first.lstrip()[:1] in (b"{", b"["):
        try:
            row = parse_json(first)
        except ValueError:
            return "json"
        return "jsonl" if isinstance(row, dict) and {options.caption_column, "captions"} & set(row) else "json"
    if suffix:
        raise InputError(f"cannot tell the format of {path}; pass --format with one of {', '.join(FORMATS[1:])}")
    return "text"


# A reader yields the place of an entry and its unchecked values: `captions` (one or a list) and, where it has them,
# `image`, `image_id`, `source` and `meta`.
Entries = Iterator[tuple[str, dict[str, Any]]]


def _text(path: Path, options: SourceOptions, bad: BadLines) -> Entries:
    for number, line in read_lines(path, bad):
        yield f"{path}:{number}", {"captions": line}


def _json_lines(path: Path, options: SourceOptions, bad: BadLines) -> Entries:
    keys = tuple(dict.fromkeys((options.caption_column, "captions")))
    for number, line in read_lines(path, bad):
        place = f"{path}:{number}"
        try:
            row = parse_json(line)
        except ValueError as error:
            bad.report(f"{place}: not JSON ({error})")
            continue
        captions = [row[key] for key in keys if row.get(key) is not None] if isinstance(row, dict) else []
        if len(captions) == 1:
            yield place, _named(row, options) | {"captions": captions[0], "meta": row.get("meta")}
        else:
            fault = "more than one of" if captions else "no caption, needs one of"
            bad.report(f"{place}: {fault} the keys {', '.join(keys)}")


def _named(row: dict[str, Any], options: SourceOptions) -> dict[str, Any]:
    image, image_id = row.get(options.image_column), row.get(options.image_id_column)
    return {"image": image, "image_id": image_id, "source": row.get("source")}


def _table(path: Path, options: SourceOptions, bad: BadLines, rows: Iterator[tuple[int, list[str]]]) -> Entries:
    header = [name.strip() for name in next(rows, (1, []))[1]]
    _check_header(path, header, options)
    for number, row in rows:
        place = f"{path}:{number}"
        if len(row) == len(header):
            values = dict(zip(header, row, strict=True))
            yield place, _named(values, options) | {"captions": values[options.caption_column]}
        else:
            bad.report(f"{place}: {len(row)} fields where the header has {len(header)}")


def _check_header(path: Path, header: list[str], options: SourceOptions) -> None:
    """Raises InputError if a column is missing (those of the photo only if they were asked for) or doubled."""
    for key in ("caption_column", "image_column", "image_id_column"):
        name = getattr(options, key)
        optional = key != "caption_column" and name == getattr(SourceOptions, key)
        if header.count(name) > 1 or (name not in header and not optional):
            raise InputError(
                f"{path} has the columns {', '.join(header) or '(none)'} and needs exactly one {name!r}; "
                f"name another one with --{key.replace('_', '-')}"
            )


def _csv_rows(path: Path, bad: BadLines) -> Iterator[tuple[int, list[str]]]:
    """Rows with the number of the line where they begin; a field in quotes may go on over several lines."""
    taken: list[int] = []

    def feed() -> Iterator[str]:
        for number, line in read_lines(path, bad):
            taken.append(number)
            yield line + "\n"

    reader = csv.reader(feed(), strict=True)
    while True:
        taken.clear()
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            extent = f"{taken[0]}" if len(taken) == 1 else f"{taken[0]}-{taken[-1]}"
            bad.report(f"{path}:{extent}: {error}, check its quotes")
            continue
        yield taken[0], row


def _tsv_rows(path: Path, bad: BadLines) -> Iterator[tuple[int, list[str]]]:
    """One row per line, so that a quote which stays open does not swallow the rows after it."""
    for number, line in read_lines(path, bad):
        try:
            row = next(csv.reader([line], delimiter="\t", strict=True))
        except csv.Error as error:
            bad.report(f"{path}:{number}: {error}, check its quotes")
            continue
        yield number, row


def _document(path: Path, options: SourceOptions, bad: BadLines) -> Entries:
    return read_document(path, options.format, options.split, bad)


def _flickr(path: Path, options: SourceOptions, bad: BadLines) -> Entries:
    """The token files of Flickr8k and Flickr30k: `name.jpg#number TAB caption`."""
    for number, line in read_lines(path, bad):
        name, tab, caption = line.partition("\t")
        image, mark, _ = name.rpartition("#")
        if tab and mark:
            yield f"{path}:{number}", {"captions": caption, "image": image}
        else:
            bad.report(f"{path}:{number}: not of the form name.jpg#0 TAB caption")


def _tar(path: Path, options: SourceOptions, bad: BadLines) -> Entries:
    return read_tar(path, options.caption_column, bad)


def _parquet(path: Path, options: SourceOptions, bad: BadLines) -> Entries:
    return read_parquet(path, options.caption_column, options.image_column, options.image_id_column, bad)


def _folder(path: Path, options: SourceOptions, bad: BadLines) -> Entries:
    """Images with the captions of the text file of the same stem beside them."""
    for parent, files in groupby(walk_files(path), key=lambda file: file.parent):
        pairs: dict[str, tuple[list[Path], list[Path]]] = defaultdict(lambda: ([], []))
        for file in files:
            if file.suffix.lower() in IMAGE_EXTENSIONS:
                pairs[file.stem][0].append(file)
            elif file.name.lower().endswith((".txt", ".txt.gz")):
                pairs[file.name.removesuffix(".gz")[: -len(".txt")]][1].append(file)
        for stem, (images, texts) in sorted(pairs.items()):
            if len(images) != 1 or len(texts) != 1:
                fault = f"{len(images)} images and {len(texts)} caption files have this stem, needs one of each"
                bad.report(f"{parent / stem}: {fault}")
                continue
            image = images[0].relative_to(path)
            values = {"image": image.as_posix(), "image_id": image.with_suffix("").as_posix()}
            empty = True
            for number, line in read_lines(texts[0], bad):
                empty = False
                yield f"{texts[0]}:{number}", values | {"captions": line}
            if empty:
                bad.report(f"{texts[0]}: no caption")


READERS = {
    "text": _text,
    "jsonl": _json_lines,
    "csv": lambda path, options, bad: _table(path, options, bad, _csv_rows(path, bad)),
    "tsv": lambda path, options, bad: _table(path, options, bad, _tsv_rows(path, bad)),
    "json": _document,
    "coco": _document,
    "karpathy": _document,
    "flickr": _flickr,
    "tar": _tar,
    "parquet": _parquet,
    "folder": _folder,
}
