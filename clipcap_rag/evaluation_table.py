"""The results of an evaluation as tables for people, in points: metrics times 100."""

from collections.abc import Iterator
from typing import Any

_STUDIES = {
    "table": "captions scored",
    "robustness": "worse and worse neighbours",
    "decoding": "decodings",
    "leaks": "with and without what the index knows of the photos",
}
_SHOWN = ("CIDEr", "BLEU-4")


def table(result: dict[str, Any]) -> str:
    """What `evaluation.evaluate` returns, for people.

    A study has a table for each feature set; with several feature sets the first study is one matrix of neighbours by
    feature sets for each decoding.
    """
    lines: list[str] = []
    for study, title in _STUDIES.items():
        rows = [row for row in result["rows"] if row["study"] == study]
        if study == "table" and len(result["features"]) > 1:
            lines += _matrix(rows, [features["name"] for features in result["features"]])
            continue
        for features in result["features"]:
            lines += _rows([row for row in rows if row["features"] == features["name"]], f"{title}: {features['name']}")
    lines += [line for effect in result["effects"] for line in _effect(effect)]
    lines += [line for leaks in result["leaks"] for line in _leaks(leaks)]
    for features in result["features"]:
        recall = ", ".join(f"{name} {100 * value:.1f}" for name, value in features["recall"].items())
        lines.append(f"image to caption on the {features['photos']} photos of {features['name']}: {recall}")
    return "\n".join(lines)


def _rows(rows: list[dict[str, Any]], title: str) -> Iterator[str]:
    if not rows:
        return
    first, second = _width("neighbours", rows, "neighbors"), _width("decoding", rows, "decoding")
    numbers = "".join(f"{name:>8}" for name in ("photos", "shown"))
    yield title
    yield f"{'neighbours':<{first}}{'decoding':<{second}}{numbers}{'CIDEr (95 %)':>22}{'BLEU-4':>8}{'s/photo':>9}"
    for row in rows:
        cider = row["metrics"]["CIDEr"]
        interval = f"{_points(row, 'CIDEr')} ({100 * cider['low']:.1f} to {100 * cider['high']:.1f})"
        scores = f"{interval:>22}{_points(row, 'BLEU-4'):>8}{row['seconds_per_image']:>9.3f}"
        yield f"{row['neighbors']:<{first}}{row['decoding']:<{second}}{row['photos']:>8}{row['shown']:>8.1f}{scores}"
    yield ""


def _matrix(rows: list[dict[str, Any]], features: list[str]) -> Iterator[str]:
    """CIDEr / BLEU-4 of every kind of neighbours on every feature set, decoding by decoding."""
    cells = {
        (row["decoding"], row["neighbors"], row["features"]): " / ".join(_points(row, name) for name in _SHOWN)
        for row in rows
    }
    first, width = _width("neighbours", rows, "neighbors"), max(15, *(len(name) + 2 for name in features))
    for decoding in dict.fromkeys(row["decoding"] for row in rows):
        yield f"{decoding}, {' / '.join(_SHOWN)}"
        yield f"{'neighbours':<{first}}" + "".join(f"{name:>{width}}" for name in features)
        for neighbors in dict.fromkeys(row["neighbors"] for row in rows if row["decoding"] == decoding):
            found = [cells.get((decoding, neighbors, name), "") for name in features]
            yield f"{neighbors:<{first}}" + "".join(f"{cell:>{width}}" for cell in found)
        yield ""


def _effect(effect: dict[str, Any]) -> Iterator[str]:
    of, minus = effect["of"], effect["minus"]
    figure = f"{100 * effect['value']:+.1f} ({100 * effect['low']:+.1f} to {100 * effect['high']:+.1f})"
    yield (
        f"{effect['effect']}, {effect['decoding']}, {effect['features']}: {effect['metric']} {figure}: "
        f"{of['neighbors']} {100 * of['value']:.1f}, {minus['neighbors']} {100 * minus['value']:.1f}"
    )


def _leaks(leaks: dict[str, Any]) -> Iterator[str]:
    where = f"{leaks['index']} and {leaks['features']}"
    for kind, words in (("ids", "the same image id"), ("strings", "a reference caption")):
        found = leaks[kind]
        yield f"{where}: {found['captions']} captions with {words}, of {found['photos']} photos"
    doubles = leaks["doubles"]
    if doubles is None:
        yield f"{where}: photos not compared, as it holds none; give them with --training-features"
    else:
        yield (
            f"{where}: {doubles['photos']} photos nearly equal one of {doubles['compared']} others, "
            f"with {doubles['captions']} captions"
        )


def _points(row: dict[str, Any], name: str) -> str:
    return f"{100 * row['metrics'][name]['value']:.1f}"


def _width(heading: str, rows: list[dict[str, Any]], column: str) -> int:
    return 2 + max(len(heading), *(len(row[column]) for row in rows))
