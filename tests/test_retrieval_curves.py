"""The script behind the curves of retrieval: a point for each number of neighbours and each size of the index."""

import json
import sys

import retrieval_curves
from clipcap_rag.caption_index import CaptionIndex


def test_curves_of_a_small_captioner(world, tmp_path, monkeypatch):
    first, second = world.index, world.other_index
    monkeypatch.setattr(retrieval_curves, "NEIGHBORS", (1, 3))
    monkeypatch.setattr(retrieval_curves, "PARTS", (5, len(first)))
    flags = ["--model", world.run, "--features", world.features.path, "--index", first.path, "--index", second.path]
    monkeypatch.setattr(sys, "argv", ["retrieval_curves", *map(str, flags), "--out", str(tmp_path), "--device", "cpu"])
    retrieval_curves.main()
    points = json.loads((tmp_path / "curves.json").read_text())
    assert [point["captions"] for point in points["none"]] == [0]
    assert [point["neighbors"] for point in points["neighbors"]] == [1, 3]
    sizes = [5, len(first), len(first) + len(second)]
    assert [point["captions"] for point in points["captions"]] == sizes
    assert all(point["CIDEr"]["low"] <= point["CIDEr"]["value"] <= point["CIDEr"]["high"] for point in points["none"])
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    part = CaptionIndex.open(tmp_path / "part-5")
    assert {*part.captions(range(5))} <= {*first.captions(range(len(first)))}
