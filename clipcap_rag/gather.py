"""Captioned photos of the web or of packed files into a folder: checked by decoding, counted, resumable."""

import hashlib
import json
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, as_completed, wait
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from PIL import UnidentifiedImageError

from clipcap_rag.artifact import (
    file_record,
    read_json,
    reopen_directory,
    resumable_directory,
    staging_path,
    unfinished_job,
    write_bytes,
    write_json,
)
from clipcap_rag.caption_formats import SourceOptions
from clipcap_rag.config import DownloadConfig
from clipcap_rag.downloads import Failure, fetch
from clipcap_rag.errors import InputError
from clipcap_rag.images import decode_image, image_suffix, walk_files
from clipcap_rag.journal import Journal
from clipcap_rag.lines import BadLines
from clipcap_rag.photo_sources import Photo, is_list, photo_files, read_photos
from clipcap_rag.progress import bar

OK = "ok"
KIND, VERSION = "photo folder", 1
_MANIFEST, _IMAGES, _CAPTIONS, _JOURNAL = "photos.json", "images", "captions.jsonl", "journal.jsonl"
_PER_FOLDER = 10_000
_ONE_COLOUR = 8  # grey levels; what stands in for a lost photo is plainer than any photo


@dataclass(frozen=True)
class PhotoFolder:
    """What `gather_photos` made: how many photos with how many captions, and how many rows had which outcome."""

    path: Path
    split: str
    photos: int
    captions: int
    outcomes: dict[str, int]
    bad_lines: list[str]
    bad_line_count: int

    @property
    def failed(self) -> int:
        """Rows without a photo, bad lines included."""
        return sum(self.outcomes.values()) - self.photos + self.bad_line_count

    def to_json(self) -> dict[str, Any]:
        values = asdict(self)
        del values["path"]
        return values


def gather_photos(
    source: str | Path,
    out: str | Path,
    split: str = "train",
    *,
    config: DownloadConfig | None = None,
    source_options: SourceOptions | None = None,
    skip_bad: bool = False,
    retry_failed: bool = False,
    overwrite: bool = False,
) -> PhotoFolder:
    """Fetches or unpacks the photos of a source into a folder that `extract_features` takes.

    `out` gets `images/`, `captions.jsonl` (image, image_id, captions and where each photo is from), `journal.jsonl`
    with the outcome of each row, and `photos.json` with the counts. A photo is kept if it decodes to the last pixel, is
    not tiny and not of one colour; what the server calls it does not matter. Its name is made of split and row, so
    that the photos of several splits or sources can lie together.

    A killed run continues where it was. What failed is not tried again unless it is asked for.

    Args:
        source: see `photo_sources.photo_files`.
        split: a name without slashes that begins all names of photos.
        retry_failed: take a finished or unfinished folder up again and try its failures once more.
        skip_bad: count and list bad entries instead of stopping at the first.

    Raises:
        InputError: the source is bad, `out` exists or holds photos of another source, or no photo could be had.
    """
    out, config, options = Path(out), config or DownloadConfig(), source_options or SourceOptions()
    if not split or Path(split).name != split:
        raise InputError(f"split is {split!r}; give a word such as train or val")
    files = photo_files(source)
    job = {"source": [_stamp(file) for file in files], "split": split, "options": options.to_json()}
    _check_out(out, job, retry_failed, overwrite)
    total = None
    if is_list(files[0]):  # hours are ahead, so bad lines are found first
        total = sum(1 for _ in read_photos(files, options, BadLines(skip_bad)))
    bad = BadLines(skip_bad)
    with resumable_directory(out, job, overwrite) as staging:
        with open(staging / _JOURNAL, "a+b") as file:
            journal = Journal(file, lambda entry: retry_failed and entry["outcome"] != OK)
            photos = (photo for photo in read_photos(files, options, bad) if photo.row not in journal)
            settle = partial(_settle, staging / _IMAGES, split, config)
            with bar("photos", total=total, done=len(journal), unit="photo") as progress:
                for entry in _settle_all(photos, settle, config.threads):
                    journal.add(entry)
                    progress.update(1)
            outcomes, captions = _write_captions(journal, staging / _CAPTIONS)
        if not outcomes[OK]:
            counts = ", ".join(f"{count} {outcome}" for outcome, count in outcomes.items() if count)
            raise InputError(
                f"no photo of {source} could be had ({counts or 'it names none'}); check it, then pass --retry-failed"
            )
        made = PhotoFolder(out, split, outcomes[OK], captions, outcomes, bad.listed, bad.count)
        record = file_record(staging / _CAPTIONS)
        fields = {"kind": KIND, "format_version": VERSION, "files": {_CAPTIONS: record}, "job": job}
        write_json(staging / _MANIFEST, made.to_json() | fields)
    return made


def _check_out(out: Path, job: dict[str, Any], retry_failed: bool, overwrite: bool) -> None:
    """Sees to it that nothing of many hours is lost by a slip; a finished folder to be retried is reopened."""
    if overwrite:
        return
    if unfinished_job(out) not in (None, job):
        raise InputError(f"{staging_path(out)} holds photos of another source; choose another --out or --overwrite it")
    if not (out / _MANIFEST).is_file():
        return
    if not retry_failed or staging_path(out).exists():
        raise InputError(f"{out} is finished; pass --retry-failed to try its failures again or choose another --out")
    if read_json(out / _MANIFEST, KIND)["job"] != job:
        raise InputError(f"{out} holds photos of another source; choose another --out")
    reopen_directory(out, job)


def _stamp(file: Path) -> list[str]:
    """What tells a file, or a folder of loose photos by its names and sizes, from another."""
    if not file.is_dir():
        return [file.name, file_record(file)["hash"]]
    digest = hashlib.sha256()
    for entry in walk_files(file):
        digest.update(f"{entry.relative_to(file)!r} {entry.stat().st_size}\n".encode())
    return [file.name, digest.hexdigest()]


def _settle_all(
    photos: Iterable[Photo], settle: Callable[[Photo], dict[str, Any]], threads: int
) -> Iterator[dict[str, Any]]:
    """The entries of photos as they are done; only a few photos wait at a time."""
    pool, waiting = ThreadPoolExecutor(threads), set()
    try:
        with warnings.catch_warnings():  # threads that decode leave the filters, which all share, in disorder
            for photo in photos:
                waiting.add(pool.submit(settle, photo))
                if len(waiting) >= 2 * threads:
                    done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                    yield from (future.result() for future in done)
            yield from (future.result() for future in as_completed(waiting))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _settle(images: Path, split: str, config: DownloadConfig, photo: Photo) -> dict[str, Any]:
    """Stores a photo, if it can be had and is one, and says what came of it."""
    try:
        content = _content(photo, config)
        stem = f"{split}-{photo.row:09d}"
        name = f"{photo.row // _PER_FOLDER:05d}/{stem}{_checked_suffix(content, config.min_side)}"
    except Failure as failure:
        return {"row": photo.row, "outcome": failure.outcome, "detail": str(failure), "meta": photo.meta}
    (images / name).parent.mkdir(parents=True, exist_ok=True)
    write_bytes(images / name, content)
    record = {"image": name, "image_id": stem, "captions": photo.captions, "meta": photo.meta}
    return {"row": photo.row, "outcome": OK} | record


def _content(photo: Photo, config: DownloadConfig) -> bytes:
    if isinstance(photo.content, str):
        return fetch(photo.content, config)
    if isinstance(photo.content, bytes):
        return photo.content
    try:
        return photo.content.read_bytes()
    except OSError as error:
        raise Failure("unreadable", f"{photo.content}: {error.strerror}") from error


def _checked_suffix(content: bytes, min_side: int) -> str:
    """The file extension of a photo that is whole and shows something; raises Failure for all else."""
    try:
        picture = decode_image(content)
    except InputError as error:
        unknown = isinstance(error.__cause__, UnidentifiedImageError) or not content
        raise Failure("not an image" if unknown else "damaged image", str(error)) from error
    if min(picture.size) < min_side:
        raise Failure("too small", f"{picture.width} x {picture.height} pixels")
    if all(high - low < _ONE_COLOUR for low, high in picture.getextrema()):
        raise Failure("one colour", "all pixels are alike")
    return image_suffix(content)


def _write_captions(journal: Journal, path: Path) -> tuple[dict[str, int], int]:
    """Writes the records of the photos that there are; returns how often which outcome was and how many captions."""
    outcomes, captions = Counter({OK: 0}), 0
    with open(path, "w", encoding="utf-8") as file:
        for entry in journal.entries():
            outcomes[entry["outcome"]] += 1
            if entry["outcome"] == OK:
                captions += len(entry["captions"])
                row = {key: entry[key] for key in ("image", "image_id", "captions", "meta")}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return dict(outcomes.most_common()), captions
