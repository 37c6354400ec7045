"""Risk over coverage: how good the captions are that remain when the least sure are held back, as numbers and drawn."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from clipcap_rag.errors import missing_extra


def risks(order_by: np.ndarray, good: np.ndarray) -> np.ndarray:
    """Share of captions that are not good among the 1, 2, ... N surest, [N]; ties keep their order.

    Args:
        order_by: [N], larger is surer.
        good: [N] bool.
    """
    kept = np.argsort(-order_by, kind="stable")
    return np.cumsum(~good[kept]) / np.arange(1, len(good) + 1)


def area(order_by: np.ndarray, good: np.ndarray) -> float:
    """Area under the risk-coverage curve, AURC (Geifman et al. 2019, arXiv 1805.08206): the mean of `risks`."""
    return float(risks(order_by, good).mean())


def areas(orders: dict[str, np.ndarray], good: np.ndarray) -> dict[str, float]:
    """AURC of each order, of an oracle that knows what is good, and of chance."""
    found = {name: area(order_by, good) for name, order_by in orders.items()}
    return found | {"oracle": area(good.astype(float), good), "chance": float((~good).mean())}


def points(sure: np.ndarray, good: np.ndarray, cider: np.ndarray, steps: int = 20) -> list[dict[str, float]]:
    """The curve at `steps` coverages: the level that keeps so many, their risk and mean CIDEr (a raw fraction)."""
    kept = np.argsort(-sure, kind="stable")
    risk = risks(sure, good)
    counts = np.unique(np.ceil(np.arange(1, steps + 1) / steps * len(sure)).astype(int))
    return [
        {
            "coverage": float(count / len(sure)),
            "level": float(sure[kept[count - 1]]),
            "risk": float(risk[count - 1]),
            "CIDEr": float(cider[kept[:count]].mean()),
        }
        for count in counts
    ]


def reliability(sure: np.ndarray, good: np.ndarray, bins: int = 10) -> tuple[float, list[dict[str, float]]]:
    """How far stated probabilities are from what comes true, on N / `bins` photos at a time, least sure first.

    Returns:
        The expected calibration error (Naeini et al. 2015), and per bin mean probability, share of good, photos.
    """
    parts = [part for part in np.array_split(np.argsort(sure, kind="stable"), bins) if len(part)]
    rows = [{"sure": float(sure[part].mean()), "good": float(good[part].mean()), "photos": len(part)} for part in parts]
    return sum(row["photos"] * abs(row["sure"] - row["good"]) for row in rows) / len(sure), rows


def draw(orders: dict[str, np.ndarray], good: np.ndarray, cider: np.ndarray, file: Path) -> None:
    """Writes a PNG: risk and mean CIDEr of what is kept over coverage, for each order, an oracle and chance."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise missing_extra("matplotlib", "eval") from error
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    risk, quality = figure.subplots(1, 2)
    coverage = 100 * np.arange(1, len(good) + 1) / len(good)
    for number, (name, order_by) in enumerate(orders.items()):
        style: dict[str, Any] = {"color": f"C{number}", "linewidth": 1 if number else 2.2, "label": name}
        risk.plot(coverage, 100 * risks(order_by, good), **style)
        quality.plot(coverage, 100 * _kept_mean(order_by, cider), **style)
    risk.plot(coverage, 100 * risks(good.astype(float), good), ":", color="grey", label="oracle")
    quality.plot(coverage, 100 * _kept_mean(cider, cider), ":", color="grey")
    risk.axhline(100 * (~good).mean(), linestyle="--", color="grey", label="chance")
    quality.axhline(100 * cider.mean(), linestyle="--", color="grey")
    quality.set_ylim(0, 300 * cider.mean())
    risk.set(xlabel="captions kept (%)", ylabel="not good among them (%)")
    quality.set(xlabel="captions kept (%)", ylabel="their CIDEr (points)")
    risk.legend(fontsize=7)
    figure.savefig(file, dpi=110)


def _kept_mean(order_by: np.ndarray, values: np.ndarray) -> np.ndarray:
    kept = np.argsort(-order_by, kind="stable")
    return np.cumsum(values[kept]) / np.arange(1, len(values) + 1)


def table(measured: dict[str, Any], coverages: Sequence[float] = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.25, 0.1)) -> str:
    """What was measured, for people: shares in percent, CIDEr in points (times 100)."""
    lines = [f"{'kept %':>8}{'level':>8}{'not good %':>12}{'CIDEr':>8}"]
    for coverage in coverages:
        row = min(measured["curve"], key=lambda row: abs(row["coverage"] - coverage))
        cells = f"{100 * row['coverage']:>8.0f}{row['level']:>8.2f}"
        lines.append(f"{cells}{100 * row['risk']:>12.1f}{100 * row['CIDEr']:>8.1f}")
    found = ", ".join(f"{name} {100 * value:.1f}" for name, value in measured["AURC"].items())
    lines.append(f"area under the risk (smaller is better): {found}")
    error, photos = 100 * measured["calibration_error"], measured["photos"]
    lines.append(f"{photos} photos, each judged by a fit to others; calibration error {error:.1f} %")
    return "\n".join(lines)
