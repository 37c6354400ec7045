"""What the argument of --index says: a name or path, a weight, and how many neighbours may come from it."""

from pathlib import Path

import pytest

from clipcap_rag.index_choice import Choice


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("flickr", ("flickr", 1.0, None)),
        ("flickr:0.7", ("flickr", 0.7, None)),
        ("flickr:0.7:3", ("flickr", 0.7, 3)),
        ("flickr:1:0", ("flickr", 1.0, 0)),
        ("c:/data", ("c:/data", 1.0, None)),
        ("a:b:2", ("a:b", 2.0, None)),
        ("a:b:2:5", ("a:b", 2.0, 5)),
        ("hf-hub:ORG/NAME:1e-1", ("hf-hub:ORG/NAME", 0.1, None)),
        ("name:1.2.3", ("name:1.2.3", 1.0, None)),
        (Path("somewhere"), ("somewhere", 1.0, None)),
    ],
)
def test_name_weight_and_limit(argument, expected):
    choice = Choice.of(argument)
    assert (str(choice.index), choice.weight, choice.most) == expected


def test_what_exists_as_a_path_is_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "kites:0.5").mkdir()
    assert Choice.of("kites:0.5") == Choice("kites:0.5", 1.0, None)
