"""Captions with embeddings as other projects store them: antarctic-captions, clip-grams, clip-retrieval, parquet."""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from clipcap_rag.caption_template import PLAIN
from clipcap_rag.config import IMPORT_FORMATS, ImportConfig
from clipcap_rag.errors import InputError
from clipcap_rag.lines import BadLines, open_bytes, read_lines
from clipcap_rag.parquet_tables import open_tables

Entry = tuple[str, dict[str, Any], np.ndarray | None]  # place, values for `sources.caption_records`, embedding [D]


@dataclass(frozen=True)
class ForeignIndex:
    """Captions, and their embeddings where there are any, that can be read again and again.

    Attributes:
        format: whose layout it is, one of IMPORT_FORMATS.
        path: what to call it in messages.
        files: all files that are read.
        rows: entries, bad ones included.
        dim: width D of the embeddings; None without any.
        read: gives the entries in order; told where to report lines that cannot be read.
        template: the sentence in which the captions were encoded.
        left_aside: what is there and not used.
    """

    format: str
    path: Path
    files: list[Path]
    rows: int
    dim: int | None
    read: Callable[[BadLines], Iterator[Entry]]
    template: str = PLAIN
    left_aside: str | None = None


def open_foreign(paths: Sequence[str | Path], config: ImportConfig) -> ForeignIndex:
    """Finds the files of an index of another project and checks that their numbers of rows agree.

    Args:
        paths: a folder or a file; for antarctic also its text and its .npy file, or what both begin with.
        config: how they are read.

    Raises:
        InputError: the format cannot be told, or a file is missing, damaged or does not fit the others.
    """
    given = [Path(path) for path in paths]
    kind = _detect(given) if config.format == "auto" else config.format
    if kind != "antarctic" and len(given) != 1:
        raise InputError(f"{kind} is one folder or file, and {len(given)} paths are given; import them one by one")
    if kind in ("antarctic", "clip-grams") and (config.caption_column or config.embedding_column):
        raise InputError(f"{given[0]} is of the format {kind}, which has no columns; leave their names out")
    match kind:
        case "antarctic":
            return _antarctic(given, not config.reencode)
        case "clip-grams":
            return _clip_grams(given[0], not config.reencode)
        case "clip-retrieval":
            return _clip_retrieval(given[0], config)
        case _:
            return _parquet(given[0], config)


def _detect(paths: list[Path]) -> str:
    path = paths[0]
    if len(paths) == 2 or path.suffix in (".txt", ".npy") or path.with_name(path.name + ".npy").is_file():
        return "antarctic"
    if not path.exists():
        raise InputError(f"there is no {path}; check the path")
    if path.is_file() and path.suffix == ".parquet":
        return "parquet"
    if path.is_dir():
        if any(path.glob("emb*.npy")):
            return "clip-grams"
        if (path / "text_emb").is_dir() or (path / "metadata").is_dir():
            return "clip-retrieval"
        if any(path.rglob("*.parquet")):
            return "parquet"
    raise InputError(f"cannot tell what {path} is; pass --format with one of {', '.join(IMPORT_FORMATS[1:])}")


def _antarctic(paths: list[Path], embeddings: bool) -> ForeignIndex:
    """One caption a line, and a matrix with one row a line."""
    if len(paths) == 1:
        stem = paths[0].with_suffix("") if paths[0].suffix in (".txt", ".npy") else paths[0]
        paths = [stem.with_name(stem.name + suffix) for suffix in (".txt", ".npy")]
    texts = [path for path in paths if path.suffix != ".npy"]
    arrays = [path for path in paths if path.suffix == ".npy"]
    if len(texts) != 1 or len(arrays) != 1:
        raise InputError(f"an antarctic cache is a text and a .npy file, {len(paths)} paths are given; name both")
    return _lines_and_arrays("antarctic", texts[0], texts[0], arrays, embeddings)


def _clip_grams(folder: Path, embeddings: bool) -> ForeignIndex:
    """entries.txt with one entry a line, and emb00000.npy, emb00001.npy, ... with their rows."""
    entries, arrays = folder / "entries.txt", _in_order(folder.glob("emb*.npy"))
    if not entries.is_file():
        raise InputError(
            f"{folder} has no entries.txt, so what its rows mean is lost; let clip-grams write it with "
            "--save_entries True, or build an index from the texts with: clipcap-rag index build --ngrams"
        )
    if embeddings and not arrays:
        raise InputError(f"{folder} has no emb*.npy; pass --reencode to encode its entries")
    prefix, recorded = "", folder / "args.txt"
    if recorded.is_file():
        try:
            prefix = json.loads(recorded.read_text(encoding="utf-8")).get("prefix") or ""
        except (ValueError, AttributeError, RecursionError) as error:
            raise InputError(f"{recorded} is not the JSON that clip-grams writes; remove or mend it") from error
    return _lines_and_arrays("clip-grams", folder, entries, arrays, embeddings, f"{prefix}{PLAIN}")


def _lines_and_arrays(
    kind: str, path: Path, text: Path, arrays: list[Path], embeddings: bool, template: str = PLAIN
) -> ForeignIndex:
    rows = _count_lines(text)
    matrices = [open_matrix(file) for file in arrays] if embeddings else []
    stored = sum(map(len, matrices))
    if embeddings and stored != rows:
        names = arrays[0].name if len(arrays) == 1 else f"its {len(arrays)} files {arrays[0].name}, ..."
        raise InputError(
            f"{text} has {rows} lines and {names} {stored} rows, so they do not belong together; find the right pair"
        )

    def read(bad: BadLines) -> Iterator[Entry]:
        vectors = (vector for matrix in matrices for vector in matrix)
        done = 0
        for number, line in read_lines(text, bad):
            for _ in range(number - 1 - done):  # rows of the lines that were reported
                next(vectors, None)
            yield f"{text}:{number}", {"captions": line}, next(vectors, None)
            done = number
        for number in range(done + 1, rows + 1):
            yield f"{text}:{number}", {"captions": ""}, None

    indexes = [file.name for file in sorted(path.glob("*.index"))] if path.is_dir() else []
    aside = f"{', '.join(indexes)}: the embeddings are taken from the .npy files" if indexes else None
    return ForeignIndex(
        kind, path, [text, *(arrays if embeddings else [])], rows, _width(matrices), read, template, aside
    )


def _clip_retrieval(folder: Path, config: ImportConfig) -> ForeignIndex:
    """metadata/*.parquet with captions and, for each, one of text_emb/*.npy with as many rows."""
    files, arrays = _in_order(folder.glob("metadata/*.parquet")), _in_order(folder.glob("text_emb/*.npy"))
    tables = open_tables(folder, files, config.caption_column)
    matrices = [None] * len(files) if config.reencode else [open_matrix(file) for file in arrays]
    if len(matrices) != len(files):
        hint = "" if arrays else "; pass --reencode to encode the captions"
        raise InputError(
            f"{folder} has {len(files)} files in metadata and {len(arrays)} in text_emb, which should be pairs{hint}"
        )
    for file, matrix, rows in zip(files, matrices, tables.rows, strict=True):
        if matrix is not None and len(matrix) != rows:
            raise InputError(f"{file} has {rows} rows and its text_emb {len(matrix)}; copy both again")

    def read(bad: BadLines) -> Iterator[Entry]:
        for number, matrix in enumerate(matrices):
            vectors = iter(matrix) if matrix is not None else iter(())
            for place, values, _ in tables.read(number):
                yield place, values, next(vectors, None)

    others = [name for name in ("img_emb", "image.index", "text.index") if (folder / name).exists()]
    aside = f"{', '.join(others)}: captions come from metadata, their embeddings from text_emb" if others else None
    used = [*files, *([] if config.reencode else arrays)]
    return ForeignIndex(
        "clip-retrieval", folder, used, sum(tables.rows), _width(matrices), read, left_aside=aside
    )  # fmt: skip


def _parquet(path: Path, config: ImportConfig) -> ForeignIndex:
    """Parquet files with a column of captions and perhaps one of embeddings."""
    files = _in_order(path.rglob("*.parquet")) if path.is_dir() else [path]
    tables = open_tables(path, files, config.caption_column, config.embedding_column, embeddings=not config.reencode)

    def read(bad: BadLines) -> Iterator[Entry]:
        for number in range(len(files)):
            yield from tables.read(number)

    return ForeignIndex("parquet", path, files, sum(tables.rows), tables.dim, read)


def _in_order(files: Iterator[Path]) -> list[Path]:
    """Files by name, numbers in them by value: emb_2 before emb_10."""
    return sorted(files, key=lambda file: [int(part) if part.isdigit() else part
                                           for part in re.split(r"([0-9]+)", str(file))])  # fmt: skip


def _count_lines(text: Path) -> int:
    with open_bytes(text) as stream:
        return sum(len(line.splitlines()) for line in stream)


def open_matrix(file: Path) -> np.ndarray:
    """A .npy file of floats [rows, D], memory-mapped; nothing in it is executed.

    Raises:
        InputError: it is missing, damaged or something else.
    """
    try:
        matrix = np.load(file, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"{file} is not an array of numbers ({reason}); copy it again") from error
    if not isinstance(matrix, np.ndarray) or matrix.ndim != 2 or matrix.dtype.kind != "f" or not matrix.shape[1]:
        raise InputError(f"{file} is no matrix of floats with one row per caption; name another file")
    return matrix.view(np.ndarray)


def _width(matrices: Sequence[np.ndarray | None]) -> int | None:
    widths = {matrix.shape[1] for matrix in matrices if matrix is not None}
    if len(widths) > 1:
        raise InputError(f"the .npy files have rows of {', '.join(map(str, sorted(widths)))} numbers; copy them again")
    return widths.pop() if widths else None
