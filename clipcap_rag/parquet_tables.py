"""Parquet files of captions, with or without embeddings, read batch by batch."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from clipcap_rag.errors import InputError

_BATCH = 4096  # rows in memory at a time
_USUAL = {
    "caption": ("caption", "captions", "text", "TEXT", "sentence", "sentences"),
    "embedding": ("text_embedding", "caption_embedding", "text_emb", "embedding", "embeddings", "emb", "vector"),
    "image": ("image", "image_path", "image_file", "file_name", "filename"),
    "image_id": ("image_id",),
    "source": ("source",),
    "meta": ("meta",),
}  # fmt: skip


@dataclass(frozen=True)
class Tables:
    """Parquet files of one schema.

    Attributes:
        files: the files.
        rows: rows of each.
        columns: by what it holds (`caption`, `embedding`, ...), the name of a column, or `image.path` in a structure.
        dim: width D of the embeddings; None without any.
    """

    files: list[Path]
    rows: list[int]
    columns: dict[str, str]
    dim: int | None

    def read(self, number: int) -> Iterator[tuple[str, dict[str, Any], np.ndarray | None]]:
        """The place, the values and the embedding [D] of each row of one file."""
        file, row = self.files[number], 0
        try:
            for batch in pq.ParquetFile(file).iter_batches(_BATCH, columns=list(self.columns.values())):
                columns = {what: batch.column(name.split(".")[0]) for what, name in self.columns.items()}
                vectors = self._vectors(columns.pop("embedding"), file, row) if self.dim else [None] * len(batch)
                lists = {what: column.to_pylist() for what, column in columns.items()}
                lists["captions"] = lists.pop("caption")
                for place, vector in enumerate(vectors):
                    values = {what: items[place] for what, items in lists.items()}
                    if isinstance(values.get("meta"), list):  # a map comes as pairs
                        values["meta"] = dict(values["meta"])
                    if isinstance(values.get("image"), dict):
                        values["image"] = values["image"]["path"]
                    yield f"{file}: row {row + place}", values, vector
                row += len(batch)
        except (pa.ArrowException, OSError) as error:
            raise InputError(f"{file} is damaged ({str(error).splitlines()[0]}); copy it again") from error

    def _vectors(self, column: pa.Array, file: Path, first: int) -> np.ndarray:
        """A column of lists as [rows, D]."""
        lengths = column.value_lengths().to_numpy(zero_copy_only=False) if column.null_count == 0 else np.array([0])
        wrong = np.flatnonzero(lengths != self.dim)
        if len(wrong):
            raise InputError(
                f"{file}: the embedding of row {first + wrong[0]} or one after it is missing or not {self.dim} wide; "
                "pass --reencode to encode the captions"
            )
        return column.flatten().to_numpy(zero_copy_only=False).reshape(len(column), self.dim)


def open_tables(
    path: Path,
    files: Sequence[Path],
    caption_column: str | None,
    embedding_column: str | None = None,
    *,
    embeddings: bool = False,
) -> Tables:
    """Finds the columns of Parquet files.

    Args:
        path: what to call them all in messages.
        caption_column, embedding_column: names that are not the usual ones.
        embeddings: whether those that are there are wanted.

    Raises:
        InputError: there is no file, one is damaged, or has no such columns.
    """
    if not files:
        raise InputError(f"there is no .parquet file in {path}; check the path")
    headers = [_header(file) for file in files]
    asked = {"caption": caption_column, "embedding": embedding_column}
    schema = headers[0][0]
    found = {what: name for what, usual in _USUAL.items() if (name := _find(schema, what, asked.get(what), usual))}
    for what, name in asked.items():
        if what not in found and (name or what == "caption"):
            raise InputError(
                f"{files[0]} has the columns {', '.join(schema.names)} and none of them is its {what} column; "
                f"name it with --{what}-column"
            )
    if not embeddings:
        found.pop("embedding", None)
    for file, (other, _) in zip(files, headers, strict=True):
        if differs := [name for what, name in found.items() if not _find(other, what, name, ())]:
            raise InputError(f"{file} has another {', '.join(differs)} than {files[0]}; import them one by one")
    if "embedding" in found and not _is_string(schema.field(found["caption"]).type):
        raise InputError(
            f"{files[0]} has several captions and one embedding in a row; pass --reencode to encode each caption"
        )
    dim = _dim(files, found["embedding"]) if "embedding" in found else None
    if "image" in found and pa.types.is_struct(schema.field(found["image"]).type):
        found["image"] += ".path"
    return Tables(list(files), [rows for _, rows in headers], found, dim)


def _header(file: Path) -> tuple[pa.Schema, int]:
    """Schema and number of rows."""
    try:
        with pq.ParquetFile(file) as opened:
            return opened.schema_arrow, opened.metadata.num_rows
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{file} is not a Parquet file ({str(error).splitlines()[0]}); copy it again") from error


def _find(schema: pa.Schema, what: str, asked: str | None, usual: Sequence[str]) -> str | None:
    """The column for `what`: the one that was asked for, or the first of the usual names with a fitting type."""
    for name in [asked] if asked else usual:
        if name in schema.names and _fits(what, schema.field(name).type):
            return name
    return None


def _fits(what: str, kind: pa.DataType) -> bool:
    match what:
        case "caption":
            return _is_string(kind) or (_is_list(kind) and _is_string(kind.value_type))
        case "embedding":
            return _is_list(kind) and pa.types.is_floating(kind.value_type)
        case "meta":
            return pa.types.is_map(kind)
        case "image_id":
            return _is_string(kind) or pa.types.is_integer(kind)
        case "image":  # the name of a file, or what Hugging Face has beside its bytes
            return _is_string(kind) or (pa.types.is_struct(kind) and kind.get_field_index("path") >= 0)
        case _:
            return _is_string(kind)


def _is_string(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def _dim(files: Sequence[Path], column: str) -> int | None:
    """The width of the first embedding; None where there is no row."""
    for file in files:
        with pq.ParquetFile(file) as opened:
            for batch in opened.iter_batches(1, columns=[column]):
                if not batch.column(0)[0].as_py():
                    raise InputError(f"{file}: row 0 has no {column}; pass --reencode to encode the captions")
                return len(batch.column(0)[0])
    return None
