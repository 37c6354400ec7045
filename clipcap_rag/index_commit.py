"""One change of an index on disk: segments and tombstones are written beside the old ones, then index.json is replaced.

That rename is the commit. Whatever interrupts the work before it leaves the old index, with files that nothing names
and that the next change removes; so does a commit with the files that it replaced, for readers have them mapped.
"""

import re
import shutil
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from clipcap_rag.artifact import disk_errors, save_array, sync
from clipcap_rag.errors import InputError
from clipcap_rag.image_table import IndexPhotos, write_images
from clipcap_rag.index_store import (
    MANIFEST,
    SEARCH,
    IndexFiles,
    SegmentWriter,
    index_lock,
    open_files,
    read_index_manifest,
    write_index_manifest,
)

ADDED = "added"  # in an index: a segment that is being encoded, and `added.partial` while that can be continued
MANY = 16  # small segments; more of them are merged when rows are added
SMALL = 16_384  # rows from which on a segment is not small
_BATCH = 16_384  # rows of a batch in a merged segment

Part = tuple[pa.RecordBatch, np.ndarray]  # captions of index_store.SCHEMA and their embeddings [n, D]


@contextmanager
def index_change(path: Path, wait: float) -> Iterator["IndexChange"]:
    """Locks an index, yields the change to be made, and clears away what an unfinished change leaves.

    Args:
        wait: seconds to wait for another process that writes the index.

    Raises:
        InputError: the index is damaged or held by another process, or the disk is full or read-only.
    """
    with disk_errors(path), index_lock(path, wait):
        change = IndexChange(path)
        _clear(path, change.manifest)
        try:
            yield change
        except BaseException:
            with suppress(InputError, OSError):
                _clear(path, read_index_manifest(path))
            raise


class IndexChange:
    """What is to become of an index; nothing of it can be seen before `commit`.

    Attributes:
        path: the index directory.
        manifest: index.json as it is; `commit` writes the next one.
        segments: entries of the segments to be.
        images: name of the file of photos to be, or None.
    """

    def __init__(self, path: Path):
        self.path, self.manifest = path, read_index_manifest(path)
        self.segments: list[dict[str, Any]] = list(self.manifest["segments"])
        self.images: str | None = self.manifest.get("images")
        self._files: IndexFiles | None = None
        self._live: np.ndarray | None = None  # [N] bool over the rows of `files`, once rows were removed or moved

    @property
    def files(self) -> IndexFiles:
        """The files as they are, opened and checked when they are first needed: adding to an index reads none."""
        if self._files is None:
            self._files = open_files(self.path)
        return self._files

    def first_new_id(self) -> int:
        """The number from which on no caption_id was ever given."""
        if "next_caption_id" in self.manifest:
            return self.manifest["next_caption_id"]
        highest = self.manifest["rows"] - 1  # indexes of before the field was kept
        for _, ids in self.files.columns("caption_id"):
            numbers = pc.cast(ids.filter(pc.match_substring_regex(ids, r"^[0-9]{1,14}$")), pa.int64())
            highest = max(highest, pc.max(numbers).as_py() or 0)
        return highest + 1

    def remove(self, mask: np.ndarray) -> None:
        """Removes rows, given as [N] bool."""
        self._live = self.files.live & ~mask

    def add(self, parts: Iterable[Part]) -> None:
        """Adds rows as a new segment, into which small segments are merged once there are many."""
        small = [
            number for number, entry in enumerate(self.segments) if entry["rows"] < SMALL and entry["search"] is None
        ]
        self.merge(small if len(small) > MANY else (), parts)

    def merge(self, numbers: Collection[int], parts: Iterable[Part] = ()) -> Path:
        """Replaces segments by a new one with what is left of their rows, and with further ones; returns its folder."""
        entry = {"name": f"{self._last() + 1:06d}", "rows": 0, "search": None}
        folder = self.path / "segments" / entry["name"]
        with SegmentWriter(folder, self.manifest["encoder"]["dim"]) as writer:
            for batch, vectors in _joined(self._left(numbers)):
                writer.append(batch, vectors)
            for batch, vectors in parts:
                writer.append(batch, vectors)
        entry["rows"] = writer.rows
        if numbers:
            live = self.files.live if self._live is None else self._live
            kept = [number for number in range(len(self.files.segments)) if number not in numbers]
            starts = self.files.starts
            stays = [np.zeros(0, bool), *(live[starts[number] : starts[number + 1]] for number in kept)]
            self._live = np.concatenate(stays)
            self.segments = [self.segments[number] for number in kept]
        self.segments.append(entry)
        return folder

    def take(self, rows: int) -> None:
        """Makes the segment that was encoded in the folder ADDED one of the index."""
        entry = {"name": f"{self._last() + 1:06d}", "rows": rows, "search": None}
        (self.path / ADDED / "segment").rename(self.path / "segments" / entry["name"])
        shutil.rmtree(self.path / ADDED)
        self.segments.append(entry)

    def image_ids(self) -> pa.ChunkedArray:
        """The image ids of the captions that belong to an image, before this change."""
        live = self.files.live
        columns = [
            column.filter(pa.array(live[start : start + len(column)]))
            for start, column in self.files.columns("image_id")
        ]
        return pa.chunked_array(columns, pa.string()).drop_null()

    def set_images(self, photos: IndexPhotos) -> None:
        """Makes these the photos of the index."""
        self.images = f"images-{self.manifest['revision'] + 1:06d}.arrow" if len(photos) else None
        if self.images:
            write_images(self.path / self.images, photos)

    def drop_images(self) -> None:
        """Leaves out photos that no caption belongs to any more."""
        images = self.files.images
        if images is not None:
            used = pc.is_in(images.ids, value_set=self.image_ids().unique())
            if not pc.all(used).as_py():
                self.set_images(images.kept(used.to_numpy(zero_copy_only=False)))

    def commit(self, next_caption_id: int | None = None, sources: Iterable[dict[str, Any]] = ()) -> int:
        """Makes the change what the index is, safe from loss of power; returns the new revision.

        Args:
            next_caption_id: above all numbers that were given as caption_id, where that has changed.
            sources: what index.json shall say of files that were added.
        """
        revision, tombstones = self.manifest["revision"] + 1, self.manifest["tombstones"]
        if self._live is not None:
            removed, tombstones = np.flatnonzero(~self._live), None
            if len(removed):
                tombstones = f"tombstones-{revision:06d}.npy"
                save_array(self.path / tombstones, removed.astype(np.int64))
        for entry in self.segments:
            if entry not in self.manifest["segments"]:
                folder = self.path / "segments" / entry["name"]
                for path in ([folder / SEARCH] if entry["search"] else []) + [folder]:  # its other files are synced
                    sync(path)
        for folder in (self.path / "segments", self.path):
            sync(folder)
        provenance, added = self.manifest["provenance"], [{**source, "revision": revision} for source in sources]
        if added:
            provenance = provenance | {"sources": [*provenance.get("sources", []), *added]}
        write_index_manifest(
            self.path,
            revision=revision,
            encoder=self.manifest["encoder"],
            segments=self.segments,
            tombstones=tombstones,
            images=self.images,
            next_caption_id=self.first_new_id() if next_caption_id is None else next_caption_id,
            provenance=provenance,
            licence=self.manifest["licence"],
            recorded=self.manifest["files"],
        )
        return revision

    def clear(self) -> None:
        """Removes what the last commit replaced, instead of leaving it to the next change."""
        _clear(self.path, read_index_manifest(self.path))

    def _last(self) -> int:
        """The highest number that names a segment."""
        names = [entry["name"] for entry in self.segments]
        return max((int(name) for name in names if re.fullmatch(r"[0-9]{1,15}", name)), default=0)

    def _left(self, numbers: Iterable[int]) -> Iterator[Part]:
        """The rows of segments that are not removed."""
        for number in numbers:
            segment, start, offset = self.files.segments[number], self.files.starts[number], 0
            for batch, size in enumerate(segment.batch_sizes):
                live = (self.files.live if self._live is None else self._live)[start + offset : start + offset + size]
                vectors = segment.vectors[offset : offset + size]
                yield segment.batch(batch).filter(pa.array(live)), vectors[live]
                offset += size


def _joined(parts: Iterable[Part]) -> Iterator[Part]:
    """Small parts put together, so that batches do not become as many as changes."""
    waiting: list[Part] = []
    for part in parts:
        waiting.append(part)
        if sum(len(batch) for batch, _ in waiting) >= _BATCH:
            yield _join(waiting)
            waiting = []
    if any(len(batch) for batch, _ in waiting):
        yield _join(waiting)


def _join(parts: list[Part]) -> Part:
    table = pa.Table.from_batches([batch for batch, _ in parts]).combine_chunks()
    return table.to_batches()[0], np.concatenate([vectors for _, vectors in parts])


def _clear(path: Path, manifest: dict[str, Any]) -> None:
    """Removes segments, tombstones and photos that index.json does not name."""
    named = {entry["name"] for entry in manifest["segments"]}
    files = {manifest["tombstones"], manifest.get("images")}
    shutil.rmtree(path / ADDED, ignore_errors=True)
    for folder in (path / "segments").glob("*"):
        if folder.is_dir() and re.fullmatch(r"[0-9]{6,}", folder.name) and folder.name not in named:
            shutil.rmtree(folder)
    for file in path.iterdir():
        stale = re.fullmatch(r"tombstones-[0-9]+\.npy|images-[0-9]+\.arrow", file.name) and file.name not in files
        if stale or re.fullmatch(rf"({re.escape(MANIFEST)}|tombstones-[0-9]+\.npy)\.tmp", file.name):
            file.unlink()
