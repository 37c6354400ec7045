"""What a benchmark leaves: a JSON file for machines and a bar chart for people."""

import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from clipcap_rag.artifact import write_json
from clipcap_rag.bench_protocol import Result
from clipcap_rag.errors import missing_extra
from clipcap_rag.hardware import bfloat16_instructions


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "bfloat16": bfloat16_instructions() or "none",
        "gpu": gpu,
        "torch": torch.__version__,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def write_results(out: Path, results: Sequence[Result], failures: dict[str, str], seconds: float) -> None:
    """Writes bench.json and bench.png into `out`.

    Args:
        failures: comparisons whose sides disagree, with the reason.
        seconds: time of the whole run.
    """
    out.mkdir(parents=True, exist_ok=True)
    rows = [result.to_json() for result in results]
    write_json(
        out / "bench.json", {"machine": machine(), "seconds": seconds, "comparisons": rows, "failures": failures}
    )
    if results:
        draw(out / "bench.png", results)


def draw(file: Path, results: Sequence[Result]) -> None:
    """Bars of the median ratios with their range, and a mark where the promise is."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError as error:
        raise missing_extra("matplotlib", "eval") from error
    figure, axes = pyplot.subplots(figsize=(9, 0.42 * len(results) + 1.2))
    places = range(len(results))
    ratios = [result.ratio for result in results]
    errors = [[r.ratio - r.low for r in results], [r.high - r.ratio for r in results]]
    axes.barh(places, ratios, xerr=errors, color="#4c78a8", ecolor="#1f2f46", height=0.6)
    for place, result in zip(places, results, strict=True):
        if result.target is not None:
            axes.plot([result.target] * 2, [place - 0.4, place + 0.4], color="#e45756", linewidth=2)
        axes.annotate(f" {result.ratio:.2g}x", (max(result.high, result.ratio), place), va="center", fontsize=8)
    axes.set_yticks(list(places), [result.name for result in results], fontsize=8)
    axes.invert_yaxis()
    axes.set_xscale("log")
    ticks = [factor * 10**power for power in range(4) for factor in (1, 2, 5)]
    axes.set_xticks(ticks, [f"{tick}x" for tick in ticks], minor=False)
    axes.set_xticks([], minor=True)
    axes.set_xlim(0.5, 2 * max(*ratios, 1))
    axes.axvline(1, color="grey", linewidth=0.8)
    axes.set_xlabel("times faster than the way beside it (median, range; red: promised)")
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    pyplot.close(figure)
