"""Scores and comparisons as tables for people, in points: fractions times 100."""

from collections.abc import Sequence
from typing import Any

DECIMALS = {"vocabulary": 0, "length": 1}  # of metrics that are no fraction


def score_table(result: dict[str, Any]) -> str:
    """What `score` or `score_files` returned: a row per metric, a column per domain."""
    groups = {"overall": result} | result.get("domains", {})
    rows = [["", *groups], ["photos", *(str(group["images"]) for group in groups.values())]]
    rows += [
        [metric, *(_with_interval(metric, group["metrics"][metric]) for group in groups.values())]
        for metric in result["metrics"]
    ]
    return "\n".join([*_aligned(rows), *_remarks(result)])


def difference_table(result: dict[str, Any]) -> str:
    """What `paired_difference` or `compare_files` returned: a row per metric, a block per domain."""
    lines = []
    for name, group in ({"overall": result} | result.get("domains", {})).items():
        rows = [[f"{name}, {group['images']} photos", "first", "second", "first - second"]]
        for metric, figures in group["metrics"].items():
            plain = [_number(metric, figures[side]["value"]) for side in ("first", "second")]
            rows.append([metric, *plain, _with_interval(metric, figures["difference"])])
        lines += [*_aligned(rows), ""]
    return "\n".join([*lines[:-1], *_remarks(result)])


def _number(metric: str, value: float | None) -> str:
    if value is None:
        return "-"
    decimals = DECIMALS.get(metric)
    return f"{100 * value:.1f}" if decimals is None else f"{value:.{decimals}f}"


def _with_interval(metric: str, figure: dict[str, float | None]) -> str:
    value, low, high = (_number(metric, figure[key]) for key in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    ]


def _remarks(result: dict[str, Any]) -> list[str]:
    """What the figures rest on, and what is not among them."""
    remarks = ["in brackets 95 % intervals; fractions times 100", f"words: {result['tokenizer']['name']}"]
    if "measured_on" in result["tokenizer"]:
        agreement, captions = 100 * result["tokenizer"]["agreement"], result["tokenizer"]["measured_on"]
        remarks[-1] += f"; the same as those of the one in Java for {agreement:.2f} % of {captions}"
    remarks += [f"{metric} is missing: {reason}" for metric, reason in result["missing"].items()]
    note = result.get("clip_score", {}).get("note")
    remarks += [f"CLIPScore: {note}"] if note else []
    for key, what in (("unpredicted", "photos have no caption"), ("unreferenced", "captions have no references")):
        remarks += [f"{result[key]} {what} and are left out"] if result.get(key) else []
    empty = result["empty_captions"]
    remarks += [f"empty captions: {empty}"] if any(empty if isinstance(empty, list) else [empty]) else []
    return remarks
