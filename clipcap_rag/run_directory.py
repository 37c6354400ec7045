"""The directory of a training run: which job it is, its best and last checkpoints, its log, and the way to continue."""

import json
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from clipcap_rag.artifact import (
    new_directory,
    read_json,
    read_manifest,
    recover,
    refuse_existing,
    write_bytes,
    write_json,
)
from clipcap_rag.checkpoint import KIND, VERSION, Checkpoint, load_weights
from clipcap_rag.errors import InputError
from clipcap_rag.model import CaptionModel

_JOB, _STATE = "run.json", "training.pt"


class RunDirectory:
    """run.json (the job, and whether it is finished), best/, last/, log.jsonl."""

    def __init__(self, path: Path, job: dict[str, Any]):
        """job: everything that determines the result, as JSON values."""
        self.path, self.job = path, json.loads(json.dumps(job))

    def begin(self, overwrite: bool) -> bool:
        """Makes the directory; True if an unfinished run of the same job stands there with a checkpoint to continue.

        Raises:
            InputError: a finished run or another job's stands there and `overwrite` is false.
        """
        refuse_finished(self.path, overwrite)
        if (self.path / _JOB).is_file() and not overwrite:
            job = read_json(self.path / _JOB, "training run")
            del job["finished"]
            different = differences(job, self.job)
            if different:
                raise InputError(
                    f"{self.path} holds an unfinished training with other settings ({'; '.join(different)}); "
                    "use the same ones to continue it, --overwrite to start over, or another --out"
                )
            recover(self.path / "last")
            return (self.path / "last").is_dir()
        if self.path.exists():
            shutil.rmtree(self.path)
        self.path.mkdir(parents=True)
        write_json(self.path / _JOB, self.job | {"finished": False})
        return False

    def finish(self) -> None:
        write_json(self.path / _JOB, self.job | {"finished": True})

    def save_best(self, checkpoint: Checkpoint) -> None:
        with new_directory(self.path / "best", overwrite=True) as folder:
            checkpoint.write(folder)

    def save_last(self, checkpoint: Checkpoint, state: dict[str, Any], history: list[dict[str, Any]]) -> None:
        """Stores what `restore` needs and rewrites the log."""
        write_bytes(self.path / "log.jsonl", "".join(json.dumps(entry) + "\n" for entry in history).encode())
        with new_directory(self.path / "last", overwrite=True) as folder:
            torch.save(state, folder / _STATE)
            checkpoint.write(folder)

    def restore(self, model: CaptionModel) -> dict[str, Any]:
        """Loads the last weights into `model` and returns the state that was saved with them."""
        last = self.path / "last"
        read_manifest(last, "config.json", KIND, VERSION)
        load_weights(model, last / "model.safetensors")
        return torch.load(last / _STATE, map_location="cpu", weights_only=True)


def refuse_finished(path: Path, overwrite: bool) -> None:
    """Raises InputError unless `path` is free, holds an unfinished run, or may be replaced."""
    if overwrite or not (path / _JOB).is_file() or is_finished(path):
        refuse_existing(path, overwrite)


def is_finished(path: Path) -> bool:
    """Whether a training run that is over stands there."""
    return (path / _JOB).is_file() and read_json(path / _JOB, "training run").get("finished", True)


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """`name: old -> new` for each setting of two jobs that differs."""
    found = []
    for name in sorted(old.keys() | new.keys()):
        before, after = old.get(name), new.get(name)
        if isinstance(before, dict) and isinstance(after, dict):
            found += differences(before, after)
        elif before != after:
            found.append(f"{name}: {before} -> {after}")
    return found


@contextmanager
def stop_signals() -> Iterator[dict[str, bool]]:
    """The first Ctrl-C or termination sets stop["now"]; a second one ends the process as usual.

    Only the main thread receives signals; elsewhere the block runs without them.
    """
    stop, previous = {"now": False}, {}

    def ask(number: int, frame: Any) -> None:
        stop["now"] = True
        for known, handler in previous.items():
            signal.signal(known, handler)

    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            previous[number] = signal.signal(number, ask)
    except ValueError:
        previous.clear()
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
