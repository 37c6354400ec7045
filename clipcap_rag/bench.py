"""Speed measured side by side: each fast way of the package against the slow way beside it."""

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from clipcap_rag import bench_encoding, bench_learning, bench_searching, bench_whole, bench_writing
from clipcap_rag.bench_protocol import PAIRS, Disagreement, Result, compare
from clipcap_rag.bench_report import write_results
from clipcap_rag.bench_subjects import FULL, QUICK, Subjects
from clipcap_rag.errors import InputError
from clipcap_rag.hardware import pick_device
from clipcap_rag.progress import say

GROUPS = {
    "encoding": bench_encoding.comparisons,
    "writing": bench_writing.comparisons,
    "searching": bench_searching.comparisons,
    "learning": bench_learning.comparisons,
    "whole": bench_whole.comparisons,
}


def bench(
    out: str | Path, *, groups: Sequence[str] = (), quick: bool = False, device: str = "auto"
) -> tuple[list[Result], dict[str, str]]:
    """Runs the comparisons and writes bench.json and bench.png into `out` after each group.

    Args:
        groups: which of `GROUPS` to run; all if empty.
        quick: small sizes and one pair each, to see that everything runs; the ratios then mean nothing.

    Returns:
        The results, and per comparison whose sides do not compute the same the reason.

    Raises:
        InputError: an unknown group.
    """
    unknown = [group for group in groups if group not in GROUPS]
    if unknown:
        raise InputError(f"there is no group {unknown[0]!r}; choose among {', '.join(GROUPS)}")
    results: list[Result] = []
    failures: dict[str, str] = {}
    began = time.perf_counter()
    for group in groups or GROUPS:
        with tempfile.TemporaryDirectory() as folder:
            subjects = Subjects(QUICK if quick else FULL, Path(folder), pick_device(device))
            for comparison in GROUPS[group](subjects):
                try:
                    results.append(compare(comparison, 1 if quick else PAIRS))
                except Disagreement as error:
                    failures[comparison.name] = str(error)
                    say(f"{comparison.name}: the sides disagree, so nothing is timed: {error}")
        write_results(Path(out), results, failures, time.perf_counter() - began)
    return results, failures
