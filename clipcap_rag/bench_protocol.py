"""How two ways of doing a thing are compared: the same result first, then the time, alternately, in one process."""

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from clipcap_rag.progress import say

PAIRS, FEW_PAIRS, LONG = 5, 3, 20.0  # pairs; pairs where the slow side takes more than LONG seconds


class Disagreement(Exception):
    """The two sides of a comparison do not compute the same, so that their times must not be compared."""


@dataclass(frozen=True)
class Comparison:
    """Two ways to the same result.

    Attributes:
        name: what is done.
        size: how much of it, for people.
        fast: our way, in a few words.
        slow: the way it is compared with.
        target: least ratio of times, slow over fast, that is promised; None where nothing is.
        run_fast, run_slow: do it once.
        agree: checks that both give the same and says how closely, or raises `Disagreement`.
        scale: how many times the work of `run_slow` the work of `run_fast` is.
    """

    name: str
    size: str
    fast: str
    slow: str
    target: float | None
    run_fast: Callable[[], Any]
    run_slow: Callable[[], Any]
    agree: Callable[[], str]
    scale: float = 1.0


@dataclass(frozen=True)
class Result:
    """What came of a comparison: ratios of times, slow over fast, seconds, and peak memory in bytes."""

    name: str
    size: str
    fast: str
    slow: str
    target: float | None
    ratio: float
    low: float
    high: float
    seconds_fast: float
    seconds_slow: float
    memory_fast: int
    memory_slow: int
    agreement: str
    pairs: list[list[float]] = field(default_factory=list)

    @property
    def met(self) -> bool:
        """Whether the median ratio reaches the target."""
        return self.target is None or self.ratio >= self.target

    def to_json(self) -> dict[str, Any]:
        """The result as an object of the JSON file."""
        return asdict(self) | {"met": self.met}


def compare(comparison: Comparison, pairs: int = PAIRS) -> Result:
    """Checks that both sides agree, then runs them alternately.

    Each side runs once unmeasured (the check does that). Odd pairs begin with the other side, so that a machine that
    slows down favours none.

    Raises:
        Disagreement: the sides do not compute the same.
    """
    agreement = comparison.agree()
    times: list[list[float]] = []
    memory = [0, 0]
    while len(times) < pairs:
        sides = [(0, comparison.run_fast), (1, comparison.run_slow)]
        measured = [0.0, 0.0]
        for side, run in sides if len(times) % 2 == 0 else reversed(sides):
            measured[side], peak = _timed(run)
            memory[side] = max(memory[side], peak)
        times.append(measured)
        if measured[1] > LONG:
            pairs = min(pairs, FEW_PAIRS)
    ratios = [slow * comparison.scale / fast for fast, slow in times]
    result = Result(
        comparison.name,
        comparison.size,
        comparison.fast,
        comparison.slow,
        comparison.target,
        statistics.median(ratios),
        min(ratios),
        max(ratios),
        statistics.median(fast for fast, _ in times),
        statistics.median(slow for _, slow in times),
        *memory,
        agreement,
        times,
    )
    say(line(result))
    return result


def line(result: Result) -> str:
    """A result on one line of a table for people."""
    target = "" if result.target is None else f" (at least {result.target:g}: {'met' if result.met else 'MISSED'})"
    return (
        f"{result.name:<34}{result.ratio:6.2f}x [{result.low:.2f}, {result.high:.2f}]{target}  "
        f"{result.seconds_fast:.3f} s against {result.seconds_slow:.3f} s, {result.memory_fast / 2**20:.0f} and "
        f"{result.memory_slow / 2**20:.0f} MB; {result.agreement}"
    )


def _timed(run: Callable[[], Any]) -> tuple[float, int]:
    """Seconds of one run and the peak memory of the process in it, in bytes; 0 where the system does not tell."""
    gc.collect()
    _reset_peak()
    began = time.perf_counter()
    run()
    return time.perf_counter() - began, _peak()


def _reset_peak() -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def _peak() -> int:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(text.split()[1]) * 1024 for text in lines if text.startswith("VmHWM")), 0)
