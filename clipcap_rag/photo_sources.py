"""Captioned photos that still have to be fetched or unpacked: lists of URLs, tar files, Parquet, folders, the hub."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from clipcap_rag.caption_formats import READERS, Entries, SourceOptions
from clipcap_rag.errors import InputError
from clipcap_rag.images import IMAGE_EXTENSIONS, walk_files
from clipcap_rag.lines import BadLines, read_lines
from clipcap_rag.packed import read_parquet, read_tar
from clipcap_rag.sources import caption_records

_HUB = "hf:"
_TAR, _PARQUET = (".tar", ".tgz"), ".parquet"
_CONVERTED = "refs/convert/parquet"  # where the hub keeps each data set as Parquet files, CONFIG/SPLIT/0000.parquet


@dataclass(frozen=True, slots=True)
class Photo:
    """A photo that was not looked at yet: its row in the source, from 1, its captions, and a URL, file or content."""

    row: int
    captions: list[str]
    content: str | Path | bytes
    meta: dict[str, str]


def photo_files(source: str | Path) -> list[Path]:
    """The files that `read_photos` reads for a source, in order; a folder of loose photos counts as one of them.

    Args:
        source: a list of URLs, a tar, a Parquet file, a folder of tars, of Parquet files or of photos with text files
            beside them, as img2dataset makes them, or `hf:ORG/NAME[:SPLIT]` (default: train), a data set of the
            Hugging Face hub, which is fetched as Parquet files into the cache of the hub.

    Raises:
        InputError: there is no such source.
    """
    if str(source).startswith(_HUB):
        return _from_hub(str(source).removeprefix(_HUB))
    path = Path(source)
    if not path.exists():
        raise InputError(f"there is no {path}; give a list of URLs, a tar or Parquet file, a folder or hf:ORG/NAME")
    files = list(walk_files(path)) if path.is_dir() else []
    tars = [file for file in files if _suffix(file) in _TAR]
    loose = any(file.suffix.lower() in IMAGE_EXTENSIONS for file in files)
    tables = [file for file in files if _suffix(file) == _PARQUET]  # beside tars and photos they only tell of them
    return tars or ([] if loose else tables) or [path]


def _from_hub(name: str) -> list[Path]:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    repository, _, split = name.partition(":")
    pattern = f"{split}/*.parquet" if "/" in split else f"*/{split or 'train'}/*.parquet"
    try:
        folder = snapshot_download(repository, repo_type="dataset", revision=_CONVERTED, allow_patterns=pattern)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise InputError(f"cannot fetch {_HUB}{name} ({reason}); check the name and the network") from error
    files = sorted(Path(folder).glob(pattern))
    configs = sorted({file.parent.parent.name for file in files})
    if len(configs) != 1:
        found = f"the configurations {', '.join(configs)}" if configs else "no such split"
        raise InputError(f"{_HUB}{name} has {found}; give {_HUB}{repository}:CONFIG/SPLIT")
    return files


def read_photos(files: Sequence[Path], options: SourceOptions, bad: BadLines) -> Iterator[Photo]:
    """The photos of a source, each with its captions.

    A list of URLs has a caption and a URL a line, in either order, a tab between them and no header, as Conceptual
    Captions and Conceptual 12M are published; its rows are the line numbers. Otherwise rows are counted.

    Args:
        files: what `photo_files` found.

    Raises:
        InputError: while reading, a file is damaged, or an entry is bad and `bad` does not skip.
    """
    row = 0
    for file in files:
        for place, values in _entries(file, options, bad):
            records = list(caption_records(place, values, file.stem, bad))
            if records and not values["content"]:
                bad.report(f"{place}: no photo")
            elif records:
                row = values.get("row", row + 1)
                name = records[0].image or records[0].image_id
                meta = records[0].meta or ({"original": name} if name else {})
                yield Photo(row, [record.caption for record in records], values["content"], meta)


def is_list(file: Path) -> bool:
    """Whether a file of a source is a list of URLs."""
    return not file.is_dir() and _suffix(file) not in (*_TAR, _PARQUET)


def _suffix(file: Path) -> str:
    return Path(file.name.lower().removesuffix(".gz")).suffix


def _entries(file: Path, options: SourceOptions, bad: BadLines) -> Entries:
    """What the readers of captions yield, with `content`: a URL, a path or bytes; once per photo."""
    if is_list(file):
        yield from _urls(file, bad)
    elif file.is_dir():
        for image, lines in groupby(READERS["folder"](file, options, bad), key=lambda entry: entry[1]["image"]):
            entries = list(lines)
            captions = [values["captions"] for _, values in entries]
            yield entries[0][0], {"captions": captions, "image": image, "content": file / image}
    elif _suffix(file) in _TAR:
        yield from read_tar(file, options.caption_column, bad, photos=True)
    else:
        columns = (options.caption_column, options.image_column, options.image_id_column)
        yield from read_parquet(file, *columns, bad, photos=True)


def _urls(path: Path, bad: BadLines) -> Entries:
    for number, line in read_lines(path, bad):
        fields = [field.strip() for field in line.split("\t")]
        urls = [field for field in fields if field.startswith(("http://", "https://"))]
        if len(fields) == 2 and len(urls) == 1:
            caption = fields[1 - fields.index(urls[0])]
            yield f"{path}:{number}", {"captions": caption, "content": urls[0], "row": number, "meta": {"url": urls[0]}}
        else:
            bad.report(f"{path}:{number}: not a caption and a URL with a tab between them")
