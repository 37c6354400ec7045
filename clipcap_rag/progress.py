"""Progress bars with rate and time left, silent when the output is not a terminal."""

import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

Item = TypeVar("Item")


def bar(description: str, total: int | None = None, done: int = 0, unit: str = "it") -> tqdm:
    """A progress bar on standard error; `done` items count as finished by an earlier run.

    Use it as a context manager and call `update(n)`. It prints nothing unless standard error is a terminal.
    """
    return tqdm(
        desc=description,
        total=total,
        initial=done,
        unit=unit,
        disable=not sys.stderr.isatty(),
        file=sys.stderr,
        dynamic_ncols=True,
        mininterval=0.2,
    )


def track(items: Iterable[Item], description: str, total: int | None = None, unit: str = "it") -> Iterator[Item]:
    """Iterates over `items` and shows how far it is."""
    with bar(description, total=total, unit=unit) as progress:
        for item in items:
            yield item
            progress.update(1)


def say(message: str) -> None:
    """One line for the person at the terminal, on standard error so that standard output stays machine-readable."""
    tqdm.write(message, file=sys.stderr)
