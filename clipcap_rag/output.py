"""What commands have in common on standard output: JSON Lines, results and the exit status."""

import json
from collections.abc import Callable
from typing import Any

from clipcap_rag.progress import say

DONE, SOME_FAILED, NOTHING_DONE = 0, 1, 2


def print_json(value: Any) -> None:
    """One JSON object on one line, at once, so that a reader of a pipe sees it when it is made."""
    print(json.dumps(value, ensure_ascii=False), flush=True)


def print_result(result: dict[str, Any], as_json: bool, table: Callable[[dict[str, Any]], str]) -> None:
    """A result for machines, or as a table for people."""
    if as_json:
        print_json(result)
    else:
        print(table(result))


def status_of(errors: list[str | None]) -> int:
    """The exit status for images with these errors, None where one went well; says how many failed."""
    failed = sum(error is not None for error in errors)
    if failed:
        say(f"{failed} of {len(errors)} images failed")
    return DONE if not failed else SOME_FAILED if failed < len(errors) else NOTHING_DONE
