"""Captions, and photos where they are wanted, out of WebDataset tar files and Parquet files."""

import tarfile
import zlib
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import Any

from clipcap_rag.errors import InputError
from clipcap_rag.images import IMAGE_EXTENSIONS
from clipcap_rag.lines import LONGEST_LINE, BadLines, open_bytes, parse_json

_ROWS = 64  # of a Parquet file in memory at a time

# Both readers yield the place of a sample and its unchecked values: `captions`, `image`, `image_id`, and `content`,
# which is the file of the photo, as bytes, where `photos` asks for it and there is one.
Samples = Iterator[tuple[str, dict[str, Any]]]


def read_tar(path: Path, caption_key: str, bad: BadLines, photos: bool = False) -> Samples:
    """The samples of a WebDataset tar: files in a row that share their name up to its first dot.

    Captions are the lines of the .txt else the `caption_key` of the .json. The tar is streamed.

    Raises:
        InputError: it is no tar, damaged or breaks off.
    """
    for key, members in groupby(_members(path, photos), key=lambda member: member[0]):
        values: dict[str, Any] = {"captions": None, "image_id": key}
        place = f"{path}:{key}"
        for _, suffix, content in members:
            if suffix in IMAGE_EXTENSIONS:
                values |= {"image": key + suffix, "content": content}
                continue
            try:
                captions = _captions(suffix, content, caption_key)
            except ValueError as error:
                bad.report(f"{place}{suffix}: {error}")
                break
            if captions and (suffix == ".txt" or not values["captions"]):
                values["captions"] = captions
        else:
            yield place, values


def _captions(suffix: str, content: bytes | None, caption_key: str) -> Any:
    """The captions in a member of a tar; raises ValueError if it cannot be read."""
    if content is None:
        raise ValueError(f"longer than {LONGEST_LINE >> 20} MB")
    if suffix == ".txt":
        return [line for line in content.decode("utf-8-sig").splitlines() if line.strip()]
    row = parse_json(content)
    return row.get(caption_key, row.get("captions")) if isinstance(row, dict) else None


def _members(path: Path, photos: bool) -> Iterator[tuple[str, str, bytes | None]]:
    """Key, suffix and content of the files that matter; the content is None where it is not wanted or too long."""
    with open_bytes(path) as stream:
        try:
            with tarfile.open(fileobj=stream, mode="r:") as archive:
                while (member := archive.next()) is not None:
                    archive.members.clear()  # or it would remember every file that went by
                    name = PurePosixPath(member.name)
                    stem, _, rest = name.name.partition(".")
                    suffix = f".{rest.lower()}"
                    is_photo = suffix in IMAGE_EXTENSIONS
                    if not member.isfile() or not stem or not (is_photo or suffix in (".txt", ".json")):
                        continue
                    wanted = photos if is_photo else member.size <= LONGEST_LINE
                    content = archive.extractfile(member).read() if wanted else None
                    yield name.with_name(stem).as_posix(), suffix, content
                end = archive.offset
            stream.seek(end)  # tarfile takes a damaged header for the end of the archive
            if stream.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise InputError(f"{path} breaks off or is damaged at byte {end}; copy it again")
        except (tarfile.TarError, EOFError, zlib.error) as error:
            raise InputError(f"{path} is not a whole tar file ({error}); copy it again") from error


def read_parquet(
    path: Path, caption_column: str, image_column: str, image_id_column: str, bad: BadLines, photos: bool = False
) -> Samples:
    """The rows of a Parquet file, such as those of the datasets of Hugging Face and of img2dataset.

    A photo is a column of bytes, or of structures with `bytes` and `path`; a column of strings names its file.

    Raises:
        InputError: it is no Parquet file, or has no column of captions.
    """
    import pyarrow as pa
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path, memory_map=True) as file:
            names = file.schema_arrow.names
            captions = next((name for name in (caption_column, "captions") if name in names), None)
            if captions is None:
                raise InputError(
                    f"{path} has the columns {', '.join(names)} and no {caption_column!r}; name one with "
                    "--caption-column"
                )
            column = file.schema_arrow.field(image_column).type if image_column in names else pa.string()
            if photos:
                columns = [captions, image_column, image_id_column]
            elif pa.types.is_struct(column):
                columns = [captions, f"{image_column}.path", image_id_column]
            else:
                columns = [captions, image_id_column, *([] if pa.types.is_binary(column) else [image_column])]
            number = 0
            for batch in file.iter_batches(_ROWS, columns=[name for name in columns if name.split(".")[0] in names]):
                for row in batch.to_pylist():
                    number += 1
                    photo = row.get(image_column)
                    photo = {"bytes": photo} if isinstance(photo, bytes) else photo
                    photo = photo if isinstance(photo, dict) else {"path": photo}
                    values = {"captions": row[captions], "image": photo.get("path")}
                    yield (
                        f"{path}:row {number}",
                        values | {"image_id": row.get(image_id_column), "content": photo.get("bytes")},
                    )
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"cannot read {path} as Parquet ({str(error).splitlines()[0]}); copy it again") from error
