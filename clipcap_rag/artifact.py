"""A directory that appears whole or not at all: written beside its place, hashed, renamed, checked when opened."""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from clipcap_rag.errors import InputError
from clipcap_rag.progress import say

_WHOLE_HASH_LIMIT = 64 * 2**20  # bytes; larger files are hashed by evenly spaced samples when opened
_JOB = "job.json"  # in a staging directory: what the unfinished work is
_MANY_FILES = 1000  # from here on one flush of the whole system is faster than one per file
_SAMPLES, _SAMPLE_BYTES = 64, 64 * 2**10


def staging_path(out: Path) -> Path:
    """Where `out` is written until it is whole; a killed job finds its work there again."""
    return out.with_name(out.name + ".partial")


def refuse_existing(out: Path, overwrite: bool) -> None:
    """Raises InputError if the folder `out` exists and may not be replaced, or its parent cannot hold it."""
    if out.exists() and not overwrite:
        raise InputError(f"{out} exists already; pass --overwrite to replace it or choose another --out")
    if out.exists() and not _is_ours(out):
        raise InputError(f"{out} was not made by clipcap-rag, so it is not replaced; choose another --out or remove it")
    refuse_unwritable(out)


def refuse_unwritable(out: Path) -> None:
    """Raises InputError if the folder that is to hold `out` cannot be written, or made."""
    ancestor = next(parent for parent in out.absolute().parents if parent.exists())
    if not ancestor.is_dir() or not os.access(ancestor, os.W_OK):
        raise InputError(f"cannot write {out}: {ancestor} is not a writable folder; choose another --out")


def _is_ours(out: Path) -> bool:
    """Whether `out` may be replaced: an empty folder, an artefact, or a training run, which holds artefacts."""
    if not out.is_dir():
        return False
    manifests = [path for path in (*out.glob("*.json"), *out.glob("*/config.json")) if path.is_file()]
    return not any(out.iterdir()) or any('"format_version"' in path.read_text(errors="replace") for path in manifests)


@contextmanager
def disk_errors(out: Path) -> Iterator[None]:
    """Turns a full or read-only disk into one sentence that says what is left and what to do."""
    try:
        yield
    except OSError as error:
        folder = next(parent for parent in out.absolute().parents if parent.exists())
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            free = shutil.disk_usage(folder).free / 2**20
            raise InputError(
                f"no space left for {out} ({free:.0f} MB free); free some space and run the same command again"
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.EISDIR):
            where = error.filename or out
            raise InputError(f"cannot write {where}: {error.strerror}; mend that or choose another folder") from error
        raise


def write_bytes(path: Path, data: bytes) -> None:
    """Replaces the file `path` by `data` in one step that survives a crash."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Replaces the JSON file `path` in one step that survives a crash."""
    write_bytes(path, (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode())


def file_record(path: Path) -> dict[str, Any]:
    """Size in bytes and hash of a file, as stored in a manifest; for a large one also the hash of all its bytes."""
    record = {"bytes": path.stat().st_size, "hash": _hash(path)}
    return record if record["hash"].startswith("sha256:") else record | {"sha256": _whole_hash(path)}


def _whole_hash(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _hash(path: Path) -> str:
    size = path.stat().st_size
    if size <= _WHOLE_HASH_LIMIT:
        return "sha256:" + _whole_hash(path)
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for number in range(_SAMPLES):
            file.seek((size - _SAMPLE_BYTES) * number // (_SAMPLES - 1))
            digest.update(file.read(_SAMPLE_BYTES))
    return "sampled-sha256:" + digest.hexdigest()


def write_manifest(
    folder: Path,
    name: str,
    kind: str,
    version: int,
    fields: dict[str, Any],
    files: dict[str, dict[str, Any]] | None = None,
) -> None:
    """Writes `folder/name` with kind, format version, `fields` and a record of the other files.

    Args:
        files: their records by name; left out, every file in the folder is recorded.
    """
    if files is None:
        files = {
            path.relative_to(folder).as_posix(): file_record(path)
            for path in sorted(folder.rglob("*"))
            if path.is_file() and path not in (folder / name, folder / _JOB)
        }
    write_json(folder / name, {"kind": kind, "format_version": version, **fields, "files": files})


def read_manifest(folder: Path, name: str, kind: str, version: int) -> dict[str, Any]:
    """Reads and checks a manifest written by `write_manifest`.

    Raises:
        InputError: the folder or the manifest is missing, of another kind or version, or a file is missing or altered.
    """
    manifest = read_unchecked(folder, name, kind, version)
    check_files(folder, manifest.get("files", {}), kind)
    return manifest


def read_unchecked(folder: Path, name: str, kind: str, version: int) -> dict[str, Any]:
    """`read_manifest` without a look at the files that are recorded."""
    manifest = read_json(folder / name, kind)
    if manifest.get("kind") != kind:
        found = str(manifest.get("kind", "folder of something else"))
        raise InputError(f"{folder} is not a {kind} but a {found if found.isprintable() else repr(found)}"[:200])
    if manifest.get("format_version") != version:
        raise InputError(
            f"{folder} has format version {repr(manifest.get('format_version'))[:40]}, this release reads {version}; "
            "make it again or use the release that wrote it"
        )
    return manifest


def read_json(path: Path, kind: str) -> dict[str, Any]:
    """Reads a JSON object; `kind` names the artefact in the error."""
    if not path.is_file():
        partial = staging_path(path.parent)
        hint = f"; {partial} is unfinished, run its command again to complete it" if partial.exists() else ""
        if not path.parent.exists() and _retired(path.parent).exists():
            hint = f"; rename {_retired(path.parent)}, its previous version, back"
        raise InputError(f"no {kind} at {path.parent}: {path.name} is missing{hint}")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # also numbers of thousands of digits and brackets nested that deep
        raise InputError(f"{path} is not valid JSON ({error}); make the {kind} again") from error
    if not isinstance(value, dict):
        raise InputError(f"{path} does not hold a JSON object; make the {kind} again")
    return value


def check_files(folder: Path, files: dict[str, dict[str, Any]], kind: str) -> None:
    """Raises InputError if a recorded file is missing, or differs in size or hash from its record."""
    for name, record in _records(folder, files, kind):
        path = folder / name
        if not path.is_file():
            raise InputError(f"the {kind} {folder} lacks its file {name}; copy it again or make it again")
        size = path.stat().st_size
        if size != record["bytes"]:
            raise InputError(
                f"{path} has {size} bytes where its manifest says {record['bytes']}; copy it again or make it again"
            )
        if _hash(path) != record["hash"]:
            raise InputError(f"{path} was altered after it was written; copy it again or make it again")


def check_whole_files(folder: Path, files: dict[str, dict[str, Any]], kind: str) -> None:
    """`check_files`, and every byte of the files that it only samples, where their records hold the whole hash."""
    check_files(folder, files, kind)
    for name, record in files.items():
        if "sha256" in record and _whole_hash(folder / name) != record["sha256"]:
            raise InputError(f"{folder / name} was altered after it was written; copy it again or make it again")


def _records(folder: Path, files: Any, kind: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The records of files, each a size and a hash of a file inside the folder."""
    if not isinstance(files, dict):
        raise InputError(f"the manifest of the {kind} {folder} lists no files; copy it again or make it again")
    for name, record in files.items():
        inside = name.isprintable() and not Path(name).is_absolute() and ".." not in Path(name).parts
        if not inside or not isinstance(record, dict) or type(record.get("bytes")) is not int or "hash" not in record:
            raise InputError(
                f"the manifest of the {kind} {folder} has an impossible record of a file {name[:80]!r}; "
                "copy it again or make it again"
            )
        yield name, record


def commit(staging: Path, out: Path) -> None:
    """Moves a finished directory to its place; what stood there is removed after the new one is there."""
    _sync_tree(staging)
    out.parent.mkdir(parents=True, exist_ok=True)
    retired = _retired(out)
    if out.exists():
        shutil.rmtree(retired, ignore_errors=True)
        os.rename(out, retired)
    os.rename(staging, out)
    sync(out.parent)
    shutil.rmtree(retired, ignore_errors=True)


def recover(out: Path) -> None:
    """Puts the previous version back where a kill hit between the two renames of `commit`."""
    if not out.exists() and _retired(out).exists():
        os.rename(_retired(out), out)


def _retired(out: Path) -> Path:
    return out.with_name(out.name + ".retired")


def _sync_tree(folder: Path) -> None:
    for number, path in enumerate(folder.rglob("*")):
        if number == _MANY_FILES:
            os.sync()
            return
        sync(path)
    sync(folder)


def sync(path: Path) -> None:
    """Waits until a file, or the list of names in a folder, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def save_array(path: Path, array: np.ndarray) -> None:
    """Writes a .npy file that is there whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        np.save(file, array)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def join_arrays(parts: Sequence[Path], out: Path) -> None:
    """Concatenates .npy files along their first axis into one, one part in memory at a time."""
    arrays = [np.load(part, mmap_mode="r") for part in parts]
    rows = sum(len(array) for array in arrays)
    joined = np.lib.format.open_memmap(out, "w+", arrays[0].dtype, (rows, *arrays[0].shape[1:]))
    start = 0
    for array in arrays:
        joined[start : start + len(array)] = array
        start += len(array)
    joined.flush()


def unfinished_job(out: Path) -> dict[str, Any] | None:
    """The job of `resumable_directory` whose unfinished work waits beside `out`, if any."""
    job = staging_path(out) / _JOB
    return read_json(job, "job") if job.is_file() else None


def reopen_directory(out: Path, job: dict[str, Any]) -> None:
    """Makes a finished directory the unfinished work of `job` again, for `resumable_directory` to continue."""
    write_json(out / _JOB, job)
    os.rename(out, staging_path(out))


@contextmanager
def resumable_directory(out: Path, job: dict[str, Any], overwrite: bool = False) -> Iterator[Path]:
    """Yields the staging directory of `out`, with what an interrupted run of the same `job` left in it.

    It becomes `out` when the block ends without an error and stays for the next run when it does not. `job` says what
    determines the result; work of another job is discarded, with a message.

    Raises:
        InputError: `out` exists and `overwrite` is false, or the disk is full or read-only.
    """
    refuse_existing(out, overwrite)
    staging, job = staging_path(out), json.loads(json.dumps(job))
    with disk_errors(out):
        if unfinished_job(out) == job:
            say(f"continuing the unfinished work in {staging}")
            for torn in staging.rglob("*.tmp"):
                torn.unlink()
        else:
            if staging.exists():
                say(f"{staging} holds unfinished work of another command; starting over")
                shutil.rmtree(staging)
            staging.mkdir(parents=True)
            write_json(staging / _JOB, job)
        yield staging
        commit(staging, out)
        (out / _JOB).unlink()


@contextmanager
def new_directory(out: Path, overwrite: bool = False) -> Iterator[Path]:
    """Yields an empty staging directory that becomes `out` when the block ends without an error.

    Raises:
        InputError: `out` exists and `overwrite` is false, or the disk is full or read-only.
    """
    refuse_existing(out, overwrite)
    staging = staging_path(out)
    with disk_errors(out):
        if staging.exists():
            shutil.rmtree(staging)
        staging.mkdir(parents=True)
        try:
            yield staging
            commit(staging, out)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise
