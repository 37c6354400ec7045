"""The lock of an index: one process writes it at a time, and another one waits or learns who that is."""

import fcntl
import json
import math
import os
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from clipcap_rag.errors import InputError
from clipcap_rag.progress import say

_PAUSE = 0.05  # seconds between two looks at a lock that is held


@contextmanager
def index_lock(index: Path, wait: float = 0) -> Iterator[None]:
    """Keeps other processes from writing `index` while the block runs; readers are not held up.

    It is a `flock` on a file beside the index, which the system frees when its holder dies, however that happens.

    Args:
        index: the directory, which need not be there yet.
        wait: seconds to wait for another process, which is named; 0 does not wait, infinity waits as long as it takes.

    Raises:
        InputError: another process still holds it.
    """
    index = index.resolve()
    file = index.with_name(f".{index.name}.lock")
    file.parent.mkdir(parents=True, exist_ok=True)
    began, told = time.monotonic(), False
    while (descriptor := _lock(file)) is None:
        left = wait - (time.monotonic() - began)
        if left <= 0:
            raise InputError(
                f"another command is writing {index}: {_holder(file)}; wait until it ends or choose another folder"
            )
        if not told:
            until = "" if math.isinf(wait) else f" for {wait:g} s"
            say(f"waiting{until}: another command is writing {index}: {_holder(file)}")
            told = True
        time.sleep(min(_PAUSE, left))
    try:
        yield
    finally:
        file.unlink(missing_ok=True)
        os.close(descriptor)


def _lock(file: Path) -> int | None:
    """A descriptor that holds the lock and says who we are, or None where another process holds it."""
    descriptor = os.open(file, os.O_CREAT | os.O_RDWR, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(descriptor).st_nlink == 0:  # its holder removed it between our open and our lock
            raise BlockingIOError
        command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])[:200]
        who = {"process": os.getpid(), "command": command, "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(who).encode(), 0)
    except BaseException as error:
        os.close(descriptor)
        if isinstance(error, BlockingIOError):
            return None
        raise
    return descriptor


def _holder(file: Path) -> str:
    try:
        who = json.loads(file.read_text())
        return f"process {who['process']} ({who['command']}) since {who['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "it has only just begun or ended"
