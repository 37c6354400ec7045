"""Text files, gzipped or not, as numbered lines in bounded memory, and the account of lines that are bad."""

import gzip
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import IO, Any

from clipcap_rag.errors import InputError

LONGEST_LINE = 16 * 2**20  # bytes; a longer one is no line of text and must not fill the memory
_LISTED = 20


class BadLines:
    """What is wrong with the input: an error at once, or, with `skip`, counted and the first 20 sentences listed."""

    def __init__(self, skip: bool = False) -> None:
        self.skip = skip
        self.count = 0
        self.listed: list[str] = []
        self.last = ""

    def report(self, sentence: str) -> None:
        """Takes note of a bad line, named as `file:line: what`.

        Raises:
            InputError: bad lines are not to be skipped.
        """
        sentence = sentence.encode("utf-8", "backslashreplace").decode()  # file names may hold what text cannot
        if not self.skip:
            raise InputError(f"{sentence}; mend it, or pass --skip-bad to leave out what is bad")
        self.count, self.last = self.count + 1, sentence
        if len(self.listed) < _LISTED:
            self.listed.append(sentence)


@contextmanager
def open_bytes(path: Path) -> Iterator[IO[bytes]]:
    """The content of a file, unpacked if it is gzipped, whatever its name.

    Raises:
        InputError: it cannot be read, or its gzip data are truncated or damaged.
    """
    try:
        with open(path, "rb") as file:
            packed = file.peek(2)[:2] == b"\x1f\x8b"
            with gzip.open(file) if packed else nullcontext(file) as stream:
                yield stream
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"{path} is a damaged gzip file ({error}); copy it again") from error
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}; check it and its permissions") from error


def read_lines(path: Path, bad: BadLines) -> Iterator[tuple[int, str]]:
    """Yields the number, from 1, and the text of each line; blank lines at the end of the file are left out.

    Lines that are not UTF-8 or longer than 16 MB are reported to `bad` and not yielded.

    Raises:
        InputError: the file cannot be read or is UTF-16, or a line is bad and `bad` does not skip.
    """
    blank = 0
    with open_bytes(path) as stream:
        for number, line in enumerate(_split(stream), 1):
            if line is not None and not line.strip():
                blank += 1
                continue
            yield from ((earlier, "") for earlier in range(number - blank, number))
            blank = 0
            if line is None:
                bad.report(f"{path}:{number}: longer than {LONGEST_LINE >> 20} MB")
                continue
            if number == 1 and line[:2] in (b"\xff\xfe", b"\xfe\xff"):
                raise InputError(f"{path} is UTF-16; convert it: iconv -f UTF-16 -t UTF-8 {path}")
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                bad.report(f"{path}:{number}: not UTF-8 (byte 0x{line[error.start]:02x} at position {error.start + 1})")
                continue
            yield number, text


def _split(stream: IO[bytes]) -> Iterator[bytes | None]:
    """Lines without their ends; None stands for one that is too long. A carriage return alone ends a line, too."""
    while raw := stream.readline(LONGEST_LINE):
        if len(raw) < LONGEST_LINE or raw.endswith(b"\n"):
            yield from raw.splitlines()
            continue
        while raw and not raw.endswith(b"\n"):
            raw = stream.readline(LONGEST_LINE)
        yield None


def parse_json(text: str | bytes) -> Any:
    """Parses JSON; all that can be wrong with it is a ValueError."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def short(value: Any) -> str:
    """A value as it is quoted in errors."""
    quoted = ascii(value)
    return quoted if len(quoted) <= 60 else quoted[:57] + "..."
