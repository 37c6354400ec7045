"""The studies of an evaluation as tables and curves that a page can show without knowing what they mean."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from clipcap_rag.score_table import DECIMALS

Row = Mapping[str, Any]
Json = dict[str, Any]

_FIRST = ("CIDEr", "BLEU-4", "ROUGE-L", "copied-neighbor")  # the other metrics are shown when asked for
_NEAREST, _WEIGHT = re.compile(r"nearest \d+ of "), re.compile(r"sample, weight ([\d.]+)")
_DECODINGS = {"beams": re.compile(r"beam (\d+)")} | {
    f"samples by {scorer}": re.compile(rf"(\d+) by {scorer}") for scorer in ("log-probability", "CLIP", "both")
}


def sections(results: Row) -> list[Json]:
    """The studies that were made, in the order of a page.

    Args:
        results: as `evaluation.evaluate` returns them.

    Returns:
        {"id", "title", "note", "parts"}; a part is {"title"} with "table" {"columns", "rows"} or "chart" {"x", "y",
        "series"}, and "folded" if it is long. A column without "digits" holds text; others hold numbers, or {"value",
        "low", "high"}, to be shown times "scale"; "more" marks those that are shown when asked for. A series is
        {"name", "points"}, a point {"x", "y", "label"}.
    """
    made = (_captions(results), _robustness(results), _decodings(results), _leaks(results), _data(results))
    return [section for section in made if section["parts"]]


def _captions(results: Row) -> Json:
    rows = _of_study(results, "table")
    weighed = [row for row in rows if _WEIGHT.fullmatch(row["decoding"])]
    written = [row for row in rows if row not in weighed]
    parts = _matrices(written, _names(results)) if len(_names(results)) > 1 else []
    for title, own in _by_features(results, written):
        parts.append({"title": _joined("Scores", title), "table": _table(own)})
    for title, own in _by_features(results, weighed):
        series = [
            _series(neighbors, [(float(_WEIGHT.fullmatch(row["decoding"])[1]), row, "") for row in of])
            for neighbors, of in _groups(own, "neighbors")
        ]
        title = _joined("Samples ordered with more or less weight on what the language model finds likely", title)
        parts.append({"title": title, "chart": _chart("weight of the log-probability", series)})
    note = "Every index and no retrieval, beside captions that were only looked up. Points; 95 % intervals over photos."
    return {"id": "captions", "title": "Captions scored", "note": note, "parts": parts}


def _matrices(rows: Sequence[Row], names: Sequence[str]) -> list[Json]:
    """CIDEr of each kind of neighbours on each feature set, a table for each decoding."""
    parts = []
    for decoding, of in _groups(rows, "decoding"):
        cells = {(row["neighbors"], row["features"]): row["metrics"]["CIDEr"] for row in of}
        columns = [_text("neighbours"), *(_points(name) for name in names)]
        lines = [[kind, *(cells.get((kind, name)) for name in names)] for kind, _ in _groups(of, "neighbors")]
        parts.append({"title": f"CIDEr by photos, {decoding}", "table": {"columns": columns, "rows": lines}})
    return parts


def _robustness(results: Row) -> Json:
    columns = [_text("effect"), _text("decoding"), _text("metric"), _points("difference", signed=True)]
    columns += [_text("of"), _points("value"), _text("minus"), _points("value")]
    parts: list[Json] = []
    for title, own in _by_features(results, results["effects"]):
        lines = [
            [
                *(one[name] for name in ("effect", "decoding", "metric")),
                _figure(one),
                *(cell for side in ("of", "minus") for cell in (one[side]["neighbors"], _figure(one[side]))),
            ]
            for one in own
        ]
        parts.append({"title": _joined("Effects", title), "table": {"columns": columns, "rows": lines}})
    for title, own in _by_features(results, _of_study(results, "robustness")):
        counted = [row for row in own if row["neighbors"] == "none" or _NEAREST.match(row["neighbors"])]
        series = [
            _series(decoding, [(row["shown"], row, f"{row['shown']:g}") for row in of])
            for decoding, of in _groups(counted, "decoding")
        ]
        parts.append({"title": _joined("More and more neighbours", title), "chart": _chart("neighbours", series)})
        parts.append({"title": _joined("Worse and worse neighbours", title), "table": _table(own)})
    note = (
        "Benefit is what the nearest captions bring over none, harm what random captions cost against none, copying "
        "how much larger the share of words gets that only a wrong majority of the neighbours has."
    )
    return {"id": "robustness", "title": "Robustness", "note": note, "parts": parts}


def _decodings(results: Row) -> Json:
    parts: list[Json] = []
    for title, own in _by_features(results, _of_study(results, "decoding")):
        found: dict[str, list[tuple[float, Row, str]]] = {}
        for row in own:
            name, label = row["decoding"], ""
            for series, pattern in _DECODINGS.items():
                if match := pattern.fullmatch(row["decoding"]):
                    name, label = series, match[1]
            found.setdefault(name, []).append((row["seconds_per_image"], row, label))
        chart = _chart("seconds a photo", [_series(name, points) for name, points in found.items()], log=True)
        parts.append({"title": _joined("CIDEr against time", title), "chart": chart})
        parts.append({"title": _joined("Scores", title), "table": _table(own)})
    note = "What a caption costs and what it is worth; the numbers in the chart count beams or samples."
    return {"id": "decoding", "title": "Decodings", "note": note, "parts": parts}


def _leaks(results: Row) -> Json:
    columns = [_text("index"), _text("what it knows"), _number("photos", 0), _number("captions", 0)]
    doubles = [_text("index"), _text("photo"), _text("nearly equal to"), _number("cosine", 3)]
    parts: list[Json] = []
    for title, own in _by_features(results, results["leaks"]):
        pairs = [
            [one["index"], pair["image"], pair["other"], pair["cosine"]]
            for one in own
            for pair in (one["doubles"] or {}).get("pairs", [])
        ]
        table = {"columns": columns, "rows": [line for one in own for line in _known(one)]}
        parts.append({"title": _joined("Found", title), "table": table})
        if pairs:
            table = {"columns": doubles, "rows": pairs}
            named = _joined("Photos that nearly equal another", title)
            parts.append({"title": named, "table": table, "folded": True})
    for title, own in _by_features(results, _of_study(results, "leaks")):
        parts.append({"title": _joined("Scores with and without", title), "table": _table(own, photos=True)})
    note = "What the indexes know of the photos that are judged."
    return {"id": "leaks", "title": "Leaks", "note": note, "parts": parts}


def _known(leaks: Row) -> Iterator[list[Any]]:
    """The lines about one index."""
    doubles = leaks["doubles"] or {}
    others = f"of {doubles['compared']} others" if doubles else "of others: not compared"
    for name, found in (
        ("captions with the same image id", leaks["ids"]),
        ("captions that equal a reference", leaks["strings"]),
        (f"captions of photos nearly equal to one {others}", doubles),
    ):
        yield [leaks["index"], name, found.get("photos"), found.get("captions")]
    yield [leaks["index"], "any of these", len(leaks["leaking"]), None]


def _data(results: Row) -> Json:
    recalls = list(dict.fromkeys(name for one in results["features"] for name in one["recall"]))
    columns = [_text("photos of"), _number("photos", 0), *(_points(name) for name in recalls), _text("folder")]
    lines = [
        [one["name"], one["photos"], *(one["recall"].get(name) for name in recalls), one["path"]]
        for one in results["features"]
    ]
    parts = [{"title": "Image to caption recall", "table": {"columns": columns, "rows": lines}}]
    held = [[one["name"], index, count] for one in results["features"] for index, count in one["excluded_rows"].items()]
    if held:
        table = {"columns": [_text("photos of"), _text("index"), _number("their captions", 0)], "rows": held}
        parts.append({"title": "Their own captions in the indexes, never retrieved but for the leak study"})
        parts[-1]["table"] = table
    note = "How often CLIP finds a photo's own caption among those of all photos, first, in five, in ten."
    return {"id": "data", "title": "Data", "note": note, "parts": parts}


def _table(rows: Sequence[Row], photos: bool = False) -> Json:
    """Rows of results, a line each; `photos` says of each how many it is about."""
    found = dict.fromkeys(name for row in rows for name in row["metrics"])
    metrics = [name for name in _FIRST if name in found] + [name for name in found if name not in _FIRST]
    columns = [_text("neighbours"), _text("decoding"), *([_number("photos", 0)] if photos else [])]
    columns += [*map(_metric, metrics), _number("shown", 1), _number("s/photo", 3)]
    lines = [
        [
            row["neighbors"],
            row["decoding"],
            *([row["photos"]] if photos else []),
            *(row["metrics"].get(name) for name in metrics),
            row["shown"],
            row["seconds_per_image"],
        ]
        for row in rows
    ]
    return {"columns": columns, "rows": lines}


def _metric(name: str) -> Json:
    column = _points(name) if name not in DECIMALS else _number(name, DECIMALS[name])
    return column if name in _FIRST else column | {"more": True}


def _text(name: str) -> Json:
    return {"name": name}


def _number(name: str, digits: int) -> Json:
    return {"name": name, "digits": digits, "scale": 1}


def _points(name: str, signed: bool = False) -> Json:
    return {"name": name, "digits": 1, "scale": 100} | ({"signed": True} if signed else {})


def _figure(value: Row) -> Json:
    return {name: value[name] for name in ("value", "low", "high")}


def _chart(x: str, series: list[Json], log: bool = False) -> Json:
    return {"x": {"name": x, "log": log}, "y": {"name": "CIDEr", "scale": 100}, "series": series}


def _series(name: str, points: Iterable[tuple[float, Row, str]]) -> Json:
    found = [{"x": x, "y": row["metrics"]["CIDEr"], "label": label} for x, row, label in points]
    return {"name": name, "points": sorted(found, key=lambda point: point["x"])}


def _names(results: Row) -> list[str]:
    return [one["name"] for one in results["features"]]


def _of_study(results: Row, study: str) -> list[Row]:
    return [row for row in results["rows"] if row["study"] == study]


def _by_features(results: Row, rows: Sequence[Row]) -> Iterator[tuple[str, list[Row]]]:
    """The rows of each feature set, and its name where there are several."""
    several = len(results["features"]) > 1
    for name, own in _groups(rows, "features"):
        yield (name if several else ""), own


def _groups(rows: Sequence[Row], column: str) -> Iterator[tuple[str, list[Row]]]:
    """The rows by their value in a column, in the order of its first appearance."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row[column], []).append(row)
    yield from groups.items()


def _joined(title: str, features: str) -> str:
    return f"{title}: {features}" if features else title
