"""A directory that appears whole or not at all: written beside its place, hashed, renamed, checked when opened."""

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
        if error.errno in (28, 122):  # ENOSPC, EDQUOT
            free = shutil.disk_usage(folder).free / 2**20
            raise InputError(
                f"no space left for {out} ({free:.0f} MB free); free some space and run the same command again"
            ) from error
        if error.errno in (13, 30):  # EACCES, EROFS
            raise InputError(f"cannot write {out}: {error.strerror}; choose another --out") from error
        raise


def write_bytes(path: Path, data: bytes) -> None:
    """Replaces the file `path` by `data` in one step that survives a crash."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_json(path: Path, value: Any) -> None:
    """Replaces the JSON file `path` in one step that survives a crash."""
    write_bytes(path, (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode())


def file_record(path: Path) -> dict[str, Any]:
    """Size in bytes and hash of a file, as stored in a manifest."""
    return {"bytes": path.stat().st_size, "hash": _hash(path)}


def _hash(path: Path) -> str:
    size = path.stat().st_size
    if size <= _WHOLE_HASH_LIMIT:
        with open(path, "rb") as file:
            return "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for number in range(_SAMPLES):
            file.seek((size - _SAMPLE_BYTES) * number // (_SAMPLES - 1))
            digest.update(file.read(_SAMPLE_BYTES))
    return "sampled-sha256:" + digest.hexdigest()


def write_manifest(folder: Path, name: str, kind: str, version: int, fields: dict[str, Any]) -> None:
    """Writes `folder/name` with kind, format version, `fields` and a record of every other file in the folder."""
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
    manifest = read_json(folder / name, kind)
    if manifest.get("kind") != kind:
        raise InputError(f"{folder} is not a {kind} but a {manifest.get('kind', 'folder of something else')}")
    if manifest.get("format_version") != version:
        raise InputError(
            f"{folder} has format version {manifest.get('format_version')}, this release reads {version}; "
            "make it again or use the release that wrote it"
        )
    check_files(folder, manifest.get("files", {}), kind)
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
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not valid JSON ({error}); make the {kind} again") from error
    if not isinstance(value, dict):
        raise InputError(f"{path} does not hold a JSON object; make the {kind} again")
    return value


def check_files(folder: Path, files: dict[str, dict[str, Any]], kind: str) -> None:
    """Raises InputError if a recorded file is missing, or differs in size or hash from its record."""
    for name, record in files.items():
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


def commit(staging: Path, out: Path) -> None:
    """Moves a finished directory to its place; what stood there is removed after the new one is there."""
    _sync_tree(staging)
    out.parent.mkdir(parents=True, exist_ok=True)
    retired = _retired(out)
    if out.exists():
        shutil.rmtree(retired, ignore_errors=True)
        os.rename(out, retired)
    os.rename(staging, out)
    _sync(out.parent)
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
        _sync(path)
    _sync(folder)


def _sync(path: Path) -> None:
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
