"""Tables and curves of a report: every study has its part, and only what was studied."""

import pytest

from clipcap_rag.report_tables import sections


def row(study, neighbors, decoding, value, **other):
    metrics = {name: {"value": value, "low": value, "high": value} for name in ("BLEU-1", "CIDEr", "vocabulary")}
    plain = {"features": "near", "photos": 9, "shown": 8.0, "seconds_per_image": value, "metrics": metrics}
    return {"study": study, "neighbors": neighbors, "decoding": decoding} | plain | other


def results(rows, features=("near",), leaks=()):
    sets = [{"name": name, "path": name, "photos": 9, "recall": {}, "excluded_rows": {}} for name in features]
    return {"rows": rows, "features": sets, "effects": [], "leaks": list(leaks)}


def parts(found, kind):
    return [part[kind] for section in found for part in section["parts"] if kind in part]


def test_only_what_was_studied_is_there():
    found = sections(results([row("decoding", "birds", "greedy", 0.4)]))
    assert [section["id"] for section in found] == ["decoding", "data"]


def test_the_main_metrics_come_first_and_the_others_when_asked_for():
    (table, _) = parts(sections(results([row("table", "birds", "greedy", 0.4)])), "table")
    assert [column["name"] for column in table["columns"]] == [
        "neighbours", "decoding", "CIDEr", "BLEU-1", "vocabulary", "shown", "s/photo"
    ]  # fmt: skip
    assert [column["name"] for column in table["columns"] if column.get("more")] == ["BLEU-1", "vocabulary"]
    scales = {column["name"]: column["scale"] for column in table["columns"] if "digits" in column}
    assert scales["CIDEr"] == 100 and scales["vocabulary"] == 1
    assert [cell["value"] if isinstance(cell, dict) else cell for cell in table["rows"][0]] == [
        "birds", "greedy", 0.4, 0.4, 0.4, 8.0, 0.4
    ]  # fmt: skip


def test_several_feature_sets_make_a_matrix():
    rows = [row("table", name, "greedy", 0.1 * n, features=f) for n, (name, f) in enumerate(
        [("birds", "near"), ("none", "near"), ("birds", "far")])]  # fmt: skip
    matrix, *rest = parts(sections(results(rows, ("near", "far"))), "table")
    assert [column["name"] for column in matrix["columns"]] == ["neighbours", "near", "far"]
    values = [[line[0], *(cell and cell["value"] for cell in line[1:])] for line in matrix["rows"]]
    assert values == [["birds", 0.0, 0.2], ["none", 0.1, None]]
    assert len(rest) == 3


def test_curves_hold_numbers_of_neighbours_samples_and_weights():
    rows = [row("robustness", f"nearest {k} of birds", "greedy", k / 10, shown=k) for k in (4, 1)]
    rows += [row("robustness", "none", "greedy", 0.05, shown=0), row("robustness", "random of birds", "greedy", 0.9)]
    rows += [row("table", "birds", f"sample, weight {weight}", 0.3) for weight in ("0", "2.5")]
    names = {"greedy": 0.1, "beam 5": 0.5, "beam 2": 0.2, "16 by CLIP": 0.7, "4 by CLIP": 0.6, "4 by both": 0.6}
    rows += [row("decoding", "birds", name, seconds) for name, seconds in names.items()]
    weights, neighbors, decodings = parts(sections(results(rows)), "chart")
    assert [point["x"] for point in weights["series"][0]["points"]] == [0, 2.5]
    assert [(point["x"], point["y"]["value"]) for point in neighbors["series"][0]["points"]] == [
        (0, 0.05), (1, 0.1), (4, 0.4)
    ]  # fmt: skip
    labels = {series["name"]: [point["label"] for point in series["points"]] for series in decodings["series"]}
    assert labels == {"greedy": [""], "beams": ["2", "5"], "samples by CLIP": ["4", "16"], "samples by both": ["4"]}


@pytest.mark.parametrize("compared", [0, 40])
def test_leaks_say_whether_photos_were_compared(compared):
    doubles = {"photos": 2, "captions": 10, "compared": compared, "pairs": []} if compared else None
    leak = {"features": "near", "index": "birds", "ids": {"photos": 1, "captions": 5}, "leaking": ["a", "b", "c"]}
    leak |= {"strings": {"photos": 0, "captions": 0}, "doubles": doubles}
    table, *_ = parts(sections(results([], leaks=[leak])), "table")
    ids, _, photos, any_of_these = table["rows"]
    assert ids[2:] == [1, 5] and any_of_these[2:] == [3, None]
    assert photos[2:] == ([2, 10] if compared else [None, None])
    assert ("one of 40 others" in photos[1]) == bool(compared) and ("not compared" in photos[1]) != bool(compared)
