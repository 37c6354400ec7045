"""Files of predictions: continued after a kill where they were, shared by equal conditions, made anew for others."""

import dataclasses
import json

import numpy as np
import pytest

import clipcap_rag.prediction_files
from clipcap_rag.errors import InputError
from clipcap_rag.evaluated import Photos, short_names
from clipcap_rag.neighbor_conditions import none, of_rows
from clipcap_rag.prediction_files import PredictionFiles


@pytest.fixture
def photos(world):
    return Photos.of(world.features, "dev")


@pytest.fixture
def neighbors(photos):
    return none(photos.embeddings.vectors).neighbors


def counting(limit=1000):
    """A writer of captions and the rows that it was asked for; it stops for good after `limit` calls."""
    asked = []

    def write(part):
        if len(asked) == limit:
            raise KeyboardInterrupt
        asked.append((part.start, part.stop))
        return [{"caption": f"caption {row}", "candidates": []} for row in range(part.start, part.stop)]

    return write, asked


def test_a_killed_file_is_continued(photos, neighbors, tmp_path, monkeypatch):
    monkeypatch.setattr(clipcap_rag.prediction_files, "_PHOTOS", 3)
    write, asked = counting(limit=2)
    with pytest.raises(KeyboardInterrupt):
        PredictionFiles(tmp_path).keep("none, x", "made", photos, neighbors, write)
    assert asked == [(0, 3), (3, 6)] and not (tmp_path / "dev/none-x.jsonl").exists()
    unfinished = tmp_path / "dev/none-x.jsonl.partial"
    whole = b"".join(unfinished.read_bytes().splitlines(keepends=True)[:5])
    unfinished.write_bytes(whole + b'{"row": 5, "ima')  # killed within a line
    write, asked = counting()
    found = PredictionFiles(tmp_path).keep("none, x", "made", photos, neighbors, write)
    assert asked == [(3, 6), (6, 8)]
    lines = [json.loads(line) for line in found.path.read_text().splitlines()]
    assert [line["row"] for line in lines] == list(range(8)) and not unfinished.exists()
    assert [line["image"] for line in lines] == photos.images
    assert [line["image_id"] for line in lines] == photos.image_ids
    assert found.captions == [f"caption {row}" for row in range(8)]


def test_equal_conditions_share_a_file_and_others_do_not(world, photos, neighbors, tmp_path):
    files, (write, asked) = PredictionFiles(tmp_path), counting()
    first = files.keep("none, x", "made", photos, neighbors, write)
    assert PredictionFiles(tmp_path).keep("another name", "made", photos, neighbors, write) == first
    assert len(asked) == 1
    shown = of_rows(world.index, np.zeros((len(photos), 1), np.int64), photos.embeddings.vectors)
    other = files.keep("one, x", "made", photos, shown, write)
    assert other.path != first.path and len(asked) == 2
    assert all(line["neighbors"][0]["row"] == 0 for line in other.lines())
    beside = files.keep("none, x", "made otherwise", photos, neighbors, write)
    assert beside.path.name == "none-x-2.jsonl" and first.path.exists() and len(asked) == 3
    turned = dataclasses.replace(photos, images=photos.images[::-1])
    again = PredictionFiles(tmp_path).keep("none, x", "made", turned, neighbors, write)
    assert again.path == first.path and len(asked) == 4
    assert [line["image"] for line in again.lines()] == photos.images[::-1]


def test_short_names(tmp_path):
    paths = [tmp_path / "a/dev", tmp_path / "b/dev", tmp_path / "b/test"]
    assert short_names(paths) == ["a-dev", "b-dev", "b-test"]
    assert short_names(paths[1:]) == ["dev", "test"] and short_names([]) == []
    with pytest.raises(InputError, match="given twice"):
        short_names([paths[0], paths[0]])
