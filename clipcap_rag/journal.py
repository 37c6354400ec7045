"""An account of long work that survives a kill: one JSON line per finished row, the last line of a row counts."""

import json
from array import array
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

from clipcap_rag.errors import InputError

_ABSENT = -1


class Journal:
    """The entries of rows, kept in a file; memory holds 8 bytes a row.

    Args:
        file: opened for reading and appending (`a+b`); a line that a kill tore off is removed from it.
        forget: whether an entry of an earlier run is to be made again.

    Raises:
        InputError: the file is damaged.
    """

    def __init__(self, file: BinaryIO, forget: Callable[[dict[str, Any]], bool] = lambda entry: False) -> None:
        self._offsets = array("q")
        self._file = file
        file.seek(0)
        whole = 0
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                break
            try:
                entry = json.loads(line)
                row = entry["row"]
                if type(row) is not int or row < 0:
                    raise ValueError(row)
            except (ValueError, TypeError, KeyError) as error:
                raise InputError(f"{file.name}:{number} is damaged; remove this line") from error
            self._place(row, _ABSENT if forget(entry) else whole)
            whole += len(line)
        file.truncate(whole)
        self._end = whole

    def __contains__(self, row: int) -> bool:
        return row < len(self._offsets) and self._offsets[row] != _ABSENT

    def __len__(self) -> int:
        return len(self._offsets) - self._offsets.count(_ABSENT)

    def add(self, entry: dict[str, Any]) -> None:
        """Appends an entry; when this returns, a kill of the program does not lose it."""
        line = json.dumps(entry, ensure_ascii=False).encode() + b"\n"
        self._file.write(line)
        self._file.flush()
        self._place(entry["row"], self._end)
        self._end += len(line)

    def entries(self) -> Iterator[dict[str, Any]]:
        """The entries in order of their rows."""
        for offset in self._offsets:
            if offset != _ABSENT:
                self._file.seek(offset)
                yield json.loads(self._file.readline())
        self._file.seek(self._end)

    def _place(self, row: int, offset: int) -> None:
        self._offsets.extend([_ABSENT] * (row + 1 - len(self._offsets)))
        self._offsets[row] = offset
