"""Conditions on the columns of an index."""

import numpy as np
import pytest

from clipcap_rag.errors import InputError
from clipcap_rag.index_filter import matching, parse_where, values_met
from clipcap_rag.index_store import SegmentWriter, caption_batch, open_files, write_index_manifest


@pytest.fixture
def files(tmp_path):
    """Seven captions in two segments and three batches; the last is removed."""
    columns = {
        "caption": ["a", "b", "c", "d", "e", "f", "g"],
        "caption_id": [str(number) for number in range(7)],
        "image_id": ["p", None, "p", "q", "", "q", "p"],
        "source": ["wiki", "wiki", "news", None, "news", "wiki", "wiki"],
        "meta": [{"k": "v"}, {"k": "w", "l": "v"}, {}, {"k": ""}, {"k=v": "x"}, {"k": "v"}, {"k": "v"}],
    }
    entries = []
    for name, parts in (("000001", [(0, 2), (2, 3)]), ("000002", [(3, 7)])):
        with SegmentWriter(tmp_path / "kites" / "segments" / name, 2) as writer:
            for start, stop in parts:
                part = {field: values[start:stop] for field, values in columns.items()}
                writer.append(caption_batch(part), np.ones((stop - start, 2)))
        entries.append({"name": name, "rows": writer.rows, "search": None})
    np.save(tmp_path / "kites" / "tombstones-000001.npy", np.array([6]))
    encoder = {"clip": "tiny", "dim": 2, "probes": {}}
    write_index_manifest(tmp_path / "kites", revision=1, encoder=encoder, segments=entries, provenance={}, licence=None,
                         tombstones="tombstones-000001.npy")  # fmt: skip
    return open_files(tmp_path / "kites")


@pytest.mark.parametrize(
    ("conditions", "rows"),
    [
        ([], [0, 1, 2, 3, 4, 5]),
        (["source=wiki"], [0, 1, 5]),
        (["source=wiki", "source=news"], [0, 1, 2, 4, 5]),
        (["source=wiki", "meta.k=v"], [0, 5]),
        (["image_id="], [1, 4]),
        (["source="], [3]),
        (["meta.k="], [2, 3, 4]),
        (["meta.k=v", "meta.k=w"], [0, 1, 5]),
        (["meta.l=v"], [1]),
        (["caption_id=2", "caption=c"], [2]),
        (["caption=x"], []),
    ],
)
def test_rows_that_meet_conditions(files, conditions, rows):
    assert np.flatnonzero(matching(files, parse_where(conditions))).tolist() == rows


def test_values_that_some_caption_has(files):
    assert values_met(files, "source", ["wiki", "", "blog"]) == {"wiki", ""}
    assert values_met(files, "caption", ["a", "g"]) == {"a"}, "removed captions have nothing"


@pytest.mark.parametrize("condition", ["source", "colour=red", "meta.=x", "=x", "meta=x", ""])
def test_what_is_no_condition_is_refused(condition):
    with pytest.raises(InputError, match="FIELD=VALUE"):
        parse_where([condition])
    assert parse_where(["meta.a.b=c=d"]) == {"meta.a.b": ["c=d"]}
